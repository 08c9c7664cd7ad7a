"""Workers in threads of this process, on real studies in an SQLite file: checkpoints, failures, who serves what."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

from momentum_tuner.checkpoints import CheckpointStore, Reference, references_from_text
from momentum_tuner.database import Database, Epoch, Ticket, database_now
from momentum_tuner.database import Worker as WorkerRow
from momentum_tuner.errors import TaskError
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import (
    Heartbeat,
    StudyRecord,
    WorkerIdentity,
    claim,
    find_study,
    read_epochs,
    register_worker,
    stop_worker,
    submit_study,
)
from momentum_tuner.worker import StopSignal, Worker
from momentum_tuner.worker_options import WorkerOptions

TESTS = Path(__file__).parent
GRACE = 2.0
RATES = (0.01, 0.02, 0.03, 0.04)


def wait_for(happened: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
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

    def join(self, seconds: float = 60.0) -> None:
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


@dataclass
class Bench:
    """A database, a folder of the task's files and of checkpoints, and the workers that a test starts."""

    database: Database
    folder: Path
    running: list[Running] = field(default_factory=list)

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
            "pruner": {"name": "none"},
            **sections,
        }
        return self.put(StudySpec.model_validate(document), rates)

    def put(self, spec: StudySpec, rates: Sequence[float]) -> StudyRecord:
        return submit_study(self.database, spec, str(TESTS), lambda _: [{"learning_rate": rate} for rate in rates])

    def start(self, name: str = "a", stop: StopSignal | None = None, **options) -> Running:
        chosen = {
            "slots": 4,
            "grace_seconds": GRACE,
            "checkpoints": str(self.checkpoints),
            "checkpoint_seconds": 0.2,
            "trust": (str(TESTS / "watched_task.py"),),
            **options,
        }
        one = Running(self.database.text, WorkerOptions(**chosen), name, stop or StopSignal())
        self.running.append(one)
        return one

    def ask_for(self, name: str, value: float) -> None:
        (self.folder / f"{name}.new").write_text(str(value))
        (self.folder / f"{name}.new").rename(self.folder / name)

    def no_more(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def steps(self, name: str = "a") -> list[list[float]]:
        """The marks at each step of a worker that trained, without those of untrained models."""
        try:
            lines = (self.folder / "steps").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = [marks for _, thread, marks in map(json.loads, lines) if thread == name]
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

    def curves(self, study: StudyRecord) -> dict[int, list[EpochRecord]]:
        """The records of each ticket by its place in the study, but for the time they took."""
        with self.database.read() as session:
            query = sa.select(Ticket.id, Ticket.position).where(Ticket.study_id == study.id)
            position = {row.id: row.position for row in session.execute(query)}
        recorded = read_epochs(self.database, list(position))
        return {position[t]: [replace(r, seconds=None) for r in records] for t, records in recorded.items()}

    def check_exact(self, study: StudyRecord, failed: Sequence[int] = ()) -> None:
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
        assert {t.position for t in tickets if t.outcome == "failed"} == set(failed)
        assert sorted((t.trial_id, t.trial_number) for t in tickets) == sorted((t[0], t[1]) for t in trials)
        told = {trial_id: (state, value) for trial_id, _, state, value in trials}
        for ticket in tickets:
            assert ticket.checkpoint is None
            if ticket.position in failed:
                assert told[ticket.trial_id] == ("FAIL", None)
                continue
            assert told[ticket.trial_id] == ("COMPLETE", ticket.value)
            curve = curves[ticket.position]
            assert [r.epoch for r in curve] == list(range(study.spec.budget.epochs + 1))
            assert ticket.value == min(r.valid_loss for r in curve[1:])


@pytest.fixture
def make_bench(tmp_path, migrated_sqlite, monkeypatch) -> Iterator[Callable[[str], Bench]]:
    monkeypatch.setattr("momentum_tuner.worker.study.POLL_SECONDS", 0.1)
    monkeypatch.setattr("momentum_tuner.worker.serving.POLL_SECONDS", 0.1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    benches: list[Bench] = []

    def make(name: str) -> Bench:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tuner.db").write_bytes(migrated_sqlite.read_bytes())
        benches.append(Bench(Database(f"sqlite:///{folder / 'tuner.db'}"), folder))
        return benches[-1]

    yield make
    for bench in benches:
        for running in bench.running:
            running.stop.asked = True
        for file in bench.folder.iterdir():
            if file.is_file() and not file.name.startswith("tuner.db"):
                file.unlink()
        for running in bench.running:
            running.thread.join(30)
        bench.database.close()
    torch.set_num_threads(threads)


@pytest.fixture
def bench(make_bench) -> Bench:
    return make_bench("bench")


@pytest.fixture
def undisturbed(make_bench) -> Callable[..., dict[int, list[EpochRecord]]]:
    """A function that gives the curves of a study that one worker trains from its beginning to its end."""

    def run(rates: Sequence[float] = RATES, *, slots: int = 4, **sections) -> dict[int, list[EpochRecord]]:
        other = make_bench("undisturbed")
        study = other.submit(rates, **sections)
        other.start(slots=slots).join()
        other.check_exact(study)
        return other.curves(study)

    return run


def marks_at(steps: int, rates: Sequence[float] = RATES) -> list[float]:
    """The marks of trials that have come so far."""
    return pytest.approx([-rate * steps for rate in rates], rel=1e-4)


# Checkpoints


def test_a_drained_trial_goes_on_in_the_middle_of_its_epoch_to_the_last_bit(bench, undisturbed):
    study = bench.submit(steps=20)
    bench.start("a", StopAfter(30)).join()
    assert bench.states(study) == {("open", None)}
    assert bench.rows(Ticket.attempts, Ticket.worker_id, Ticket.slot) == [(0, None, None)] * 4
    done = len(bench.steps("a")) + 1
    assert 20 < done < 40
    assert bench.epochs() == 1
    trials = bench.rows(Ticket.trial_id)
    bench.start("b").join()
    assert bench.rows(Ticket.trial_id) == trials
    assert bench.steps("b")[0] == marks_at(done)
    assert len(bench.steps("b")) == 80 - done
    bench.check_exact(study)
    assert bench.curves(study) == undisturbed(steps=20)


def test_while_checkpoints_cannot_be_written_training_goes_on_and_the_last_good_one_stays(bench, undisturbed, caplog):
    study = bench.submit(steps=20, epochs=12)
    bench.ask_for("seconds-per-step", 0.005)
    running = bench.start("a")
    wait_for(lambda: all(bench.references()))
    kept, aside = bench.checkpoints / study.checkpoint_folder, bench.folder / "aside"
    kept.rename(aside)
    kept.write_text("in the way")
    good = bench.references()
    before = bench.epochs()
    wait_for(lambda: "checkpoint skipped" in caplog.text and bench.epochs() >= before + 2)
    good = bench.references()
    running.drain()
    assert bench.states(study) == {("open", None)}
    assert bench.references() == good
    kept.unlink()
    aside.rename(kept)
    bench.no_more("seconds-per-step")
    saved = CheckpointStore(str(bench.checkpoints)).load(dict(enumerate([good[0]], start=1)))[1].header
    assert saved["epoch"] < bench.epochs()
    bench.start("b").join()
    assert bench.steps("b")[0] == marks_at(saved["step"] + saved["epoch_steps"])
    bench.check_exact(study)
    assert bench.curves(study) == undisturbed(steps=20, epochs=12)


@pytest.mark.parametrize("broken", ["newest", "all"])
def test_a_broken_checkpoint_is_passed_over_for_the_one_before_else_for_the_beginning(
    bench, undisturbed, caplog, broken
):
    study = bench.submit(steps=20, epochs=12)
    bench.ask_for("seconds-per-step", 0.005)
    running = bench.start("a")
    wait_for(lambda: all(len(found) == 2 for found in bench.references()))
    running.drain()
    bench.no_more("seconds-per-step")
    trials = bench.rows(Ticket.trial_id, Ticket.trial_number)
    (newest, older), *_ = bench.references()
    assert all(found == [newest, older] for found in bench.references())
    saved = CheckpointStore(str(bench.checkpoints)).load({1: [older]})[1].header
    for reference in (newest,) if broken == "newest" else (newest, older):
        path = bench.checkpoints / reference.file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    bench.start("b").join()
    expected = saved["step"] + saved["epoch_steps"] if broken == "newest" else 1
    assert bench.steps("b")[0] == marks_at(expected)
    assert f"checkpoint {newest.file!r} is passed over: it is broken" in caplog.text
    assert bench.rows(Ticket.trial_id, Ticket.trial_number) == trials
    bench.check_exact(study)
    assert bench.curves(study) == undisturbed(steps=20, epochs=12)


def test_old_checkpoints_are_removed_and_all_of_them_when_the_study_is_done(bench):
    study = bench.submit(steps=20, epochs=16)
    folder = bench.checkpoints / study.checkpoint_folder
    bench.ask_for("seconds-per-step", 0.005)
    first = bench.start("a", slots=2, checkpoint_seconds=0.1)
    second = bench.start("b", slots=2, checkpoint_seconds=0.1)
    most: dict[str, int] = {}

    def look() -> None:
        names = [path.name.rpartition("-")[0] for path in folder.glob("*.safetensors")]
        most.update({name: max(most.get(name, 0), names.count(name)) for name in names})

    def numbers(name: str) -> list[int]:
        return [int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{name}-*.safetensors")]

    def written(count: int) -> bool:
        look()
        return all(max(numbers(one.id), default=0) >= count for one in (first, second))

    wait_for(lambda: written(5))
    assert set(most) == {first.id, second.id}
    assert max(most.values()) <= 3, "two that are noted, and one that is about to be"
    first.drain()
    assert len(numbers(first.id)) <= 2
    (folder / ".gone-1.safetensors.x.tmp").mkdir()
    (folder / ".gone-1.safetensors.x.tmp" / "gone-1.safetensors").write_bytes(b"half")
    (folder / "gone-2.safetensors").write_bytes(b"not noted")
    third = bench.start("c", slots=2, checkpoint_seconds=0.1)
    wait_for(lambda: len(numbers(third.id)) == 2 and min(numbers(third.id)) > 1)
    assert numbers(first.id) == [], "nothing refers to files of a worker that has ended"
    assert not list(folder.glob("*gone-*"))
    bench.no_more("seconds-per-step")
    second.join()
    third.join()
    bench.check_exact(study)
    assert not folder.exists()


# Memory


def test_without_memory_half_of_the_slots_go_back_with_their_state_and_the_study_completes(bench, undisturbed, caplog):
    rates = [0.01 * n for n in range(1, 9)]
    study = bench.submit(rates, steps=20)
    bench.ask_for("seconds-per-step", 0.01)
    running = bench.start(slots=8, checkpoint_seconds=60.0)
    wait_for(lambda: len(bench.steps()) > 30)
    bench.ask_for("memory-for", 4)
    wait_for(lambda: bench.steps() and len(bench.steps()[-1]) == 4)
    full = max(len(marks) == 8 and round(-marks[0] / 0.01) for marks in bench.steps())
    bench.no_more("seconds-per-step")
    running.join()
    assert "going on with 4 of 8 slots" in caplog.text
    assert max(len(marks) for marks in bench.steps()[full + 1 :]) == 4
    assert [generation for (generation,) in bench.rows(Ticket.generation)] == [1] * 4 + [2] * 4
    again = next(
        marks for marks in bench.steps() if marks[0] < -0.045 and len(marks) == 4 and marks[0] / marks[1] > 0.8
    )
    assert again == marks_at(full, rates[4:]), "they went on from where they were"
    bench.check_exact(study)
    close_to(bench.curves(study), undisturbed(rates, slots=8, steps=20))


def close_to(found, expected, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for position, records in expected.items():
        assert [r.epoch for r in found[position]] == [r.epoch for r in records]
        for name in ("step", "train_loss", "valid_loss", "grad_norm", "grad_norm_max", "update_norm"):
            values = [getattr(r, name) for r in found[position]]
            assert values == pytest.approx([getattr(r, name) for r in records], rel=tolerance), name


def test_a_trial_that_has_no_memory_even_alone_fails_and_the_others_complete(bench):
    study = bench.submit((0.01, 0.02, 1.0, 0.03, 0.04), steps=5)
    bench.ask_for("no-memory-beyond", 0.9)
    bench.start().join()
    bench.check_exact(study, failed=[2])
    reasons = [reason for (reason,) in bench.rows(Ticket.reason)]
    assert "out of memory" in reasons[2]
    assert "a test's memory is full" in reasons[2]
    assert reasons[:2] + reasons[3:] == [None] * 4


# Failures of the user's code


def test_trials_whose_training_fails_fail_with_the_reason_and_the_worker_goes_on(bench, caplog):
    study = bench.submit((0.01, 1.0, 0.02, 0.03, 0.04, 0.05), steps=5)
    bench.ask_for("fail-beyond", 0.9)
    bench.start(slots=2).join()
    bench.check_exact(study, failed=[0, 1])  # they train together, and nobody knows which one it was
    reasons = [reason for (reason,) in bench.rows(Ticket.reason)]
    assert all("RuntimeError: this setting fails (watched_task.py:" in reason for reason in reasons[:2])
    assert reasons[2:] == [None] * 4
    assert "this setting fails" in caplog.text


# Which study


def test_a_worker_for_ever_serves_every_open_study_oldest_first_and_waits_for_new_ones(bench):
    first, second = bench.submit(name="first"), bench.submit(name="second")
    running = bench.start(forever=True)
    wait_for(lambda: bench.is_done(second))
    assert bench.is_done(first)
    with bench.database.read() as session:
        finished = session.scalar(sa.select(sa.func.max(Ticket.finished_at)).where(Ticket.study_id == first.id))
        started = session.scalar(sa.select(sa.func.min(Ticket.started_at)).where(Ticket.study_id == second.id))
    assert finished <= started
    refused = bench.submit(name="refused", task={"factory": "somewhere.py:build"})
    third = bench.submit(name="third")
    wait_for(lambda: bench.is_done(third))
    assert running.thread.is_alive()
    running.drain()
    for study in (first, second, third):
        bench.check_exact(study)
    assert bench.states(refused) == {("open", None)}
    with bench.database.read() as session:
        assert session.scalars(sa.select(WorkerRow.state)).all() == ["stopped"]


def test_a_study_that_was_named_and_is_not_trusted_is_refused(bench):
    bench.submit(name="refused", task={"factory": "somewhere.py:build"})
    with pytest.raises(TaskError, match="is not trusted: add --trust"):
        bench.start(studies=("refused",)).join()


def test_where_others_hold_the_last_tickets_a_worker_goes_to_a_study_that_has_work(bench):
    first, second = bench.submit(name="first"), bench.submit(name="second")
    register_worker(bench.database, WorkerIdentity("other", "host", 1), "cpu")
    (held,) = claim(bench.database, first.id, "other", 1, max_attempts=3)
    with Heartbeat(bench.database, "other", 0.2):
        running = bench.start(studies=("first", "second"))
        wait_for(lambda: bench.is_done(second))
        assert bench.states(first) == {("done", "complete"), ("running", None)}
        time.sleep(GRACE)
        assert running.thread.is_alive(), "it waits for the last ticket"
        assert bench.rows(Ticket.worker_id)[0] == ("other",)
    stop_worker(bench.database, "other")
    running.join()
    assert held.ticket_id in [t for t, generation in bench.rows(Ticket.id, Ticket.generation) if generation == 2]
    for study in (first, second):
        bench.check_exact(study)


# Clocks


@pytest.mark.parametrize("wrong_by", [3600.0, -3600.0])
def test_a_wrong_clock_of_the_workers_machine_changes_nothing(bench, monkeypatch, wrong_by):
    right = time.time()
    study = bench.submit(tuple(0.01 * n for n in range(1, 7)), steps=10, epochs=6)
    bench.ask_for("seconds-per-step", 0.02)
    register_worker(bench.database, WorkerIdentity("silent", "host", 1), "cpu")
    claim(bench.database, study.id, "silent", 1, max_attempts=3)
    silent_since = time.monotonic()
    monkeypatch.setattr(time, "time", lambda: time.monotonic() - silent_since + right + wrong_by)
    both = [bench.start(name, slots=3, grace_seconds=1.0) for name in ("a", "b")]
    wait_for(lambda: bench.rows(Ticket.generation)[0] == (2,))
    assert time.monotonic() - silent_since >= 1.0
    bench.no_more("seconds-per-step")
    for running in both:
        running.join()
    assert bench.rows(Ticket.generation) == [(2,)] + [(1,)] * 5, "nobody was given up but the silent one"
    bench.check_exact(study)
    with bench.database.read() as session:
        now = session.scalar(sa.select(database_now()))
        first, last = session.execute(sa.select(sa.func.min(Epoch.recorded_at), sa.func.max(Epoch.recorded_at))).one()
    assert right - 1 < first < last <= now < right + 60


# From worker to worker


def test_a_trial_that_moves_between_workers_of_other_widths_keeps_its_curve(bench, undisturbed):
    rates = [0.02 * n for n in range(1, 10)]
    sections = {
        "epochs": 8,
        "task": {"factory": "momentum_tuner.tasks:digits_mlp"},
        "optimizers": ["nesterov"],
        "fixed": {"batch_size": 64},
        "schedule": {"name": "cosine"},
        "precision": "float64",
    }
    study = bench.submit(rates, **sections)
    positions = []
    for name, slots, questions in (("a", 64, 60), ("b", 8, 50)):
        bench.start(name, StopAfter(questions), slots=slots).join()
        store = CheckpointStore(str(bench.checkpoints))
        held = {t: [r[0]] for t, r in enumerate(bench.references(), start=1)}
        positions.append([(s.header["epoch"], s.header["epoch_steps"]) for s in store.load(held).values()])
    bench.start("c", slots=1).join()
    assert positions[0] == [positions[0][0]] * 9, "all nine trained together"
    assert [after > before for before, after in zip(*positions, strict=True)] == [True] * 8 + [False]
    assert all(epoch_steps > 0 for _, epoch_steps in positions[0] + positions[1])
    bench.check_exact(study)
    close_to(bench.curves(study), undisturbed(rates, slots=8, **sections), tolerance=1e-8)
