"""Workers in threads of this process, on real studies in an SQLite file: checkpoints, failures, who serves what."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import sqlalchemy as sa
import torch

from momentum_tuner import search
from momentum_tuner.checkpoints import CheckpointStore
from momentum_tuner.database import Epoch, Study, Ticket, Worker, database_now
from momentum_tuner.errors import StorageError, TaskError
from momentum_tuner.tasks import describe_data, load_task
from momentum_tuner.tickets import Heartbeat, WorkerIdentity, claim, note_data, register_worker, stop_worker
from momentum_tuner.trainer import SlotsOutOfMemoryError, SlotState, Trainer
from momentum_tuner.worker import StopSignal
from momentum_tuner.worker.held import Held, Stage
from momentum_tuner.worker.pacing import Pacing
from momentum_tuner.worker.saving import Saver

from .workbench import (
    GRACE,
    OFTEN,
    RATES,
    TESTS,
    Bench,
    Running,
    StopAfter,
    close_to,
    marks_at,
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

    def run(rates: Sequence[float] = RATES, *, slots: int = 4, **sections):
        return undisturbed_curves(make_bench, rates, slots, **sections)

    return run


# Checkpoints


def drain_at(bench: Bench, steps: int) -> None:
    """Let worker a train so far, with checkpoints, and give its trials back."""
    bench.hold_at(steps, "a")
    running = bench.start("a", checkpoint_seconds=OFTEN)
    bench.wait_at(steps)
    running.stop.asked = True
    bench.release("a")
    running.join()


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
    study = bench.submit(epochs=12)
    bench.hold_at(45, "a")
    running = bench.start("a", checkpoint_seconds=OFTEN)
    bench.wait_at(45)
    assert all(bench.references())
    kept, aside = bench.checkpoints / study.checkpoint_folder, bench.folder / "aside"
    kept.rename(aside)
    kept.write_text("in the way")
    bench.hold_at(85, "a")
    bench.wait_at(85)
    assert "checkpoint skipped" in caplog.text
    assert bench.epochs() == 8
    good = bench.references()
    running.stop.asked = True
    bench.release("a")
    running.join()
    assert bench.states(study) == {("open", None)}
    assert bench.references() == good
    kept.unlink()
    aside.rename(kept)
    saved = bench.saved()[0]
    assert 0 < saved["step"] + saved["epoch_steps"] <= 45
    bench.start("b").join()
    assert bench.steps("b")[0] == marks_at(saved["step"] + saved["epoch_steps"])
    bench.check_exact(study)
    assert bench.curves(study) == undisturbed(epochs=12)


@pytest.mark.parametrize("broken", ["newest", "all"])
def test_a_broken_checkpoint_is_passed_over_for_the_one_before_else_for_the_beginning(
    bench, undisturbed, caplog, broken
):
    study = bench.submit(steps=20, epochs=6)
    drain_at(bench, 70)
    trials = bench.rows(Ticket.trial_id, Ticket.trial_number)
    (newest, older), *_ = bench.references()
    assert all(found == [newest, older] for found in bench.references())
    saved = bench.saved(1)[0]
    assert 1 < saved["step"] + saved["epoch_steps"] <= 71
    for reference in (newest,) if broken == "newest" else (newest, older):
        path = bench.checkpoints / reference.file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    bench.start("b").join()
    expected = saved["step"] + saved["epoch_steps"] if broken == "newest" else 1
    assert bench.steps("b")[0] == marks_at(expected)
    passed_over = [f"checkpoint {r.file!r} is passed over: it is broken" in caplog.text for r in (newest, older)]
    assert passed_over == [True, broken == "all"]
    assert bench.rows(Ticket.trial_id, Ticket.trial_number) == trials
    bench.check_exact(study)
    assert bench.curves(study) == undisturbed(steps=20, epochs=6)


def test_a_trial_that_begins_anew_is_forgiven_no_attempt_until_it_has_come_further_than_before(bench):
    study = bench.submit(steps=20, epochs=6)
    drain_at(bench, 70)
    for file in (bench.checkpoints / study.checkpoint_folder).iterdir():
        file.unlink()
    with bench.database.write() as session:  # as if a worker had died of it
        session.execute(sa.update(Ticket).values(attempts=1))
    bench.hold_at(55, "b")
    heir = bench.start("b", checkpoint_seconds=OFTEN)
    for steps, attempts in ((55, 2), (95, 1)):
        bench.hold_at(steps, "b")  # the second lets go of the first
        bench.wait_at(steps, "b")
        assert all(found[0].file.split("/")[1].startswith(heir.id) for found in bench.references())
        assert bench.rows(Ticket.attempts) == [(attempts,)] * 4
    bench.release("b")
    heir.join()
    bench.check_exact(study)


def test_a_worker_that_comes_back_to_a_study_writes_none_of_its_checkpoints_over(bench):
    study = bench.submit()
    store = CheckpointStore(str(bench.checkpoints))
    held = [Held(one, Stage.TRAINING) for one in claim(bench.database, study.id, "same", 1, max_attempts=3)]
    for _ in range(2):
        saver = Saver(bench.database, store, study, "same", 60.0, GRACE)
        saver.begin(held, lambda _: SlotState({"parameters": torch.ones(3)}))
        saver.close()
    assert len(list(store.files(study.checkpoint_folder))) == 2


def test_old_checkpoints_are_removed_and_all_of_them_when_the_study_is_done(bench):
    study = bench.submit(epochs=16)
    folder = bench.checkpoints / study.checkpoint_folder
    most: dict[str, int] = {}

    def numbers(worker: Running) -> list[int]:
        return [int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{worker.id}-*.safetensors")]

    def reached(steps: int, *workers: Running) -> None:
        """Until they wait there; meanwhile their files are counted."""
        while any(len(bench.steps(worker.thread.name)) < steps for worker in workers):
            most.update({worker.id: max(most.get(worker.id, 0), len(numbers(worker))) for worker in workers})

    for name in "abc":
        bench.hold_at(100, name, RATES[:2])
    bench.hold_at(100, "b")
    first = bench.start("a", slots=2, checkpoint_seconds=OFTEN)
    wait_for(lambda: len(bench.steps("a")) > 5)
    second = bench.start("b", slots=2, checkpoint_seconds=OFTEN)
    reached(100, first, second)
    assert all(max(numbers(worker)) > 5 for worker in (first, second)), "many were written"
    assert max(most.values()) <= 3, "two that are noted, and one that is about to be"
    first.stop.asked = True
    bench.release("a")
    first.join()
    assert len(numbers(first)) <= 2
    (folder / ".gone-1.safetensors.x.tmp").mkdir()
    (folder / ".gone-1.safetensors.x.tmp" / "gone-1.safetensors").write_bytes(b"half")
    (folder / "gone-2.safetensors").write_bytes(b"not noted")
    bench.hold_at(150, "c", RATES[:2])
    third = bench.start("c", slots=2, checkpoint_seconds=OFTEN)
    reached(150 - 101, third)
    assert max(most.values()) <= 3
    assert numbers(first) == [], "nothing refers to files of a worker that has ended"
    assert not list(folder.glob("*gone-*"))
    bench.release("b")
    bench.release("c")
    second.join()
    third.join()
    bench.check_exact(study)
    assert not folder.exists()


# Memory


def test_without_memory_half_of_the_slots_go_back_with_their_state_and_the_study_completes(bench, undisturbed, caplog):
    rates = [0.01 * n for n in range(1, 9)]
    study = bench.submit(rates, steps=20)
    bench.hold_at(50, "a", rates)
    running = bench.start(slots=8)
    bench.wait_at(50)
    bench.ask_for("memory-for", 4)
    bench.release("a")
    running.join()
    assert "out of memory at 8 slots" in caplog.text
    assert "going on with 4 of 8 slots" in caplog.text
    after = bench.steps()[50:]
    assert after[0] == marks_at(50, rates[:4])
    assert after[30] == marks_at(50, rates[4:]), "those that left go on from where they were"
    assert [len(marks) for marks in after] == [4] * 60
    assert [generation for (generation,) in bench.rows(Ticket.generation)] == [1] * 4 + [2] * 4
    assert bench.rows(Ticket.attempts) == [(1,)] * 8
    bench.check_exact(study)
    close_to(bench.curves(study), undisturbed(rates, slots=8, steps=20))


@pytest.mark.parametrize(("slots", "fitting"), [(2, 1), (8, 5)])
def test_trials_that_find_no_memory_as_they_are_admitted_wait_for_those_that_train(
    bench, caplog, monkeypatch, slots, fitting
):
    study = bench.submit([0.01 * n for n in range(1, 9)], steps=5)
    admit = Trainer.admit

    def full(self, key, *arguments):
        if len(self.keys) >= fitting:
            raise SlotsOutOfMemoryError("CUDA out of memory", [key])
        return admit(self, key, *arguments)

    monkeypatch.setattr(Trainer, "admit", full)
    bench.start(slots=slots).join()
    assert f"going on with the {fitting} slots that fit" in caplog.text
    assert max(len(marks) for marks in bench.steps()) == fitting
    assert bench.rows(Ticket.attempts) == [(1,)] * 8
    bench.check_exact(study)


def test_a_trial_that_has_no_memory_even_alone_fails_and_the_others_complete(bench):
    study = bench.submit((0.01, 0.02, 1.0, 0.03, 0.04), steps=5)
    bench.ask_for("no-memory-beyond", 0.9)
    bench.start().join()
    bench.check_exact(study, failed=[2])
    reasons = [reason for (reason,) in bench.rows(Ticket.reason)]
    assert "out of memory" in reasons[2]
    assert "a test's memory is full" in reasons[2]
    assert reasons[:2] + reasons[3:] == [None] * 4


def test_a_worker_that_finds_no_database_as_it_opens_a_study_tries_again(bench, monkeypatch):
    study = bench.submit(steps=2)
    opened = search.open_storage
    tries: list[None] = []

    def away(database):
        tries.append(None)
        if len(tries) < 3:
            raise StorageError("the database does not answer")
        return opened(database)

    monkeypatch.setattr(search, "open_storage", away)
    bench.start().join()
    assert len(tries) == 3
    bench.check_exact(study)


# Stability


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """How many trials were measured at once, each time."""
    found: list[int] = []
    measure = Trainer.sharpness

    def spy(self, keys, pause=None):
        if keys:
            found.append(len(keys))
        return measure(self, keys, pause)

    monkeypatch.setattr(Trainer, "sharpness", spy)
    return found


def stability(bench: Bench, *columns):
    """Sharpness and margin of each trial after other columns."""
    names = ("sharpness", "stability_margin")
    rows = bench.rows(*columns, Ticket.measures)
    return [(*row[:-1], *((row[-1] or {}).get(name) for name in names)) for row in rows]


def test_trials_that_complete_have_their_stability_measured_together_and_no_others(bench, measured):
    rates = (0.019, 1e-3, 0.5, 0.012, 1e-4, 0.018, 0.4, 2e-4)
    study = bench.submit(
        rates,
        epochs=9,
        task={"factory": "momentum_tuner.tasks:quadratic", "params": {"kappa": 100.0, "steps_per_epoch": 4}},
        pruner={"name": "successive_halving", "reduction_factor": 3},
        objective={"metric": "final_valid_loss"},
    )
    bench.start(slots=8).join()
    found = stability(bench, Ticket.outcome)
    outcomes = [outcome for outcome, *_ in found]
    assert {"complete", "pruned", "diverged"} == set(outcomes)
    for rate, (outcome, sharpness, margin) in zip(rates, found, strict=True):
        if outcome == "complete":
            assert sharpness == pytest.approx(100.0, rel=0.005)
            assert margin == pytest.approx(rate * sharpness / 2)
        else:
            assert sharpness is margin is None
    assert measured == [outcomes.count("complete")] and measured[0] > 1
    assert bench.is_done(study)


def test_a_baseline_has_a_sharpness_and_no_margin(bench):
    bench.submit(
        (1e-3,),
        epochs=1,
        task={"factory": "momentum_tuner.tasks:quadratic", "params": {"kappa": 10.0}},
        optimizers=["adam"],
    )
    bench.start().join()
    ((sharpness, margin),) = stability(bench)
    assert sharpness == pytest.approx(10.0, rel=0.005)
    assert margin is None


def stop_within(measuring: pytest.MonkeyPatch, stop: StopSignal) -> None:
    """Let the wish to drain come with the first measurement."""
    measure = Trainer.sharpness

    def stopped(self, keys, pause=None):
        stop.asked = stop.asked or bool(keys)
        return measure(self, keys, pause)

    measuring.setattr(Trainer, "sharpness", stopped)


def test_a_wish_to_drain_within_a_measurement_leaves_it_to_who_goes_on(bench, make_bench, monkeypatch):
    study = bench.submit(steps=3)
    stop = StopSignal()
    with monkeypatch.context() as measuring:
        stop_within(measuring, stop)
        bench.start("a", stop).join()
    assert bench.states(study) == {("open", None)}
    assert [(saved["epoch"], saved["epoch_steps"]) for saved in bench.saved()] == [(4, 0)] * 4
    bench.start("b").join()
    assert bench.steps("b") == []
    bench.check_exact(study)
    undisturbed = make_bench("undisturbed")
    undisturbed.submit(steps=3)
    undisturbed.start().join()
    found = stability(bench)
    assert found == stability(undisturbed)
    assert all(sharpness > 0 < margin for sharpness, margin in found)
    assert [margin for _, margin in found] == pytest.approx([r * s / 2 for r, (s, _) in zip(RATES, found, strict=True)])


def test_without_checkpoints_such_trials_end_unmeasured_as_all_their_training_would_be_lost(bench, monkeypatch):
    study = bench.submit(steps=3)
    stop = StopSignal()
    stop_within(monkeypatch, stop)
    bench.start("a", stop, checkpoints=None).join()
    assert bench.states(study) == {("done", "complete")}
    assert stability(bench) == [(None, None)] * 4


# Failures of the user's code


def test_trials_whose_training_fails_fail_with_the_reason_and_the_worker_goes_on(bench, caplog):
    study = bench.submit((0.01, 1.0, 0.01, 0.02, 0.03, 0.04), steps=5)
    bench.ask_for("fail-beyond", 0.9)
    bench.start(slots=2).join()
    bench.check_exact(study, failed=[0, 1])  # they train together, and nobody knows which one it was
    reasons = [reason for (reason,) in bench.rows(Ticket.reason)]
    assert all("RuntimeError: this setting fails (watched_task.py:" in reason for reason in reasons[:2])
    assert reasons[2:] == [None] * 4
    assert "this setting fails" in caplog.text
    tracebacks = [traceback for (traceback,) in bench.rows(Ticket.traceback)]
    assert tracebacks[2:] == [None] * 4
    for traceback in tracebacks[:2]:
        *frames, said = traceback.splitlines()
        assert said == "RuntimeError: this setting fails"
        assert all(frame.startswith('File "') for frame in frames)
        assert "watched_task.py" in frames[-1]


def test_an_epoch_that_fails_as_the_worker_is_asked_to_stop_fails_no_trial(bench, monkeypatch):
    study = bench.submit(steps=5)
    stop = StopSignal()

    def end(self, pause=None):
        stop.asked = True
        self.failed = self.keys
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_epoch", end)
        bench.start("a", stop).join()
    assert bench.rows(Ticket.state, Ticket.attempts) == [("open", 0)] * 4
    bench.start("b").join()
    bench.check_exact(study)


def test_before_a_step_is_compiled_a_checkpoint_is_noted(bench, monkeypatch):
    study = bench.submit(steps=5, epochs=2)
    noted = []

    def compiles(self, trainer, epochs_left, before):
        before()
        noted.append(
            [(checkpoint is not None, state) for checkpoint, state in bench.rows(Ticket.checkpoint, Ticket.state)]
        )

    monkeypatch.setattr(Pacing, "consider_compiling", compiles)
    bench.start("a").join()
    assert noted == [[(True, "running")] * 4] * 2
    bench.check_exact(study)


def test_a_worker_notes_its_machine_and_what_the_trials_learn_from(bench, caplog):
    study = bench.submit(RATES)
    bench.start("a").join()
    with bench.database.read() as session:
        (worker,) = session.scalars(sa.select(Worker))
        data = session.get_one(Study, study.id).data
    assert worker.environment["torch"] == torch.__version__
    assert worker.environment["python"] == platform.python_version()
    assert worker.environment["cores"] == os.cpu_count()
    assert "gpu" not in worker.environment
    factory, params = study.spec.task.factory, study.spec.task.params
    task = load_task(factory, params, base=TESTS, trusted=bench.options().trust)
    assert data == describe_data(task, factory, params)
    assert "the data here" not in caplog.text


def test_a_worker_whose_data_are_others_warns(bench, caplog):
    study = bench.submit(RATES)
    note_data(bench.database, study.id, {"name": "other", "digest": "0123456789abcdef"})
    bench.start("a").join()
    assert "the data here is not what other workers train on" in caplog.text
    bench.check_exact(study)


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
        assert session.scalars(sa.select(Worker.state)).all() == ["stopped"]


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
    study = bench.submit(tuple(0.01 * n for n in range(1, 7)), epochs=6)
    bench.ask_for("seconds-per-step", 0.05)
    register_worker(bench.database, WorkerIdentity("silent", "host", 1), "cpu")
    silent_since = time.monotonic()
    claim(bench.database, study.id, "silent", 1, max_attempts=3)
    monkeypatch.setattr(time, "time", lambda: time.monotonic() - silent_since + right + wrong_by)
    both = [bench.start(name, slots=3) for name in ("a", "b")]
    wait_for(lambda: bench.rows(Ticket.generation)[0] == (2,))
    assert time.monotonic() - silent_since >= GRACE
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
        "epochs": 6,
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
        positions.append([(saved["epoch"], saved["epoch_steps"]) for saved in bench.saved()])
    bench.start("c", slots=1).join()
    assert positions[0] == [positions[0][0]] * 9, "all nine trained together"
    assert [after > before for before, after in zip(*positions, strict=True)] == [True] * 8 + [False]
    assert all(epoch_steps > 0 for _, epoch_steps in positions[0] + positions[1])
    bench.check_exact(study)
    close_to(bench.curves(study), undisturbed(rates, slots=8, **sections), tolerance=1e-8)
