"""Loops of the user's own: the context, the trainer behind them, and workers on real studies of them."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from torch import nn

from momentum_tuner import Loop, LoopContext, Task
from momentum_tuner.catalog import OPTIMIZERS
from momentum_tuner.checkpoints import CheckpointStore, SavedSlot
from momentum_tuner.database import Ticket
from momentum_tuner.errors import TaskError, TrialError, describe_failure
from momentum_tuner.optim import make_schedule
from momentum_tuner.space import torch_line
from momentum_tuner.spec import StudySpec
from momentum_tuner.tasks import check_objective, check_task
from momentum_tuner.tasks.packing import pack, unpack
from momentum_tuner.tickets import StudyRecord
from momentum_tuner.trainer import (
    LoopTrainer,
    ScheduleSettings,
    SlotsOutOfMemoryError,
    SlotState,
    TrialSettings,
    trainer_of,
)

from .workbench import TESTS, Bench, sqlite_benches, wait_for

torch.set_num_threads(1)
LOOP = TESTS / "watched_loop.py"


def settings(rate: float = 0.1, *, optimizer: str = "momentum", seed: int = 0, **others: float) -> TrialSettings:
    return TrialSettings(optimizer, {"learning_rate": rate, "momentum": 0.5, **others}, 8, seed)


def trainer(train: Callable, *, epochs: int = 4, metrics=(), **options) -> LoopTrainer:
    return LoopTrainer(Loop(train=train, metrics=metrics), epochs=epochs, **options)


def walk(context: LoopContext) -> Iterator[dict[str, float]]:
    """A point that goes to zero under noise, and saves all it has."""
    point = nn.Parameter(torch.randn(3))
    optimizer = context.optimizer([point])
    average = 0.0
    if state := context.load():
        point.data.copy_(state["point"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
    yield {"valid_loss": point.square().sum()}
    for _ in range(context.epoch, context.epochs):
        noise = torch.randn(3) + float(np.random.rand()) + random.random()
        loss = (point + 0.1 * noise).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average = 0.9 * average + 0.1 * loss.item()
        context.save({"point": point, "optimizer": optimizer.state_dict(), "average": average})
        yield {"valid_loss": point.square().sum() + average, "train_loss": loss}


def curve(owner: LoopTrainer, key: str, epochs: int) -> list[tuple[int, float]]:
    found = []
    for _ in range(epochs):
        found += [(r.epoch, r.valid_loss) for k, r in owner.train_epoch() if k == key]
    return found


# What a Loop may be


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": 3}, "Loop.train must be a generator function, not int"),
        ({"train": walk(None)}, "Loop.train is a generator that runs already"),
        ({"train": lambda: None}, "Loop.train must take one argument, the context"),
        ({"train": walk, "metrics": "accuracy"}, "Loop.metrics must be a list of names, not str"),
        ({"train": walk, "metrics": ["my score"]}, "'my score' is not a name"),
        ({"train": walk, "metrics": ["valid_score"]}, "'valid_score' is taken or has a prefix"),
    ],
)
def test_a_loop_that_cannot_be_used_is_refused_in_one_line(fields, message):
    with pytest.raises(TaskError, match=message.replace("(", r"\(")) as refused:
        Loop(**fields)
    assert "\n" not in str(refused.value)


def test_the_objective_is_checked_against_the_metrics_of_a_loop():
    loop = Loop(train=walk, metrics=["reward"])
    check_task(loop)
    check_objective("valid_loss", loop)
    check_objective("valid_reward", loop)
    with pytest.raises(TaskError, match="the task has no 'valid_accuracy'; its metrics are valid_reward"):
        check_objective("valid_accuracy", loop)
    check_objective("steps_to_target", loop)
    for metric in ("train_loss", "oscillation", "sharpness"):
        with pytest.raises(TaskError, match=f"need not yield {metric}"):
            check_objective(metric, loop)
    with pytest.raises(TaskError, match="contraction needs a task with a known optimum"):
        check_objective("contraction", loop)


def test_the_trainer_follows_from_the_kind_of_task():
    options = dict(epochs=1, slots=None, device="cpu", schedule=ScheduleSettings(), stopping=lambda: False)
    loop = Loop(train=walk)
    assert trainer_of(loop, precision="auto", **options).width == 1
    assert trainer_of(loop, precision="auto", **{**options, "slots": 3}).free == 3
    with pytest.raises(TaskError, match="precision: a Loop sees to its precision itself"):
        trainer_of(loop, precision="float64", **options)
    task = Task(model=lambda: nn.Linear(1, 1), loss=lambda m, b: m.weight.square().sum(), steps_per_epoch=1)
    assert type(trainer_of(task, precision="auto", **options)).__name__ == "Trainer"


# The context


TORCH_OPTIMIZERS = [name for name, optimizer in OPTIMIZERS.items() if optimizer.torch_class]


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_context_builds_the_optimizer_that_best_prints(name, momentum):
    values = {"learning_rate": 0.02, "weight_decay": 0.01, "clip_norm": math.inf}
    own = {"momentum": momentum, "dampening": 0.0, "beta1": 0.8, "beta2": 0.9, "alpha": 0.7, "eps": 1e-6}
    values |= {k: v for k, v in own.items() if k in OPTIMIZERS[name].hyperparameters}
    owner = trainer(walk)
    context = owner._new_context(TrialSettings(name, values, 8, 0))
    model = nn.Linear(2, 1)
    built = context.optimizer(model.parameters())
    printed = eval(torch_line(name, values), {"torch": torch, "model": model})
    assert type(built) is type(printed)
    ours, theirs = ({k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (built, printed))
    assert ours == theirs


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in TORCH_OPTIMIZERS])
def test_an_optimizer_that_torch_has_not_fails_the_trial_in_one_line(name):
    with pytest.raises(TrialError) as failed:
        trainer(walk).admit("a", settings(optimizer=name))
    reason = describe_failure(failed.value)
    assert f"{name} is not in torch.optim, so context.optimizer cannot build it" in reason
    assert "test_loop.py:" in reason and "\n" not in reason


def test_the_optimizer_clips_and_follows_the_schedule_of_the_study():
    rates = []

    def train(context):
        weight = nn.Parameter(torch.ones(1))
        optimizer = context.optimizer([weight], steps_per_epoch=3)
        if state := context.load():
            weight.data.copy_(state["weight"])
        yield {"valid_loss": 1.0}
        for _ in range(context.epoch, context.epochs):
            for _ in range(3):
                before = weight.item()
                weight.grad = torch.full((1,), 100.0)
                optimizer.step()
                rates.append((before - weight.item()) / 2.0)
            context.save({"weight": weight})
            yield {"valid_loss": 1.0}

    schedule = ScheduleSettings("cosine", warmup_epochs=1.0)
    whole = trainer(train, schedule=schedule)
    setting = settings(0.1, optimizer="sgd", clip_norm=2.0)
    whole.admit("a", setting)
    curve(whole, "a", 4)
    expected = make_schedule("cosine", total_steps=12, steps_per_epoch=3, warmup_epochs=1.0)
    factors = expected.learning_rate_factor(np.arange(12))
    assert rates == pytest.approx((0.1 * factors).tolist(), rel=1e-3, abs=1e-6)

    half = trainer(train, schedule=schedule)
    half.admit("a", setting)
    curve(half, "a", 2)
    state = half.export("a")
    assert (state.epoch, state.step) == (2, 6)
    rates.clear()
    other = trainer(train, schedule=schedule)
    other.admit("b", setting, state)
    assert [r.step for _, r in other.train_epoch()] == [9]
    assert rates == pytest.approx((0.1 * factors[6:9]).tolist(), rel=1e-3)


def context_of(schedule_of=None, **hyper):
    values = {"learning_rate": 0.1, "momentum": 0.9, **hyper}
    return LoopContext("momentum", values, 0, torch.device("cpu"), 4, schedule_of)


@pytest.mark.parametrize("how", ["in place", "by name"])
def test_a_gradient_that_a_closure_computes_is_clipped_too(how):
    weight, plain = (nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    ours = context_of(clip_norm=2.0).optimizer([weight])
    theirs = torch.optim.SGD([plain], lr=0.1, momentum=0.9)

    def closure():
        ours.zero_grad()
        loss = 50 * weight.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        loss = ours.step(closure) if how == "in place" else ours.step(closure=closure)
        theirs.zero_grad()
        expected = 50 * plain.square().sum()
        expected.backward()
        torch.nn.utils.clip_grad_norm_([plain], 2.0)
        theirs.step()
        assert torch.equal(loss, expected)
        assert torch.equal(weight, plain)


def test_groups_that_are_added_later_follow_the_schedule_from_their_own_rate():
    def build():
        optimizer = context_of(
            lambda steps: make_schedule("cosine", total_steps=4 * steps, steps_per_epoch=steps)
        ).optimizer([nn.Parameter(torch.ones(1))], steps_per_epoch=5)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.02})
        return optimizer

    factors = make_schedule("cosine", total_steps=20, steps_per_epoch=5).learning_rate_factor(np.arange(20))
    optimizer = build()
    for _ in range(10):
        optimizer.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    optimizer.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.1 * factors[10], 0.02 * factors[10], 0.1 * factors[10]])

    other = build()
    other.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    other.load_state_dict(optimizer.state_dict())  # in which the schedule has changed the rates
    other.step()
    assert [group["lr"] for group in other.param_groups] == pytest.approx([0.1, 0.02, 0.1])


def test_one_cycle_cycles_momentum_too():
    seen = []

    def train(context):
        optimizer = context.optimizer([nn.Parameter(torch.ones(1))], steps_per_epoch=10)
        yield {"valid_loss": 1.0}
        for _ in range(10):
            optimizer.step()
            seen.append(optimizer.param_groups[0]["momentum"])
        yield {"valid_loss": 1.0}

    owner = trainer(train, epochs=1, schedule=ScheduleSettings("one_cycle"))
    owner.admit("a", settings())
    list(owner.train_epoch())
    expected = make_schedule("one_cycle", total_steps=10, steps_per_epoch=10).momentum_factor(np.arange(10))
    assert seen == pytest.approx((0.5 * expected).tolist())
    assert min(seen) < 0.45


def test_a_schedule_needs_the_number_of_steps():
    with pytest.raises(TrialError, match=r"the loop must say how many steps it takes in an epoch"):
        trainer(walk, schedule=ScheduleSettings("cosine")).admit("a", settings())


def test_the_context_has_what_the_trial_is():
    seen = []

    def train(context):
        seen.append(context)
        yield {"valid_loss": 1.0}

    trainer(train, epochs=7).admit("a", TrialSettings("nesterov", {"learning_rate": 0.3, "momentum": 0.8}, 16, 5))
    (context,) = seen
    assert (context.epoch, context.epochs, context.seed, context.device) == (0, 7, 5, torch.device("cpu"))
    assert context.optimizer_name == "nesterov"
    assert context.settings == {
        "learning_rate": 0.3,
        "momentum": 0.8,
        "nesterov": 1.0,
        "weight_decay": 0.0,
        "clip_norm": math.inf,
        "batch_size": 16,
    }
    with pytest.raises(TypeError):
        context.settings["learning_rate"] = 1.0


# States


def test_a_state_comes_back_from_a_checkpoint_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.8, 0.9))
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "numbers": [1, 2.5, math.inf, True, None, "text", (np.float32(0.5), np.int64(3))],
        "none of a name": {"a/b": torch.ones(()), 7: torch.zeros(0), "tensor": "loop/0"},
        "half": torch.ones(2, dtype=torch.bfloat16),
        "columns": torch.arange(6.0).reshape(2, 3).T,
    }
    tensors, rest = pack(state)
    store = CheckpointStore(str(tmp_path))
    reference = store.save("study/a.safetensors", {1: SavedSlot(tensors, {"loop": rest})})
    saved = store.load({1: [reference]})[1]
    found = unpack(saved.tensors, saved.header["loop"])

    def same(ours, theirs):
        if isinstance(theirs, torch.Tensor):
            return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        if isinstance(theirs, dict):
            return list(ours) == list(theirs) and all(same(ours[k], v) for k, v in theirs.items())
        if isinstance(theirs, list | tuple):
            return type(ours) is type(theirs) and all(map(same, ours, theirs))
        return ours == theirs

    assert same(found, state)
    optimizer.load_state_dict(found["optimizer"])
    model.load_state_dict(found["model"])


def test_a_packed_and_an_unpacked_state_are_copies():
    point = torch.ones(2)
    tensors, rest = pack({"point": point})
    point += 1
    unpack(tensors, rest)["point"].add_(5)
    assert unpack(tensors, rest)["point"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (nn.Linear(1, 1), "the state to save must be a mapping"),
        ({"model": {"layers": [nn.Linear(1, 1)]}}, r"state\['model'\]\['layers'\]\[0\] is of type Linear"),
        ({"array": np.ones(2)}, r"state\['array'\] is of type ndarray, which is not saved"),
        ({"seen": {(1, 2): 3}}, r"state\['seen'\] has the key \(1, 2\)"),
    ],
)
def test_what_cannot_be_saved_is_named(state, message):
    with pytest.raises(TypeError, match=message):
        pack(state)


@pytest.mark.parametrize(
    "packed",
    [{"tensor": "loop/9"}, {"mapping": [["a"]]}, {"mapping": [[[], 1]]}, {"other": 1}, [1], {"mapping": [["a", {}]]}],
)
def test_a_broken_state_is_refused(packed):
    with pytest.raises(ValueError, match="state of the loop"):
        unpack({"loop/0": torch.ones(1)}, packed)


# Training


def test_a_trial_gives_the_same_curve_alone_among_others_and_from_any_saved_state():
    alone = trainer(walk, epochs=6)
    first = alone.admit("a", settings(seed=3))
    assert (first.epoch, first.step) == (0, 0)
    expected = curve(alone, "a", 6)
    assert [epoch for epoch, _ in expected] == [1, 2, 3, 4, 5, 6]

    among = trainer(walk, epochs=6, slots=3)
    among.admit("b", settings(0.3, seed=4))
    among.admit("a", settings(seed=3))
    among.admit("c", settings(0.2, seed=3, optimizer="nesterov"))
    assert [among.slot_number(key) for key in "bac"] == [0, 1, 2]
    assert curve(among, "a", 3) == expected[:3]
    state = among.export("a")
    restored = SlotState.restore(state.tensors, json.loads(json.dumps(state.header())))
    assert curve(among, "a", 3) == expected[3:]

    torch.manual_seed(99)
    other = trainer(walk, epochs=6)
    assert other.admit("d", settings(seed=3), restored) is None
    assert curve(other, "d", 3) == expected[3:]


def test_random_numbers_follow_from_the_seed_and_the_epoch():
    def train(context):
        for _ in range(4):
            yield {"valid_loss": 1.0 + torch.rand(1).item() + random.random() + float(np.random.rand())}

    owner = trainer(train, epochs=3, slots=3)
    starts = [owner.admit(key, settings(seed=seed)).valid_loss for key, seed in (("a", 1), ("b", 2), ("c", 1))]
    a, b, c = zip(*([r.valid_loss for _, r in owner.train_epoch()] for _ in range(3)), strict=True)
    assert len({*starts, *a, *b}) == 8
    assert (starts[0], *a) == (starts[2], *c)


def test_the_random_generators_of_the_caller_are_left_alone():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    owner = trainer(walk)
    owner.admit("a", settings())
    list(owner.train_epoch())
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


def test_a_loop_may_yield_without_gradients_and_with_measures_of_its_own():
    def train(context):
        with torch.no_grad():
            yield {"valid_loss": np.float32(2.0), "valid_score": 1}
            yield {
                "valid_loss": 1.0,
                "valid_score": math.nan,
                "spikes": 2.0,
                "step": 40,
                "grad_norm": torch.tensor(3.0),
            }

    owner = trainer(train, metrics=["score"])
    assert owner.admit("a", settings()).metrics == {"score": 1.0}
    ((_, record),) = owner.train_epoch()
    assert torch.is_grad_enabled()
    assert (record.step, record.spikes, record.grad_norm, dict(record.metrics)) == (40, 2, 3.0, {})


def test_steps_are_counted_by_the_first_optimizer_or_are_the_epochs():
    def two(context):
        weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
        first, second = context.optimizer(weights[:1]), context.optimizer(weights[1:])
        yield {"valid_loss": 1.0}
        for _ in range(2):
            for _ in range(5):
                first.step()
            second.step()
            yield {"valid_loss": 1.0}

    def none(context):
        for _ in range(3):
            yield {"valid_loss": 1.0}

    for train, steps in ((two, [5, 10]), (none, [1, 2])):
        owner = trainer(train)
        owner.admit("a", settings())
        assert [r.step for _ in range(2) for _, r in owner.train_epoch()] == steps
        assert owner.steps_per_epoch(batch_size=8) == steps[0]


@pytest.mark.parametrize(
    ("initial", "after", "diverged"),
    [
        (2.0, {"valid_loss": 19.9}, False),
        (2.0, {"valid_loss": 20.1}, True),
        (2.0, {"valid_loss": math.nan}, True),
        (2.0, {"valid_loss": 1.0, "train_loss": math.inf}, True),
        (-1.0, {"valid_loss": 7.9}, False),
        (-1.0, {"valid_loss": 8.1}, True),
    ],
)
def test_a_trial_is_diverged_above_ten_times_its_initial_loss_or_where_that_is_not_finite(initial, after, diverged):
    def train(context):
        yield {"valid_loss": initial}
        yield after

    owner = trainer(train)
    owner.admit("a", settings())
    ((_, record),) = owner.train_epoch()
    assert record.diverged_at_step == (1 if diverged else None)
    assert record.valid_loss == (after["valid_loss"] if math.isfinite(after["valid_loss"]) else None)


def yields(*values):
    def train(context):
        yield from values

    return train


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (lambda context: None, "Loop.train must be a generator: it has no yield, it returned NoneType"),
        (yields(), "Loop.train ended after 0 of 4 epochs: it must yield before training and after each epoch"),
        (yields({"valid_loss": 1.0}), "Loop.train ended after 0 of 4 epochs"),
        (yields(0.3), "before training Loop.train yields float: yield a mapping"),
        (yields({"valid_los": 0.3}), "before training Loop.train yields 'valid_los' (did you mean 'valid_loss'?)"),
        (yields({}), "before training Loop.train yields no valid_loss"),
        (yields({"valid_loss": math.nan}), "before training Loop.train yields nan for valid_loss"),
        (
            yields({"valid_loss": None}),
            "before training Loop.train yields NoneType for valid_loss: it must be",
        ),
        (yields({"valid_loss": torch.ones(2)}), "Loop.train yields Tensor of shape [2] for valid_loss"),
        (yields({"valid_loss": 1.0}, {"valid_loss": 1.0, "step": -3}), "after epoch 1 Loop.train yields -3 for step"),
        (yields({"valid_loss": 1.0}, {"valid_loss": "good"}), "after epoch 1 Loop.train yields str for valid_loss"),
    ],
)
def test_a_loop_that_yields_garbage_or_ends_early_has_one_clear_reason(train, reason):
    owner = trainer(train)
    with pytest.raises(TrialError) as failed:
        owner.admit("a", settings())
        list(owner.train_epoch())
    found = describe_failure(failed.value)
    assert reason in found and "\n" not in found
    assert owner.failed == owner.keys


def test_an_error_in_a_loop_fails_that_trial_alone_and_says_where():
    def train(context):
        yield {"valid_loss": 1.0}
        for epoch in range(context.epochs):
            if context.seed == 1 and epoch == 1:
                raise RuntimeError("the environment\ncrashed")
            yield {"valid_loss": 1.0}

    owner = trainer(train, slots=3)
    for key, seed in (("a", 0), ("b", 1), ("c", 2)):
        owner.admit(key, settings(seed=seed))
    assert [key for key, _ in owner.train_epoch()] == ["a", "b", "c"]
    found = []
    with pytest.raises(TrialError, match=r"RuntimeError: the environment crashed \(.*test_loop.py:\d+\)"):
        found.extend(key for key, _ in owner.train_epoch())
    assert owner.failed == ["b"]
    owner.release("b")
    assert [key for key, _ in owner.train_epoch()] == ["c", "a"]  # whose turn it was, then who had had it
    assert owner.failed == []


def test_a_pause_comes_between_two_epochs():
    owner = trainer(walk, slots=3)
    for key in "abc":
        owner.admit(key, settings())
    assert [(k, r.epoch) for k, r in owner.train_epoch(lambda: True)] == [("a", 1)]
    assert [(k, r.epoch) for k, r in owner.train_epoch()] == [("b", 1), ("c", 1), ("a", 2)]


def test_a_slot_is_free_for_another_trial_once_it_is_released():
    ended = []

    def train(context):
        try:
            while True:
                yield {"valid_loss": 1.0}
        finally:
            ended.append(context.seed)

    owner = trainer(train, slots=2)
    owner.admit("a", settings(seed=1))
    owner.admit("b", settings(seed=2))
    with pytest.raises(ValueError, match="all 2 slots are taken"):
        owner.admit("c", settings())
    owner.release("a")
    assert ended == [1]
    owner.admit("c", settings())
    assert (owner.keys, owner.slot_number("c"), owner.free) == (["b", "c"], 0, 0)
    assert owner.sharpness(["b", "c"]) == {"b": None, "c": None}
    with pytest.raises(ValueError, match="holds a slot already"):
        owner.width = 3
        owner.admit("b", settings())


def test_a_trial_that_saved_nothing_begins_anew():
    def train(context):
        assert context.load() is None
        for value in (3.0, 2.0, 1.0):
            yield {"valid_loss": value}

    owner = trainer(train)
    owner.admit("a", settings())
    curve(owner, "a", 1)
    state = owner.export("a")
    assert (state.epoch, state.tensors, state.loop) == (0, {}, None)
    other = trainer(train)
    assert other.admit("a", settings(), SlotState.restore({}, state.header())) is None
    assert curve(other, "a", 2) == [(1, 2.0), (2, 1.0)]


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_what_is_saved_before_the_first_yield_is_not_the_state_after_an_epoch(after):
    def train(context):
        point = nn.Parameter(torch.randn(3))
        optimizer = context.optimizer([point])
        if state := context.load():
            point.data.copy_(state["point"])
            optimizer.load_state_dict(state["optimizer"])

        def save():
            context.save({"point": point, "optimizer": optimizer.state_dict()})

        save()
        yield {"valid_loss": point.square().sum().item()}
        for epoch in range(context.epoch, context.epochs):
            optimizer.zero_grad()
            point.square().sum().backward()
            optimizer.step()
            if epoch % 2:  # after the epochs 2, 4, ...
                save()
            yield {"valid_loss": point.square().sum().item()}

    owner = trainer(train, epochs=6)
    owner.admit("a", settings(seed=3))
    whole = [record for _ in range(6) for _, record in owner.train_epoch()]
    assert [record.step for record in whole] == [1, 2, 3, 4, 5, 6]

    other, saved = trainer(train, epochs=6), after // 2 * 2
    other.admit("a", settings(seed=3))
    curve(other, "a", after)
    state = other.export("a")
    assert (state.epoch, state.step) == (saved, saved)
    other = trainer(train, epochs=6)
    other.admit("a", settings(seed=3), state)
    (first,) = [record for _, record in other.train_epoch()]
    assert (first.epoch, first.step) == (saved + 1, saved + 1)
    assert other.export("a").epoch == saved  # nor after a resume
    rest = [first.valid_loss, *(loss for _, loss in curve(other, "a", 5 - saved))]
    assert rest == [record.valid_loss for record in whole[saved:]]


def test_a_loop_that_saves_must_load():
    def train(context):
        for _ in range(3):
            context.save({"a": 1})
            yield {"valid_loss": 1.0}

    owner = trainer(train)
    owner.admit("a", settings())
    curve(owner, "a", 1)
    other = trainer(train)
    other.admit("a", settings(), owner.export("a"))
    with pytest.raises(TrialError, match="saves its state but does not load it"):
        list(other.train_epoch())


def test_a_state_of_another_kind_of_task_is_refused():
    with pytest.raises(ValueError, match="not one of a loop"):
        trainer(walk).admit("a", settings(), SlotState({"parameters": torch.ones(3)}, 2, 10, 1.0))


def test_after_a_loss_of_memory_a_trial_goes_on_from_its_saved_state_without_showing_epochs_twice():
    full = []

    def train(context):
        point = nn.Parameter(torch.randn(2))
        if state := context.load():
            point.data.copy_(state["point"])
        yield {"valid_loss": 1.0 + point.square().sum()}
        for epoch in range(context.epoch, context.epochs):
            if full and epoch == 3:
                full.clear()
                raise torch.OutOfMemoryError("CUDA out of memory")
            point.data.add_(0.1 * torch.randn(2))
            if epoch == 0:
                context.save({"point": point})
            yield {"valid_loss": 1.0 + point.square().sum()}

    whole = trainer(train)
    whole.admit("a", settings())
    expected = curve(whole, "a", 4)
    full.append(True)
    owner = trainer(train, slots=2)
    owner.admit("a", settings())
    assert curve(owner, "a", 3) == expected[:3]
    with pytest.raises(SlotsOutOfMemoryError) as lost:
        list(owner.train_epoch())
    assert lost.value.keys == ["a"]
    assert curve(owner, "a", 1) == expected[3:]


# Workers


@pytest.fixture
def make_bench(tmp_path, migrated_sqlite) -> Iterator[Callable[[str], Bench]]:
    with sqlite_benches(tmp_path, migrated_sqlite) as make:
        yield make


@pytest.fixture
def bench(make_bench) -> Bench:
    return make_bench("bench")


RATES = (0.02, 0.05, 0.1)


def submit(bench: Bench, rates=RATES, *, epochs: int = 5, save_every: int = 1, **sections) -> StudyRecord:
    document = {
        "name": "watched-loop",
        "task": {"factory": "watched_loop.py:build", "params": {"folder": str(bench.folder), "save_every": save_every}},
        "optimizers": ["momentum"],
        "space": {"learning_rate": {"low": 1e-4, "high": 20.0}},
        "fixed": {"batch_size": 8, "momentum": 0.5},
        "budget": {"trials": len(rates), "epochs": epochs},
        "pruner": {"name": "none"},
        "confirm": {"seeds": 0},
        **sections,
    }
    return bench.put(StudySpec.model_validate(document), rates)


def start(bench: Bench, name: str = "a", **changes):
    return bench.start(name, trust=(str(LOOP),), **{"slots": None, **changes})


def trained(folder: Path) -> list[tuple[float, int]]:
    """Learning rate and number of each epoch that was begun, in order."""
    try:
        lines = (folder / "epochs").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(rate, epoch) for _, _, rate, epoch in map(json.loads, lines)]


def undisturbed(make_bench, **options):
    other = make_bench("undisturbed")
    study = submit(other, **options)
    start(other, checkpoints=None).join()
    return other.curves(study)


def test_a_worker_trains_one_trial_after_the_other_to_the_end(bench):
    study = submit(bench, (0.02, 15.0, 0.1))
    start(bench).join()
    assert bench.is_done(study)
    rows = bench.rows(Ticket.outcome, Ticket.value, Ticket.slot, Ticket.measures)
    assert [row[0] for row in rows] == ["complete", "diverged", "complete"]
    curves = bench.curves(study)
    assert rows[0][1] == min(r.valid_loss for r in curves[0][1:])
    assert rows[1][1] == curves[1][0].valid_loss  # worth what the untrained model was
    assert rows[2][3]["valid_largest"] == pytest.approx(
        min(curves[2][1:], key=lambda r: r.valid_loss).metrics["largest"]
    )
    assert [rate for rate, _ in trained(bench.folder)] == [0.02] * 5 + [15.0] * len(curves[1][1:]) + [0.1] * 5
    assert {row[2] for row in rows} == {0}


def test_rungs_prune_trials_of_a_loop(bench):
    rates = (0.1, 0.1, 0.1, 1e-4, 1e-4)
    study = submit(
        bench, rates, epochs=4, pruner={"name": "successive_halving", "min_epochs": 1, "reduction_factor": 2}
    )
    start(bench).join()
    outcomes = [row[0] for row in bench.rows(Ticket.outcome)]
    assert outcomes[3:] == ["pruned", "pruned"]
    curves = bench.curves(study)
    assert [len(curves[i]) for i in (3, 4)] == [2, 2]


def test_an_error_in_a_loop_fails_its_trial_with_the_reason(bench):
    bench.ask_for("fail", 3)
    study = submit(bench, (0.02,))
    start(bench).join()
    ((outcome, reason),) = bench.rows(Ticket.outcome, Ticket.reason)
    assert outcome == "failed"
    assert reason.startswith("Loop.train raised RuntimeError: this setting fails (") and "watched_loop.py:" in reason
    assert len(bench.curves(study)[0]) == 3


def test_a_drained_trial_goes_on_from_its_last_epoch_to_the_last_bit(bench, make_bench):
    expected = undisturbed(make_bench)
    study = submit(bench)
    bench.ask_for("hold", 3)
    first = start(bench)
    wait_for(lambda: trained(bench.folder)[-1:] == [(0.02, 3)])
    first.stop.asked = True
    bench.no_more("hold")
    first.join()
    assert bench.rows(Ticket.state, Ticket.attempts) == [("open", 0)] * 3
    assert [header["epoch"] for header in bench.saved()] == [3]
    start(bench, "b").join()
    assert trained(bench.folder)[:5] == [(0.02, epoch) for epoch in (1, 2, 3, 4, 5)]
    assert bench.curves(study) == expected
    bench.check_exact(study)


@pytest.mark.parametrize(("save_every", "first_again"), [(1, 4), (2, 3)])
def test_a_long_epoch_is_given_up_at_a_drain_and_trained_again_from_the_last_saved_state(
    bench, make_bench, monkeypatch, save_every, first_again
):
    monkeypatch.setattr("momentum_tuner.trainer.loop.PATIENCE_SECONDS", 0.3)
    expected = undisturbed(make_bench, rates=RATES[:1], save_every=save_every)
    study = submit(bench, RATES[:1], save_every=save_every)
    bench.ask_for("hold", 4)
    first = start(bench)
    wait_for(lambda: trained(bench.folder)[-1:] == [(0.02, 4)])
    first.drain()  # while the epoch waits
    assert bench.rows(Ticket.state, Ticket.attempts) == [("open", 0)]
    assert bench.epochs() == 3
    bench.no_more("hold")
    start(bench, "b").join()
    assert [epoch for _, epoch in trained(bench.folder)] == [1, 2, 3, 4, *range(first_again, 6)]
    assert bench.curves(study) == expected
    bench.check_exact(study)


def test_a_trial_of_a_worker_that_is_killed_goes_on_under_its_number_from_its_last_checkpoint(bench, make_bench):
    expected = undisturbed(make_bench, rates=RATES[:2])
    study = submit(bench, RATES[:2])
    bench.ask_for("kill", 4)
    process = bench.spawn()
    bench.order(process, trust=(str(LOOP),), slots=None, checkpoint_seconds=0.0)
    assert process.end() == -9
    bench.no_more("kill")
    before = bench.rows(Ticket.trial_number, Ticket.attempts, Ticket.state)
    assert before == [(0, 1, "running"), (None, 0, "open")]
    assert [header["epoch"] for header in bench.saved()] == [3]
    start(bench, "b").join()
    assert [epoch for rate, epoch in trained(bench.folder) if rate == 0.02] == [1, 2, 3, 4, 4, 5]
    assert bench.curves(study) == expected
    bench.check_exact(study)


def test_several_slots_take_turns_and_leave_each_other_undisturbed(bench, make_bench):
    expected = undisturbed(make_bench)
    study = submit(bench)
    start(bench, slots=2).join()
    assert trained(bench.folder)[:4] == [(0.02, 1), (0.05, 1), (0.02, 2), (0.05, 2)]
    assert bench.curves(study) == expected
    with bench.database.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Ticket).where(Ticket.outcome == "complete")) == 3


def test_the_best_setting_of_a_loop_is_confirmed_on_fresh_seeds_that_pair_the_contestants(bench):
    study = submit(bench, (0.05, 0.1), epochs=3, confirm={"seeds": 2}, optimizers=["momentum", "nesterov"])
    start(bench).join()
    assert bench.is_done(study)
    tickets = bench.rows(Ticket.kind, Ticket.optimizer, Ticket.seed, Ticket.outcome, Ticket.measures)
    confirmed = [row for row in tickets if row[0] == "confirm"]
    assert {row[3] for row in confirmed} == {"complete"}
    starts = {(row[1], row[2]): row[4]["initial_valid_loss"] for row in confirmed}
    contestants, seeds = ({key[i] for key in starts} for i in (0, 1))
    assert len(contestants) >= 3 and len(seeds) == 2 and len(starts) == 2 * len(contestants)
    for seed in seeds:
        assert len({starts[contestant, seed] for contestant in contestants}) == 1
    assert len(set(starts.values())) == 2


def test_patience_ends_python_code_in_its_middle_and_nothing_after_it(monkeypatch):
    from momentum_tuner.trainer.patience import AbandonedError, Patience

    began = time.monotonic()
    closed = []
    with pytest.raises(AbandonedError), Patience(lambda: True, 0.1):
        try:
            while time.monotonic() < began + 60:
                time.sleep(0.001)
        finally:
            closed.append(True)
    assert closed == [True]
    assert time.monotonic() - began < 30
    for _ in range(20):  # what comes in time is left alone, also at the very end of the time
        with Patience(lambda: True, 0.1):
            pass
    assert replace(SlotState({}), epoch=1).epoch == 1
