"""The trainer: takes settings, yields epoch records. It knows no database, no Optuna, no MLflow."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from momentum_tuner.metrics import EpochRecord, finite, stability_margin
from momentum_tuner.optim import Schedule, make_schedule
from momentum_tuner.tasks import Task
from momentum_tuner.trainer.calibration import SEQUENTIAL_WIDTH, Calibration
from momentum_tuner.trainer.data import Batch, Source, TrainingData, data_dtype
from momentum_tuner.trainer.memory import within_memory
from momentum_tuner.trainer.objective import Objective
from momentum_tuner.trainer.pace import Pace
from momentum_tuner.trainer.sharpness import Sharpness
from momentum_tuner.trainer.slots import Member, Slot, SlotBatch, evaluate, named_metrics, on_cpu
from momentum_tuner.trainer.state import SlotState, TrialSettings, check_state, new_state

logger = logging.getLogger(__name__)

FUSED_WIDTH = 64
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
        slots: how many trials at once; None takes the fastest width, and one at a time where that is faster, by
            measurement.
        device: where to train.
        precision: `auto`, `float32`, `float64`, `tfloat32` or `bfloat16`; see `Objective`.
        schedule: of the learning rate, and of momentum for `one_cycle`.
        mode: `auto`, `fused` or `sequential` (one slot after the other).
        most: the greatest width that the measurement may choose.
        compiles: `on` compiles what slots do fused at its first call; `auto` leaves it to `consider_compiling`; `off`.
        batch_size: that most trials have, for the measurement.
        calibration: what was measured before, to be taken instead of a new measurement.
    """

    whole_epochs = False
    """Whether a trial is saved only as it was at the end of an epoch."""

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
        most: int = FUSED_WIDTH,
        compiles: str = "off",
        batch_size: int = 64,
        calibration: Calibration | None = None,
    ) -> None:
        self.task = task
        self.epochs = epochs
        self.device = torch.device(device)
        self._usual_batch_size = batch_size
        self._data = TrainingData(task, self.device, data_dtype(precision))
        self._schedule = schedule or ScheduleSettings()
        self.failed: list[Hashable] = []
        """Keys of the trials in whose training `train_epoch` last raised an error."""
        self._batches: list[SlotBatch] = []  # in the order in which they train
        self._sources: dict[int, Source] = {}
        self._leaving: set[Slot] = set()
        self._entering: list[Member] = []
        self._slots: dict[Hashable, Slot] = {}
        self._starts: OrderedDict[tuple[int, str], tuple[SlotState, EpochRecord]] = OrderedDict()
        self.objective = Objective(task, self.device, precision, self._probe(), mode)
        self._sharpness = Sharpness(self.objective, self._data)
        self._optimum = None
        if task.optimum is not None:
            self._optimum = task.optimum.to(self.device, self.objective.layout.dtype)
        self.pace = Pace(self.objective, self._timed_batch, compiles, calibration)
        if slots is None and mode == "auto":
            slots = self.pace.choose(most)
        self.width = slots or (most if self.objective.batch_slots else min(most, SEQUENTIAL_WIDTH))
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

    def consider_compiling(
        self, trial_steps: float, sharing: int = 1, before: Callable[[], None] = lambda: None
    ) -> bool:
        """Compile what slots do fused, if `compiles` is `auto` and what is left to train repays it.

        It takes a minute or so, in which nothing is trained. What it took and gained is in `calibration` afterwards.

        Args:
            trial_steps: left to train in this trainer, about.
            sharing: trainers of this machine with as much left, of which one compiles for all.
            before: called before it compiles.

        Returns:
            Whether that is settled for now; not if another trainer is compiling.
        """
        return self.pace.consider_compiling(self.width, trial_steps, sharing, before)

    def slot_number(self, key: Hashable) -> int:
        """The number of the slot that a trial holds, from 0."""
        return self._slots[key].number

    def steps_per_epoch(self, batch_size: int) -> int:
        """Optimizer steps in an epoch at this batch size."""
        return self._source(batch_size).steps

    def admit(self, key: Hashable, settings: TrialSettings, state: SlotState | None = None) -> EpochRecord | None:
        """Give a trial a slot. It trains from the next epoch on.

        From a state in the middle of an epoch it first trains the rest of that, together with the slots of its batch
        size that are at the same step; the other slots of that batch size wait meanwhile.

        Args:
            key: the caller's name for the trial.
            settings: what it trains with.
            state: where it goes on; None starts it anew.

        Returns:
            The record of epoch 0, the untrained model, or None for a trial that goes on from a state.

        Raises:
            ValueError: the key has a slot, none is free, or the state is not one of this model, optimizer and batch
                size. Nothing has changed.
            SlotsOutOfMemoryError: memory did not suffice. Nothing has changed.
        """
        if key in self._slots:
            raise ValueError(f"{key!r} holds a slot already")
        if self.free <= 0:
            raise ValueError(f"all {self.width} slots are taken")
        if state is not None:
            check_state(self.objective, settings, state, self.steps_per_epoch(self._batch_size(settings)))
        state, record = within_memory(lambda: self._place(settings, state), lambda: [key])
        taken = {slot.number for slot in self._slots.values()}
        number = next(n for n in range(self.width) if n not in taken)
        slot = Slot(key, number, settings, state.epoch, state.step, state.initial_loss, state.spikes, state.seconds)
        self._slots[key] = slot
        self._entering.append((slot, state))
        return record

    def release(self, key: Hashable) -> None:
        """Take a trial out of its slot, which the next `admit` may fill.

        Its tensors go when `train_epoch` is called next, in the middle of an epoch too.
        """
        slot = self._slots.pop(key)
        before = len(self._entering)
        self._entering = [member for member in self._entering if member[0] is not slot]
        if len(self._entering) == before:
            self._leaving.add(slot)

    def export(self, key: Hashable) -> SlotState:
        """A copy of a slot's state on the CPU, from which `admit` goes on, here or elsewhere.

        Raises:
            UnfinishedStepError: a step of this trial broke off in the middle.
        """
        return on_cpu(self._state(key))

    def sharpness(
        self, keys: Sequence[Hashable], pause: Callable[[], bool] | None = None
    ) -> dict[Hashable, float | None]:
        """The largest eigenvalue of the Hessian of what each trial minimizes, at its parameters as they are now.

        That is the training loss and, unless it is decoupled, the L2 penalty `weight_decay / 2 |theta|^2`, which adds
        `weight_decay`. The loss is that of one batch, the same for all trials: the first 512 examples, the first batch
        of an iterable, or the landscape. Dropout is off, and batch norm normalizes by that batch, as the optimizer
        never sees its running statistics. It is found to 1%, in the parameters' dtype and without autocast.

        Args:
            keys: trials that hold a slot.
            pause: asked before each Hessian-vector product. When it says True, the trials not done yet are left out.

        Returns:
            By trial, None where it cannot be had; the log says why.

        Raises:
            UnfinishedStepError: a step of one of the trials broke off in the middle.
        """
        states = [self._state(key) for key in keys]
        values = self._sharpness.measure(states, pause or _never)
        found: dict[Hashable, float | None] = {}
        for key, value in zip(keys, values, strict=False):
            found[key] = None if value is None else value + self._slots[key].settings.penalty
        return found

    def stability_margin(self, key: Hashable, sharpness: float) -> float | None:
        """`metrics.stability_margin` at this sharpness, by the learning rate and momentum of a trial's last step."""
        slot = self._slots[key]
        settings = slot.settings
        schedule = self._make_schedule(self._source(self._batch_size(settings)))
        last = np.array(max(slot.step - 1, 0))
        return stability_margin(
            settings.optimizer,
            settings.value("learning_rate") * float(schedule.learning_rate_factor(last)),
            settings.value("momentum") * float(schedule.momentum_factor(last)),
            sharpness,
            settings.value("dampening"),
        )

    def train_epoch(self, pause: Callable[[], bool] | None = None) -> Iterator[tuple[Hashable, EpochRecord]]:
        """Train every slot to the end of its epoch and yield its record, one batch size after the other.

        A trial whose record says `diverged_at_step` has nothing more to train: release it. One that was released
        meanwhile has no record. Slots at the start of an epoch wait, without a record, for those of their batch
        size that are in the middle of one, so that they train together afterwards.

        Args:
            pause: asked before each optimizer step and each evaluation, except before the first that this call
                takes. When it says True, the generator ends there. The next call goes on from that very step, and
                takes those that have had their turn last.

        Raises:
            SlotsOutOfMemoryError: memory did not suffice. All slots are as they were after their last whole step:
                export, release and train them, or lower `width` first.
            UnfinishedStepError: the trials in `failed` are of no more use.
            Exception: what the user's model or data raised. The trials in `failed` would meet it again: release
                them; all others can go on.
        """
        proceed = _spare_the_first(pause) if pause is not None else _never
        self.failed = []
        self._rearrange()
        busy = {batch.size for batch in self._batches if batch.position}
        for batch in [b for b in self._batches if b.position or b.size not in busy]:
            records = self._train(batch, proceed)
            if records is None:
                return
            self._batches.remove(batch)
            self._batches.append(batch)
            for slot, record in records:
                if self._slots.get(slot.key) is slot:
                    yield slot.key, record

    def _train(self, batch: SlotBatch, pause: Callable[[], bool]) -> list[tuple[Slot, EpochRecord]] | None:
        """Train one batch, and note whose training failed."""

        def keys() -> list[Hashable]:
            return [slot.key for slot in batch.slots if self._slots.get(slot.key) is slot]

        try:
            return within_memory(lambda: batch.train(pause), keys)
        except Exception:
            self.failed = keys()
            raise

    def _state(self, key: Hashable) -> SlotState:
        """A slot's state on the device, to be read only."""
        slot = self._slots[key]
        for entering, state in self._entering:
            if entering is slot:
                return state
        return next(batch for batch in self._batches if slot in batch.slots).state(slot)

    def _place(self, settings: TrialSettings, state: SlotState | None) -> tuple[SlotState, EpochRecord | None]:
        """The state on the device, and the record of a trial that starts anew."""
        if state is None:
            return self._start(settings)
        return replace(state, tensors={n: t.detach().to(self.device) for n, t in state.tensors.items()}), None

    def _rearrange(self) -> None:
        """Carry out releases and admissions, and let slots train together that are at the same step of their epoch.

        A batch that lost slots and got no new ones is smaller afterwards. If memory runs out on the way, the rest is
        left to the next call.
        """
        self._batches = [batch for batch in self._batches if not self._leaving.issuperset(batch.slots)]
        entering: dict[tuple[int, int], list[Member]] = {}
        for member in self._entering:
            place = self._batch_size(member[0].settings), member[1].epoch_steps
            entering.setdefault(place, []).append(member)
        there: dict[tuple[int, int], list[SlotBatch]] = {}
        for batch in self._batches:
            there.setdefault((batch.size, batch.position), []).append(batch)
        places = list(dict.fromkeys([*there, *entering]))
        busy = {size for size, position in places if position}
        for size, position in places:
            if position or size not in busy:
                self._gather(size, there.get((size, position), []), entering.get((size, position), []))
        self._leaving.intersection_update([slot for batch in self._batches for slot in batch.slots])

    def _gather(self, size: int, batches: Sequence[SlotBatch], enter: Sequence[Member]) -> None:
        """Make one batch of those at one place, without the slots that leave and with those that enter."""
        if len(batches) == 1 and not enter and self._leaving.isdisjoint(batches[0].slots):
            return
        first, *others = batches or [self._new_batch(size)]
        moving = [member for other in others for member in other.members() if member[0] not in self._leaving]
        members = [*first.slots, *(slot for slot, _ in [*moving, *enter])]
        within_memory(
            lambda: first.change(self._leaving, [*moving, *enter]),
            lambda: [slot.key for slot in members if slot not in self._leaving],
        )
        entered = {slot for slot, _ in enter}
        self._entering = [member for member in self._entering if member[0] not in entered]
        self._batches = [batch for batch in self._batches if batch not in others]
        if first not in self._batches:
            self._batches.append(first)

    def _batch_size(self, settings: TrialSettings) -> int:
        """The batch size that tells batches of slots apart: one for all where the task makes its own batches."""
        return settings.batch_size if isinstance(self.task.train, TensorDataset) else 0

    def _source(self, batch_size: int) -> Source:
        if batch_size not in self._sources:
            self._sources[batch_size] = self._data.source(batch_size)
        return self._sources[batch_size]

    def _new_batch(self, batch_size: int) -> SlotBatch:
        source = self._source(batch_size)
        return SlotBatch(self.objective, source, self._make_schedule(source), self._optimum, batch_size)

    def _make_schedule(self, source: Source) -> Schedule:
        return make_schedule(
            self._schedule.name,
            total_steps=self.epochs * source.steps,
            steps_per_epoch=source.steps,
            options=self._schedule.options,
            warmup_epochs=self._schedule.warmup_epochs,
            warmup_start=self._schedule.warmup_start,
        )

    def _start(self, settings: TrialSettings) -> tuple[SlotState, EpochRecord]:
        """State and record of an untrained trial; the last few seeds are remembered, as a search shares one."""
        known = (settings.seed, settings.rule.name)
        if known not in self._starts:
            state = new_state(self.objective, settings)
            prefix = "buffer/"
            buffers = {
                n.removeprefix(prefix): t[None].clone() for n, t in state.tensors.items() if n.startswith(prefix)
            }
            rows = self.objective.layout.stack([state.tensors["parameters"]])
            evaluated, distance = evaluate(self.objective, rows, buffers, self._optimum)
            self._starts[known] = state, first_record(self.objective, evaluated[0], float(distance[0]))
            while len(self._starts) > _REMEMBERED_SEEDS:
                self._starts.popitem(last=False)
        self._starts.move_to_end(known)
        return self._starts[known]

    def _timed_batch(self) -> Batch:
        """A minibatch of the size that most trials have, shared by all slots."""
        return next(iter(self._source(self._usual_batch_size).epoch([(0, 1)])))

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


def _never() -> bool:
    return False


def _spare_the_first(pause: Callable[[], bool]) -> Callable[[], bool]:
    """The same question, but False the first time, so that every call makes progress."""
    asked = iter([False])
    return lambda: next(asked, None) is None and pause()
