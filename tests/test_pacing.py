"""What a worker measures of a task is kept in the database, and taken from there by the next one."""

import logging
from dataclasses import replace

import pytest
import sqlalchemy as sa
import torch

from momentum_tuner.database import Calibration as Row
from momentum_tuner.database import Database
from momentum_tuner.spec import StudySpec
from momentum_tuner.tasks import quadratic
from momentum_tuner.tickets import (
    WorkerIdentity,
    assign_worker,
    open_tickets_per_worker,
    register_worker,
    stop_worker,
    submit_study,
)
from momentum_tuner.trainer import Calibration, Way, pace
from momentum_tuner.worker.calibrations import Calibrations
from momentum_tuner.worker.pacing import Pacing, usual_batch_size
from momentum_tuner.worker.results import smallest_batch_size
from momentum_tuner.worker_options import WorkerOptions

torch.set_num_threads(1)

KNOWN = Calibration({Way("sequential", 8, 1): 2.0, Way("fused", 4, 1): 1.0, Way("fused", 16, 2): 0.5})
OPTIONS = WorkerOptions(threads=1, sharing=2)


def spec(name="small", trials=3, epochs=4, **sections):
    document = {
        "name": name,
        "task": {"factory": "momentum_tuner.tasks:quadratic", "params": {"dim": 4}},
        "optimizers": ["sgd"],
        "space": {"learning_rate": {"low": 0.01, "high": 0.1}},
        "budget": {"trials": trials, "epochs": epochs},
        "confirm": {"seeds": 0},
        "pruner": {"name": "none"},
    }
    return StudySpec.model_validate(document | sections)


def submit(database, *args, folder=None, **sections):
    return submit_study(database, spec(*args, **sections), folder, lambda _: None)


def never():
    return False


def of(database, study, batch_size=64, device="cpu", most=32):
    return Calibrations(database, study, batch_size, device, most)


def rows(database):
    with database.read() as session:
        return {(row.mode, row.width): row.step_seconds for row in session.scalars(sa.select(Row))}


def test_what_was_measured_comes_back_and_what_is_new_is_added(database):
    study = submit(database)
    mine = of(database, study)
    assert mine.read() is None
    mine.write(Calibration())
    assert rows(database) == {}
    mine.write(KNOWN)
    assert rows(database) == {("sequential", 8): 2.0, ("fused", 4): 1.0, ("fused x2", 16): 0.5}
    assert of(database, study).read() == KNOWN
    more = KNOWN.having(Way("compiled", 16, 2), 0.3, 21.5)
    mine.write(more)
    assert of(database, study).read() == more
    assert rows(database)["compiling", 0] == 21.5


def test_of_two_workers_that_measured_at_once_the_first_is_kept(database):
    study = submit(database)
    first, second = of(database, study), of(database, study)
    assert first.read() is None and second.read() is None
    first.write(KNOWN)
    second.write(Calibration({Way("sequential", 8, 1): 9.0, Way("fused", 8, 1): 3.0}))
    assert rows(database)["sequential", 8] == 2.0 and rows(database)["fused", 8] == 3.0


def test_a_measurement_holds_for_its_task_batch_size_width_and_part_of_the_machine(database, tmp_path, monkeypatch):
    study = submit(database)
    of(database, study).write(KNOWN)
    same = submit(database, "same", 7, 9, seed=3)
    assert of(database, same).read() == KNOWN
    for other in (
        of(database, study, batch_size=32),
        of(database, study, most=64),
        of(
            database, submit(database, "wide", task={"factory": "momentum_tuner.tasks:quadratic", "params": {"dim": 5}})
        ),
        of(database, submit(database, "exact", precision="float64")),
    ):
        assert other.read() is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert of(database, study).read() is None
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "3.0")
    assert of(database, study).read() is None
    monkeypatch.undo()
    file = tmp_path / "mine.py"
    file.write_text("a = 1")
    own = submit(database, "own", folder=str(tmp_path), task={"factory": "mine.py:build"})
    of(database, own).write(KNOWN)
    assert of(database, own).read() == KNOWN
    file.write_text("a = 2")
    assert of(database, own).read() is None


def test_a_database_that_does_not_answer_only_costs_a_measurement(caplog, sqlite_database):
    study = submit(sqlite_database)
    gone = Database("postgresql://nobody@127.0.0.1:1/nothing")
    mine = of(gone, study)
    assert mine.read() is None
    mine.write(KNOWN)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "measured anew" in said[0] and "not kept" in said[1]
    trainer = Pacing(gone, study, OPTIONS).make_trainer(quadratic(dim=4), never)
    assert trainer.pace.calibration.seconds


def test_a_worker_measures_once_and_the_next_takes_that(sqlite_database, monkeypatch):
    study = submit(sqlite_database)
    first = Pacing(sqlite_database, study, OPTIONS).make_trainer(quadratic(dim=4), never)
    found = rows(sqlite_database)
    assert ("sequential", 2) in found and ("fused", 4) in found
    assert max(width for _, width in found) <= 32 and first.width <= 32  # two workers share the device
    monkeypatch.setattr(pace, "calibrate", lambda *_: pytest.fail("it was measured again"))
    second = Pacing(sqlite_database, study, OPTIONS).make_trainer(quadratic(dim=4), never)
    assert (second.width, second.pace.calibration) == (first.width, first.pace.calibration)
    fixed = Pacing(sqlite_database, study, replace(OPTIONS, slots=5)).make_trainer(quadratic(dim=4), never)
    assert fixed.width == 5


def test_the_threads_that_are_fastest_are_set(sqlite_database, monkeypatch):
    study, asked = submit(sqlite_database), []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    Pacing(sqlite_database, study, replace(OPTIONS, threads=2))
    assert asked == [2]
    mine = of(sqlite_database, study)
    mine.write(Calibration({Way("sequential", 8, 1): 9.0, Way("fused", 16, 2): 0.5, Way("fused", 16, 1): 0.4}))
    asked.clear()
    Pacing(sqlite_database, study, OPTIONS).make_trainer(quadratic(dim=4), never)
    assert asked == [1, 1]


@pytest.mark.parametrize(("slots", "threads"), [(4, 1), (20, 2)])
def test_slots_that_were_asked_for_train_with_the_threads_that_are_fastest(
    sqlite_database, monkeypatch, slots, threads
):
    study, asked = submit(sqlite_database), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    measured = {Way("fused", 4, 2): 3.0, Way("fused", 4, 1): 2.0, Way("fused", 16, 2): 0.5, Way("fused", 16, 1): 1.0}
    of(sqlite_database, study).write(Calibration({Way("sequential", 8, 1): 9.0, **measured}))
    monkeypatch.setattr(pace, "calibrate", lambda *_: pytest.fail("it was measured again"))
    pacing = Pacing(sqlite_database, study, replace(OPTIONS, threads=None, slots=slots))
    assert pacing.make_trainer(quadratic(dim=4), never).width == slots
    assert asked == [threads]


def test_what_is_known_of_slots_that_were_asked_for_is_no_choice_for_later_runs(sqlite_database):
    study = submit(sqlite_database)
    of(sqlite_database, study).write(Calibration({Way("fused", 3, 1): 1e-9}))
    trainer = Pacing(sqlite_database, study, OPTIONS).make_trainer(quadratic(dim=4), never)
    assert trainer.width > 3
    assert {("sequential", 2), ("fused", 3), ("fused", 4), ("fused", 8)} <= set(rows(sqlite_database))


def test_the_batch_size_is_the_studys_own_or_one_of_those_it_searches():
    assert usual_batch_size(spec()) == 64
    assert usual_batch_size(spec(fixed={"batch_size": 16})) == 16
    searched = {"learning_rate": {"low": 0.01, "high": 0.1}, "batch_size": [128, 16, 32]}
    assert usual_batch_size(spec(space=searched)) == 32


def test_the_smallest_batch_size_is_that_of_any_contestant():
    assert smallest_batch_size(spec()) == 64
    rates = {"learning_rate": {"low": 0.01, "high": 0.1}}
    assert smallest_batch_size(spec(space={**rates, "batch_size": [128, 16, 32]})) == 16
    assert smallest_batch_size(spec(space={**rates, "batch_size": {"low": 8, "high": 256, "log": True}})) == 8
    assert smallest_batch_size(spec(fixed={"batch_size": 24})) == 24


def test_open_tickets_are_divided_among_the_workers_that_serve_the_study(database):
    study, other = submit(database, trials=6), submit(database, "other")
    assert open_tickets_per_worker(database, study.id) == 6
    workers = [WorkerIdentity.of_this_process() for _ in range(3)]
    for worker, served in zip(workers, (study, study, other), strict=True):
        register_worker(database, worker, "cpu", "")
        assign_worker(database, worker.id, served.id, 4)
    assert open_tickets_per_worker(database, study.id) == 3
    stop_worker(database, workers[0].id)
    assert open_tickets_per_worker(database, study.id) == 6


def test_the_trainer_is_told_how_many_steps_are_left_now_and_then(sqlite_database, monkeypatch):
    study = submit(sqlite_database, trials=6, epochs=4)
    pacing = Pacing(sqlite_database, study, replace(OPTIONS, sharing=2))
    trainer = pacing.make_trainer(quadratic(dim=4, steps_per_epoch=5), never)
    told = []

    def save():
        raise AssertionError("nothing is compiled")

    def consider(trial_steps, sharing, before):
        assert before is save
        told.append((trial_steps, sharing))
        trainer.pace.calibration = trainer.pace.calibration.having(Way("compiled", 32, 1), 1e-6, 3.0)

    monkeypatch.setattr(trainer, "consider_compiling", consider)
    pacing.consider_compiling(trainer, 7, save)
    pacing.consider_compiling(trainer, 7, save)
    # Of each of the six open trials half of its budget.
    assert told == [((7 + 6 * 2) * 5, 2)]
    assert rows(sqlite_database)["compiling", 0] == 3.0
    monkeypatch.setattr(trainer.pace, "considers", False)
    monkeypatch.setattr(pacing, "_next_look", 0.0)
    pacing.consider_compiling(trainer, 7, save)
    assert len(told) == 1


@pytest.mark.parametrize("compiles", ["on", "off", "auto"])
def test_compiling_is_as_the_options_say(sqlite_database, compiles, caplog):
    caplog.set_level(logging.INFO)
    options = replace(OPTIONS, compiles=compiles, slots=4)
    trainer = Pacing(sqlite_database, submit(sqlite_database), options).make_trainer(quadratic(dim=4), never)
    assert trainer.pace.considers == (compiles == "auto")
    assert trainer.objective.replay.compiles == ({"gradient", "update", "evaluation"} if compiles == "on" else set())
