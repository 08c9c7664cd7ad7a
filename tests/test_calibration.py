"""Which way of training is taken follows from what was measured, and a compilation from what it takes and gains."""

import logging
import re
import time
from dataclasses import replace

import pytest
import torch

from momentum_tuner.tasks import digits_mlp, quadratic
from momentum_tuner.trainer import Calibration, Trainer, TrialSettings, Way, calibration, compiling, pace, replay
from momentum_tuner.trainer.calibration import COMPILED, FUSED, SEQUENTIAL, Stopwatch, calibrate
from momentum_tuner.trainer.capture import NotCapturedError
from momentum_tuner.trainer.stack import Stack

torch.set_num_threads(1)

TASK = replace(digits_mlp(hidden=4), steps_per_epoch=2)


def fused(width, threads=1):
    return Way(FUSED, width, threads)


def sequential(threads=1, width=2):
    return Way(SEQUENTIAL, width, threads)


@pytest.mark.parametrize(
    ("seconds", "most", "best"),
    [
        ({sequential(): 5.0, fused(8): 2.0, fused(16): 1.0, fused(64): 1.5}, 64, fused(16)),
        ({sequential(): 5.0, fused(8): 2.0, fused(16): 1.04, fused(64): 1.0}, 64, fused(16)),
        ({sequential(): 5.0, fused(8): 2.0, fused(16): 1.06, fused(64): 1.0}, 64, fused(64)),
        ({sequential(): 5.0, fused(8): 2.0, fused(16): 1.1, fused(64): 1.0}, 64, fused(64)),
        ({sequential(): 5.0, fused(8): 2.0, fused(16): 1.1, fused(64): 1.0}, 32, fused(16)),
        ({sequential(): 1.0, fused(8): 1.2, fused(16): 1.1}, 64, sequential()),
        ({sequential(): 1.0, fused(4): 1.2}, 2, sequential()),
        ({sequential(2): 2.0, fused(8, 2): 1.0, sequential(1): 0.9}, 64, sequential(1)),
        ({sequential(2): 2.0, fused(8, 2): 1.0, fused(8, 1): 1.01}, 64, fused(8, 1)),
        ({sequential(): 5.0, fused(8): 2.0, Way(COMPILED, 8, 1): 0.1}, 64, fused(8)),
        ({sequential(): 5.0, fused(32): 2.0, fused(64): 1.0}, 16, fused(32)),
    ],
)
def test_the_narrowest_of_the_fastest_ways_is_taken(seconds, most, best):
    assert Calibration(seconds).best(most) == best


def test_compiling_is_worth_what_it_saves():
    one = Calibration({fused(64): 1e-3})
    cost = calibration.USUAL_COMPILE_SECONDS * calibration.MARGIN
    gain = 1e-3 * (1 - 1 / calibration.USUAL_GAIN)
    assert not one.expects_to_repay(fused(64), 0.99 * cost / gain, kept=False)
    assert one.expects_to_repay(fused(64), 1.01 * cost / gain, kept=False)
    assert one.expects_to_repay(fused(64), 0.2 * cost / gain, kept=True)
    measured = one.having(Way(COMPILED, 32, 1), 0.5e-3, 10.0)
    assert measured.expects_to_repay(fused(64), 1.01 * 10 * calibration.MARGIN / 0.5e-3, kept=False)
    assert not measured.expects_to_repay(fused(64), 0.99 * 10 * calibration.MARGIN / 0.5e-3, kept=False)
    slower = one.having(Way(COMPILED, 64, 1), 1.1e-3, 1.0)
    assert not slower.expects_to_repay(fused(64), 1e12, kept=True)
    assert measured.having(fused(8), 2e-3).compile_seconds == 10.0
    assert measured.of(COMPILED, 8, 1) == 0.5e-3 and measured.of(COMPILED, 8, 2) is None
    assert measured.of(FUSED, 50, 1) == 1e-3 and measured.least(SEQUENTIAL) == float("inf")


def test_threads_are_compared_at_the_width_that_was_measured_nearest():
    found = Calibration({fused(4, 2): 3.0, fused(4): 2.0, fused(32, 2): 1.0, fused(32): 1.5, sequential(2): 5.0})
    assert [found.fastest_threads(FUSED, width) for width in (1, 10, 30, 100)] == [1, 1, 2, 2]
    assert found.fastest_threads(SEQUENTIAL, 8) == 2


class Clock:
    """Stands in for the stopwatch: seconds by way, and how long each measurement takes."""

    def __init__(self, monkeypatch, seconds, takes=0.0, most_memory=10**9):
        self.asked, self.measured = [], 0.0
        clock = self

        def measure(watch, way):
            clock.asked.append(way)
            clock.measured += takes
            if way.width > most_memory:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return seconds(way)

        monkeypatch.setattr(Stopwatch, "seconds", measure)
        monkeypatch.setattr(
            Stopwatch, "measured", property(lambda watch: clock.measured, lambda watch, value: None), raising=False
        )

    @property
    def widths(self):
        return [way.width for way in dict.fromkeys(self.asked) if way.mode == FUSED]


def widths(most, monkeypatch, seconds, **options):
    clock = Clock(monkeypatch, seconds, **options)
    trainer = Trainer(TASK, epochs=1, slots=1)
    found = calibrate(trainer.objective, trainer._timed_batch(), most)
    assert set(found.seconds) == {way for way in clock.asked if way.width <= options.get("most_memory", most)}
    return clock.widths


def test_widths_are_measured_as_long_as_they_gain_and_memory_and_time_suffice(monkeypatch):
    def halving(way):
        return 1e-4 / way.width

    assert widths(64, monkeypatch, halving) == [4, 8, 16, 32, 64]
    assert widths(50, monkeypatch, halving) == [4, 8, 16, 32, 50]
    assert widths(33, monkeypatch, halving) == [4, 8, 16, 32, 33]
    assert widths(3, monkeypatch, halving) == [3]
    assert widths(64, monkeypatch, lambda way: 1e-5 * abs(way.width - 9)) == [4, 8, 16]
    assert widths(64, monkeypatch, halving, most_memory=20) == [4, 8, 16, 32]
    assert widths(64, monkeypatch, halving, takes=1.1) == [4, 8]
    assert widths(64, monkeypatch, lambda way: 0.2) == [4]  # a step of 8 slots would take too long


def test_what_came_close_is_measured_twice_and_threads_are_tried(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    seconds = {2: 0.5e-3, 4: 1.0e-3, 8: 0.5e-3}
    clock = Clock(monkeypatch, lambda way: seconds[way.width] * (1.0 if way.threads == 2 else 0.9))
    trainer = Trainer(TASK, epochs=1, slots=1)
    found = calibrate(trainer.objective, trainer._timed_batch(), 8)
    ways = [sequential(2), fused(4, 2), fused(8, 2), sequential(1), fused(4, 1), fused(8, 1)]
    assert clock.asked[:6] == ways
    assert set(clock.asked[6:]) == {way for way in ways if way.width in (2, 8)}
    assert found.best(8).threads == 1


def test_a_real_measurement_is_of_whole_steps_and_leaves_everything_as_it_was():
    trainer = Trainer(TASK, epochs=1, slots=1, mode="fused")
    patience, threads = trainer.objective.replay.patience, torch.get_num_threads()
    found = calibrate(trainer.objective, trainer._timed_batch(), 8)
    assert {way.mode for way in found.seconds} == {SEQUENTIAL, FUSED}
    assert all(1e-6 < seconds < 1.0 for seconds in found.seconds.values())
    assert (trainer.objective.replay.patience, torch.get_num_threads()) == (patience, threads)
    # Most of a step of a small model is overhead, which slots share.
    quick = Trainer(quadratic(), epochs=1, slots=1, mode="fused")
    seconds = calibrate(quick.objective, quick._timed_batch(), 16).seconds
    assert seconds[fused(16)] < seconds[fused(4)] < seconds[sequential()]


def test_what_comes_before_a_step_and_other_processes_do_not_count_as_its_time(monkeypatch):
    capture, gradient = replay.capture, Stack.gradient

    def slowly(*args):
        busy_until = time.thread_time() + 1.0
        while time.thread_time() < busy_until:
            pass
        return capture(*args)

    def interrupted(*args):
        time.sleep(0.3)
        return gradient(*args)

    monkeypatch.setattr(replay, "capture", slowly)
    monkeypatch.setattr(Stack, "gradient", interrupted)
    monkeypatch.setattr(calibration, "LEAST_STEPS", 1)
    monkeypatch.setattr(calibration, "WINDOW_SECONDS", 0.0)
    trainer = Trainer(TASK, epochs=1, slots=1)
    watch = Stopwatch(trainer.objective, trainer._timed_batch())
    seconds = watch.seconds(fused(1))
    assert watch.spent > 1.0
    assert 0.0 < seconds == watch.measured < 0.3


def test_a_trainer_takes_what_is_known_and_measures_nothing(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "momentum_tuner.trainer")
    monkeypatch.setattr(pace, "calibrate", lambda *_: pytest.fail("it was measured"))
    known = Calibration({sequential(2): 3.0, fused(8, 2): 2.0, fused(32, 2): 1.0, fused(64, 2): 1.5})
    trainer = Trainer(TASK, epochs=1, calibration=known)
    assert (trainer.width, trainer.pace.threads, trainer.objective.batch_slots) == (32, 2, True)
    assert Trainer(TASK, epochs=1, calibration=known, most=16).width == 8
    assert Trainer(TASK, epochs=1, calibration=known, most=2).width == 2
    assert Trainer(TASK, epochs=1, calibration=known, slots=5).width == 5
    assert caplog.records == []
    alone = Trainer(TASK, epochs=1, calibration=Calibration({sequential(): 1.0, fused(8): 2.5}), most=64)
    assert (alone.width, alone.objective.batch_slots) == (2, False)
    assert [r.getMessage() for r in caplog.records] == [
        "the model trains one slot at a time: that is 2.5 times as fast as fused slots are here"
    ]


def test_a_model_that_fails_while_it_is_measured_is_left_to_its_trials(caplog):
    caplog.set_level(logging.INFO, "momentum_tuner.trainer")
    calls = []

    def loss(model, batch):
        calls.append(model)
        if len(calls) > 9:  # as often as the task is looked at before
            raise ValueError("the data ran out")
        return TASK.loss(model, batch)

    trainer = Trainer(replace(TASK, loss=loss), epochs=1, most=16)
    assert trainer.width == 16 and not trainer.pace.calibration.seconds
    assert [r.getMessage() for r in caplog.records] == [
        "the ways of training were not measured: ValueError: the data ran out"
    ]
    calls.clear()
    trainer.admit("a", TrialSettings("sgd", {"learning_rate": 0.1}, 64, 0))
    calls += [None] * 10
    with pytest.raises(ValueError, match="the data ran out"):
        list(trainer.train_epoch())
    assert trainer.failed == ["a"]


# --- compiling


@pytest.fixture
def considering(monkeypatch, tmp_path):
    """A trainer that may compile, what it compiled, and the seconds of a trial-step that its stopwatch will find."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    made, seconds = [], {FUSED: 1e-3, COMPILED: 0.5e-3}

    def compile_graph(graph, *_):
        made.append(lambda *tensors: graph(*tensors))
        compiling._mark(graph).parent.mkdir(exist_ok=True)
        compiling._mark(graph).touch()
        return made[-1]

    real = Stopwatch.seconds
    monkeypatch.setattr(replay, "compile_graph", compile_graph)
    monkeypatch.setattr(Stopwatch, "seconds", lambda watch, way: real(watch, way) and seconds[way.mode])

    def make(**options):
        trainer = Trainer(TASK, epochs=3, slots=3, mode="fused", **({"compiles": "auto"} | options))
        trainer.objective.replay.patience = 0
        for key in range(3):
            trainer.admit(key, TrialSettings("sgd", {"learning_rate": 0.1}, 64, 0))
        return trainer

    return make, made, seconds


def runners(trainer, name="gradient"):
    """By width, what serves the gradient or the update."""
    (kind,) = trainer.objective.replay._of(name)
    return kind.runners


def test_compiled_code_is_taken_once_it_repays_and_is_faster(considering, caplog):
    caplog.set_level(logging.INFO, "momentum_tuner.trainer")
    make, made, _ = considering
    trainer = make()
    trainer.consider_compiling(1000)
    list(trainer.train_epoch())
    assert made == [] and trainer.pace.calibration == Calibration({fused(3): 1e-3})
    trainer.consider_compiling(1e9)
    names = ("gradient", "update", "evaluation")
    assert len(made) == 3 and [runners(trainer, name) for name in names] == [{3: m} for m in made]
    assert trainer.pace.calibration.seconds == {fused(3): 1e-3, Way(COMPILED, 3, 1): 0.5e-3}
    assert trainer.pace.calibration.compile_seconds > 0
    assert re.search(r"compiled in \d+ s: a step takes 50% of the time it took", caplog.text)
    trainer.release(0)
    list(trainer.train_epoch())
    assert [runners(trainer, name) for name in names] == [{3: m, 2: m} for m in made]
    trainer.consider_compiling(1e9)
    assert len(made) == 3
    # Another run knows that the code is kept, and so compiles for less.
    again = make(calibration=trainer.pace.calibration)
    list(again.train_epoch())
    again.consider_compiling(4_000)
    assert len(made) == 6 and again.pace.calibration.compile_seconds == trainer.pace.calibration.compile_seconds


def test_one_worker_of_a_machine_compiles_for_all_that_share_it(considering):
    make, made, _ = considering
    trainer, other = make(), make()
    trainer.consider_compiling(200_000)
    other.consider_compiling(200_000)
    assert made == []
    with other.objective.replay.turn_to_compile("gradient") as mine:
        settled = trainer.consider_compiling(200_000, sharing=2)
        assert mine and made == [] and trainer.pace.considers and not settled
    settled = trainer.consider_compiling(200_000, sharing=2)
    assert len(made) == 3 and settled
    other.consider_compiling(10_000)  # what is kept is opened for that
    assert len(made) == 6 and other.pace.calibration.compile_seconds is None


def test_what_cannot_be_captured_is_measured_once_and_not_considered_again(considering, monkeypatch):
    make, made, _ = considering

    def refuses(*_):
        raise NotCapturedError("a branch on values")

    monkeypatch.setattr(replay, "capture", refuses)
    trainer = make()
    assert trainer.consider_compiling(1000) and not trainer.pace.considers
    assert made == [] and len(list(trainer.train_epoch())) == 3


@pytest.mark.parametrize("mode", [FUSED, COMPILED])
def test_what_goes_wrong_while_compiling_is_considered_is_left_to_the_trials(considering, monkeypatch, caplog, mode):
    caplog.set_level(logging.INFO, "momentum_tuner.trainer")
    make, _, seconds = considering
    trainer = make()
    del seconds[mode]
    assert trainer.consider_compiling(1e9) and not trainer.pace.considers
    assert [r.getMessage() for r in caplog.records] == [f"training goes on without compiled code: KeyError: '{mode}'"]
    assert len(list(trainer.train_epoch())) == 3
    assert not trainer.objective.replay.is_compiling("gradient")


def test_compiled_code_that_is_slower_is_given_up(considering):
    make, made, seconds = considering
    seconds[COMPILED] = 1.1e-3
    trainer = make()
    trainer.consider_compiling(1e9)
    list(trainer.train_epoch())
    assert len(made) == 2 and made[0] not in runners(trainer).values()
    assert not trainer.objective.replay.is_compiling("update")
    assert trainer.pace.calibration.seconds[Way(COMPILED, 3, 1)] == 1.1e-3
    make(calibration=trainer.pace.calibration).consider_compiling(1e9)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"compiles": "off"}, 0), ({"compiles": "on"}, 3), ({"mode": "sequential"}, 0), ({"slots": 1}, 0)],
)
def test_compiling_is_as_asked_for(considering, options, expected):
    make, made, _ = considering
    if options.get("slots") == 1:
        trainer = Trainer(TASK, epochs=1, slots=1, mode="fused", compiles="auto")
    elif "mode" in options:
        trainer = Trainer(TASK, epochs=1, slots=3, compiles="auto", **options)
    else:
        trainer = make(**options)
        list(trainer.train_epoch())
    trainer.consider_compiling(1e9)
    assert len(made) == expected


def test_where_compiling_fails_nothing_is_noted(considering, monkeypatch, caplog):
    make, _, _ = considering

    def fails(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(replay, "compile_graph", fails)
    trainer = make()
    trainer.consider_compiling(1e9)
    list(trainer.train_epoch())
    assert trainer.pace.calibration == Calibration({fused(3): 1e-3})
    assert [r.getMessage() for r in caplog.records] == [
        "training goes on without torch.compile, which failed: RuntimeError: no compiler"
    ]
