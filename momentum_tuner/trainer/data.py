"""Minibatches for slots: the order follows from `(seed, epoch)` of each slot, never from its place."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import TensorDataset

from momentum_tuner.errors import TaskError
from momentum_tuner.tasks import Task
from momentum_tuner.trainer.dropout import mix_seed

EVALUATION_BATCH = 1024
"""Validation examples per forward pass, the same for every width, so that the width does not change a sum's order."""

Order = tuple[int, int]
"""What a slot's data order follows from: its trial's seed and the epoch, counted from 1."""


@dataclass(frozen=True)
class Batch:
    """A minibatch for all slots.

    Attributes:
        tensors: what the task's loss gets (any nesting of tuples, lists and dicts of tensors; None for a landscape),
            every tensor with a leading `[slots]` axis unless it is shared.
        shared: whether all slots train on the same minibatch, without that axis.
    """

    tensors: Any
    shared: bool


def slice_slot(batch: Batch, slot: int) -> Any:
    """The minibatch of one slot, as the task's loss gets it."""
    if batch.shared:
        return batch.tensors
    return tree_map(lambda t: t[slot] if isinstance(t, Tensor) else t, batch.tensors)


def distinct(orders: Sequence[Order]) -> tuple[list[Order], list[int]]:
    """The distinct orders, and for each slot which of them it follows."""
    found = {order: i for i, order in enumerate(dict.fromkeys(orders))}
    return list(found), [found[order] for order in orders]


class Source(Protocol):
    """Training data of a task at one batch size."""

    steps: int
    """Optimizer steps per epoch."""

    def epoch(self, orders: Sequence[Order]) -> Iterator[Batch]:
        """The minibatches of one epoch for slots that follow these orders."""
        ...


class LandscapeSource:
    """No data: each step sees the same landscape."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def epoch(self, orders: Sequence[Order]) -> Iterator[Batch]:
        """`steps` empty minibatches."""
        for _ in range(self.steps):
            yield Batch(None, shared=True)


class MemorySource:
    """Tensors that stay on the device; a minibatch is a gather of rows.

    The last incomplete minibatch of an epoch is left out; the next epoch's order is another, so no example stays out.

    Args:
        tensors: `[examples, ...]` each.
        batch_size: examples per step; the whole set if it has fewer.
    """

    def __init__(self, tensors: Sequence[Tensor], batch_size: int) -> None:
        self.tensors = tuple(tensors)
        self.examples = len(tensors[0])
        self.batch_size = min(batch_size, self.examples)
        self.steps = self.examples // self.batch_size

    def order(self, order: Order) -> Tensor:
        """Indices `[steps, batch_size]` of one trial's epoch, on the CPU."""
        generator = torch.Generator().manual_seed(mix_seed(*order))
        indices = torch.randperm(self.examples, generator=generator)
        return indices[: self.steps * self.batch_size].view(self.steps, self.batch_size)

    def epoch(self, orders: Sequence[Order]) -> Iterator[Batch]:
        """The epoch's minibatches; a single gather serves all slots where their orders agree."""
        device = self.tensors[0].device
        kinds, kind_of_slot = distinct(orders)
        indices = torch.stack([self.order(kind) for kind in kinds], dim=1)  # [steps, kinds, batch]
        shared = len(kinds) == 1
        indices = indices[:, 0] if shared else indices[:, kind_of_slot]  # [steps, batch] or [steps, slots, batch]
        for step in indices.to(device):
            yield Batch(tuple(t[step] for t in self.tensors), shared)


class LoaderSource:
    """The task's own iterable of batches (a `DataLoader`, say), which all slots of the same order share.

    It is iterated once per distinct order, under random generators seeded by that order, so that shuffling and
    augmentation follow the trial and not its neighbours.

    Args:
        batches: can be iterated anew each epoch.
        steps: batches to take per epoch.
        place: moves a batch to the device.
    """

    def __init__(self, batches: Iterable[Any], steps: int, device: torch.device, dtype: torch.dtype | None) -> None:
        self.batches = batches
        self.steps = steps
        self.device = device
        self.dtype = dtype

    def epoch(self, orders: Sequence[Order]) -> Iterator[Batch]:
        """The epoch's batches, stacked over slots where their orders differ."""
        kinds, kind_of_slot = distinct(orders)
        streams = [self._stream(kind) for kind in kinds]
        done = 0
        for parts in itertools.islice(zip(*streams, strict=False), self.steps):
            done += 1
            if len(kinds) == 1:
                yield Batch(place(parts[0], self.device, self.dtype), shared=True)
            else:
                yield Batch(self._stack(parts, kind_of_slot), shared=False)
        if done < self.steps:
            raise TaskError(
                f"task.train: gave {done} batches where {self.steps} were expected; "
                "every epoch must have the same number"
            )

    def _stream(self, order: Order) -> Iterator[Any]:
        state = _RandomState.seeded(mix_seed(*order))
        with state:
            iterator = iter(self.batches)
        while True:
            with state:
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def _stack(self, parts: Sequence[Any], kind_of_slot: Sequence[int]) -> Any:
        def join(*tensors: Any) -> Any:
            if not isinstance(tensors[0], Tensor):
                return tensors[0]
            if len({t.shape for t in tensors}) > 1:
                raise TaskError(
                    "task.train: batches of one step differ in shape between data orders; "
                    "let every batch have the same shape (drop_last=True, padding)"
                )
            return torch.stack(tensors)[kind_of_slot]

        return place(tree_map(join, parts[0], *parts[1:]), self.device, self.dtype)


class _RandomState:
    """The global generators of torch, NumPy and Python as one stream; `with` swaps them in and out."""

    def __init__(self) -> None:
        self._mine: tuple[Any, ...] = ()
        self._outer: tuple[Any, ...] = ()

    @classmethod
    def seeded(cls, seed: int) -> _RandomState:
        state = cls()
        outer = state._read()
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        state._mine = state._read()
        state._write(outer)
        return state

    def __enter__(self) -> None:
        self._outer = self._read()
        self._write(self._mine)

    def __exit__(self, *exc: object) -> None:
        self._mine = self._read()
        self._write(self._outer)

    @staticmethod
    def _read() -> tuple[Any, ...]:
        return torch.get_rng_state(), np.random.get_state(), random.getstate()

    @staticmethod
    def _write(state: tuple[Any, ...]) -> None:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])


def place(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A batch on the device, its floating-point tensors in `dtype` (unchanged if None)."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        target = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return value.to(device=device, dtype=target, non_blocking=True)

    return tree_map(move, batch)


def training_source(task: Task, batch_size: int, device: torch.device, dtype: torch.dtype | None) -> Source:
    """The task's training data at one batch size, on the device."""
    if task.train is None:
        assert task.steps_per_epoch is not None
        return LandscapeSource(task.steps_per_epoch)
    if isinstance(task.train, TensorDataset):
        tensors = [place(t, device, dtype) for t in task.train.tensors]
        source = MemorySource(tensors, batch_size)
        if task.steps_per_epoch is not None:
            source.steps = min(source.steps, task.steps_per_epoch)
        return source
    steps = task.steps_per_epoch
    if steps is None:
        steps = len(task.train)  # type: ignore[arg-type]  # Task checked that it has a length
    return LoaderSource(task.train, steps, device, dtype)


@dataclass(frozen=True)
class ValidationBatch:
    """A part of the validation set and the number of its examples, its weight in the mean."""

    batch: Batch
    weight: int


class Validation:
    """The whole validation set, in parts; in-memory data stays on the device.

    A landscape is evaluated at a single point, without data.
    """

    def __init__(self, task: Task, device: torch.device, dtype: torch.dtype | None) -> None:
        self._device = device
        self._dtype = dtype
        self._batches: list[ValidationBatch] | None = None
        self._iterable: Iterable[Any] | None = None
        if task.valid is None:
            self._batches = [ValidationBatch(Batch(None, shared=True), 1)]
        elif isinstance(task.valid, TensorDataset):
            tensors = [place(t, device, dtype) for t in task.valid.tensors]
            pieces = zip(*(t.split(EVALUATION_BATCH) for t in tensors), strict=True)
            self._batches = [ValidationBatch(Batch(piece, shared=True), len(piece[0])) for piece in pieces]
        else:
            self._iterable = task.valid

    def __iter__(self) -> Iterator[ValidationBatch]:
        """The parts, each for all slots."""
        if self._batches is not None:
            yield from self._batches
            return
        assert self._iterable is not None
        state = _RandomState.seeded(0)
        with state:
            for raw in self._iterable:
                batch = place(raw, self._device, self._dtype)
                yield ValidationBatch(Batch(batch, shared=True), _examples(batch))


def _examples(batch: Any) -> int:
    """Length of the first tensor's first axis."""
    sizes: list[int] = []

    def look(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim:
            sizes.append(len(value))
        return value

    tree_map(look, batch)
    return sizes[0] if sizes else 1
