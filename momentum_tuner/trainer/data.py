"""Minibatches for slots: the order follows from `(seed, epoch)` of each slot, never from its place."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import DataLoader, TensorDataset

from momentum_tuner.errors import TaskError
from momentum_tuner.tasks import Task
from momentum_tuner.tasks.task import plain_batch
from momentum_tuner.trainer.randomness import RandomStream, mix_seed

GATHERED_AT_ONCE = 1 << 24
"""Bytes of minibatches that are gathered in one go: each gather costs calls, whatever its size."""
EVALUATION_BATCH = 1024
"""Validation examples per forward pass, the same for every width, so that the width does not change a sum's order."""
LEAST_EVALUATION_BATCH = 64
EVALUATION_BYTES = 8 << 20
"""What a slot's training would keep for the examples of a forward pass of the validation, which keeps less."""

Order = tuple[int, int]
"""What a slot's data order follows from: its trial's seed and the epoch, counted from 1."""


@dataclass(frozen=True)
class Batch:
    """A minibatch for all slots.

    Attributes:
        tensors: what the task's loss gets (any nesting of tuples, lists and dicts of tensors; None for a landscape),
            every tensor with a leading `[slots]` axis unless it is shared.
        shared: whether all slots train on the same minibatch, without that axis.
        separate: whether `tensors` is a list of one minibatch per slot, as theirs cannot be stacked.
    """

    tensors: Any
    shared: bool
    separate: bool = False


def slice_slot(batch: Batch, slot: int) -> Any:
    """The minibatch of one slot, as the task's loss gets it."""
    if batch.shared:
        return batch.tensors
    if batch.separate:
        return batch.tensors[slot]
    return tree_map(lambda t: t[slot] if isinstance(t, Tensor) else t, batch.tensors)


def distinct(orders: Sequence[Order]) -> tuple[list[Order], list[int]]:
    """The distinct orders, and for each slot which of them it follows."""
    found = {order: i for i, order in enumerate(dict.fromkeys(orders))}
    return list(found), [found[order] for order in orders]


class Source(Protocol):
    """Training data of a task at one batch size."""

    steps: int
    """Optimizer steps per epoch."""

    def epoch(self, orders: Sequence[Order], start: int = 0) -> Iterator[Batch]:
        """The minibatches of one epoch for slots that follow these orders, from the step `start` on (from 0)."""
        ...


class LandscapeSource:
    """No data: each step sees the same landscape."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def epoch(self, orders: Sequence[Order], start: int = 0) -> Iterator[Batch]:
        """Empty minibatches, `steps` of them from step 0 on."""
        for _ in range(start, self.steps):
            yield Batch(None, shared=True)


class MemorySource:
    """Tensors that stay on the device; minibatches are a gather of rows.

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

    def epoch(self, orders: Sequence[Order], start: int = 0) -> Iterator[Batch]:
        """The epoch's minibatches; the same ones serve all slots where their orders agree."""
        device = self.tensors[0].device
        kinds, kind_of_slot = distinct(orders)
        indices = torch.stack([self.order(kind) for kind in kinds], dim=1)  # [steps, kinds, batch]
        shared = len(kinds) == 1
        indices = indices[:, 0] if shared else indices[:, kind_of_slot]  # [steps, batch] or [steps, slots, batch]
        bytes_per_step = indices[0].numel() * sum(t[:1].nbytes for t in self.tensors)
        for some in torch.split(indices[start:], max(1, GATHERED_AT_ONCE // max(1, bytes_per_step))):
            at = some.to(device)
            for step in zip(*(t[at].unbind(0) for t in self.tensors), strict=True):
                yield Batch(step, shared)


class LoaderSource:
    """The task's own iterable of batches (a `DataLoader`, say), which all slots of the same order share.

    It is iterated once per distinct order, under random generators seeded by that order, so that shuffling and
    augmentation follow the trial and not its neighbours. An epoch that begins in the middle passes over the batches
    before, which are loaded all the same. So the order and the augmentation are the same in any process, if they
    follow from the global generators of torch, NumPy and Python, or from one that a DataLoader or its samplers hold.
    What else an iterable draws from or remembers is not: a generator of its own, the clock, where it stopped in a
    file, the order of a set of strings.

    Args:
        batches: can be iterated anew each epoch.
        steps: batches to take per epoch.
        device: where the batches go.
        dtype: of their floating-point tensors; None leaves it.
    """

    def __init__(self, batches: Iterable[Any], steps: int, device: torch.device, dtype: torch.dtype | None) -> None:
        self.batches = batches
        self.steps = steps
        self.device = device
        self.dtype = dtype

    def epoch(self, orders: Sequence[Order], start: int = 0) -> Iterator[Batch]:
        """The epoch's batches, stacked over slots where their orders differ."""
        kinds, kind_of_slot = distinct(orders)
        streams = [seeded_iterator(self.batches, mix_seed(*kind)) for kind in kinds]
        done = 0
        for parts in itertools.islice(zip(*streams, strict=False), self.steps):
            done += 1
            if done <= start:
                continue
            placed = [place(part, self.device, self.dtype) for part in parts]
            yield Batch(placed[0], shared=True) if len(kinds) == 1 else stack_batches(placed, kind_of_slot)
        if done < self.steps:
            raise TaskError(
                f"task.train: gave {done} batches where {self.steps} were expected; "
                "every epoch must have the same number"
            )


def seeded_iterator(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """Iterate once with the random generators seeded, and the caller's state in them between the batches.

    Args:
        batches: the task's iterable.
        seed: for torch, NumPy, Python and the generators that a DataLoader and its samplers hold.
    """
    generators: list[torch.Generator] = []
    if isinstance(batches, DataLoader):
        parts = (batches, batches.sampler, batches.batch_sampler, getattr(batches.batch_sampler, "sampler", None))
        held = (getattr(part, "generator", None) for part in parts)
        generators = list({id(g): g for g in held if isinstance(g, torch.Generator)}.values())
        if batches.persistent_workers:
            # Persistent workers keep their random state over epochs, and serve one iteration at a time.
            batches = copy.copy(batches)
            vars(batches).update(persistent_workers=False, _iterator=None)
    stream = RandomStream(seed, generators)
    with stream:
        iterator = iter(batches)
    while True:
        with stream:
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def stack_batches(parts: Sequence[Any], kind_of_slot: Sequence[int]) -> Batch:
    """One minibatch for all slots from one per kind; separate ones where shapes or other values differ."""
    flat, specs = zip(*(tree_flatten(part) for part in parts), strict=True)
    leaves = list(zip(*flat, strict=False))
    if any(spec != specs[0] for spec in specs) or not all(_alike(leaf) for leaf in leaves):
        return Batch([parts[kind] for kind in kind_of_slot], shared=False, separate=True)
    stacked = [
        torch.stack([leaf[kind] for kind in kind_of_slot]) if isinstance(leaf[0], Tensor) else leaf[0]
        for leaf in leaves
    ]
    return Batch(tree_unflatten(stacked, specs[0]), shared=False)


def _alike(values: Sequence[Any]) -> bool:
    """Whether tensors can be stacked, or plain values are equal."""
    first = values[0]
    if all(isinstance(v, Tensor) for v in values):
        return all(v.shape == first.shape and v.dtype == first.dtype for v in values)
    plain = (type(None), bool, int, float, str, bytes)
    return all(type(v) is type(first) and isinstance(v, plain) and v == first for v in values)


def place(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A batch on the device, its floating-point tensors in `dtype` (unchanged if None).

    An object that is no container of torch's is left as it is, or moved by its own `to`.
    """

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            to = getattr(value, "to", None)
            return to(device) if callable(to) else value
        target = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return value.to(device=device, dtype=target, non_blocking=True)

    return tree_map(move, plain_batch(batch))


def data_dtype(precision: str) -> torch.dtype | None:
    """The dtype of models and data under a precision of the study file; None leaves them as the task made them."""
    return {"float32": torch.float32, "tfloat32": torch.float32, "float64": torch.float64}.get(precision)


class TrainingData:
    """A task's training data on the device, held once for all batch sizes."""

    def __init__(self, task: Task, device: torch.device, dtype: torch.dtype | None) -> None:
        self._task = task
        self._device = device
        self._dtype = dtype
        self._tensors: list[Tensor] = []
        if isinstance(task.train, TensorDataset):
            self._tensors = [place(t, device, dtype) for t in task.train.tensors]

    def sample(self, examples: int) -> Batch:
        """One and the same batch every time: the first examples, at most so many; of an iterable its first batch."""
        train = self._task.train
        if train is None:
            return Batch(None, shared=True)
        if isinstance(train, TensorDataset):
            return Batch(tuple(t[:examples] for t in self._tensors), shared=True)
        return next(LoaderSource(train, 1, self._device, self._dtype).epoch([(0, 1)]))

    def source(self, batch_size: int) -> Source:
        """The minibatches at one batch size (of no effect for iterables and landscapes)."""
        steps = self._task.steps_per_epoch
        train = self._task.train
        if train is None:
            assert steps is not None
            return LandscapeSource(steps)
        if isinstance(train, TensorDataset):
            source = MemorySource(self._tensors, batch_size)
            source.steps = min(source.steps, steps or source.steps)
            return source
        if steps is None:
            steps = len(train)  # type: ignore[arg-type]  # Task checked that it has a length
        return LoaderSource(train, steps, self._device, self._dtype)


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
        self._tensors: list[Tensor] = []
        self._iterable: Iterable[Any] | None = None
        if task.valid is None:
            self._batches = [ValidationBatch(Batch(None, shared=True), 1)]
        elif isinstance(task.valid, TensorDataset):
            self._tensors = [place(t, device, dtype) for t in task.valid.tensors]
            self._divide(EVALUATION_BATCH)
        else:
            self._iterable = task.valid

    @property
    def divisible(self) -> bool:
        """Whether smaller parts can be made."""
        return bool(self._tensors) and len(self._tensors[0]) > LEAST_EVALUATION_BATCH

    def fit(self, bytes_per_example: float) -> None:
        """Make the parts as small as memory asks for.

        Args:
            bytes_per_example: that a slot's training keeps for the gradient.
        """
        examples = int(EVALUATION_BYTES / max(bytes_per_example, 1.0))
        self._divide(min(EVALUATION_BATCH, max(LEAST_EVALUATION_BATCH, examples)))

    def _divide(self, examples: int) -> None:
        pieces = zip(*(torch.split(t, examples) for t in self._tensors), strict=True)
        self._batches = [ValidationBatch(Batch(piece, shared=True), len(piece[0])) for piece in pieces]

    def __iter__(self) -> Iterator[ValidationBatch]:
        """The parts, each for all slots."""
        if self._batches is not None:
            yield from self._batches
            return
        assert self._iterable is not None
        for raw in seeded_iterator(self._iterable, 0):
            batch = place(raw, self._device, self._dtype)
            yield ValidationBatch(Batch(batch, shared=True), count_examples(batch))


def count_examples(batch: Any) -> int:
    """Length of the first tensor's first axis, also of one that an object of the user's own holds; 1 without any."""
    for value in tree_flatten(batch)[0]:
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
        held = [v for v in getattr(value, "__dict__", {}).values() if isinstance(v, Tensor) and v.ndim]
        if held:
            return len(held[0])
    return 1
