"""Epochs that stop at a step: pauses, states in the middle of an epoch, and memory that runs out there."""

import functools
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from momentum_tuner import Task
from momentum_tuner.metrics import SpikeState
from momentum_tuner.tasks import digits_mlp, quadratic
from momentum_tuner.trainer import (
    ScheduleSettings,
    SlotsOutOfMemoryError,
    SlotState,
    Trainer,
    TrialSettings,
    UnfinishedStepError,
    is_out_of_memory,
    update,
)
from momentum_tuner.trainer import stack as stack_module
from momentum_tuner.trainer.data import LoaderSource, MemorySource
from momentum_tuner.trainer.objective import Objective
from momentum_tuner.trainer.stack import Stack

from .live import live_tensors

torch.set_num_threads(1)

EXAMPLES, FEATURES, BATCH = 48, 4, 8
STEPS = EXAMPLES // BATCH


def examples(count=EXAMPLES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    return x, torch.sin(x.sum(1, keepdim=True)) + 0.1 * torch.randn(count, 1, generator=generator)


def mean_square(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def perceptron():
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1))


def norm_and_dropout():
    first = (nn.Linear(FEATURES, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3))
    return nn.Sequential(*first, nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 1))


def make_task(model=perceptron, **changes):
    fields = {
        "model": model,
        "loss": mean_square,
        "train": TensorDataset(*examples()),
        "valid": TensorDataset(*examples(40, seed=1)),
        "metrics": {"error": lambda model, batch: (model(batch[0]) - batch[1]).abs().mean()},
    }
    return Task(**(fields | changes))


class Noisy(TensorDataset):
    """Examples with noise of torch's generator."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + 0.1 * torch.randn(FEATURES), y


TASKS = {
    "mlp": make_task,
    "batch norm and dropout": lambda: make_task(norm_and_dropout),
    "loader": lambda: make_task(train=DataLoader(Noisy(*examples()), batch_size=BATCH, shuffle=True)),
    "landscape": lambda: quadratic(dim=3, kappa=10, steps_per_epoch=STEPS),
}
COSINE = ScheduleSettings("cosine", {"final_fraction": 0.01}, warmup_epochs=0.5)
CYCLE = ScheduleSettings("one_cycle")


def setting(optimizer="momentum", learning_rate=0.02, beta=0.9, seed=0, batch_size=BATCH, **more):
    hyper = {"learning_rate": learning_rate, "momentum": beta, "beta1": beta, "beta2": 0.99, "eps": 1e-8, "alpha": 0.9}
    return TrialSettings(optimizer, hyper | more, batch_size, seed)


MIXED = {
    "momentum": setting(weight_decay=1e-3),
    "nesterov": setting("nesterov", 0.01, clip_norm=0.5),
    "adam": setting("adam", 0.01, seed=1),
    "lookahead": setting("nesterov_lookahead", 0.01, 0.8, seed=1),
    "rmsprop": setting("rmsprop", 0.005, weight_decay=1e-2),
    "diverging": setting("sgd", 1e6),
    "small": setting("momentum", 0.01, batch_size=BATCH // 2),
    "large": setting("adam", 0.01, batch_size=3 * BATCH, seed=2),
}


@pytest.fixture(params=TASKS, scope="module")
def task(request):
    return TASKS[request.param]()


@pytest.fixture(params=["fused", "sequential"])
def mode(request):
    return request.param


def values(record):
    """A record without the time it took."""
    return {name: value for name, value in asdict(record).items() if name != "seconds"}


def filled(task, settings, slots=None, **options):
    trainer = Trainer(task, slots=slots or len(settings), **({"epochs": 3, "mode": "fused"} | options))
    for key, one in settings.items():
        trainer.admit(key, one)
    return trainer


def train(trainer, epochs=1, pause=None, found=None):
    """By key, the values of the records, until each trial has trained some epochs more."""
    found = {} if found is None else found
    wanted = {key: len(found.get(key, [])) + epochs for key in trainer.keys}
    for _ in range(10_000):
        for key, record in trainer.train_epoch(pause):
            found.setdefault(key, []).append(values(record))
        if all(len(found.get(key, [])) >= count for key, count in wanted.items()):
            return found
    raise AssertionError("it does not end")


def take(trainer, steps, found=None):
    """Take some steps and no more; what they yield goes to `found`."""
    for _ in range(steps):
        for key, record in trainer.train_epoch(lambda: True):
            (found if found is not None else {}).setdefault(key, []).append(values(record))


def through_a_file(state):
    """The state as another process reads it."""
    content = safetensors.torch.save(dict(state.tensors))
    text = json.dumps(state.header(), allow_nan=False)
    return SlotState.restore(safetensors.torch.load(content), json.loads(text))


def assert_same_state(found, expected):
    assert set(found.tensors) == set(expected.tensors)
    for name, value in expected.tensors.items():
        assert found.tensors[name].dtype == value.dtype
        assert torch.equal(found.tensors[name].nan_to_num(), value.nan_to_num()), name
    assert replace(found, tensors={}, seconds=0.0) == replace(expected, tensors={}, seconds=0.0)


def assert_close(found, expected, rel):
    """Curves that agree up to rounding."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=rel, abs=1e-12)
        assert {name for name, v in ours.items() if v is None} == {name for name, v in theirs.items() if v is None}
        for name, value in theirs.items():
            if name != "metrics" and value is not None:
                assert ours[name] == pytest.approx(value, rel=rel, abs=1e-12), name


# --- pauses


@pytest.mark.parametrize("schedule", [COSINE, CYCLE], ids=["cosine", "one_cycle"])
def test_an_epoch_that_pauses_at_every_step_is_bit_equal_to_one_that_does_not(task, mode, schedule):
    control = filled(task, MIXED, mode=mode, schedule=schedule)
    expected = train(control, 2)
    trainer = filled(task, MIXED, mode=mode, schedule=schedule)
    assert train(trainer, 2, pause=lambda: True) == expected
    for key in MIXED:
        assert_same_state(trainer.export(key), control.export(key))


def test_every_call_makes_progress_and_no_step_is_taken_after_the_word_to_stop():
    steps = []

    class Counting(nn.Linear):
        def forward(self, x):
            if self.training:
                steps.append(1)
            return super().forward(x)

    trainer = filled(make_task(lambda: Counting(FEATURES, 1)), {"a": setting()})
    steps.clear()
    for call in range(1, STEPS + 1):
        assert list(trainer.train_epoch(lambda: True)) == []
        assert len(steps) == call == trainer.export("a").epoch_steps
    assert [key for key, _ in trainer.train_epoch(lambda: True)] == ["a"]  # only evaluates
    assert len(steps) == STEPS and trainer.export("a").epoch_steps == 0


def test_the_question_is_put_before_every_step_and_evaluation_but_the_first():
    asked = []
    trainer = filled(make_task(), {"a": setting(), "b": setting(batch_size=4)})
    list(trainer.train_epoch(lambda: asked.append(1) or False))
    assert len(asked) == STEPS + 1 + 2 * STEPS + 1 - 1


def test_an_error_of_the_question_itself_does_no_harm():
    def broken():
        raise OSError("no answer")

    expected = train(filled(make_task(), {"a": setting()}))
    trainer = filled(make_task(), {"a": setting()})
    with pytest.raises(OSError, match="no answer"):
        list(trainer.train_epoch(broken))
    assert trainer.export("a").epoch_steps == 1
    assert train(trainer) == expected


def test_batch_sizes_that_had_their_turn_come_last_after_a_pause():
    settings = {size: setting(batch_size=size) for size in (8, 12, 16)}  # 6, 4 and 3 steps
    expected = train(filled(make_task(), settings), 3)
    trainer, order, found = filled(make_task(), settings), [], {}
    for _ in range(6):
        answers = iter([False] * 8)  # the first call ends in the midst of the second batch size
        records = list(trainer.train_epoch(lambda answers=answers: next(answers, True)))
        order += [key for key, _ in records]
        for key, record in records:
            found.setdefault(key, []).append(values(record))
    assert order == [8, 12, 16] * 3
    assert found == expected


def test_new_trials_wait_for_the_end_of_the_epoch_and_then_train_along():
    settings = {"a": setting(), "b": setting(seed=1)}
    expected = train(filled(make_task(), settings | {"late": setting(seed=2)}), 2)
    trainer = filled(make_task(), settings, slots=3)
    take(trainer, 2)
    assert trainer.admit("late", setting(seed=2)).epoch == 0
    assert trainer.export("late").epoch_steps == 0
    assert trainer.export("a").epoch_steps == 2
    assert [key for key, _ in trainer.train_epoch()] == ["a", "b"]
    found = train(trainer, 2)
    assert len(trainer._batches) == 1
    assert_close(found["late"], expected["late"], 1e-4)


def test_the_seconds_of_a_record_are_those_of_all_its_parts():
    trainer = filled(make_task(), {"a": setting(), "b": setting()})
    take(trainer, 3)
    state = trainer.export("a")
    assert 0 < state.seconds < 10
    assert through_a_file(state).seconds == state.seconds
    other = Trainer(make_task(), epochs=3, slots=1, mode="fused")
    other.admit("a", setting(), replace(state, seconds=1000.0))
    first, second = (dict(other.train_epoch())["a"].seconds for _ in range(2))
    assert 1000 < first < 1010 and 0 < second < 10


# --- states in the middle of an epoch


@functools.cache
def whole(task, mode):
    """A task's trials of one batch size, trained without a break: the curves and the states."""
    settings = {key: one for key, one in MIXED.items() if one.batch_size == BATCH}
    control = filled(task, settings, mode=mode, schedule=CYCLE)
    curves = train(control, 3)
    return curves, {key: control.export(key) for key in settings}


@pytest.mark.parametrize("at", [1, 3, STEPS - 1, STEPS])
@pytest.mark.parametrize("after", [0, 1])
def test_a_state_from_the_middle_of_an_epoch_goes_on_elsewhere_bit_equal(task, mode, at, after):
    settings = {key: one for key, one in MIXED.items() if one.batch_size == BATCH}
    options = {"mode": mode, "schedule": CYCLE}
    expected, last = whole(task, mode)
    trainer = filled(task, settings, **options)
    found = train(trainer, after) if after else {}
    take(trainer, at)
    states = {key: through_a_file(trainer.export(key)) for key in settings}
    assert {(s.epoch, s.step, s.epoch_steps) for key, s in states.items() if key != "diverging"} == {
        (after, after * STEPS, at)
    }
    assert all(s.tensors["part/table"].shape == (at, 5) for s in states.values())
    other = Trainer(task, epochs=3, slots=len(settings), **options)
    for key, state in reversed(states.items()):
        assert other.admit(key, settings[key], state) is None
        assert_same_state(other.export(key), state)
    assert train(other, 3 - after, found=found) == expected
    for key in settings:
        assert_same_state(other.export(key), last[key])


def test_a_state_of_the_middle_of_an_epoch_is_a_copy():
    trainer = filled(make_task(norm_and_dropout), {"a": setting("adam")})
    take(trainer, 2)
    state = trainer.export("a")
    kept = {name: value.clone() for name, value in state.tensors.items()}
    train(trainer)
    assert {"part/table", "part/limit", "part/taken", "moment/second_moment"} < set(kept)
    assert all(torch.equal(state.tensors[name], value) for name, value in kept.items())


def test_a_trial_moved_twice_in_mid_epoch_between_widths_of_1_8_and_64_has_its_curve():
    task = digits_mlp(hidden=16)
    few = {n: TensorDataset(*(t[:320] for t in getattr(task, n).tensors)) for n in ("train", "valid")}
    task = replace(task, **few)
    it = setting("nesterov", 0.05, batch_size=32, weight_decay=1e-3, clip_norm=1.0)
    options = {"precision": "float64", "epochs": 3, "schedule": COSINE}
    expected = train(filled(task, {"it": it}, **options), 3)["it"]
    names = ("adam", "momentum", "sgd")
    others = [setting(names[i % 3], 10.0 ** (-1 - i % 3), seed=i % 4, batch_size=32) for i in range(63)]
    for widths in ((1, 8, 64), (64, 1, 8), (8, 64, 1)):
        state, found = None, {}
        for width, epoch, at in zip(widths, (0, 1, 3), (4, 7, 0), strict=True):
            trainer = filled(task, dict(enumerate(others[: width - 1])), slots=width, **options)
            trainer.admit("it", it, state)
            while (state := trainer.export("it")).epoch < epoch or state.epoch_steps < at:
                take(trainer, 1, found)
            state = through_a_file(state)
            assert (state.epoch, state.epoch_steps) == (epoch, at)
        assert_close(found["it"], expected, 1e-8)


def test_states_of_different_steps_first_end_their_epochs_and_then_train_together():
    settings = {at: setting(seed=at) for at in (0, 2, 5)}
    expected = {at: train(filled(make_task(), {at: one}), 3)[at] for at, one in settings.items()}
    trainer = Trainer(make_task(), epochs=3, slots=4, mode="fused")
    for at, one in settings.items():
        source = filled(make_task(), {at: one})
        take(source, at)
        trainer.admit(at, one, source.export(at) if at else None)
    trainer.admit("again", settings[2], trainer.export(2))
    found = {}
    for key, record in trainer.train_epoch():
        found.setdefault(key, []).append(values(record))
    assert set(found) == {2, 5, "again"}  # the new one waits
    assert sorted(len(batch.slots) for batch in trainer._batches) == [1, 2]
    train(trainer, 2, found=found)
    assert [len(batch.slots) for batch in trainer._batches] == [4]
    assert_close(found.pop("again"), expected[2], 1e-4)
    for at, curve in found.items():
        assert_close(curve, expected[at][: len(curve)], 1e-4)
    assert [len(found[at]) for at in (0, 2, 5)] == [2, 3, 3]


def test_a_state_admitted_during_a_pause_joins_the_slots_at_its_step():
    trainer = filled(make_task(), {"a": setting()}, slots=3)
    take(trainer, 2)
    trainer.admit("b", setting(), trainer.export("a"))
    take(trainer, 1)
    assert [(len(b.slots), b.position) for b in trainer._batches] == [(2, 3)]
    found = train(trainer)
    assert found["a"] == found["b"]


class Slide(nn.Module):
    """A slope of 1, down from theta = 1, with another loss below 0: lr 0.3 gets there after four steps."""

    def __init__(self, below):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        self.below = below

    def forward(self):
        theta = self.theta[0]
        return torch.where(theta < 0, self.below + (theta - theta.detach()), theta)


@pytest.mark.parametrize("below", [math.nan, 10.001])
@pytest.mark.parametrize("at", [3, 4, 5, 8])
def test_a_trial_that_diverges_before_or_after_it_moves_has_its_step(at, below):
    task = Task(model=lambda: Slide(below), loss=lambda model, batch: model(), steps_per_epoch=9)
    settings = {"it": setting("sgd", 0.3, 0.0), "other": setting("sgd", 0.01, 0.0)}
    expected = train(filled(task, settings))
    trainer = filled(task, settings)
    take(trainer, at)
    other = Trainer(task, epochs=3, slots=2, mode="fused")
    for key, one in settings.items():
        other.admit(key, one, through_a_file(trainer.export(key)))
    assert train(other) == expected
    assert expected["it"][0]["diverged_at_step"] == 5 and expected["other"][0]["diverged_at_step"] is None


def test_a_trial_that_diverged_on_one_minibatch_stays_so_after_it_moves():
    x, y = examples()
    batches = [(x[i : i + 8], y[i : i + 8] * (100 if i == 16 else 1)) for i in range(0, EXAMPLES, 8)]
    task = make_task(train=batches)
    expected = train(filled(task, {"it": setting()}))
    trainer = filled(task, {"it": setting()})
    take(trainer, 4)
    other = Trainer(task, epochs=3, slots=1, mode="fused")
    other.admit("it", setting(), through_a_file(trainer.export("it")))
    assert expected["it"][0]["diverged_at_step"] == 3
    assert train(other) == expected


# --- release


def test_a_trial_released_in_mid_epoch_leaves_and_its_key_may_come_back_at_once():
    settings = {key: setting(("momentum", "adam")[i % 2], seed=i) for i, key in enumerate("abcd")}
    expected = train(filled(make_task(norm_and_dropout), settings), 2)
    trainer = filled(make_task(norm_and_dropout), settings)
    take(trainer, 3)
    trainer.release("a")
    assert trainer.free == 1
    trainer.admit("a", setting("rmsprop", seed=9))
    take(trainer, 1)
    batch = next(b for b in trainer._batches if b.position)
    assert [s.key for s in batch.slots] == ["c", "b", "d"] and len(batch._stack.rows[0]) == 3
    assert batch._stack.buffers["model.1.running_mean"].shape == (3, 8)
    assert trainer.export("c").tensors["part/table"].shape == (4, 5)
    found = train(trainer, 1)
    assert [r["epoch"] for r in found["a"]] == [1]
    for key in "bcd":
        assert_close(found[key][:1], expected[key][:1], 1e-4)
    alone = train(filled(make_task(norm_and_dropout), {"a": setting("rmsprop", seed=9)}))
    assert_close(found["a"], alone["a"], 1e-4)


def test_a_trial_released_while_its_neighbours_records_are_read_has_none():
    trainer = filled(make_task(), {"a": setting(), "b": setting(), "c": setting(batch_size=4)})
    seen = []
    for key, record in trainer.train_epoch():
        seen.append((key, record.epoch))
        if key == "a":
            trainer.release("b")
            trainer.release("c")
            trainer.admit("b", setting())
    assert seen == [("a", 1)]
    assert [(key, r.epoch) for key, r in trainer.train_epoch()] == [("a", 2), ("b", 1)]


def test_when_all_trials_of_a_paused_batch_leave_nothing_of_it_stays():
    trainer = filled(make_task(), {"a": setting(), "b": setting()})
    take(trainer, 2)
    trainer.release("a")
    trainer.release("b")
    assert list(trainer.train_epoch()) == [] and trainer._batches == [] and not trainer._leaving


def test_nothing_grows_with_the_number_of_pauses_exports_and_moves():
    task = make_task(norm_and_dropout)
    trainer = filled(task, {"a": setting(), "b": setting("adam")}, epochs=50, slots=2)

    def sizes():
        tensors = live_tensors()
        held = [trainer._batches, trainer._slots, trainer._entering, trainer._leaving, trainer._starts]
        return [len(h) for h in held], len(tensors), sum(t.nbytes for t in tensors)

    def go(epochs):
        for _ in range(epochs * (STEPS + 1)):
            take(trainer, 1)
            state = trainer.export("b")
            trainer.release("b")
            trainer.admit("b", setting("adam"), state)
            trainer.export("a")
        del state

    take(trainer, 2)
    go(2)
    before = sizes()
    go(8)
    assert sizes() == before


# --- data from the middle of an epoch


def same_batches(found, expected):
    found, expected = list(found), list(expected)
    return len(found) == len(expected) and all(
        a.shared == b.shared and all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("orders", [[(0, 1)], [(0, 1), (1, 1), (0, 2)]], ids=["shared", "own"])
def test_a_source_begins_an_epoch_at_any_step(orders):
    data = TensorDataset(*examples())
    loaders = [
        DataLoader(data, batch_size=8, shuffle=True),
        DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1)),
        DataLoader(Noisy(*examples()), batch_size=8, shuffle=True, num_workers=1),
    ]
    sources = [MemorySource(data.tensors, 8)]
    sources += [LoaderSource(loader, STEPS, torch.device("cpu"), None) for loader in loaders]
    for source in sources:
        whole = list(source.epoch(orders))
        assert len(whole) == STEPS
        for start in (1, STEPS - 1, STEPS):
            assert same_batches(source.epoch(orders, start=start), whole[start:])


# --- headers and states from elsewhere


STRANGE = SpikeState(0.1, math.inf, 1 / 3, math.nan)


def test_a_header_is_plain_json_and_keeps_every_float():
    state = SlotState({}, 3, 30, 0.1 + 0.2, SpikeState(5e-324, -1e308, 1 / 3, 0.7), 2, 1e-17)
    assert SlotState.restore({}, json.loads(json.dumps(state.header(), allow_nan=False))) == state
    for loss in (math.nan, math.inf, -math.inf, None):
        strange = SlotState({}, 0, 0, loss, STRANGE)
        text = json.dumps(strange.header(), allow_nan=False)
        back = SlotState.restore({}, json.loads(text))
        assert repr(back) == repr(strange)


GOOD = SlotState({}, 3, 30, 0.5, SpikeState(0.5, 0.5, 0.5, 0.5), 2, 1.0).header()
HOSTILE = {
    "epoch": [-1, 1.0, "1", None, True, [1], 10**400, 2**60, {}],
    "step": [-1, 30.0, [], 10**30],
    "epoch_steps": [-1, None, "2", 1e300],
    "initial_loss": [[0.5], "0.5", "NaN", True, math.nan, math.inf, 10**400, {}, None],
    "seconds": [-1.0, "inf", "nan", None, math.nan, [], False, 10**400],
    "spikes": [None, [], 1.0, "x", {}, GOOD["spikes"] | {"weight": -1.0}, GOOD["spikes"] | {"mean": [1.0]}],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, bad in HOSTILE.items() for v in bad])
def test_a_hostile_header_is_refused_in_one_line(name, value):
    assert SlotState.restore({}, GOOD | {"more": 1}).epoch == 3
    with pytest.raises(ValueError, match=name if name != "spikes" else "spikes|weight|mean") as caught:
        SlotState.restore({}, GOOD | {name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("header", [None, [], "x", 3, {}, *({k: v for k, v in GOOD.items() if k != n} for n in GOOD)])
def test_a_header_that_lacks_something_is_refused(header):
    with pytest.raises(ValueError, match="header"):
        SlotState.restore({}, header)


def changed(state, **tensors):
    kept = {n: t for n, t in state.tensors.items() if tensors.get(n.replace("/", "_"), "") is not None}
    named = {n: tensors[n.replace("/", "_")] for n in kept if n.replace("/", "_") in tensors}
    return replace(state, tensors=kept | named)


STATE_FAULTS = {
    "a parameter too many": lambda s: changed(s, parameters=torch.zeros(9)),
    "another dtype": lambda s: changed(s, parameters=s.tensors["parameters"].double()),
    "two dimensions": lambda s: changed(s, previous_update=s.tensors["previous_update"][None]),
    "a moment missing": lambda s: changed(s, moment_velocity=None),
    "another rule's moment": lambda s: replace(s, tensors={**s.tensors, "moment/first_moment": torch.zeros(129)}),
    "no tensor": lambda s: changed(s, parameters=[0.0] * 129),
    "a buffer missing": lambda s: replace(
        s, tensors={n: t for n, t in s.tensors.items() if not n.endswith("running_var")}
    ),
    "an unknown buffer": lambda s: replace(s, tensors={**s.tensors, "buffer/x": torch.zeros(1)}),
    "no table": lambda s: changed(s, part_table=None),
    "a short table": lambda s: changed(s, part_table=s.tensors["part/table"][:1]),
    "a narrow table": lambda s: changed(s, part_table=s.tensors["part/table"][:, :4]),
    "a table without steps": lambda s: replace(s, epoch_steps=0),
    "steps beyond the epoch": lambda s: changed(
        replace(s, epoch_steps=STEPS + 1), part_table=torch.zeros(STEPS + 1, 5)
    ),
    "huge steps": lambda s: replace(s, epoch_steps=2**50),
    "negative steps": lambda s: replace(s, epoch_steps=-1),
    "a limit for several": lambda s: changed(s, part_limit=torch.zeros(2)),
    "more steps taken than done": lambda s: changed(s, part_taken=torch.tensor(4.0)),
    "half a step": lambda s: changed(s, part_taken=torch.tensor(0.5)),
    "no number of steps": lambda s: changed(s, part_taken=torch.tensor(math.nan)),
    "a taken step without loss": lambda s: changed(s, part_table=torch.full((3, 5), math.nan)),
}


@pytest.mark.parametrize("fault", STATE_FAULTS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(fault):
    task = make_task(norm_and_dropout)
    trainer = filled(task, {"a": setting(), "b": setting(seed=1)}, slots=3)
    take(trainer, 3)
    state = trainer.export("a")
    with pytest.raises(ValueError, match=r"^the state") as caught:
        trainer.admit("c", setting(), STATE_FAULTS[fault](state))
    assert "\n" not in str(caught.value)
    assert trainer.free == 1 and trainer.keys == ["a", "b"] and trainer._entering == []
    assert train(trainer) == undisturbed_pair()


@functools.cache
def undisturbed_pair():
    return train(filled(make_task(norm_and_dropout), {"a": setting(), "b": setting(seed=1)}))


def test_a_state_of_another_optimizer_or_batch_size_is_refused():
    trainer = filled(make_task(), {"a": setting()}, slots=3)
    take(trainer, STEPS)
    state = trainer.export("a")
    with pytest.raises(ValueError, match="tensor 'moment/"):
        trainer.admit("b", setting("adam"), state)
    with pytest.raises(ValueError, match="6 steps of an epoch of 3"):
        trainer.admit("b", setting(batch_size=16), state)
    trainer.admit("b", setting("nesterov"), state)  # the same rule


# --- memory that runs out


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_what_running_out_of_memory_looks_like():
    with pytest.raises(RuntimeError) as real:
        torch.empty(10**15)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:75] . not enough memory: you tried"))
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    for other in (RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("x"), TypeError()):
        assert not is_out_of_memory(other)


class Scarce:
    """Memory for so many rows, from some call on: what needs more fails after it did its work."""

    def __init__(self, monkeypatch, owner, name, rows_of, most, first=1, times=10**9):
        self.calls, self.failures = 0, 0
        real = getattr(owner, name)

        def wrapped(one, *args, **kwargs):
            self.calls += 1
            out = real(one, *args, **kwargs)
            if rows_of(one, args) > most and self.calls >= first and self.failures < times:
                self.failures += 1
                out_of_memory()
            return out

        monkeypatch.setattr(owner, name, wrapped)


POINTS = {
    "gradient": (Objective, "gradient", lambda one, args: len(args[0][0])),
    "norms": (Stack, "gradient_norms", lambda one, args: len(args[0][0])),
    "update": (Stack, "make_room", lambda one, args: len(one.rows[0])),
    "evaluation": (Objective, "evaluate", lambda one, args: len(args[0][0])),
    "stacking": (Stack, "__init__", lambda one, args: len(args[1])),
}
SIX = {i: setting(("momentum", "adam", "rmsprop")[i % 3], 0.01, seed=i % 2, weight_decay=1e-3) for i in range(6)}


def six_task(loader=False):
    data = {"train": DataLoader(Noisy(*examples()), batch_size=BATCH, shuffle=True)} if loader else {}
    return make_task(norm_and_dropout, **data)


@functools.cache
def undisturbed(loader=False, **options):
    """The curves of the six where memory suffices."""
    return train(filled(six_task(loader), SIX, **options), 3)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("first", [1, 3])
def test_a_call_that_ran_out_of_memory_is_as_if_it_had_not_been(point, first, mode, monkeypatch):
    expected = undisturbed(mode=mode)
    trainer = filled(six_task(), SIX, mode=mode)
    scarce = Scarce(monkeypatch, *POINTS[point], most=5, first=first, times=3)
    found, errors = {}, 0
    while any(len(found.get(key, [])) < 3 for key in SIX):
        try:
            for key, record in trainer.train_epoch():
                found.setdefault(key, []).append(values(record))
        except SlotsOutOfMemoryError as error:
            errors += 1
            assert sorted(error.keys) == sorted(trainer.failed or SIX) == list(SIX)
            assert "CUDA out of memory" in str(error) and "6 slots" in str(error) and "\n" not in str(error)
            assert error.__context__ is None and error.__cause__ is None  # which would keep its tensors alive
            states = {key: through_a_file(trainer.export(key)) for key in SIX}
            assert len({(s.epoch, s.epoch_steps) for s in states.values()}) == 1
    assert found == expected
    assert errors == scarce.failures == (0 if (point, first) == ("stacking", 3) else 3)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("loader", [False, True], ids=["tensors", "loader"])
def test_half_of_the_slots_go_on_here_and_the_others_elsewhere(point, loader, monkeypatch):
    task = six_task(loader)
    expected = undisturbed(loader, precision="float64")
    trainer = filled(task, SIX, precision="float64")
    with monkeypatch.context() as patch:
        Scarce(patch, *POINTS[point], most=2, first=1 if point in ("stacking", "evaluation") else 4)
        queue, found = {}, {}
        while True:
            try:
                for key, record in trainer.train_epoch():
                    found.setdefault(key, []).append(values(record))
            except SlotsOutOfMemoryError:
                keep = len(trainer.keys) // 2
                for key in trainer.keys[keep:]:
                    queue[key] = through_a_file(trainer.export(key))
                    trainer.release(key)
                trainer.width = keep
                continue
            if all(len(found[key]) == 3 for key in trainer.keys):
                break
    assert len(queue) == 5 and trainer.width == 1 and trainer.free == 0
    (batch,) = trainer._batches
    rows = [batch._stack.rows, batch._stack.previous, batch._stack.update]
    rows += [segments for s in batch._stack.slices for segments in s.moments.values()]
    tensors = [*batch._stack.buffers.values(), *(segment for segments in rows for segment in segments)]
    assert {len(t) for t in tensors} == {1}
    other = Trainer(task, epochs=3, slots=6, precision="float64", mode="fused")
    for key, state in queue.items():
        other.admit(key, SIX[key], state)
    while any(len(found.get(key, [])) < 3 for key in SIX):
        for key, record in other.train_epoch():
            if len(found.get(key, [])) < 3:
                found.setdefault(key, []).append(values(record))
    for key in SIX:
        assert_close(found[key], expected[key], 1e-8)


def test_after_an_evaluation_without_memory_only_the_evaluation_is_left(monkeypatch):
    trainer = filled(make_task(), {"a": setting(), "b": setting(seed=1)})
    expected = train(filled(make_task(), {"a": setting(), "b": setting(seed=1)}))
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "evaluate", out_of_memory)
        with pytest.raises(SlotsOutOfMemoryError):
            list(trainer.train_epoch())
    state = through_a_file(trainer.export("a"))
    assert state.epoch_steps == STEPS and state.epoch == 0
    other = Trainer(make_task(), epochs=3, slots=2, mode="fused")
    other.admit("a", setting(), state)
    other.admit("b", setting(seed=1), trainer.export("b"))
    monkeypatch.setattr(Objective, "gradient", out_of_memory)
    assert train(trainer) == expected and train(other) == expected


def test_a_trial_for_whose_start_memory_runs_out_has_no_slot(monkeypatch):
    trainer = filled(make_task(), {"a": setting()}, slots=2)
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "evaluate", out_of_memory)
        with pytest.raises(SlotsOutOfMemoryError, match="1 slot: OutOfMemoryError: CUDA") as caught:
            trainer.admit("b", setting(seed=1))
    assert caught.value.keys == ["b"] and trainer.keys == ["a"] and trainer.free == 1
    assert trainer.admit("b", setting(seed=1)).epoch == 0
    assert train(trainer) == train(filled(make_task(), {"a": setting(), "b": setting(seed=1)}))


def test_data_for_which_memory_runs_out_are_asked_for_again(monkeypatch):
    calls = []
    real = MemorySource.epoch

    def epoch(self, orders, start=0):
        for step, batch in enumerate(real(self, orders, start), start=start):
            calls.append(step)
            if step == 3 and calls.count(3) < 3:
                out_of_memory()
            yield batch

    expected = train(filled(make_task(), {"a": setting()}))
    monkeypatch.setattr(MemorySource, "epoch", epoch)
    trainer = filled(make_task(), {"a": setting()})
    calls.clear()
    for _ in range(2):
        with pytest.raises(SlotsOutOfMemoryError):
            list(trainer.train_epoch())
    assert train(trainer) == expected
    assert calls == [0, 1, 2, 3, 3, 3, 4, 5]


def test_a_step_that_breaks_off_in_its_update_is_never_trained_or_exported(monkeypatch):
    settings = {"a": setting(), "b": setting("adam"), "c": setting(batch_size=4)}
    expected = train(filled(make_task(), settings))
    trainer = filled(make_task(), settings)
    take(trainer, 2)
    with monkeypatch.context() as patch:
        patch.setattr(stack_module, "move", lambda *args: (update.move(*args), out_of_memory()))
        with pytest.raises(UnfinishedStepError, match="CUDA out of memory"):
            list(trainer.train_epoch())
    assert trainer.failed == ["a", "b"]
    with pytest.raises(UnfinishedStepError):
        list(trainer.train_epoch())
    for key in "ab":
        with pytest.raises(UnfinishedStepError):
            trainer.export(key)
        trainer.release(key)
    assert train(trainer) == {"c": expected["c"]}


def test_no_width_is_chosen_for_which_memory_did_not_suffice_when_measuring(monkeypatch):
    real = Objective.gradient

    def gradient(self, rows, *args, **kwargs):
        if len(rows[0]) > 20:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return real(self, rows, *args, **kwargs)

    monkeypatch.setattr(Objective, "gradient", gradient)
    assert Trainer(make_task(), epochs=1).width in (4, 8, 16)


WITH_LITTLE_MEMORY = """
import resource
import torch
from torch import nn
from torch.utils.data import TensorDataset
from momentum_tuner import Task
from momentum_tuner.trainer import SlotsOutOfMemoryError, Trainer, TrialSettings

torch.set_num_threads(1)
WIDE = 500_000  # an activation of 8 slots and 2 examples has 32 MB, and a step needs several
ROOM = 75_000_000


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.bias, self.norm = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1)), nn.BatchNorm1d(1)

    def forward(self, x):
        x = self.norm(x)
        return (x.expand(-1, WIDE) * self.scale).sin().mean(1, keepdim=True) + self.bias


x = torch.linspace(-1, 1, 8)[:, None]
task = Task(
    model=Net,
    loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
    train=TensorDataset(x, x),
    valid=TensorDataset(x[:1], x[:1]),
)


def full():
    trainer = Trainer(task, epochs=2, slots=8, mode="fused", precision="float32")
    for key in range(8):
        trainer.admit(key, TrialSettings("momentum", {"learning_rate": 0.1, "momentum": 0.1 * key}, 2, 0))
    return trainer


def train(trainer):
    curves, failures = {}, 0
    while any(len(curves.get(key, [])) < 2 for key in trainer.keys):
        try:
            for key, record in trainer.train_epoch():
                curves.setdefault(key, []).append((record.epoch, record.train_loss, record.valid_loss))
        except SlotsOutOfMemoryError as error:
            assert "allocate memory" in str(error), error
            failures += 1
            trainer.width = len(trainer.keys) // 2
            for key in trainer.keys[trainer.width :]:
                trainer.export(key)
                trainer.release(key)
    return curves, failures


expected, failures = train(full())
assert failures == 0 and len(expected) == 8
trainer = full()
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
found, failures = train(trainer)
assert failures in (1, 2, 3) and len(trainer.keys) == 8 // 2**failures, (failures, found)
for key in trainer.keys:
    for ours, theirs in zip(found[key], expected[key], strict=True):
        assert all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
print("halved", failures)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_a_process_that_really_runs_out_of_memory_goes_on_with_fewer_slots():
    done = subprocess.run(
        [sys.executable, "-c", WITH_LITTLE_MEMORY],
        # No arenas of 64 MB for threads, and no large blocks in a heap that cannot shrink.
        env=os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("halved")


# --- errors of the user's own code


class Fragile(nn.Linear):
    """A model that fails when told to."""

    broken = False

    def forward(self, x):
        if type(self).broken and self.training and x.shape[-2] == BATCH:
            raise ZeroDivisionError("my mistake")
        return super().forward(x)


def test_an_error_of_the_users_model_ends_the_trials_of_its_batch_alone(monkeypatch, mode):
    task = make_task(lambda: Fragile(FEATURES, 1))
    settings = {"a": setting(), "b": setting(seed=1), "c": setting(batch_size=4)}
    expected = train(filled(task, settings, mode=mode), 2)
    trainer = filled(task, settings, mode=mode)
    take(trainer, 2)
    monkeypatch.setattr(Fragile, "broken", True)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="my mistake"):
            list(trainer.train_epoch())
        assert trainer.failed == ["a", "b"]
    state = trainer.export("a")
    assert state.epoch_steps == 2
    for key in trainer.failed:
        trainer.release(key)
    found = train(trainer, 2)
    assert found == {"c": expected["c"]} and trainer.failed == []
    monkeypatch.setattr(Fragile, "broken", False)
    trainer.admit("a", settings["a"], state)
    assert_close(train(trainer)["a"], expected["a"][:1], 1e-4)


def test_an_error_of_the_users_data_leaves_the_slots_at_their_last_step():
    class Flaky:
        def __init__(self):
            self.failures = 0

        def __len__(self):
            return STEPS

        def __iter__(self):
            for i, rows in enumerate(torch.randperm(EXAMPLES).view(STEPS, BATCH)):
                if i == 3 and self.failures:
                    self.failures -= 1
                    raise OSError("the disk is away")
                yield tuple(t[rows] for t in examples())

    data = Flaky()
    task = make_task(train=data)
    expected = train(filled(task, {"a": setting(), "b": setting(seed=1)}))
    trainer = filled(task, {"a": setting(), "b": setting(seed=1)})
    data.failures = 1
    with pytest.raises(OSError, match="the disk is away"):
        list(trainer.train_epoch())
    assert {trainer.export(key).epoch_steps for key in "ab"} == {3}
    assert train(trainer) == expected
