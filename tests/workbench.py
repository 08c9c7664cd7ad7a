"""Workers in threads and in processes, on real studies of the watched task, for the tests of workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

from momentum_tuner.checkpoints import CheckpointStore, Reference, references_from_text
from momentum_tuner.database import Database, Epoch, Ticket
from momentum_tuner.errors import StorageError
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import StudyRecord, find_study, read_epochs, submit_study
from momentum_tuner.worker import StopSignal, Worker
from momentum_tuner.worker_options import WorkerOptions

TESTS = Path(__file__).parent
GRACE = 3.0
OFTEN = 0.01
"""Seconds between checkpoints: the next one begins as soon as the one before is noted."""
RATES = (0.01, 0.02, 0.03, 0.04)


def wait_for(happened: Callable[[], object], seconds: float = 120.0) -> None:
    """Until it happened; a database that does not answer meanwhile is asked again."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(StorageError):
            if happened():
                return
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Running:
    """A worker in a thread, which has its name."""

    def __init__(self, url: str, options: WorkerOptions, name: str, stop: StopSignal) -> None:
        self.database = Database(url)
        self.stop = stop
        self.worker = Worker(self.database, options, stop)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=name)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.worker.run()
        except BaseException as error:
            self.error = error
        finally:
            self.database.close()

    @property
    def id(self) -> str:
        return self.worker.identity.id

    def join(self, seconds: float = 120.0) -> None:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the worker does not end"
        if self.error is not None:
            raise self.error

    def drain(self) -> None:
        self.stop.asked = True
        self.join()


class StopAfter(StopSignal):
    """Wishes to drain once it was asked so often: at the same step each time."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0

    @asked.setter
    def asked(self, wish: bool) -> None:
        self.left = 0


class Process:
    """A worker in a process of its own, which imports all it needs while the test gets ready."""

    def __init__(self, said: Path) -> None:
        self._said = said
        with said.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "momentum_tuner.launcher.process", "worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def order(self, url: str, options: WorkerOptions) -> None:
        assert self.process.stdin is not None
        order = {"options": asdict(options), "storage": url, "log_level": 20}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def said(self) -> str:
        return self._said.read_text()

    def end(self, seconds: float = 120.0) -> int:
        """Its exit code, once it has ended by itself."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


@dataclass
class Bench:
    """A database, a folder of the task's files and of checkpoints, and the workers that a test starts."""

    database: Database
    folder: Path
    running: list[Running] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def submit(self, rates: Sequence[float] = RATES, *, steps: int = 10, epochs: int = 4, **sections) -> StudyRecord:
        """A study of one SGD trial for each learning rate on the watched task."""
        document = {
            "name": "watched",
            "task": {"factory": "watched_task.py:build", "params": {"folder": str(self.folder), "steps": steps}},
            "optimizers": ["sgd"],
            "space": {"learning_rate": {"low": 1e-4, "high": 2.0}},
            "fixed": {"batch_size": 8},
            "budget": {"trials": len(rates), "epochs": epochs},
            "confirm": {"seeds": 0},
            "pruner": {"name": "none"},
            **sections,
        }
        return self.put(StudySpec.model_validate(document), rates)

    def put(self, spec: StudySpec, rates: Sequence[float]) -> StudyRecord:
        return submit_study(self.database, spec, str(TESTS), lambda _: [{"learning_rate": rate} for rate in rates])

    def options(self, **changes) -> WorkerOptions:
        options = WorkerOptions(
            slots=4,
            threads=1,
            grace_seconds=GRACE,
            checkpoints=str(self.checkpoints),
            checkpoint_seconds=60.0,
            trust=(str(TESTS / "watched_task.py"),),
        )
        return replace(options, **changes)

    def start(self, name: str = "a", stop: StopSignal | None = None, *, url: str | None = None, **changes) -> Running:
        """A worker in a thread."""
        options = self.options(**changes)
        self.running.append(Running(url or self.database.text, options, name, stop or StopSignal()))
        return self.running[-1]

    def spawn(self) -> Process:
        """A worker in a process, that waits for its order."""
        self.processes.append(Process(self.folder / f"said-{len(self.processes)}"))
        return self.processes[-1]

    def order(self, process: Process, **changes) -> None:
        process.order(self.database.text, self.options(**changes))

    def close(self) -> None:
        """End all workers, whatever they wait for."""
        for running in self.running:
            running.stop.asked = True
        for process in self.processes:
            process.kill()
        for file in self.folder.iterdir():
            if file.is_file() and not file.name.startswith("tuner.db"):
                file.unlink()
        for running in self.running:
            running.thread.join(30)
        self.database.close()

    def ask_for(self, name: str, value: float) -> None:
        (self.folder / f"{name}.new").write_text(str(value))
        (self.folder / f"{name}.new").rename(self.folder / name)

    def no_more(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def hold_at(self, steps: int, who: str | int, rates: Sequence[float] = RATES) -> None:
        """Let a worker (a thread's name or a process's number) wait when its trials are there, in the next step."""
        self.ask_for(f"hold-beyond-{who}", (steps - 0.5) * max(rates))

    def release(self, who: str | int) -> None:
        self.no_more(f"hold-beyond-{who}")

    def wait_at(self, steps: int, worker: str | Process = "a") -> None:
        """Until a worker waits there."""
        wait_for(lambda: len(self.steps(worker)) == steps)

    def steps(self, worker: str | Process = "a") -> list[list[float]]:
        """The marks at each step that a worker took, without those of untrained models."""
        try:
            lines = (self.folder / "steps").read_text().split("\n")[:-1]  # without one that is being written
        except FileNotFoundError:
            return []
        who = worker.pid if isinstance(worker, Process) else worker
        found = [marks for pid, thread, marks in map(json.loads, lines) if who in (pid, thread)]
        return [marks for marks in found if any(marks)]

    def rows(self, *columns):
        with self.database.read() as session:
            return [tuple(row) for row in session.execute(sa.select(*columns).order_by(Ticket.id))]

    def states(self, study: StudyRecord) -> set[tuple[str, str | None]]:
        with self.database.read() as session:
            query = sa.select(Ticket.state, Ticket.outcome).where(Ticket.study_id == study.id)
            return {(row.state, row.outcome) for row in session.execute(query)}

    def epochs(self) -> int:
        with self.database.read() as session:
            return session.scalar(sa.select(sa.func.max(Epoch.epoch))) or 0

    def is_done(self, study: StudyRecord) -> bool:
        return find_study(self.database, study.name).phase == "done"

    def references(self) -> list[list[Reference]]:
        """For each ticket its checkpoints, newest first."""
        return [references_from_text(text) for (text,) in self.rows(Ticket.checkpoint)]

    def saved(self, which: int = 0) -> list[dict[str, object]]:
        """The headers of the tickets' checkpoints, the newest or an older one of each."""
        found = {t: references_from_text(text) for t, text in self.rows(Ticket.id, Ticket.checkpoint)}
        wanted = {ticket: references[which : which + 1] for ticket, references in found.items()}
        return [slot.header for _, slot in sorted(CheckpointStore(str(self.checkpoints)).load(wanted).items())]

    def curves(self, study: StudyRecord) -> dict[int, list[EpochRecord]]:
        """The records of each ticket by its place in the study, but for the time they took."""
        with self.database.read() as session:
            query = sa.select(Ticket.id, Ticket.position).where(Ticket.study_id == study.id)
            position = {row.id: row.position for row in session.execute(query)}
        recorded = read_epochs(self.database, list(position))
        return {position[t]: [replace(r, seconds=None) for r in records] for t, records in recorded.items()}

    def check_exact(self, study: StudyRecord, failed: Sequence[int] = (), pruned: Sequence[int] = ()) -> None:
        """Every ticket has one Optuna trial and one result, all its records, and nothing is left running."""
        assert self.is_done(study)
        curves = self.curves(study)
        with self.database.read() as session:
            tickets = session.scalars(sa.select(Ticket).where(Ticket.study_id == study.id)).all()
            trials = session.execute(
                sa.text(
                    "SELECT t.trial_id, t.number, t.state, v.value FROM trials t JOIN studies s USING (study_id) "
                    "LEFT JOIN trial_values v ON v.trial_id = t.trial_id WHERE s.study_name LIKE :name"
                ),
                {"name": f"{study.name}/%"},
            ).all()
        assert {t.state for t in tickets} == {"done"}
        expected = {**dict.fromkeys(failed, "failed"), **dict.fromkeys(pruned, "pruned")}
        assert {t.position: t.outcome for t in tickets if t.outcome != "complete"} == expected
        assert sorted((t.trial_id, t.trial_number) for t in tickets) == sorted((t[0], t[1]) for t in trials)
        told = {trial_id: (state, value) for trial_id, _, state, value in trials}
        for ticket in tickets:
            assert ticket.checkpoint is None
            if ticket.position in failed:
                assert told[ticket.trial_id] == ("FAIL", None)
                continue
            curve = curves[ticket.position]
            assert told[ticket.trial_id] == (ticket.outcome.upper(), ticket.value)
            assert [r.epoch for r in curve] == list(range(len(curve)))
            assert (len(curve) == study.spec.budget.epochs + 1) == (ticket.outcome == "complete")
            assert ticket.value == min(r.valid_loss for r in curve[1:])


@contextmanager
def quick_workers() -> Iterator[None]:
    """Workers in this process use one thread, as those in processes do, and look often for what is new."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("momentum_tuner.worker.study.POLL_SECONDS", 0.1)
        patch.setattr("momentum_tuner.worker.serving.POLL_SECONDS", 0.1)
        yield
    torch.set_num_threads(threads)


@contextmanager
def sqlite_benches(folder: Path, migrated: Path) -> Iterator[Callable[[str], Bench]]:
    """A function that makes a bench of a name with a database of its own."""
    benches: list[Bench] = []

    def make(name: str) -> Bench:
        own = folder / name
        own.mkdir()
        (own / "tuner.db").write_bytes(migrated.read_bytes())
        benches.append(Bench(Database(f"sqlite:///{own / 'tuner.db'}"), own))
        return benches[-1]

    with quick_workers():
        yield make
        for bench in benches:
            bench.close()


def undisturbed_curves(
    make_bench: Callable[[str], Bench], rates: Sequence[float], slots: int, pruned: Sequence[int] = (), **sections
) -> dict[int, list[EpochRecord]]:
    """The curves of a study that one worker trains from its beginning to its end."""
    other = make_bench("undisturbed")
    study = other.submit(rates, **sections)
    other.start(slots=slots, checkpoints=None).join()
    other.check_exact(study, pruned=pruned)
    return other.curves(study)


def marks_at(steps: int, rates: Sequence[float] = RATES) -> list[float]:
    """The marks of trials that have come so far."""
    return pytest.approx([-rate * steps for rate in rates], rel=1e-4)


def close_to(found, expected, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for position, records in expected.items():
        assert [r.epoch for r in found[position]] == [r.epoch for r in records]
        for name in ("step", "train_loss", "valid_loss", "grad_norm", "grad_norm_max", "update_norm"):
            values = [[getattr(r, name) for r in curve[1:]] for curve in (found[position], records)]
            assert values[0] == pytest.approx(values[1], rel=tolerance), name
