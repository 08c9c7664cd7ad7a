"""Tasks, trials and training for the tests of the trainer, most of all of epochs that stop at a step."""

import json
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from momentum_tuner import Task
from momentum_tuner.tasks import quadratic
from momentum_tuner.trainer import (
    ScheduleSettings,
    SlotState,
    Trainer,
    TrialSettings,
)

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
