"""The trainer: takes settings, yields epoch records. It knows no database, no Optuna, no MLflow."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import TensorDataset

from momentum_tuner.metrics import EpochRecord, finite
from momentum_tuner.optim import make_schedule
from momentum_tuner.tasks import Task
from momentum_tuner.trainer.data import Batch, Source, TrainingData
from momentum_tuner.trainer.objective import Objective, data_dtype
from momentum_tuner.trainer.slots import (
    Slot,
    SlotBatch,
    SlotState,
    TrialSettings,
    evaluate,
    named_metrics,
    new_state,
)

logger = logging.getLogger(__name__)

FUSED_WIDTH = 64
SEQUENTIAL_WIDTH = 8
ONE_BY_ONE_ADVANTAGE = 0.9
"""One slot alone must be this much faster than its share of a fused batch, to be preferred."""
_TIMED_BATCH = 64
_TIMED_GRADIENTS = 4
_REMEMBERED_SEEDS = 16
_PROBE_EXAMPLES = 32  # as many as check_task takes


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning-rate schedule of a study: a name of `catalog.SCHEDULES`, its options and a linear warmup."""

    name: str = "constant"
    options: Mapping[str, float] | None = None
    warmup_epochs: float = 0.0
    warmup_start: float = 0.1


class Trainer:
    """Trains trials in slots, fused into one batch where the model allows it.

    Args:
        task: what to train.
        epochs: the budget of each trial, over which schedules run.
        slots: how many trials at once; None takes 64 fused or, where a short measurement finds that faster, 8 one at
            a time.
        device: where to train.
        precision: `auto`, `float32`, `float64` or `bfloat16` (autocast).
        schedule: of the learning rate, and of momentum for `one_cycle`.
        mode: `auto`, `fused` or `sequential` (one slot after the other).
    """

    def __init__(
        self,
        task: Task,
        *,
        epochs: int,
        slots: int | None = None,
        device: torch.device | str = "cpu",
        precision: str = "auto",
        schedule: ScheduleSettings | None = None,
        mode: str = "auto",
    ) -> None:
        self.task = task
        self.epochs = epochs
        self.device = torch.device(device)
        self._data = TrainingData(task, self.device, data_dtype(precision))
        self._schedule = schedule or ScheduleSettings()
        self._batches: dict[int, SlotBatch] = {}
        self._sources: dict[int, Source] = {}
        self._leaving: set[Hashable] = set()
        self._entering: list[tuple[Slot, SlotState]] = []
        self._slots: dict[Hashable, Slot] = {}
        self._starts: OrderedDict[tuple[int, str], tuple[SlotState, EpochRecord]] = OrderedDict()
        self.objective = Objective(task, self.device, precision, self._probe(), mode)
        self._optimum = None
        if task.optimum is not None:
            self._optimum = task.optimum.to(self.device, self.objective.layout.dtype)
        self.width = slots or FUSED_WIDTH
        if slots is None and self.objective.batch_slots and mode == "auto":
            self._see_whether_fusing_pays()
        if slots is None and not self.objective.batch_slots:
            self.width = SEQUENTIAL_WIDTH
        if self.objective.reason is not None and mode == "auto":
            logger.warning("the model trains one slot at a time: %s", self.objective.reason)

    @property
    def keys(self) -> list[Hashable]:
        """Keys of the trials that hold a slot."""
        return list(self._slots)

    @property
    def free(self) -> int:
        """Slots that a new trial can take."""
        return self.width - len(self._slots)

    def slot_number(self, key: Hashable) -> int:
        """The number of the slot that a trial holds, from 0."""
        return self._slots[key].number

    def steps_per_epoch(self, batch_size: int) -> int:
        """Optimizer steps in an epoch at this batch size."""
        return self._source(batch_size).steps

    def admit(self, key: Hashable, settings: TrialSettings, state: SlotState | None = None) -> EpochRecord | None:
        """Give a trial a slot. It trains from the next epoch on.

        Args:
            key: the caller's name for the trial.
            settings: what it trains with.
            state: where it goes on; None starts it anew.

        Returns:
            The record of epoch 0, the untrained model, or None for a trial that goes on from a state.
        """
        if key in self._slots:
            raise ValueError(f"{key!r} holds a slot already")
        if self.free <= 0:
            raise ValueError(f"all {self.width} slots are taken")
        record = None
        if state is None:
            state, record = self._start(settings)
        else:
            state = SlotState(
                {n: t.to(self.device) for n, t in state.tensors.items()},
                state.epoch,
                state.step,
                state.initial_loss,
                state.spikes,
            )
        taken = {slot.number for slot in self._slots.values()}
        number = next(n for n in range(self.width) if n not in taken)
        slot = Slot(key, number, settings, state.epoch, state.step, state.initial_loss, state.spikes)
        self._slots[key] = slot
        self._entering.append((slot, state))
        return record

    def release(self, key: Hashable) -> None:
        """Take a trial out of its slot, which the next `admit` may fill."""
        del self._slots[key]
        before = len(self._entering)
        self._entering = [pair for pair in self._entering if pair[0].key != key]
        if len(self._entering) == before:
            self._leaving.add(key)

    def export(self, key: Hashable) -> SlotState:
        """A copy of a slot's state on the CPU, from which `admit` goes on, here or elsewhere."""
        self._rearrange()
        return self._batch_of(key).state(key)

    def train_epoch(self) -> Iterator[tuple[Hashable, EpochRecord]]:
        """Train one epoch of every slot and yield its record, one batch size after the other.

        A trial whose record says `diverged_at_step` has nothing more to train: release it.
        """
        self._rearrange()
        for batch in list(self._batches.values()):
            for slot, record in batch.train_epoch():
                yield slot.key, record

    def _rearrange(self) -> None:
        """Carry out releases and admissions; a batch that lost slots and got no new ones is smaller now."""
        if not self._leaving and not self._entering:
            return
        entering: dict[int, list[tuple[Slot, SlotState]]] = {}
        for pair in self._entering:
            entering.setdefault(self._batch_size(pair[0].settings), []).append(pair)
        for size in entering:
            if size not in self._batches:
                self._batches[size] = self._new_batch(size)
        for size, batch in list(self._batches.items()):
            enter = entering.get(size, [])
            if enter or any(slot.key in self._leaving for slot in batch.slots):
                batch.change(self._leaving, enter)
            if not batch.slots:
                del self._batches[size]
        self._leaving, self._entering = set(), []

    def _batch_of(self, key: Hashable) -> SlotBatch:
        return self._batches[self._batch_size(self._slots[key].settings)]

    def _batch_size(self, settings: TrialSettings) -> int:
        """The batch size that tells batches of slots apart: one for all where the task makes its own batches."""
        return settings.batch_size if isinstance(self.task.train, TensorDataset) else 0

    def _source(self, batch_size: int) -> Source:
        if batch_size not in self._sources:
            self._sources[batch_size] = self._data.source(batch_size)
        return self._sources[batch_size]

    def _new_batch(self, batch_size: int) -> SlotBatch:
        source = self._source(batch_size)
        schedule = make_schedule(
            self._schedule.name,
            total_steps=self.epochs * source.steps,
            steps_per_epoch=source.steps,
            options=self._schedule.options,
            warmup_epochs=self._schedule.warmup_epochs,
            warmup_start=self._schedule.warmup_start,
        )
        return SlotBatch(self.objective, source, schedule, self._optimum)

    def _start(self, settings: TrialSettings) -> tuple[SlotState, EpochRecord]:
        """State and record of an untrained trial; the last few seeds are remembered, as a search shares one."""
        known = (settings.seed, settings.rule.name)
        if known not in self._starts:
            state = new_state(self.objective, settings)
            prefix = "buffer/"
            buffers = {
                n.removeprefix(prefix): t[None].clone() for n, t in state.tensors.items() if n.startswith(prefix)
            }
            evaluated, distance = evaluate(self.objective, state.tensors["parameters"][None], buffers, self._optimum)
            self._starts[known] = state, first_record(self.objective, evaluated[0], float(distance[0]))
            while len(self._starts) > _REMEMBERED_SEEDS:
                self._starts.popitem(last=False)
        self._starts.move_to_end(known)
        return self._starts[known]

    def _see_whether_fusing_pays(self) -> None:
        """Time a gradient of all slots at once against one slot alone; half the width where memory does not suffice."""
        batch = next(iter(self._source(_TIMED_BATCH).epoch([(0, 1)])))
        alone = self._seconds_per_slot(batch, 1, fused=False)
        while True:
            try:
                fused = self._seconds_per_slot(batch, self.width, fused=True)
                break
            except torch.OutOfMemoryError:
                if self.width == 1:
                    raise
                self.width //= 2
        if alone < ONE_BY_ONE_ADVANTAGE * fused:
            self.objective.train_one_by_one(f"{fused / alone:.1f} times as fast as {self.width} fused slots here")

    def _seconds_per_slot(self, batch: Batch, slots: int, fused: bool) -> float:
        """The shortest of a few gradients, divided by its slots."""
        start = self.objective.start(0)
        rows = start.row.expand(slots, -1).contiguous()
        buffers = {name: value.expand(slots, *value.shape).contiguous() for name, value in start.buffers.items()}
        keys = torch.zeros(slots, dtype=torch.int64, device=self.device) if self.objective.keys or not fused else None
        times = []
        for _ in range(_TIMED_GRADIENTS):
            started = time.perf_counter()
            _, loss = self.objective.gradient(rows, buffers, batch, keys, fused=fused)
            loss.cpu()  # waits for the device
            times.append(time.perf_counter() - started)
        return min(times) / slots

    def _probe(self) -> Batch:
        """One small minibatch of the training data, shared by all slots."""
        return next(iter(self._data.source(_PROBE_EXAMPLES).epoch([(0, 1)])))


def first_record(objective: Objective, evaluated: Any, distance: float) -> EpochRecord:
    """The record of epoch 0 from the evaluation `[1 + metrics]` of an untrained model."""
    return EpochRecord(
        epoch=0,
        step=0,
        valid_loss=finite(float(evaluated[0])),
        distance=finite(distance),
        metrics=named_metrics(objective, evaluated),
    )
