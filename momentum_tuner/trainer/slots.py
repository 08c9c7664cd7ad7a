"""One batch of slots, which train together, and the records of their epochs."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momentum_tuner.metrics import EpochRecord, SpikeState, count_spikes, finite, summarize_steps
from momentum_tuner.optim import Schedule
from momentum_tuner.trainer.data import Source
from momentum_tuner.trainer.epoch import Epoch
from momentum_tuner.trainer.layout import Rows
from momentum_tuner.trainer.memory import UnfinishedStepError, first_line
from momentum_tuner.trainer.objective import Objective
from momentum_tuner.trainer.stack import Stack, by_rule
from momentum_tuner.trainer.state import SlotState, TrialSettings

ROUNDINGS = 1000.0
"""Steps come as near to an optimum as so many roundings of it: in float32 Rosenbrock's valley stalls at 500 of them."""


@dataclass(eq=False)
class Slot:
    """The bookkeeping of one trial in the batch; a trial that comes back under its old key is another slot."""

    key: Hashable
    number: int
    settings: TrialSettings
    epoch: int
    step: int
    initial_loss: float | None
    spikes: SpikeState
    seconds: float  # of the unfinished epoch
    diverged_at_step: int | None = None


Member = tuple[Slot, SlotState]
"""A slot, and the state in which it enters a batch or is in it."""


class SlotBatch:
    """Slots that share a batch size and train together, all at the same step of their epoch.

    Args:
        objective: loss, gradient and evaluation of the task.
        source: training data at this batch size.
        schedule: factors of learning rate and momentum by step.
        optimum: flat parameters `[parameters]` of the known optimum, if any.
        size: the batch size.
    """

    def __init__(
        self, objective: Objective, source: Source, schedule: Schedule, optimum: Tensor | None, size: int
    ) -> None:
        self.objective = objective
        self.source = source
        self.schedule = schedule
        self.optimum = optimum
        self.size = size
        self.slots: list[Slot] = []
        self._stack: Stack | None = None
        self._epoch: Epoch | None = None

    @property
    def position(self) -> int:
        """Steps done of the unfinished epoch."""
        return 0 if self._epoch is None else self._epoch.done

    def change(self, leave: Collection[Slot], enter: Sequence[Member]) -> None:
        """Release some slots and admit others, which are at the same step of their epoch.

        Slots of one update rule are kept side by side. Nothing has changed if it fails.
        """
        stay = [member for member in self.members() if member[0] not in leave]
        members = sorted([*stay, *enter], key=lambda member: by_rule(member[0].settings))
        slots = [slot for slot, _ in members]
        tensors = [state.tensors for _, state in members]
        stack = Stack(self.objective, [slot.settings for slot in slots], tensors)
        epoch = None
        if members[0][1].epoch_steps:
            epoch = Epoch(stack, slots, self.source, self.schedule, tensors)
        self.slots, self._stack, self._epoch = slots, stack, epoch

    def members(self) -> list[Member]:
        """The slots with their states."""
        return list(zip(self.slots, self._states(slice(None)), strict=True))

    def state(self, slot: Slot) -> SlotState:
        """One slot's state."""
        at = self.slots.index(slot)
        return self._states(slice(at, at + 1))[0]

    def train(self, pause: Callable[[], bool]) -> list[tuple[Slot, EpochRecord]] | None:
        """Train every slot to the end of its epoch, evaluate it, and derive its record.

        Args:
            pause: asked before each step and before the evaluation, whether to stop there.

        Returns:
            The records, or None after a pause; the next call goes on from there.

        Raises:
            UnfinishedStepError: the slots are of no more use. After any other error they are as they were
                after their last whole step, from which the next call goes on.
        """
        started = time.perf_counter()
        assert self._stack is not None
        if self._epoch is None:
            self._epoch = Epoch(self._stack, self.slots, self.source, self.schedule)
        epoch = self._epoch
        try:
            finished = epoch.run(pause)
            self.objective.check_shared()
            evaluated = self.evaluate() if finished else None
        except BaseException as error:
            epoch.reset_data()
            if isinstance(error, Exception) and not epoch.sound:
                raise UnfinishedStepError(f"an optimizer step broke off in the middle: {first_line(error)}") from error
            raise
        finally:
            share = (time.perf_counter() - started) / len(self.slots)
            for slot in self.slots:
                slot.seconds += share
        if evaluated is None:
            return None
        table, taken = epoch.table()
        values, distance = evaluated
        self._epoch = None
        measures = summarize_steps(table, taken)
        return [
            (slot, self._record(slot, table.loss[:, i], int(taken[i]), measures[i], values[i], distance[i]))
            for i, slot in enumerate(self.slots)
        ]

    def evaluate(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Validation loss and metrics `[slots, 1 + metrics]`, distance to the optimum `[slots]` (NaN if unknown)."""
        assert self._stack is not None
        return evaluate(self.objective, self._stack.rows, self._stack.buffers, self.optimum)

    def _states(self, which: slice) -> list[SlotState]:
        """The states of some slots; they may share memory with the batch."""
        if self._stack is None:
            return []
        tensors = self._stack.tensors(which)
        if self._epoch is not None:
            self._epoch.check_sound()
            if self._epoch.done:
                for index, found in zip(range(len(self.slots))[which], tensors, strict=True):
                    found |= self._epoch.part(index)
        return [
            SlotState(t, slot.epoch, slot.step, slot.initial_loss, slot.spikes, self.position, slot.seconds)
            for slot, t in zip(self.slots[which], tensors, strict=True)
        ]

    def _record(
        self,
        slot: Slot,
        losses: NDArray[np.float64],
        taken: int,
        measures: Mapping[str, float | None],
        evaluated: NDArray[np.float64],
        distance: float,
    ) -> EpochRecord:
        """One slot's record; moves the slot's own counters on."""
        steps = len(losses)
        if slot.initial_loss is None:
            slot.initial_loss = float(losses[0])
        valid_loss = finite(float(evaluated[0]))
        if taken < steps:
            slot.diverged_at_step = slot.step + taken + 1
        elif valid_loss is None:
            slot.diverged_at_step = slot.step + steps
        spikes, slot.spikes = count_spikes(losses[:taken], slot.step + 1, slot.spikes)
        slot.epoch += 1
        slot.step += steps if taken == steps else taken + 1
        seconds, slot.seconds = slot.seconds, 0.0
        return EpochRecord(
            epoch=slot.epoch,
            step=slot.step,
            valid_loss=valid_loss,
            seconds=seconds,
            distance=finite(float(distance)),
            metrics=named_metrics(self.objective, evaluated),
            diverged_at_step=slot.diverged_at_step,
            spikes=spikes,
            **measures,
        )


def on_cpu(state: SlotState) -> SlotState:
    """A copy of a state, with its tensors on the CPU."""
    return replace(state, tensors={n: t.detach().to("cpu", copy=True) for n, t in state.tensors.items()})


def evaluate(
    objective: Objective, rows: Rows, buffers: dict[str, Tensor], optimum: Tensor | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Validation loss and metrics `[slots, 1 + metrics]`, and distance to the optimum `[slots]` (NaN if unknown)."""
    total: Tensor | None = None
    weights = 0
    for number, part in enumerate(objective.validation):
        values = objective.evaluate(rows, buffers, part.batch, number).to(torch.float64) * part.weight
        total = values if total is None else total + values
        weights += part.weight
    assert total is not None
    mean = total / weights
    if optimum is None:
        distance = torch.full((len(mean), 1), torch.nan, dtype=torch.float64, device=mean.device)
    else:
        distance = _distance(objective.layout.join(rows), optimum)
    both = torch.cat([mean, distance], dim=1).cpu().numpy()
    return both[:, :-1], both[:, -1]


def _distance(rows: Tensor, optimum: Tensor) -> Tensor:
    """Distance of rows `[slots, parameters]` to the optimum `[parameters]`, `[slots, 1]`.

    It is 0 where the rows' dtype does not resolve it: near underflow, or below what is rounded at the optimum.
    """
    number = torch.finfo(rows.dtype)
    apart = (rows - optimum).double()
    # A norm's squares underflow below 1e-154.
    scale = apart.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    distance = scale * torch.linalg.vector_norm(apart / scale, dim=1, keepdim=True)
    rounding = ROUNDINGS * number.eps * torch.linalg.vector_norm(optimum.double())
    found: Tensor = distance.masked_fill(distance <= rounding.clamp(min=number.tiny / number.eps), 0.0)
    return found


def named_metrics(objective: Objective, evaluated: NDArray[np.float64]) -> dict[str, float]:
    """The finite metrics of one slot by name, from its evaluation `[1 + metrics]`."""
    values = zip(objective.metric_names[1:], evaluated[1:].tolist(), strict=True)
    return {name: value for name, value in values if np.isfinite(value)}
