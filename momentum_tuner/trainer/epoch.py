"""One epoch of a batch of slots: it can stop after any step, and go on from there, here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momentum_tuner.metrics import DIVERGENCE_FACTOR, StepTable, divergence_limit
from momentum_tuner.optim import Schedule
from momentum_tuner.trainer.data import Batch, Source
from momentum_tuner.trainer.dropout import step_keys
from momentum_tuner.trainer.memory import UnfinishedStepError
from momentum_tuner.trainer.stack import Stack
from momentum_tuner.trainer.state import TABLE_COLUMNS, TrialSettings, table_dtype
from momentum_tuner.trainer.update import Standing


class Trial(Protocol):
    """What an epoch needs to know of a slot."""

    settings: TrialSettings
    epoch: int
    step: int
    initial_loss: float | None


class Epoch:
    """The epoch that all slots of a stack are in.

    Nothing of it changes before a step has all it needs, so that a step that fails leaves the last one's state.

    Args:
        stack: the slots' tensors.
        slots: the trials, in the stack's order.
        source: training data at their batch size.
        schedule: factors of learning rate and momentum by step.
        parts: for each slot the tensors of a state in the middle of this epoch; empty at its start.
    """

    def __init__(
        self,
        stack: Stack,
        slots: Sequence[Trial],
        source: Source,
        schedule: Schedule,
        parts: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        self.stack = stack
        self.source = source
        self.done = len(parts[0]["part/table"]) if parts else 0
        self._orders = [(slot.settings.seed, slot.epoch + 1) for slot in slots]
        self._batches: Iterator[Batch] | None = None
        device, wide = stack.rows[0].device, table_dtype(stack.objective.layout.dtype)

        # Of every step to come, `[steps, slots]`
        at = np.array([slot.step for slot in slots])[None, :] + np.arange(source.steps)[:, None]
        base = np.array([slot.settings.value("learning_rate") for slot in slots])
        self._rates = torch.from_numpy(base * schedule.learning_rate_factor(at)).to(device, wide)
        cycle = torch.from_numpy(schedule.momentum_factor(at)) if schedule.cycles_momentum else None
        self._cycle = None if cycle is None else cycle.to(device, wide)
        self._counts = torch.from_numpy(at + 1.0).to(device, wide)
        self._keys = None
        if stack.objective.draws or not stack.objective.batch_slots:
            self._keys = torch.from_numpy(step_keys(self._orders, source.steps)).to(device)

        # Of the slots, `[slots]`
        clip = [slot.settings.value("clip_norm") for slot in slots]
        self._max_norm = stack.column(clip) if any(c != float("inf") for c in clip) else None
        self._new = torch.tensor([slot.initial_loss is None for slot in slots], device=device)
        self._largest = torch.finfo(wide).max

        # What moves on from step to step
        if parts:
            self._table = [torch.stack([part["part/table"] for part in parts], dim=2)]  # [some steps, 5, slots] each
            limit = torch.stack([part["part/limit"] for part in parts])
            taken = torch.stack([part["part/taken"] for part in parts])
        else:
            self._table = []
            limits = [self._largest if s.initial_loss is None else divergence_limit(s.initial_loss) for s in slots]
            limit = stack.column([min(limit, self._largest) for limit in limits])
            taken = torch.zeros(len(slots), dtype=wide, device=device)
        self._standing = Standing(limit, taken == self.done, taken)

    @property
    def sound(self) -> bool:
        """Whether the slots are at the end of a whole step."""
        return not self.stack.torn

    def run(self, pause: Callable[[], bool]) -> bool:
        """Take the steps that are left; False if `pause`, asked before each of them and at the end, said to stop."""
        self.check_sound()
        while self.done < self.source.steps:
            if pause():
                return False
            self._step()
        self._batches = None
        return not pause()

    def check_sound(self) -> None:
        """See that no step broke off halfway.

        Raises:
            UnfinishedStepError: one did.
        """
        if self.stack.torn:
            raise UnfinishedStepError("an optimizer step broke off in the middle; its trials cannot go on")

    def reset_data(self) -> None:
        """Let go of the data's iterator, which an error may have ended; the next step begins another in its place."""
        self._batches = None

    def part(self, index: int) -> dict[str, Tensor]:
        """What a slot's state holds of this epoch, as views."""
        if len(self._table) > 1:
            self._table = [torch.cat(self._table)]
        table = self._table[0][:, :, index]
        return {
            "part/table": table,
            "part/limit": self._standing.limit[index],
            "part/taken": self._standing.taken[index],
        }

    def table(self) -> tuple[StepTable, NDArray[np.int64]]:
        """The measures of the steps, and where each slot stopped, in one transfer."""
        taken = self._standing.taken.expand(1, TABLE_COLUMNS, -1)
        table = torch.cat([*self._table, taken]).to("cpu", torch.float64).numpy()
        columns = (np.ascontiguousarray(table[:-1, i]) for i in range(TABLE_COLUMNS))
        return StepTable(*columns), table[-1, 0].astype(np.int64)

    def _step(self) -> None:
        """Take one step on the device."""
        stack, now = self.stack, self.done
        if self._batches is None:
            self._batches = self.source.epoch(self._orders, start=now)
        batch = next(self._batches)
        keys = None if self._keys is None else self._keys[now]
        cycle = None if self._cycle is None else self._cycle[now]
        grads, loss, buffers = stack.gradient(batch, keys, cycle)
        standing = self._standing
        if now == 0:
            # as metrics.divergence_limit
            margin = (DIVERGENCE_FACTOR - 1.0) * loss.abs()
            limit = (loss + margin).clamp(max=self._largest).to(standing.limit.dtype)
            standing = standing._replace(limit=torch.where(self._new, limit, standing.limit))
        rate, count = self._rates[now], self._counts[now]
        measures, standing = stack.step(grads, loss, standing, self._max_norm, rate, cycle, count)
        self._table.append(measures[None])
        stack.buffers = buffers
        self._standing = standing
        self.done = now + 1
        stack.torn = False
