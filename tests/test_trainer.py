"""Slots: admission, refill, divergence and release; models that vmap refuses; random numbers; data of every kind."""

import itertools
import logging
import math
import random
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from momentum_tuner import Task
from momentum_tuner.errors import TaskError
from momentum_tuner.tasks import (
    check_task,
    digits_cnn,
    digits_mlp,
    digits_rnn,
    digits_transformer,
    double_well,
    quadratic,
    rosenbrock,
)
from momentum_tuner.trainer import ScheduleSettings, SlotState, Trainer, TrialSettings
from momentum_tuner.trainer.data import MemorySource, TrainingData
from momentum_tuner.trainer.dropout import KeyedDropout, _Calls, key_dropout, step_keys
from momentum_tuner.trainer.randomness import RandomStream, mix_seed

from .half_epochs import BATCH, FEATURES, mean_square, perceptron
from .live import live_tensors

torch.set_num_threads(1)

EXAMPLES = 64
STEPS = EXAMPLES // BATCH


def examples(count=EXAMPLES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    y = torch.sin(x.sum(1, keepdim=True)) + 0.1 * torch.randn(count, 1, generator=generator)
    return x, y


def make_task(model=perceptron, **changes):
    fields = {
        "model": model,
        "loss": mean_square,
        "train": TensorDataset(*examples()),
        "valid": TensorDataset(*examples(40, seed=1)),
    }
    return Task(**(fields | changes))


def momentum(learning_rate=0.05, beta=0.9, seed=0, batch_size=BATCH, optimizer="momentum", **more):
    return TrialSettings(optimizer, {"learning_rate": learning_rate, "momentum": beta, **more}, batch_size, seed)


def values(record):
    """A record without the time it took."""
    return {name: value for name, value in asdict(record).items() if name != "seconds"}


def assert_close(found, expected, rel=1e-4):
    """Records that agree up to rounding."""
    found, expected = values(found), values(expected)
    assert found.pop("metrics") == pytest.approx(expected.pop("metrics"), rel=rel)
    assert {name for name, v in found.items() if v is None} == {name for name, v in expected.items() if v is None}
    numbers = {name: v for name, v in expected.items() if v is not None}
    assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=rel)


def train(trainer, epochs=1):
    """By key, the records of some epochs."""
    found = {}
    for _ in range(epochs):
        for key, record in trainer.train_epoch():
            found.setdefault(key, []).append(record)
    return found


def curves(task, settings, epochs=3, **options):
    """By key, the records of trials trained together from the first epoch on."""
    trainer = Trainer(task, epochs=epochs, slots=len(settings), **options)
    for key, one in settings.items():
        trainer.admit(key, one)
    return train(trainer, epochs)


def alone(task, settings, epochs=3, **options):
    return curves(task, {"it": settings}, epochs, **options)["it"]


def assert_same_curve(found, expected, rel=1e-4):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rel)


def only_stack(trainer):
    """The tensors of a trainer's one batch of slots."""
    (batch,) = trainer._batches
    return batch._stack


@pytest.fixture(params=["fused", "sequential"])
def mode(request):
    return request.param


# --- admission, refill, slots


def test_a_released_slot_is_taken_at_once_while_its_neighbours_go_on(mode):
    task = make_task()
    settings = {"a": momentum(0.05), "b": momentum(0.01, optimizer="nesterov"), "c": momentum(0.1, 0.5, seed=1)}
    late = momentum(0.02, 0.8, seed=2)
    control = curves(task, settings, 4, mode=mode)

    trainer = Trainer(task, epochs=4, slots=3, mode=mode)
    for key, one in settings.items():
        trainer.admit(key, one)
    found = train(trainer, 2)
    number = trainer.slot_number("b")
    trainer.release("b")
    assert trainer.free == 1
    start = trainer.admit("d", late)
    assert (start.epoch, start.step) == (0, 0)
    assert trainer.slot_number("d") == number
    assert trainer.keys == ["a", "c", "d"] and trainer.free == 0
    for key, records in train(trainer, 2).items():
        found.setdefault(key, []).extend(records)

    assert [r.epoch for r in found["a"]] == [1, 2, 3, 4]
    assert [r.epoch for r in found["d"]] == [1, 2] and [r.step for r in found["d"]] == [STEPS, 2 * STEPS]
    for key in ("a", "c"):  # at equal width: to the last bit
        assert [values(r) for r in found[key]] == [values(r) for r in control[key]]
    assert_same_curve(found["d"], alone(task, late, 2, mode=mode))


def test_slots_have_numbers_and_the_lowest_free_one_is_taken():
    trainer = Trainer(make_task(), epochs=1, slots=4)
    for key in "abcd":
        trainer.admit(key, momentum())
    assert [trainer.slot_number(key) for key in "abcd"] == [0, 1, 2, 3]
    trainer.release("c")
    trainer.release("a")
    trainer.admit("e", momentum())
    assert trainer.slot_number("e") == 0
    trainer.admit("f", momentum())
    assert trainer.slot_number("f") == 2
    assert trainer.slot_number("d") == 3


def test_a_slot_too_many_and_a_key_held_already_are_refused():
    trainer = Trainer(make_task(), epochs=1, slots=1)
    trainer.admit("a", momentum())
    with pytest.raises(ValueError, match="'a' holds a slot already"):
        trainer.admit("a", momentum())
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        trainer.admit("b", momentum())
    with pytest.raises(KeyError):
        trainer.release("b")


def test_a_trial_that_leaves_before_it_trained_is_never_trained():
    trainer = Trainer(make_task(), epochs=1, slots=2)
    trainer.admit("a", momentum())
    trainer.admit("b", momentum())
    trainer.release("a")
    assert set(train(trainer)) == {"b"}


def test_a_key_may_come_back_at_once_with_other_settings():
    task, trainer = make_task(), Trainer(make_task(), epochs=2, slots=1)
    trainer.admit("a", momentum(0.01))
    train(trainer)
    trainer.release("a")
    trainer.admit("a", momentum(0.1, batch_size=16))
    assert_same_curve(train(trainer)["a"], alone(task, momentum(0.1, batch_size=16), 1))
    trainer.release("a")
    assert train(trainer) == {}


def test_epoch_0_is_the_untrained_model():
    x, y = examples(40, seed=1)
    task = make_task(metrics={"error": lambda model, batch: (model(batch[0]) - batch[1]).abs().mean()})
    trainer = Trainer(task, epochs=1, slots=1)
    record = trainer.admit("a", momentum(seed=7))
    torch.manual_seed(7)
    model = perceptron()
    with torch.no_grad():
        error = model(x) - y
    assert record.valid_loss == pytest.approx(error.square().mean().item(), rel=1e-6)
    assert record.metrics == pytest.approx({"error": error.abs().mean().item()}, rel=1e-6)
    missing = {name for name, value in asdict(record).items() if value is None}
    assert missing == {
        *("train_loss", "grad_norm", "grad_norm_max", "layer_grad_ratio", "update_norm"),
        *("oscillation", "spikes", "seconds", "distance", "diverged_at_step"),
    }
    assert (record.epoch, record.step) == (0, 0)


def test_a_trial_that_goes_on_has_no_epoch_0():
    trainer = Trainer(make_task(), epochs=2, slots=2)
    trainer.admit("a", momentum())
    train(trainer)
    assert trainer.admit("b", momentum(), trainer.export("a")) is None
    records = train(trainer)
    assert [r.epoch for r in records["a"] + records["b"]] == [2, 2]
    assert_same_curve(records["b"], records["a"], rel=1e-12)


def test_an_exported_state_is_a_copy():
    trainer = Trainer(make_task(), epochs=3, slots=1)
    trainer.admit("a", momentum())
    untrained = trainer.export("a")
    train(trainer)
    state = trainer.export("a")
    kept = {name: value.clone() for name, value in state.tensors.items()}
    train(trainer)
    assert (untrained.epoch, untrained.step, untrained.initial_loss) == (0, 0, None)
    assert (state.epoch, state.step) == (1, STEPS) and state.initial_loss is not None
    assert all(torch.equal(state.tensors[name], value) for name, value in kept.items())
    assert not torch.equal(state.tensors["parameters"], untrained.tensors["parameters"])
    assert set(kept) == {"parameters", "previous_update", "moment/velocity"}


def test_without_new_trials_the_batch_shrinks():
    trainer = Trainer(make_task(), epochs=4, slots=6)
    settings = {i: momentum(0.01 * (i + 1), optimizer=["momentum", "nesterov_lookahead"][i % 2]) for i in range(6)}
    control = curves(make_task(), settings, 3)
    for key, one in settings.items():
        trainer.admit(key, one)
    train(trainer)
    for key in (0, 1, 4):
        trainer.release(key)
    found = train(trainer, 2)
    stack = only_stack(trainer)
    rows = [stack.rows, stack.previous, stack.update, *(m for s in stack.slices for m in s.moments.values())]
    assert [{len(segment) for segment in segments} for segments in rows] == [{3}, {3}, {3}, {1}, {2}]
    assert set(found) == {2, 3, 5}
    for key, records in found.items():
        assert_same_curve(records, control[key][1:])
    for key in (2, 3, 5):
        trainer.release(key)
    assert train(trainer) == {} and trainer._batches == []


def test_trials_of_different_batch_sizes_train_in_batches_of_their_own():
    task = make_task()
    settings = {size: momentum(0.05, batch_size=size) for size in (4, 8, 12, 100)}
    found = curves(task, settings, 2)
    assert {size: r[0].step for size, r in found.items()} == {4: 16, 8: 8, 12: 5, 100: 1}
    for size, records in found.items():
        assert_same_curve(records, alone(task, settings[size], 2))
    trainer = Trainer(task, epochs=2, slots=4)
    assert [trainer.steps_per_epoch(size) for size in (4, 8, 12, 100)] == [16, 8, 5, 1]


def test_training_data_are_held_once_for_all_batch_sizes():
    trainer = Trainer(make_task(), epochs=1, slots=1, precision="float64")
    for size in (4, 8, 12):
        trainer.steps_per_epoch(size)
    held = {t.data_ptr() for source in trainer._sources.values() for t in source.tensors}
    assert len(held) == 2


def test_nothing_grows_with_the_number_of_trials_done():
    trainer = Trainer(make_task(), epochs=1, slots=4)

    def sizes():
        held = [trainer._batches, trainer._slots, trainer._entering, trainer._leaving]
        tensors = live_tensors()
        return [len(h) for h in held], len(tensors), sum(t.nbytes for t in tensors), len(trainer._starts)

    def run(first, last):
        for i in range(first, last):
            if trainer.free == 0:
                trainer.release(i - 4)
            names = ("momentum", "adam", "nesterov")
            more = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
            trainer.admit(i, momentum(0.01, seed=i, optimizer=names[i % 3], batch_size=(32, 64)[i % 2], **more))
            if i % 4 == 3:
                assert len(train(trainer)) == 4

    run(0, 40)
    before = sizes()
    run(40, 244)  # so that the last four are alike
    assert sizes() == before
    assert before[0] == [2, 4, 0, 0] and before[3] <= 16


# --- divergence


class Slide(nn.Module):
    """A slope of 1, down from theta = 1, with another loss below theta = 0: lr 0.3 gets there after four steps."""

    def __init__(self, below):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        self.below = below

    def forward(self):
        theta = self.theta[0]
        return torch.where(theta < 0, self.below + (theta - theta.detach()), theta)  # the slope goes on below


def slide(below, steps=10):
    return Task(model=lambda: Slide(below), loss=lambda model, batch: model(), steps_per_epoch=steps)


def slide_trials():
    return {"left": momentum(0.01, 0.0), "it": momentum(0.3, 0.0), "right": momentum(0.02, 0.5)}


@pytest.mark.parametrize("below", [math.nan, math.inf, -math.inf, 10.001, 1e300])
def test_a_slot_diverges_at_the_exact_step_and_stays_there(below, mode):
    task, settings = slide(below), slide_trials()
    trainer = Trainer(task, epochs=2, slots=3, mode=mode)
    for key, one in settings.items():
        trainer.admit(key, one)
    found = train(trainer)
    record = found["it"][0]
    assert record.diverged_at_step == 5 == record.step  # theta is 1, 0.7, 0.4, 0.1, -0.2 before steps 1 to 5
    assert trainer.export("it").tensors["parameters"].item() == pytest.approx(-0.2)
    assert record.train_loss == pytest.approx((1 + 0.7 + 0.4 + 0.1) / 4)  # of the steps taken
    assert record.grad_norm == record.grad_norm_max == 1.0
    assert record.update_norm == pytest.approx(0.3)
    trainer.release("it")
    found["left"] += train(trainer)["left"]

    control = curves(task, settings | {"it": momentum(0.001, 0.0)}, 2, mode=mode)
    assert control["it"][0].diverged_at_step is None
    assert [values(r) for r in found["left"]] == [values(r) for r in control["left"]]
    assert values(found["right"][0]) == values(control["right"][0])


@pytest.mark.parametrize("below", [10.0, 9.99, 0.0, -50.0])
def test_a_loss_up_to_ten_times_the_initial_one_is_not_diverged(below, mode):
    record = curves(slide(below), slide_trials(), 1, mode=mode)["it"][0]
    assert record.diverged_at_step is None and record.step == 10
    assert record.valid_loss == pytest.approx(below)


def test_later_epochs_still_compare_with_the_first_loss():
    records = curves(slide(10.001, steps=2), slide_trials(), 3)["it"]
    assert [r.diverged_at_step for r in records] == [None, None, 5]
    assert [r.step for r in records] == [2, 4, 5]
    assert records[1].valid_loss == pytest.approx(10.001)
    assert records[2].train_loss is None and records[2].oscillation is None  # no step of the epoch was taken


def test_the_limit_moves_with_a_trial_to_another_trainer():
    for below, expected in ((10.001, 5), (10.0, None)):
        first, second = (Trainer(slide(below, steps=2), epochs=3, slots=1) for _ in range(2))
        first.admit("it", momentum(0.3, 0.0))
        train(first, 2)
        second.admit("it", momentum(0.3, 0.0), first.export("it"))
        assert train(second)["it"][0].diverged_at_step == expected


def test_a_model_that_is_broken_after_the_last_step_has_diverged_at_that_step():
    record = curves(slide(math.nan, steps=4), slide_trials(), 1)["it"][0]
    assert record.valid_loss is None
    assert record.diverged_at_step == 4 and record.step == 4


def test_a_trial_that_starts_broken_diverges_at_step_1(mode):
    task = make_task(model=lambda: nn.Linear(FEATURES, 1))
    trainer = Trainer(task, epochs=1, slots=2, mode=mode)
    start = Trainer(task, epochs=1, slots=1)
    start.admit("it", momentum())
    state = start.export("it")
    trainer.admit("it", momentum(), replace(state, tensors=dict(state.tensors, parameters=torch.full((5,), math.nan))))
    trainer.admit("other", momentum(0.03))
    found = train(trainer)
    assert (found["it"][0].diverged_at_step, found["it"][0].step, found["it"][0].train_loss) == (1, 1, None)
    assert_same_curve(found["other"], alone(task, momentum(0.03), 1))


@pytest.mark.parametrize("rate", [1e2, 1e18, 1e38])
def test_the_neighbours_of_an_exploding_network_train_as_if_it_were_not_there(rate, mode):
    task = replace(digits_cnn(channels=2, batch_norm=True), steps_per_epoch=5)
    others = {
        "a": momentum(0.05, weight_decay=1e-3, batch_size=16),
        "b": momentum(0.01, clip_norm=0.1, batch_size=16, seed=1),
        "c": momentum(0.01, optimizer="nesterov_lookahead", batch_size=16),
    }
    found, control = (curves(task, {"it": momentum(r, batch_size=16)} | others, 2, mode=mode) for r in (rate, 1e-3))
    assert found["it"][0].diverged_at_step is not None
    assert control["it"][0].diverged_at_step is None
    for key in others:
        assert [values(r) for r in found[key]] == [values(r) for r in control[key]]


# --- models that vmap cannot batch


class Branching(nn.Module):
    """Its flow depends on what it computes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 8), nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.first(x)
        hidden = hidden.tanh() if hidden.mean() > 0 else hidden.relu()
        return self.second(hidden)


class Counting(Branching):
    """It uses an operation that vmap would loop over the slots for."""

    def forward(self, x):
        hidden = self.first(x)
        return self.second(hidden * (1 + 0.1 * torch.histc(hidden.detach(), 4)[0]).tanh())


class Packed(nn.Module):
    """A recurrent network over sequences of different lengths."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        lengths = torch.arange(len(x)) % FEATURES + 1
        packed = nn.utils.rnn.pack_padded_sequence(x[:, :, None], lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.recurrent(packed)[1][0][0])


class Drawing(Branching):
    """Dropout by function."""

    def forward(self, x):
        return self.second(F.dropout(self.first(x), 0.3, self.training))


class Noisy(Branching):
    """Noise in training and in evaluation, as in a variational autoencoder."""

    def forward(self, x):
        hidden = self.first(x)
        return self.second(hidden + 0.1 * torch.randn_like(hidden))


class SkippingAtRandom(Branching):
    """Stochastic depth by Python's generator, which vmap does not see."""

    def forward(self, x):
        hidden = self.first(x)
        if self.training and random.random() < 0.5:
            hidden = hidden.tanh() + np.random.normal()
        return self.second(hidden)


REFUSED = {
    Branching: "data-dependent control flow",
    Counting: "no batching rule for aten::histc",
    Packed: "",
    Drawing: "random",
    Noisy: "random",
    SkippingAtRandom: "Python's or NumPy's random generator",
}


@pytest.mark.parametrize("model", REFUSED)
def test_a_model_that_vmap_cannot_batch_trains_one_at_a_time_and_the_log_says_why(model, caplog):
    caplog.set_level(logging.INFO, "momentum_tuner.trainer")
    task = make_task(model)
    trainer = Trainer(task, epochs=2)
    assert trainer.objective.batch_slots is False
    assert [r.getMessage() for r in caplog.records] == [
        f"the model trains one slot at a time: {trainer.objective.reason}"
    ]
    assert REFUSED[model] in trainer.objective.reason and "\n" not in trainer.objective.reason
    assert trainer.width == 2
    settings = {
        "a": momentum(seed=1),
        "b": momentum(0.01, optimizer="nesterov"),
        "c": momentum(0.1, 0.5, optimizer="nesterov_lookahead"),
    }
    found = curves(task, settings, 2)
    for key, one in settings.items():
        assert_same_curve(found[key], alone(task, one, 2), rel=1e-6)
    late = Trainer(task, epochs=2)
    late.admit("a", settings["a"])
    first = train(late)["a"]
    late.admit("c", settings["c"])
    both = train(late)
    assert_same_curve(first + both["a"], found["a"], rel=1e-6)
    assert_same_curve(both["c"], found["c"][:1], rel=1e-6)


def test_a_model_that_vmap_batches_says_nothing(caplog):
    caplog.set_level(logging.INFO, "momentum_tuner.trainer")
    trainer = Trainer(make_task(), epochs=1)
    assert trainer.objective.batch_slots and trainer.objective.reason is None and trainer.width in (4, 8, 16, 32, 64)
    assert caplog.records == []


@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_networks_are_fused_in_training_and_in_evaluation(cell):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.head = cell(1, 4, batch_first=True, num_layers=2, bidirectional=True), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.recurrent(x[:, :, None])[0][:, -1])

    task = make_task(Reader)
    enabled = torch.backends.mkldnn.enabled
    assert Trainer(task, epochs=1).objective.batch_slots
    settings = {"a": momentum(seed=1), "b": momentum(0.01, optimizer="nesterov")}
    fused, sequential = (curves(task, settings, 2, mode=mode) for mode in ("auto", "sequential"))
    for key in settings:
        assert_same_curve(fused[key], sequential[key])
    assert torch.backends.mkldnn.enabled == enabled


def test_a_model_whose_fused_gradient_is_wrong_is_not_fused():
    class Wrong(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(x):
            return x * 2

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

        @staticmethod
        def vmap(info, in_dims, x):
            return x * 3, in_dims[0]

    class Net(Branching):
        def forward(self, x):
            return self.second(Wrong.apply(self.first(x)))

    trainer = Trainer(make_task(Net), epochs=1)
    assert not trainer.objective.batch_slots
    assert "fused gradient differs from the solo one by" in trainer.objective.reason


def test_the_callers_generators_are_left_alone(mode):
    class Init(Branching):
        def __init__(self):
            super().__init__()
            self.first.weight.data.mul_(float(np.random.normal()) + random.random())

    def state():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    models = [Init, Drawing, Noisy, SkippingAtRandom] if mode == "sequential" else [perceptron, dropping]
    for model in models:
        loader = DataLoader(TensorDataset(*examples()), batch_size=8, shuffle=True)
        task = make_task(model, train=loader, valid=[examples(8)])
        before = state()
        found = curves(task, {"a": momentum(seed=3), "b": momentum(seed=3)}, 2, mode=mode)
        assert state() == before
        torch.rand(3), np.random.rand(3), random.random()
        again = curves(task, {"a": momentum(seed=3), "b": momentum(seed=3)}, 2, mode=mode)
        assert [values(r) for r in again["a"]] == [values(r) for r in found["a"]]


# --- dropout


def dropping():
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 1)
    )


def test_a_model_with_dropout_has_the_same_curve_alone_and_in_any_batch():
    task = make_task(dropping)
    assert Trainer(task, epochs=1).objective.batch_slots
    it = momentum(0.05, seed=2)
    expected = alone(task, it)
    assert_same_curve(alone(task, it, mode="sequential"), expected)
    others = {i: momentum(0.01 * i, seed=i % 3, optimizer="nesterov") for i in range(1, 9)}
    assert_same_curve(curves(task, others | {"it": it})["it"], expected)
    assert_same_curve(curves(task, {"it": it} | others, mode="sequential")["it"], expected)
    late = Trainer(task, epochs=3, slots=3)
    late.admit("other", momentum(seed=2))
    train(late)
    late.admit("it", it)
    assert_same_curve(train(late, 3)["it"], expected)
    without = alone(make_task(lambda: nn.Sequential(*(m for m in dropping() if type(m) is not nn.Dropout))), it)
    assert abs(without[0].train_loss / expected[0].train_loss - 1) > 1e-3


def masks(layer, key, shape, calls=1):
    """What is kept in some calls in a row under one key."""
    layer.calls.made = 0
    layer.key = torch.tensor(key)
    return torch.stack([layer(torch.ones(shape)) for _ in range(calls)])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_a_share_of_1_minus_p_and_scales_it(p):
    layer = KeyedDropout(p, False, _Calls())
    for key in [*step_keys([(0, 1), (1, 1)], 2).flatten().tolist(), 0, 1]:
        kept = masks(layer, key, (100, 200))[0]
        assert kept.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
        spread = 5 * math.sqrt(p * (1 - p) / 20_000)
        assert (kept > 0).double().mean().item() == pytest.approx(1 - p, abs=spread)
        rows = (kept > 0).double().mean(1)
        assert rows.std().item() == pytest.approx(math.sqrt(p * (1 - p) / 200), rel=0.35)


def test_masks_of_steps_layers_calls_epochs_and_seeds_are_independent():
    layer = KeyedDropout(0.5, False, _Calls())
    keys = step_keys([(0, 1), (0, 2), (1, 1)], 2).flatten().tolist()
    drawn = torch.cat([masks(layer, key, (100, 100), calls=2) for key in keys]).flatten(1) > 0
    for i in range(len(drawn)):
        for j in range(i):
            agreement = (drawn[i] == drawn[j]).double().mean().item()
            assert agreement == pytest.approx(0.5, abs=0.03), (i, j)
    assert torch.equal(masks(layer, keys[0], (9, 9)), masks(layer, keys[0], (9, 9)))


def test_a_mask_under_vmap_is_that_of_the_slot_alone():
    layer = KeyedDropout(0.3, False, _Calls())
    keys = torch.from_numpy(step_keys([(0, 1), (5, 1), (5, 2)], 1)[0])

    def forward(key, x):
        layer.calls.made = 0
        return torch.func.functional_call(layer, {"key": key}, (x,))

    fused = vmap(forward)(keys, torch.ones(3, 7, 5))
    solo = torch.stack([forward(key, torch.ones(7, 5)) for key in keys])
    assert torch.equal(fused, solo)


def test_dropout_of_channels_drops_whole_channels():
    for module, shape in (
        (nn.Dropout1d, (50, 40, 3)),
        (nn.Dropout2d, (50, 40, 3, 2)),
        (nn.Dropout3d, (50, 40, 2, 2, 2)),
    ):
        model = nn.Sequential(module(0.25))
        names, calls = key_dropout(model)
        assert names == ["0.key"] and model[0].channelwise and calls.made == 0
        kept = model(torch.ones(shape)).flatten(2)
        assert torch.equal(kept.amin(2), kept.amax(2))
        assert (kept > 0).double().mean().item() == pytest.approx(0.75, abs=0.05)


def test_dropout_is_off_in_evaluation_and_at_its_ends():
    x = torch.randn(5, 5)
    assert torch.equal(KeyedDropout(0.5, False, _Calls()).eval()(x), x)
    assert torch.equal(KeyedDropout(0.0, False, _Calls())(x), x)
    assert torch.equal(KeyedDropout(1.0, False, _Calls())(x), torch.zeros(5, 5))


def test_every_dropout_layer_is_replaced_wherever_it_is_used():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.again = nn.Dropout(0.5)
            self.block = nn.Sequential(nn.Linear(2, 2), self.first)

    model = Net()
    names, _ = key_dropout(model)
    assert sorted(names) == ["again.key", "block.1.key", "first.key"]
    assert not any(type(module) is nn.Dropout for module in model.modules())


# --- data


def test_an_epoch_is_a_permutation_without_its_incomplete_minibatch():
    x = torch.arange(30.0)
    source = MemorySource([x, 2 * x], 8)
    batches = list(source.epoch([(0, 1)]))
    assert source.steps == len(batches) == 3 and all(b.shared for b in batches)
    seen = torch.cat([b.tensors[0] for b in batches])
    assert len(set(seen.tolist())) == 24
    assert torch.equal(torch.cat([b.tensors[1] for b in batches]), 2 * seen)
    other = torch.cat([b.tensors[0] for b in source.epoch([(0, 2)])])
    assert not torch.equal(seen, other) and set(other.tolist()) != set(seen.tolist())
    assert [len(b.tensors[0]) for b in MemorySource([x], 100).epoch([(0, 1)])] == [30]


def test_slots_of_one_seed_and_epoch_share_a_minibatch_and_others_have_their_own():
    source = MemorySource([torch.arange(32.0)], 4)
    orders = [(0, 1), (1, 1), (0, 2), (1, 1)]
    alone = {order: [b.tensors[0] for b in source.epoch([order])] for order in orders}
    for step, batch in enumerate(source.epoch(orders)):
        assert not batch.shared and batch.tensors[0].shape == (4, 4)
        assert torch.equal(batch.tensors[0], torch.stack([alone[order][step] for order in orders]))
    assert all(batch.shared for batch in source.epoch([(1, 1), (1, 1)]))


def stagger(task, settings, epochs=2, **options):
    """The curve of a trial that enters while others are at their second and third epoch, or have another seed."""
    trainer = Trainer(task, epochs=4, slots=4, **options)
    trainer.admit("first", momentum(0.02, optimizer="nesterov"))
    train(trainer)
    trainer.admit("second", momentum(0.03, seed=9))
    train(trainer)
    trainer.admit("it", settings)
    trainer.admit("third", momentum(0.01, optimizer="sgd"))
    return train(trainer, epochs)["it"]


class Augmented(Dataset):
    """Noise from each of the three generators."""

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, i):
        x, y = examples()
        noise = 0.1 * torch.randn(FEATURES) + 0.1 * np.random.normal() + 0.1 * random.gauss(0, 1)
        return x[i] + noise.float(), y[i]


def loader(kind):
    data = TensorDataset(*examples())
    match kind:
        case "shuffle":
            return DataLoader(data, batch_size=8, shuffle=True)
        case "generator":
            return DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5))
        case "sampler":
            sampler = RandomSampler(data, replacement=True, generator=torch.Generator().manual_seed(5))
            return DataLoader(data, batch_size=8, sampler=sampler)
        case "augmentation":
            return DataLoader(Augmented(), batch_size=8, shuffle=True)
        case "workers":
            return DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=1)
        case "persistent workers":
            return DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=1, persistent_workers=True)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["shuffle", "generator", "sampler", "augmentation", "workers", "persistent workers"])
def test_a_trials_curve_on_a_data_loader_does_not_depend_on_when_it_enters(kind):
    task = make_task(train=loader(kind), valid=DataLoader(TensorDataset(*examples(40, seed=1)), batch_size=16))
    check_task(task)  # which begins an iteration and leaves it
    it = momentum(0.05, seed=0)
    expected = alone(task, it, 2)
    assert expected[0].step == STEPS
    assert_same_curve(stagger(task, it), expected)
    assert_same_curve(stagger(task, it, mode="sequential"), expected)
    other = alone(task, momentum(0.05, seed=1), 1)
    assert other[0].train_loss != pytest.approx(expected[0].train_loss, rel=1e-4)


def test_all_slots_of_one_order_share_the_loaders_batches():
    calls = []

    class Batches:
        def __len__(self):
            return 4

        def __iter__(self):
            calls.append("iter")
            order = torch.randperm(EXAMPLES).view(4, 16)
            return (tuple(t[rows] for t in examples()) for rows in order)

    task = make_task(train=Batches(), valid=[examples(8)])
    trainer = Trainer(task, epochs=2, slots=5)
    calls.clear()
    for key in range(5):
        trainer.admit(key, momentum(0.01 * key + 0.01, batch_size=key + 1))
    found = train(trainer)
    assert calls == ["iter"] and set(found) == set(range(5))
    assert {r[0].step for r in found.values()} == {4}
    trainer.release(0)
    trainer.admit(5, momentum())
    calls.clear()
    train(trainer)
    assert calls == ["iter", "iter"]


def test_a_data_loaders_own_generator_is_left_alone():
    task = make_task(train=loader("generator"), valid=[examples(8)])
    before = task.train.generator.get_state()
    alone(task, momentum(), 2)
    assert torch.equal(task.train.generator.get_state(), before)


def test_batches_may_be_dictionaries_and_hold_other_values():
    def loss(model, batch):
        assert batch["name"] == "x"
        return batch["weight"] * (model(batch["features"]["x"]) - batch["y"]).square().mean()

    def batches(seed):
        found = []
        for rows in range(0, EXAMPLES, 16):
            x, y = (t[rows : rows + 16] for t in examples(seed=seed))
            found.append({"features": {"x": x}, "y": y, "name": "x", "weight": 2.0, "none": None})
        return found

    class Shuffled(list):
        def __iter__(self):
            return (self[i] for i in torch.randperm(len(self)).tolist())

    task = make_task(loss=loss, train=Shuffled(batches(0)), valid=batches(1))
    assert Trainer(task, epochs=1).objective.batch_slots
    expected = alone(task, momentum(), 2)
    assert_same_curve(stagger(task, momentum()), expected)
    assert_same_curve(stagger(task, momentum(), mode="sequential"), expected)
    doubled = alone(make_task(train=TensorDataset(*examples()), valid=[examples(8)]), momentum(batch_size=16), 1)
    assert expected[0].step == doubled[0].step == 4


@pytest.mark.parametrize("what", ["lengths", "names"])
def test_batches_that_cannot_be_stacked_train_one_slot_at_a_time(what):
    """Sequences of different lengths, or names that differ: only where slots are at different batches."""

    class Ragged:
        def __len__(self):
            return 6

        def __iter__(self):
            for i in torch.randperm(6).tolist():
                x, y = examples(8, seed=i)
                yield (x.repeat(i + 1, 1), y.repeat(i + 1, 1), i) if what == "lengths" else (x, y, f"batch {i}")

    def loss(model, batch):
        weight = 1.0 if what == "lengths" else 1.0 + int(batch[2].split()[1])
        return weight * mean_square(model, batch)

    task = make_task(loss=loss, train=Ragged(), valid=[(*examples(8), "batch 0")])
    assert Trainer(task, epochs=1).objective.batch_slots
    expected = alone(task, momentum(0.01), 2)
    assert_same_curve(stagger(task, momentum(0.01)), expected)


def test_an_epoch_with_too_few_batches_is_an_error_in_one_line():
    class Short:
        def __init__(self):
            self.left = 4

        def __iter__(self):
            self.left -= 1
            return iter([examples(8)] * self.left)

    task = make_task(train=Short(), valid=[examples(8)], steps_per_epoch=3)
    trainer = Trainer(task, epochs=2, slots=1)
    trainer.admit("a", momentum())
    with pytest.raises(TaskError, match="gave 2 batches where 3 were expected"):
        train(trainer)


@pytest.mark.parametrize("kind", ["tensors", "loader"])
def test_validation_is_over_the_whole_set_each_example_alike(kind):
    x, y = examples(2500, seed=1)
    data = TensorDataset(x, y)
    valid = data if kind == "tensors" else DataLoader(data, batch_size=700)
    task = make_task(valid=valid, metrics={"error": lambda model, batch: (model(batch[0]) - batch[1]).abs().mean()})
    trainer = Trainer(task, epochs=1, slots=2, precision="float64")
    for seed in (0, 1):
        record = trainer.admit(seed, momentum(seed=seed))
        torch.manual_seed(seed)
        error = perceptron().double()(x.double()) - y
        assert record.valid_loss == pytest.approx(error.square().mean().item(), rel=1e-12)
        assert record.metrics["error"] == pytest.approx(error.abs().mean().item(), rel=1e-12)


class Wide(nn.Module):
    """Its training keeps 160,000 bytes for an example."""

    def __init__(self, width=20_000):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, width), nn.Linear(width, 1)

    def forward(self, x):
        return self.last(self.first(x).sin())


def parts(trainer):
    return [part.weight for part in trainer.objective.validation]


def test_validation_is_in_parts_for_which_memory_suffices_where_it_suffices_for_a_step(mode):
    task = make_task(Wide, valid=TensorDataset(*examples(150, seed=1)))
    trainer = Trainer(task, epochs=1, slots=2, mode=mode)
    assert parts(trainer) == [64, 64, 22]  # 8 MiB would be of 52 examples
    record = trainer.admit("a", momentum(seed=1))
    torch.manual_seed(1)
    model = Wide()
    with torch.no_grad():
        assert record.valid_loss == pytest.approx(task.loss(model, task.valid.tensors).item(), rel=1e-5)
    assert parts(Trainer(make_task(lambda: Wide(5_000), valid=task.valid), epochs=1, slots=1, mode=mode)) == [150]


def test_validation_of_small_models_is_in_large_parts():
    for task in (digits_mlp(hidden=64), digits_cnn(), digits_rnn(cell="lstm"), digits_transformer()):
        assert parts(Trainer(task, epochs=1, slots=1, mode="sequential")) == [360]
    valid = TensorDataset(*examples(2500))
    assert parts(Trainer(make_task(valid=valid), epochs=1, slots=1)) == [1024, 1024, 452]


def test_the_parameters_themselves_do_not_make_parts_smaller():
    def backbone():
        frozen = nn.Linear(500, 500).requires_grad_(False)
        return nn.Sequential(nn.Linear(FEATURES, 500), frozen, nn.Linear(500, 500), nn.Linear(500, 1))

    task = make_task(backbone, valid=TensorDataset(*examples(2500)))
    assert parts(Trainer(task, epochs=1, slots=1, mode="sequential")) == [1024, 1024, 452]


def test_where_what_a_step_keeps_is_not_to_be_known_parts_are_large():
    def with_slope(model, batch):
        slope = torch.func.grad(lambda x: model(x).sum())(batch[0])
        return (model(batch[0]) - batch[1]).square().mean() + slope.square().mean()

    task = make_task(Wide, loss=with_slope, valid=TensorDataset(*examples(150)))
    assert parts(Trainer(task, epochs=1, slots=1, mode="sequential")) == [150]


# --- landscapes


def descend(gradient, theta, rate, steps):
    for _ in range(steps):
        theta = theta - rate * gradient(theta)
    return theta


LANDSCAPES = {
    "quadratic": (
        quadratic(dim=2, kappa=10, steps_per_epoch=5),
        lambda t: np.array([1.0, 10.0]) * t,
        np.full(2, 0.5**0.5),
        0.05,
        np.zeros(2),
    ),
    "rosenbrock": (
        rosenbrock(steps_per_epoch=5),
        lambda t: np.array(
            [-400 * t[0] * (t[1] - t[0] ** 2) - 2 * (1 - t[0]), 200 * (t[1] - t[0] ** 2)],
        ),
        np.array([-1.2, 1.0]),
        1e-3,
        np.ones(2),
    ),
    "double well": (
        double_well(steps_per_epoch=5),
        lambda t: 2.0 * (t + 1) * t * (t - 2.5),
        np.array([-1.6]),
        0.01,
        np.array([2.5]),
    ),
}


@pytest.mark.parametrize("name", LANDSCAPES)
def test_a_landscape_is_descended_as_by_hand(name, mode):
    task, gradient, theta, rate, optimum = LANDSCAPES[name]
    trainer = Trainer(task, epochs=3, slots=3, mode=mode)
    first = trainer.admit("it", momentum(rate, 0.0))
    trainer.admit("other", momentum(rate / 2, 0.9))
    assert first.distance == pytest.approx(np.linalg.norm(theta - optimum), rel=1e-12)
    for epoch in range(1, 4):
        record = train(trainer)["it"][0]
        theta = descend(gradient, theta, rate, 5)
        assert record.step == 5 * epoch
        assert type(record.distance) is float
        assert record.distance == pytest.approx(np.linalg.norm(theta - optimum), rel=1e-9)
        assert trainer.export("it").tensors["parameters"].numpy() == pytest.approx(theta, rel=1e-9)


# --- precision


def test_float64_trains_a_float32_model_in_float64():
    trainer = Trainer(make_task(), epochs=1, slots=1, precision="float64")
    trainer.admit("a", momentum())
    assert {t.dtype for t in trainer.export("a").tensors.values()} == {torch.float64}
    fine, coarse = train(trainer)["a"][0], alone(make_task(), momentum(), 1)[0]
    assert fine.train_loss == pytest.approx(coarse.train_loss, rel=1e-5)
    assert fine.train_loss != coarse.train_loss


def test_float32_trains_a_float64_landscape_in_float32():
    trainer = Trainer(quadratic(dim=2), epochs=1, slots=1, precision="float32")
    trainer.admit("a", momentum(1e-3))
    assert trainer.export("a").tensors["parameters"].dtype == torch.float32
    assert train(trainer)["a"][0].distance == pytest.approx(
        alone(quadratic(dim=2), momentum(1e-3), 1)[0].distance, rel=1e-4
    )


def test_bfloat16_is_autocast_and_roughly_agrees_with_float32(mode):
    task = replace(digits_mlp(hidden=16), steps_per_epoch=10)
    settings = {"a": momentum(0.1, batch_size=32), "b": momentum(0.05, 0.5, batch_size=32)}
    half, whole = (curves(task, settings, 2, precision=p, mode=mode) for p in ("bfloat16", "float32"))
    for key in settings:
        for ours, theirs in zip(half[key], whole[key], strict=True):
            assert ours.train_loss == pytest.approx(theirs.train_loss, rel=0.05)
            assert ours.valid_loss == pytest.approx(theirs.valid_loss, rel=0.05)
            assert ours.grad_norm != pytest.approx(theirs.grad_norm, rel=1e-5)
    trainer = Trainer(task, epochs=1, slots=1, precision="bfloat16", mode=mode)
    trainer.admit("a", settings["a"])
    assert trainer.export("a").tensors["parameters"].dtype == torch.float32


def test_a_loss_that_comes_as_bfloat16_trains(mode):
    task = replace(digits_mlp(hidden=16), steps_per_epoch=10)

    def likelihood(model, batch):
        return -F.log_softmax(model(batch[0]), -1).gather(1, batch[1][:, None]).mean()

    narrow = replace(task, loss=likelihood)
    settings = {"a": momentum(0.1, batch_size=32), "b": momentum(1e6, 0.99, batch_size=32)}
    found, expected = (curves(t, settings, 1, precision="bfloat16", mode=mode) for t in (narrow, task))
    assert found["a"][0].train_loss == pytest.approx(expected["a"][0].train_loss, rel=0.01)
    assert found["a"][0].valid_loss == pytest.approx(expected["a"][0].valid_loss, rel=0.01)
    assert found["b"][0].diverged_at_step == expected["b"][0].diverged_at_step is not None


def test_metrics_are_not_rounded_to_the_dtype_of_the_loss(mode):
    whole = digits_mlp(hidden=16)
    task = replace(
        whole,
        steps_per_epoch=2,
        valid=TensorDataset(*(t[:97] for t in whole.valid.tensors)),
        loss=lambda model, batch: whole.loss(model, batch).bfloat16(),
    )
    found = alone(task, momentum(0.1, batch_size=32), 2, mode=mode)
    for record in found:
        right = 97 * record.metrics["accuracy"]
        assert right == pytest.approx(round(right), abs=1e-4)


# --- settings of each slot


def test_each_slot_clips_at_its_own_norm(mode):
    task = make_task(steps_per_epoch=1)
    sharp = {"optimizer": "sgd", "beta": 0.0}
    settings = {
        "tight": momentum(0.5, clip_norm=0.01, **sharp),
        "none": momentum(0.5, **sharp),
        "loose": momentum(0.5, clip_norm=1e3, **sharp),
        "infinite": momentum(0.5, clip_norm=math.inf, **sharp),
    }
    found = {key: records[0] for key, records in curves(task, settings, 1, mode=mode).items()}
    norm = found["none"].grad_norm
    assert norm > 0.02
    assert {key: r.grad_norm for key, r in found.items()} == pytest.approx(dict.fromkeys(found, norm))
    assert found["tight"].update_norm == pytest.approx(0.5 * 0.01, rel=1e-3)
    for key in ("none", "loose", "infinite"):
        assert found[key].update_norm == pytest.approx(0.5 * norm, rel=1e-5)


def cycle_by_hand(task, settings, epochs):
    """torch.optim.SGD under OneCycleLR: mean training loss of each epoch."""
    rate, beta = settings.hyperparameters["learning_rate"], settings.hyperparameters["momentum"]
    torch.manual_seed(settings.seed)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=beta)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=epochs * STEPS, max_momentum=beta, base_momentum=beta * 0.85 / 0.95
    )
    source, found = TrainingData(task, torch.device("cpu"), None).source(BATCH), []
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in source.epoch([(settings.seed, epoch)]):
            loss = task.loss(model, batch.tensors)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if epoch * STEPS < epochs * STEPS or len(losses) < STEPS - 1:
                schedule.step()
            losses.append(loss.item())
        found.append(np.mean(losses))
    return found


def test_one_cycle_moves_each_slots_own_rate_and_momentum_from_its_own_first_step():
    task = make_task()
    trainer = Trainer(task, epochs=3, slots=3, schedule=ScheduleSettings("one_cycle"))
    settings = {"a": momentum(0.3, 0.9), "b": momentum(0.1, 0.5), "late": momentum(0.2, 0.8)}
    trainer.admit("a", settings["a"])
    trainer.admit("b", settings["b"])
    found = train(trainer)
    trainer.admit("late", settings["late"])
    for key, records in train(trainer, 2).items():
        found.setdefault(key, []).extend(records)
    trainer.release("a")
    found["late"] += train(trainer)["late"]
    for key, one in settings.items():
        assert [r.train_loss for r in found[key][:3]] == pytest.approx(cycle_by_hand(task, one, 3), rel=1e-4)
    flat = alone(task, settings["a"])
    assert flat[0].train_loss != pytest.approx(found["a"][0].train_loss, rel=1e-3)


def test_a_schedule_starts_anew_in_a_slot_that_is_refilled_and_goes_on_with_a_state():
    task, schedule = make_task(), ScheduleSettings("cosine", {"final_fraction": 0.01})
    it = momentum(0.1, 0.5)
    expected = alone(task, it, 3, schedule=schedule)
    trainer = Trainer(task, epochs=3, slots=1, schedule=schedule)
    trainer.admit("other", momentum())
    train(trainer, 3)
    trainer.release("other")
    trainer.admit("it", it)
    found = train(trainer, 1)["it"]
    state = trainer.export("it")
    other = Trainer(task, epochs=3, slots=2, schedule=schedule)
    other.admit("new", momentum())
    other.admit("it", it, state)
    found += train(other, 2)["it"]
    assert_same_curve(found, expected)
    assert found[2].update_norm < 0.3 * found[0].update_norm


# --- what a model holds besides its parameters


class Backbone(nn.Module):
    """A frozen layer, a constant buffer, a buffer that counts, and a trained head."""

    def __init__(self, seeded=False):
        super().__init__()
        self.frozen, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, 1)
        if not seeded:
            with torch.no_grad():
                self.frozen.weight.copy_(torch.linspace(-1, 1, 32).view(8, 4))
                self.frozen.bias.zero_()
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.full((8,), 0.5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        hidden = self.scale * self.frozen(x).tanh()
        if self.training:
            self.calls = self.calls + 1
            self.mean.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
        return self.head(hidden - self.mean)


def test_frozen_parameters_and_constant_buffers_are_shared_and_not_stacked(mode):
    task = make_task(Backbone)
    trainer = Trainer(task, epochs=2, slots=3, mode=mode)
    assert set(trainer.objective.shared) == {"model.frozen.weight", "model.frozen.bias", "model.scale"}
    for seed in range(3):
        trainer.admit(seed, momentum(seed=seed))
    found = train(trainer, 2)
    stack = only_stack(trainer)
    assert {name: b.shape for name, b in stack.buffers.items()} == {"model.calls": (3,), "model.mean": (3, 8)}
    assert [segment.shape for segment in stack.rows] == [(3, 9)]
    assert stack.buffers["model.calls"].tolist() == [2 * STEPS] * 3
    state = trainer.export(1)
    assert set(state.tensors) == {
        *("parameters", "previous_update", "moment/velocity", "buffer/model.calls", "buffer/model.mean")
    }
    assert_same_curve(found[1], alone(task, momentum(seed=1), 2, mode="fused"))
    assert not stack.buffers["model.mean"].requires_grad


def test_frozen_parameters_that_follow_the_seed_belong_to_the_slot(mode):
    task = make_task(lambda: Backbone(seeded=True))
    trainer = Trainer(task, epochs=2, slots=2, mode=mode)
    assert set(trainer.objective.shared) == {"model.scale"}
    for seed in range(2):
        trainer.admit(seed, momentum(seed=seed))
    found = train(trainer, 2)
    assert [segment.shape for segment in only_stack(trainer).rows] == [(2, 9)]
    for seed in range(2):
        torch.manual_seed(seed)
        weight = Backbone(seeded=True).frozen.weight
        assert torch.equal(trainer.export(seed).tensors["buffer/model.frozen.weight"], weight)
        assert_same_curve(found[seed], alone(task, momentum(seed=seed), 2))


@pytest.mark.parametrize("how", ["in place", "assigned"])
def test_a_shared_buffer_that_changes_later_is_an_error_and_not_shared_between_trials(how, mode):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.calls = nn.Linear(FEATURES, 1), itertools.count(1)
            self.register_buffer("late", torch.ones(()))

        def forward(self, x):
            if next(self.calls) > 12 and self.training:
                if how == "in place":
                    self.late.add_(1)
                else:
                    self.late = self.late + 1
            return self.head(x) * self.late

    trainer = Trainer(make_task(Late), epochs=9, slots=1, mode=mode)
    trainer.admit("a", momentum(1e-3))
    # Fused, torch itself refuses to write to what was not passed in.
    error = r"task\.model: late did not change in the first training step but did later|mutate a captured Tensor"
    with pytest.raises((TaskError, RuntimeError), match=error):
        train(trainer, 9)


def test_running_statistics_belong_to_the_slot_even_where_the_first_step_leaves_them_as_they_were(mode):
    x = torch.tensor([-3.0, -1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 3.0])[:, None]  # whose mean is 0
    task = make_task(
        lambda: nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)), train=TensorDataset(x, x), valid=TensorDataset(x, x)
    )
    settings = {seed: momentum(seed=seed, batch_size=2) for seed in range(3)}
    trainer = Trainer(task, epochs=2, slots=3, mode=mode)
    assert trainer.objective.shared == {}
    for key, one in settings.items():
        trainer.admit(key, one)
    found = train(trainer, 2)
    means = {key: trainer.export(key).tensors["buffer/model.0.running_mean"].item() for key in settings}
    assert len(set(means.values())) == 3
    for key, one in settings.items():
        assert_same_curve(found[key], alone(task, one, 2))


class Tied(nn.Module):
    """One matrix as the first and, transposed, as the last layer."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(FEATURES, FEATURES, bias=False), nn.Linear(FEATURES, FEATURES)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.encode(x).tanh())


def test_tied_weights_stay_tied_and_count_once(mode):
    task = make_task(Tied, loss=lambda model, batch: (model(batch[0]) - batch[0]).square().mean())
    settings = {"a": momentum(0.1, 0.9), "b": momentum(0.05, 0.0, seed=1)}
    trainer = Trainer(task, epochs=2, slots=2, mode=mode)
    for key, one in settings.items():
        trainer.admit(key, one)
    found = train(trainer, 2)
    source = TrainingData(task, torch.device("cpu"), None).source(BATCH)
    for key, one in settings.items():
        torch.manual_seed(one.seed)
        model = Tied()
        hyper = one.hyperparameters
        optimizer = torch.optim.SGD(model.parameters(), lr=hyper["learning_rate"], momentum=hyper["momentum"])
        for epoch in (1, 2):
            losses = []
            for batch in source.epoch([(one.seed, epoch)]):
                loss = task.loss(model, batch.tensors)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert found[key][epoch - 1].train_loss == pytest.approx(np.mean(losses), rel=1e-4)
        row = trainer.export(key).tensors["parameters"]
        assert row.shape == (FEATURES**2 + FEATURES,)
        expected = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert torch.allclose(row, expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_ratio_is_of_root_mean_squares_over_tensors():
    task = make_task(steps_per_epoch=1)
    found = alone(task, momentum(seed=4), 1)[0].layer_grad_ratio
    torch.manual_seed(4)
    model = perceptron()
    batch = next(iter(TrainingData(task, torch.device("cpu"), None).source(BATCH).epoch([(4, 1)]))).tensors
    grads = torch.autograd.grad(task.loss(model, batch), list(model.parameters()))
    sizes = [g.square().mean().sqrt().item() for g in grads]
    assert found == pytest.approx(max(sizes) / min(sizes), rel=1e-4)


def test_a_models_parameters_must_have_one_dtype():
    def mixed():
        return nn.Sequential(nn.Linear(FEATURES, 4), nn.Linear(4, 1).double())

    with pytest.raises(TaskError, match=r"several dtypes \(torch\.float32, torch\.float64\)"):
        Trainer(make_task(mixed), epochs=1)


# --- random streams


def test_a_random_stream_goes_on_where_it_stopped():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random(), torch.rand(1, generator=own).item()

    own = torch.Generator().manual_seed(9)
    with RandomStream(3, [own]):
        expected = [draw(), draw()]
    outer = torch.get_rng_state()
    stream, found = RandomStream(3, [own]), []
    for _ in range(2):
        with stream:
            found.append(draw())
        draw()
    assert found == expected
    assert not torch.equal(torch.get_rng_state(), outer)


def test_seeds_are_mixed_well():
    seeds = {mix_seed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000 and all(0 <= s < 2**63 for s in seeds)
    assert mix_seed(1, 2) != mix_seed(2, 1) and mix_seed(-1) != mix_seed(1)


def test_a_state_says_all_that_a_trial_needs():
    state = SlotState({})
    assert (state.epoch, state.step, state.initial_loss, state.spikes.weight) == (0, 0, None, 0.0)
