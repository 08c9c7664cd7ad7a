"""The process that publishes: servers that die, studies that grow, databases that fail."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from mlflow import MlflowClient

from momentum_tuner.database import Database, Study
from momentum_tuner.tickets import (
    delete_study,
    find_study,
    finish_study,
)
from momentum_tuner.tracking import Publisher, PublisherLoop, is_shown
from momentum_tuner.tracking import lease as lease_module
from momentum_tuner.tracking.store import RunStore

from .published import (
    complete,
    contents,
    epochs,
    finish,
    finished_study,
    notes,
    publish,
    runs_of,
    start,
    submit,
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real MLflow server on this machine, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self.process is None, "it runs already"
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            f"sqlite:///{self.folder}/mlflow.db",
        ]
        command += ["--artifacts-destination", str(self.folder / "files")]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError("the MLflow server did not start")

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(folder, empty_mlflow):
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    one = Server(folder)
    yield one
    one.kill()


class Loop:
    """A publisher loop in a thread."""

    def __init__(self, database: Database, uri: str, studies: tuple[str, ...] = ("digits-mlp",)) -> None:
        self.loop = PublisherLoop(database, studies, uri, "loop")
        self.finishing = threading.Event()
        self.whole: bool | None = None
        self.thread = threading.Thread(target=self.work, daemon=True)  # a failed test must not keep pytest from ending
        self.thread.start()

    def work(self) -> None:
        self.whole = self.loop.run(self.finishing, 0.1)

    def finish(self) -> bool:
        self.finishing.set()
        self.thread.join(60)
        assert self.whole is not None
        return self.whole


def wait_for(happened, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def shown(database: Database) -> int:
    return sum(n[3] is not None for n in notes(database))


def test_a_server_is_asked_whether_it_shows_a_study(database, make_spec, server):
    study = finished_study(database, make_spec)
    server.start()
    assert not is_shown(database, study.id, server.uri)
    publish(database, study, server.uri)
    assert is_shown(database, study.id, server.uri + "/")
    (parent,), _ = runs_of(server.uri)
    MlflowClient(tracking_uri=server.uri).delete_run(parent.info.run_id)
    assert not is_shown(database, study.id, server.uri)
    server.kill()
    assert not is_shown(database, study.id, server.uri)


def test_a_server_that_is_down_at_first_and_killed_midway_loses_and_doubles_nothing(
    database, make_spec, folder, server, control_uri, monkeypatch, caplog
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setattr("momentum_tuner.tracking.loop.LONGEST_PAUSE", 0.5)
    study = submit(database, make_spec, trials=6)
    claims = start(database, study)
    finish(database, *((c, complete(0.5), epochs(4)) for c in claims[:4]))
    with caplog.at_level(logging.WARNING):
        loop = Loop(database, server.uri)
        wait_for(lambda: loop.loop._failing)
        server.start()
        wait_for(lambda: shown(database) == 4 and not loop.loop._failing)

        real, calls = RunStore.show, 0

        def killing(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 2:
                server.kill()
            return real(self, *args, **kwargs)

        monkeypatch.setattr(RunStore, "show", killing)
        finish(database, *((c, complete(0.5), epochs(4)) for c in claims[4:9]))
        wait_for(lambda: loop.loop._failing)
        server.start()
        wait_for(lambda: shown(database) == 9 and not loop.loop._failing)
        server.signal(signal.SIGSTOP)  # it hangs: it takes connections and says nothing
        finish(database, *((c, complete(0.5), epochs(4)) for c in claims[9:]))
        finish_study(database, study.id)
        wait_for(lambda: loop.loop._failing)
        server.signal(signal.SIGCONT)
        wait_for(lambda: shown(database) == 12)
        assert loop.finish() is True
    server.kill()
    uri = f"sqlite:///{folder / 'mlflow.db'}"  # quicker without the server, which has the files
    found = contents(uri, with_ids=False, with_files=False)
    assert len([path for path in (folder / "files").rglob("*") if path.is_file()]) == 7
    parents, children = runs_of(uri)
    assert (len(parents), len(children)) == (1, 12)
    publish(database, find_study(database, study.name), control_uri)
    assert found == contents(control_uri, with_ids=False, with_files=False)
    said = [r.getMessage() for r in caplog.records if r.name == "momentum_tuner.tracking.loop"]
    assert [line.partition(" (")[0] for line in said] == ["MLflow does not answer", "MLflow answers again"] * 3


def test_a_loop_ends_at_once_and_says_no_where_mlflow_never_answers(database, make_spec, folder):
    study = finished_study(database, make_spec)
    loop = Loop(database, f"http://127.0.0.1:{free_port()}")
    wait_for(lambda: loop.loop._failing)
    before = time.monotonic()
    assert loop.finish() is False
    assert time.monotonic() - before < 10
    assert shown(database) == 0
    with database.read() as session:
        assert session.get_one(Study, study.id).publisher is None


def test_a_loop_shows_trials_as_they_end_and_all_studies_if_none_is_named(database, make_spec, uri):
    study = submit(database, make_spec)
    loop = Loop(database, uri, ())
    claims = start(database, study)
    finish(database, (claims[0], complete(0.5), epochs(4)))
    wait_for(lambda: shown(database) == 1)
    other = submit(database, make_spec, name="other")
    more = start(database, other)
    finish(database, (more[0], complete(0.5), epochs(4)))
    wait_for(lambda: shown(database) == 2)
    assert loop.finish() is True
    assert [len(runs_of(uri, name)[1]) for name in ("digits-mlp", "other")] == [1, 1]
    assert runs_of(uri)[0][0].info.status == "SCHEDULED"
    with database.read() as session:
        assert session.scalars(sa.select(Study.publisher)).all() == [None, None]


def test_a_loop_shows_what_a_study_that_grew_adds(database, make_spec, uri):
    finished_study(database, make_spec)
    loop = Loop(database, uri)
    wait_for(lambda: shown(database) == 4)
    grown = submit(database, make_spec, trials=3)
    finish(database, *((c, complete(0.1), epochs(4)) for c in start(database, grown)))
    finish_study(database, grown.id)
    assert loop.finish() is True
    (parent,), children = runs_of(uri)
    assert (parent.info.status, len(children)) == ("FINISHED", 6)
    assert parent.data.params["budget"] == "3 trials of 4 epochs for each optimizer"


def test_a_loop_sees_that_a_study_was_deleted_and_submitted_again(database, make_spec, uri):
    first = finished_study(database, make_spec)
    loop = Loop(database, uri, ())
    wait_for(lambda: shown(database) == 4)
    delete_study(database, first.id)
    second = finished_study(database, make_spec)
    assert second.id == first.id, "SQLite gives the number again"
    wait_for(lambda: shown(database) == 4)
    assert loop.finish() is True
    parents, children = runs_of(uri)
    assert (len(parents), len(children)) == (2, 8)


def test_a_loop_waits_for_the_lease_of_a_publisher_that_was_killed(database, make_spec, uri, monkeypatch):
    study = finished_study(database, make_spec)
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 1.5)
    Publisher(database, study, uri, "killed")._lease.take()
    loop = Loop(database, uri)
    assert loop.finish() is True
    assert shown(database) == 4


def test_a_loop_survives_a_database_that_fails(database, make_spec, uri, monkeypatch, caplog):
    from momentum_tuner.errors import StorageError

    finished_study(database, make_spec)
    monkeypatch.setattr("momentum_tuner.tracking.loop.LONGEST_PAUSE", 0.2)
    failures = []

    def broken():
        failures.append(1)
        raise StorageError("the database postgresql://***@host/db does not answer: no\nsecond line")

    with caplog.at_level(logging.WARNING):
        with monkeypatch.context() as patch:
            patch.setattr(database, "write", broken)
            loop = Loop(database, uri)
            wait_for(lambda: len(failures) >= 2)
        assert loop.finish() is True
    said = [r.getMessage() for r in caplog.records if r.name == "momentum_tuner.tracking.loop"]
    assert said[0] == "publishing: the database postgresql://***@host/db does not answer: no"
    assert shown(database) == 4
