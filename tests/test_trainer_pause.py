"""Epochs that stop at a step: pauses, states in the middle of an epoch, trials that leave there."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from momentum_tuner import Task
from momentum_tuner.tasks import digits_mlp
from momentum_tuner.trainer import (
    Trainer,
)
from momentum_tuner.trainer.data import LoaderSource, MemorySource

from .half_epochs import (
    BATCH,
    COSINE,
    CYCLE,
    EXAMPLES,
    FEATURES,
    MIXED,
    STEPS,
    TASKS,
    Noisy,
    assert_close,
    assert_same_state,
    examples,
    filled,
    make_task,
    norm_and_dropout,
    setting,
    take,
    through_a_file,
    train,
    values,
)
from .live import live_tensors


@pytest.fixture(params=TASKS, scope="module")
def task(request):
    return TASKS[request.param]()


@pytest.fixture(params=["fused", "sequential"])
def mode(request):
    return request.param


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
