"""What `throughput.py` times: an epoch of the plain loop, of the trainer, and a large matrix product."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peers import BATCH_SIZE
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from momentum_tuner import tasks
from momentum_tuner.tasks import Task
from momentum_tuner.trainer import Trainer, TrialSettings

MATMUL_SIZE = 2048
LEARNING_RATES = (1e-8, 1e-6)
"""So small that nothing converges or diverges meanwhile: subnormal numbers would slow some ways more than others."""

Loop = Callable[[], int]
"""Trains one epoch and returns its trial-steps (for `matmul`: its floating-point operations)."""


@dataclass(frozen=True)
class Problem:
    """A built-in task with its options; `steps` shortens its epochs."""

    task: str
    options: tuple[tuple[str, str], ...] = ()
    steps: int | None = None

    def __str__(self) -> str:
        return " ".join([self.task, *(value for _, value in self.options)])

    def build(self) -> Task:
        """The task itself."""
        task: Task = getattr(tasks, self.task)(**dict(self.options))
        return task if self.steps is None else replace(task, steps_per_epoch=self.steps)


def plain_loop(task: Task) -> Loop:
    """The loop that one would write by hand, with the fused SGD kernel (README.md says what else was tried).

    As every tuner must, and as the trainer does, it looks at the validation set after each epoch.
    """
    model, loss = task.model().train(), task.loss
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATES[1], momentum=0.9, nesterov=True, fused=True)

    valid = task.valid.tensors if isinstance(task.valid, TensorDataset) else None

    def step(batch: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def epoch() -> int:
        steps = 0
        for batch in minibatches(task):
            step(batch)
            steps += 1
        model.eval()
        with torch.no_grad():
            for measure in (loss, *task.metrics.values()):
                measure(model, valid).item()
        model.train()
        return steps

    return epoch


def minibatches(task: Task, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, ...] | None]:
    """One epoch of shuffled minibatches from memory, without the last incomplete one; None each for a landscape.

    Args:
        task: whose data.
        generator: of the order; None for torch's own.
    """
    if task.train is None:
        assert task.steps_per_epoch is not None
        yield from [None] * task.steps_per_epoch
        return
    assert isinstance(task.train, TensorDataset)
    steps = len(task.train) // BATCH_SIZE
    order = torch.randperm(len(task.train), generator=generator)
    order = order[: min(steps, task.steps_per_epoch or steps) * BATCH_SIZE]
    yield from zip(*(torch.split(t[order], BATCH_SIZE) for t in task.train.tensors), strict=True)


def loaded_minibatches(task: Task, generator: torch.Generator) -> Iterator[list[Tensor]]:
    """The same minibatches out of a data loader."""
    order = torch.randperm(len(task.train), generator=generator).tolist()
    return iter(DataLoader(task.train, BATCH_SIZE, sampler=order, drop_last=True))


def loaded_validation(task: Task) -> list[Tensor]:
    """The validation set out of a data loader, as one batch."""
    (batch,) = DataLoader(task.valid, len(task.valid))
    return batch


def trainer_loop(trainer: Trainer) -> Loop:
    """Every slot of a trainer, filled as a search fills them: settings differ, the seed is common."""
    rates = np.geomspace(*LEARNING_RATES, num=trainer.width)
    for slot, rate in enumerate(rates.tolist()):
        optimizer = ("sgd", "momentum", "nesterov")[slot % 3]
        settings = {"learning_rate": rate} | ({} if optimizer == "sgd" else {"momentum": 0.9})
        trainer.admit(slot, TrialSettings(optimizer, settings, BATCH_SIZE, seed=0))
    trial_steps = trainer.width * trainer.steps_per_epoch(BATCH_SIZE)

    def epoch() -> int:
        for slot, record in trainer.train_epoch():
            if record.diverged_at_step is not None:
                raise RuntimeError(f"the trial in slot {slot} diverged, so its steps are not training")
        return trial_steps

    return epoch


def matmul_loop() -> Loop:
    """A product of two large float32 matrices."""
    first, second = torch.rand(2, MATMUL_SIZE, MATMUL_SIZE)
    out = torch.empty_like(first)

    def multiply() -> int:
        torch.mm(first, second, out=out)
        return 2 * MATMUL_SIZE**3

    return multiply


def count_flop(task: Task) -> int:
    """Floating-point operations of the matrix products and convolutions in one forward and backward pass."""
    model = task.model().train()
    batch = next(minibatches(task))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration")  # of the next line's switch, about Intel GPUs
        # oneDNN runs a whole LSTM as one operation, which is not counted; without it, its matrix products are.
        with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
            task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())
