"""One batch of slots: stacked parameters, moments and buffers, and the training of one epoch over them."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momentum_tuner.catalog import OPTIMIZERS
from momentum_tuner.metrics import (
    DIVERGENCE_FACTOR,
    EpochRecord,
    SpikeState,
    StepTable,
    count_spikes,
    divergence_limit,
    finite,
    summarize_steps,
)
from momentum_tuner.optim import OPTIONAL_HYPERPARAMETERS, RULES, Rule, Schedule, clip_scale, lookahead_point
from momentum_tuner.trainer.data import Source
from momentum_tuner.trainer.dropout import step_keys
from momentum_tuner.trainer.objective import Objective


@dataclass(frozen=True)
class TrialSettings:
    """What one trial trains with.

    Attributes:
        optimizer: a name of `catalog.OPTIMIZERS`.
        hyperparameters: `learning_rate`, `momentum`, ... by name; those missing are at their neutral value.
        batch_size: examples per step (of no effect for iterables and landscapes).
        seed: fixes the initial weights and the data order.
    """

    optimizer: str
    hyperparameters: Mapping[str, float]
    batch_size: int
    seed: int

    @property
    def rule(self) -> Rule:
        """The update rule that trains it."""
        return RULES[OPTIMIZERS[self.optimizer].rule]

    def value(self, name: str) -> float:
        """A hyperparameter's value, 0 (or infinity, for `clip_norm`) where nothing sets it."""
        constants = OPTIMIZERS[self.optimizer].constants
        neutral = float("inf") if name == "clip_norm" else 0.0
        return float(constants.get(name, self.hyperparameters.get(name, neutral)))


@dataclass(frozen=True)
class SlotState:
    """All of one slot's state after an epoch: what another worker needs to go on with the trial.

    Attributes:
        tensors: `parameters`, `previous_update` and `moment/<name>`, each `[parameters]`, and `buffer/<name>`.
        epoch: epochs done.
        step: optimizer steps done.
        initial_loss: loss of the first minibatch before any update; None before the first epoch.
        spikes: the trailing means of the loss.
    """

    tensors: Mapping[str, Tensor]
    epoch: int = 0
    step: int = 0
    initial_loss: float | None = None
    spikes: SpikeState = field(default_factory=SpikeState)


@dataclass
class Slot:
    """The bookkeeping of one trial in the batch."""

    key: Hashable
    number: int
    settings: TrialSettings
    epoch: int
    step: int
    initial_loss: float | None
    spikes: SpikeState
    diverged_at_step: int | None = None


@dataclass
class _Slice:
    """Neighbouring slots of one update rule, with their moments and constant hyperparameters."""

    rule: Rule
    start: int
    stop: int
    moments: dict[str, Tensor]  # [stop - start, parameters] each
    hyper: dict[str, Tensor]  # [stop - start] each

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class SlotBatch:
    """Slots that share a batch size and train together. All tensors have one row per slot.

    Args:
        objective: loss, gradient and evaluation of the task.
        source: training data at this batch size.
        schedule: factors of learning rate and momentum by step.
        optimum: flat parameters `[parameters]` of the known optimum, if any.
    """

    def __init__(self, objective: Objective, source: Source, schedule: Schedule, optimum: Tensor | None) -> None:
        self.objective = objective
        self.source = source
        self.schedule = schedule
        self.optimum = optimum
        self.slots: list[Slot] = []
        self._rows = torch.empty(0)
        self._previous = torch.empty(0)
        self._update = torch.empty(0)
        self._roots = torch.empty(0)  # square roots of the parameter tensors' sizes
        self._buffers: dict[str, Tensor] = {}
        self._slices: list[_Slice] = []

    def change(self, leave: set[Hashable], enter: Sequence[tuple[Slot, SlotState]]) -> None:
        """Release some slots and admit others, keeping slots of one update rule side by side."""
        stay = [(slot, self._state(i)) for i, slot in enumerate(self.slots) if slot.key not in leave]
        rules = list(RULES)
        members = sorted([*stay, *enter], key=lambda pair: rules.index(pair[0].settings.rule.name))
        self.slots = [slot for slot, _ in members]
        states = [state.tensors for _, state in members]
        if not members:
            self._rows = self._previous = self._update = torch.empty(0)
            self._buffers, self._slices = {}, []
            return
        self._rows = torch.stack([s["parameters"] for s in states])
        self._previous = torch.stack([s["previous_update"] for s in states])
        self._update = torch.empty_like(self._rows)
        self._roots = self._column([size**0.5 for size in self.objective.layout.sizes])
        prefix = "buffer/"
        self._buffers = {
            name.removeprefix(prefix): torch.stack([s[name] for s in states])
            for name in states[0]
            if name.startswith(prefix)
        }
        self._slices = []
        start = 0
        while start < len(members):
            rule = self.slots[start].settings.rule
            stop = start
            while stop < len(members) and self.slots[stop].settings.rule is rule:
                stop += 1
            moments = {m: torch.stack([s[f"moment/{m}"] for s in states[start:stop]]) for m in rule.moments}
            self._slices.append(_Slice(rule, start, stop, moments, self._constants(rule, start, stop)))
            start = stop

    def state(self, key: Hashable) -> SlotState:
        """A copy of one slot's state, on the CPU."""
        index = next(i for i, slot in enumerate(self.slots) if slot.key == key)
        state = self._state(index)
        return replace(state, tensors={n: t.detach().to("cpu", copy=True) for n, t in state.tensors.items()})

    def train_epoch(self) -> list[tuple[Slot, EpochRecord]]:
        """Train every slot for one epoch, evaluate it, and derive its record."""
        started = time.perf_counter()
        steps = self.source.steps
        table, stopped_at = self._train_steps(steps)
        evaluated, distance = self.evaluate()
        seconds = (time.perf_counter() - started) / len(self.slots)
        return [
            (slot, self._record(slot, i, table, int(stopped_at[i]), evaluated[i], distance[i], seconds))
            for i, slot in enumerate(self.slots)
        ]

    def evaluate(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Validation loss and metrics `[slots, 1 + metrics]`, distance to the optimum `[slots]` (NaN if unknown)."""
        return evaluate(self.objective, self._rows, self._buffers, self.optimum)

    def _state(self, index: int) -> SlotState:
        """One slot's state as views of the batch."""
        slot = self.slots[index]
        piece = next(s for s in self._slices if s.start <= index < s.stop)
        tensors = {"parameters": self._rows[index], "previous_update": self._previous[index]}
        tensors |= {f"moment/{name}": m[index - piece.start] for name, m in piece.moments.items()}
        tensors |= {f"buffer/{name}": b[index] for name, b in self._buffers.items()}
        return SlotState(tensors, slot.epoch, slot.step, slot.initial_loss, slot.spikes)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=self._rows.dtype, device=self._rows.device)

    def _constants(self, rule: Rule, start: int, stop: int) -> dict[str, Tensor]:
        """Hyperparameters of a rule's slots, `[slots]` each; optional ones that all slots leave at 0 are left out."""
        values = {name: [slot.settings.value(name) for slot in self.slots[start:stop]] for name in rule.hyperparameters}
        return {
            name: self._column(column)
            for name, column in values.items()
            if any(column) or name not in OPTIONAL_HYPERPARAMETERS
        }

    def _scheduled(self, steps: int) -> tuple[Tensor, Tensor | None]:
        """Learning rates `[steps, slots]`, and the factor of momentum `[steps, slots]` if the schedule cycles it."""
        begin = np.array([slot.step for slot in self.slots])
        at = begin[None, :] + np.arange(steps)[:, None]
        base = np.array([slot.settings.value("learning_rate") for slot in self.slots])
        rates = torch.from_numpy(base * self.schedule.learning_rate_factor(at)).to(self._rows)
        if not self.schedule.cycles_momentum:
            return rates, None
        return rates, torch.from_numpy(self.schedule.momentum_factor(at)).to(self._rows)

    def _train_steps(self, steps: int) -> tuple[StepTable, NDArray[np.int64]]:
        """Take the epoch's steps on the device; one transfer brings the table and where each slot stopped."""
        slots = self.slots
        dtype = self._rows.dtype
        rates, cycle = self._scheduled(steps)
        orders = [(slot.settings.seed, slot.epoch + 1) for slot in slots]
        keys = None
        if self.objective.keys or not self.objective.batch_slots:
            keys = torch.from_numpy(step_keys(orders, steps)).to(self._rows.device)
        clip = [slot.settings.value("clip_norm") for slot in slots]
        max_norm = self._column(clip) if any(c != float("inf") for c in clip) else None
        count = self._column([float(slot.step) for slot in slots])
        new = torch.tensor([slot.initial_loss is None for slot in slots], device=self._rows.device)
        largest = torch.finfo(dtype).max
        limit = self._column(
            [
                largest if slot.initial_loss is None else min(divergence_limit(slot.initial_loss), largest)
                for slot in slots
            ]
        )
        active = torch.ones(len(slots), dtype=torch.bool, device=self._rows.device)
        rows_of: list[Tensor] = []
        wide = torch.promote_types(dtype, torch.float32)  # a bfloat16 cannot count to an epoch's steps
        taken = torch.zeros(len(slots), dtype=wide, device=self._rows.device)
        on_cpu = self._rows.device.type == "cpu"
        looking_ahead = [s for s in self._slices if s.rule.lookahead]

        for step, batch in enumerate(self.source.epoch(orders)):
            count += 1
            point = self._rows if not looking_ahead else self._ahead(looking_ahead, cycle, step)
            grads, loss = self.objective.gradient(point, self._buffers, batch, None if keys is None else keys[step])
            if step == 0:
                # as metrics.divergence_limit
                margin = (DIVERGENCE_FACTOR - 1.0) * loss.abs()
                limit = torch.where(new, (loss + margin).clamp(max=largest), limit)
            active &= loss.isfinite() & (loss <= limit)
            norm, ratio = self._gradient_norms(grads)
            if max_norm is not None:
                grads = grads * clip_scale(norm, max_norm)[:, None]
            update = self._take(grads, rates[step], None if cycle is None else cycle[step], count)
            if not on_cpu or not bool(active.all()):  # asking costs nothing where no transfer is needed
                update.masked_fill_(~active[:, None], 0.0)
            self._rows += update
            taken += active
            rows_of.append(
                torch.stack(
                    (
                        loss.to(dtype),
                        norm,
                        ratio,
                        torch.linalg.vector_norm(update, dim=1),
                        torch.linalg.vecdot(update, self._previous, dim=1),
                    )
                ).to(wide)
            )
            self._update, self._previous = self._previous, update
        self.objective.check_shared()

        table = torch.stack([*rows_of, taken.expand(5, -1)]).to("cpu", torch.float64).numpy()
        columns = (np.ascontiguousarray(table[:-1, i]) for i in range(5))
        return StepTable(*columns), table[-1, 0].astype(np.int64)

    def _ahead(self, slices: Sequence[_Slice], cycle: Tensor | None, step: int) -> Tensor:
        """The rows, with those of look-ahead rules moved to where their gradient is taken."""
        point = self._rows.clone()
        for piece in slices:
            momentum = piece.hyper["momentum"]
            if cycle is not None:
                momentum = momentum * cycle[step, piece.rows]
            point[piece.rows] = lookahead_point(self._rows[piece.rows], piece.moments["velocity"], momentum)
        return point

    def _take(self, grads: Tensor, rate: Tensor, cycle: Tensor | None, count: Tensor) -> Tensor:
        """Let each rule write its slots' updates; returns `[slots, parameters]`."""
        for piece in self._slices:
            hyper = dict(piece.hyper, learning_rate=rate[piece.rows])
            if cycle is not None:
                for name in ("momentum", "beta1"):
                    if name in hyper:
                        hyper[name] = hyper[name] * cycle[piece.rows]
            piece.rule.update(
                self._rows[piece.rows],
                grads[piece.rows],
                piece.moments,
                hyper,
                count[piece.rows],
                self._update[piece.rows],
            )
        return self._update

    def _gradient_norms(self, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Global gradient norm `[slots]`, and largest over smallest non-zero per-tensor RMS `[slots]`."""
        sizes = self.objective.layout.sizes
        norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in torch.split(grads, list(sizes), dim=1)])
        total = torch.linalg.vector_norm(norms, dim=0)
        if len(sizes) == 1:
            return total, torch.ones_like(total)
        rms = norms / self._roots[:, None]
        smallest = torch.where(rms > 0, rms, torch.inf).amin(0)
        return total, rms.amax(0) / smallest

    def _record(
        self,
        slot: Slot,
        index: int,
        table: StepTable,
        taken: int,
        evaluated: NDArray[np.float64],
        distance: float,
        seconds: float,
    ) -> EpochRecord:
        """One slot's record; moves the slot's own counters on."""
        steps = len(table.loss)
        if slot.initial_loss is None:
            slot.initial_loss = float(table.loss[0, index])
        valid_loss = finite(float(evaluated[0]))
        if taken < steps:
            slot.diverged_at_step = slot.step + taken + 1
        elif valid_loss is None:
            slot.diverged_at_step = slot.step + steps
        measures: dict[str, Any] = summarize_steps(table, index, taken)
        measures["spikes"], slot.spikes = count_spikes(table.loss[:taken, index], slot.step + 1, slot.spikes)
        slot.epoch += 1
        slot.step += steps if taken == steps else taken + 1
        return EpochRecord(
            epoch=slot.epoch,
            step=slot.step,
            valid_loss=valid_loss,
            seconds=seconds,
            distance=finite(float(distance)),
            metrics=named_metrics(self.objective, evaluated),
            diverged_at_step=slot.diverged_at_step,
            **measures,
        )


def evaluate(
    objective: Objective, rows: Tensor, buffers: dict[str, Tensor], optimum: Tensor | None
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
        distance = torch.full((len(rows), 1), torch.nan, dtype=torch.float64, device=rows.device)
    else:
        distance = torch.linalg.vector_norm((rows - optimum).to(torch.float64), dim=1, keepdim=True)
    both = torch.cat([mean, distance], dim=1).cpu().numpy()
    return both[:, :-1], both[:, -1]


def named_metrics(objective: Objective, evaluated: NDArray[np.float64]) -> dict[str, float]:
    """The finite metrics of one slot by name, from its evaluation `[1 + metrics]`."""
    values = zip(objective.metric_names[1:], evaluated[1:].tolist(), strict=True)
    return {name: value for name, value in values if np.isfinite(value)}


def new_state(objective: Objective, settings: TrialSettings) -> SlotState:
    """The state of a trial before its first step."""
    start = objective.start(settings.seed)
    tensors = {"parameters": start.row, "previous_update": torch.zeros_like(start.row)}
    tensors |= {f"moment/{name}": torch.zeros_like(start.row) for name in settings.rule.moments}
    tensors |= {f"buffer/{name}": value for name, value in start.buffers.items()}
    return SlotState(tensors)
