"""Trains loops of the user's own behind the trainer's interface: one epoch at a time, one trial after the other."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from momentum_tuner.catalog import OPTIMIZERS
from momentum_tuner.errors import TaskError, TrialError, redact
from momentum_tuner.metrics import EpochRecord, divergence_limit, finite
from momentum_tuner.optim import make_schedule
from momentum_tuner.tasks import Loop, LoopContext, Task
from momentum_tuner.tasks.loop import ScheduleOf
from momentum_tuner.tasks.task import described
from momentum_tuner.trainer.calibration import Calibration
from momentum_tuner.trainer.loop_measures import LoopMeasures, read_measures
from momentum_tuner.trainer.memory import is_out_of_memory, within_memory
from momentum_tuner.trainer.patience import AbandonedError, Patience
from momentum_tuner.trainer.randomness import RandomStream, mix_seed
from momentum_tuner.trainer.state import SlotState, TrialSettings
from momentum_tuner.trainer.trainer import FUSED_WIDTH, ScheduleSettings, Trainer

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 4.0
"""How long an epoch may go on when the worker is to stop: after 8 s the worker is killed, and it has to save first."""


class LoopTrainer:
    """Trains trials with a loop of the user's own.

    It has the interface of `Trainer`. A pause comes between two epochs only. An epoch that goes on for
    `PATIENCE_SECONDS` after `stopping` became true is abandoned, and its trial goes on elsewhere from its last saved
    state, whose records and measures are the same then.

    Args:
        loop: what to train.
        epochs: the budget of each trial.
        slots: how many trials are alive at once, of which each trains an epoch in turn; None for one.
        device: what the loop is told to train on.
        schedule: of the learning rate, which `LoopContext.optimizer` follows.
        stopping: whether the worker is to stop; asked in another thread.
    """

    whole_epochs = True
    """Whether a trial is saved only as it was at the end of an epoch."""

    def __init__(
        self,
        loop: Loop,
        *,
        epochs: int,
        slots: int | None = None,
        device: torch.device | str = "cpu",
        schedule: ScheduleSettings | None = None,
        stopping: Callable[[], bool] | None = None,
    ) -> None:
        self.loop = loop
        self.epochs = epochs
        self.device = torch.device(device)
        self.width = slots or 1
        self.failed: list[Hashable] = []
        """Keys of the trials in whose training `train_epoch` last raised an error."""
        self._stopping = stopping
        self._schedule = schedule or ScheduleSettings()
        self._slots: dict[Hashable, _LoopSlot] = {}  # in the order of their turns
        self._steps_per_epoch = 1
        if self.device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]  # so that random streams have the device's generator

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
        """Optimizer steps in an epoch, as far as the last one tells: a loop may take what it likes."""
        return self._steps_per_epoch

    def admit(self, key: Hashable, settings: TrialSettings, state: SlotState | None = None) -> EpochRecord | None:
        """Give a trial a slot. It trains from the next epoch on.

        Args:
            key: the caller's name for the trial.
            settings: what it trains with.
            state: where it goes on; None starts it anew.

        Returns:
            The record of epoch 0, the untrained model, or None for a trial that goes on from a state.

        Raises:
            ValueError: the key has a slot, none is free, or the state is not one of a loop. Nothing has changed.
            SlotsOutOfMemoryError: memory did not suffice. Nothing has changed.
            TrialError: the loop failed, for this reason. Nothing has changed.
        """
        if key in self._slots:
            raise ValueError(f"{key!r} holds a slot already")
        if self.free <= 0:
            raise ValueError(f"all {self.width} slots are taken")
        if state is not None and (state.epoch_steps or (state.epoch > 0 and state.loop is None)):
            raise ValueError("the state is not one of a loop after an epoch")
        taken = {slot.number for slot in self._slots.values()}
        number = next(n for n in range(self.width) if n not in taken)
        context = partial(self._new_context, settings)
        slot = _LoopSlot(self.loop, number, settings.seed, state or SlotState({}), context)
        record = None
        if state is None:
            record = self._run(key, slot.begin)
        self._slots[key] = slot
        return record

    def release(self, key: Hashable) -> None:
        """End a trial's loop, and free its slot."""
        self._slots.pop(key).close()

    def export(self, key: Hashable) -> SlotState:
        """What the loop saved after its last epoch that it saved at all, from which `admit` goes on.

        A trial whose loop saved nothing begins anew.
        """
        return self._slots[key].saved

    def sharpness(
        self, keys: Sequence[Hashable], pause: Callable[[], bool] | None = None
    ) -> dict[Hashable, float | None]:
        """None for each trial: what a loop trains is its own."""
        return dict.fromkeys(keys)

    def stability_margin(self, key: Hashable, sharpness: float) -> float | None:
        """None, as there is no sharpness."""
        return None

    def train_epoch(self, pause: Callable[[], bool] | None = None) -> Iterator[tuple[Hashable, EpochRecord]]:
        """Train every slot for one epoch, one after the other, and yield its record.

        A trial whose record says `diverged_at_step` has nothing more to train: release it.

        Args:
            pause: asked before each slot's epoch, except before the first. When it says True, the generator ends
                there. The next call takes those that have had their turn last.

        Raises:
            SlotsOutOfMemoryError: memory did not suffice. The slot goes on from its last saved state.
            TrialError: the loop of the trial in `failed` failed, for this reason: release it.
        """
        self.failed = []
        for turn, (key, slot) in enumerate(list(self._slots.items())):
            if self._slots.get(key) is not slot:
                continue
            if turn and pause is not None and pause():
                return
            try:
                record = self._run(key, slot.train)
            except AbandonedError:
                logger.warning("an epoch took longer than %.0f s to its end and is given up", PATIENCE_SECONDS)
                return
            except TrialError:
                self.failed = [key]
                raise
            self._slots[key] = self._slots.pop(key)
            self._steps_per_epoch = max(1, round(record.step / record.epoch))
            yield key, record

    def _run(self, key: Hashable, work: Callable[[], EpochRecord]) -> EpochRecord:
        patience = nullcontext() if self._stopping is None else Patience(self._stopping, PATIENCE_SECONDS)
        with patience, torch.enable_grad():  # a loop may yield in a block of its own without gradients
            return within_memory(work, lambda: [key])

    def _new_context(self, settings: TrialSettings) -> LoopContext:
        optimizer = OPTIMIZERS[settings.optimizer]
        values = {name: settings.value(name) for name in (*optimizer.hyperparameters, *optimizer.constants)}
        values["batch_size"] = settings.batch_size
        return LoopContext(settings.optimizer, values, settings.seed, self.device, self.epochs, self._schedule_of())

    def _schedule_of(self) -> ScheduleOf | None:
        asked = self._schedule
        if asked.name == "constant" and not asked.warmup_epochs:
            return None
        return lambda steps: make_schedule(
            asked.name,
            total_steps=self.epochs * steps,
            steps_per_epoch=steps,
            options=asked.options,
            warmup_epochs=asked.warmup_epochs,
            warmup_start=asked.warmup_start,
        )


class _LoopSlot:
    """One trial: its loop, how far that is, and what it saved last.

    Args:
        loop: the user's.
        number: of the slot.
        seed: of the trial.
        saved: where it begins.
        new_context: what the loop gets, each time that it begins.
    """

    def __init__(
        self, loop: Loop, number: int, seed: int, saved: SlotState, new_context: Callable[[], LoopContext]
    ) -> None:
        self.number = number
        self.saved = saved
        self._loop = loop
        self._seed = seed
        self._new_context = new_context
        self._context = new_context()
        self._generator: Iterator[Mapping[str, float]] | None = None
        self._epoch = 0
        self._step = 0
        self._initial_loss: float | None = None
        self._shown = saved.epoch  # epochs up to this one are trained again after a loss of memory, and not shown

    def begin(self) -> EpochRecord:
        """Start the loop where it saved its state last; returns the record of the model as it stands there."""
        saved = self.saved
        self._context = self._new_context()
        self._context.begin(saved.epoch, None if saved.loop is None else (saved.tensors, saved.loop))
        self._epoch, self._step, self._initial_loss = saved.epoch, saved.step, saved.initial_loss
        measures = self._next(self._seed)
        self._context.forget()
        if saved.loop is not None and not self._context.loaded:
            raise TrialError("Loop.train saves its state but does not load it: call context.load() before it yields")
        if self._initial_loss is None:
            self._initial_loss = measures.valid_loss
        if not math.isfinite(self._initial_loss):
            raise TrialError(f"before training Loop.train yields {self._initial_loss} for valid_loss")
        return EpochRecord(saved.epoch, saved.step, valid_loss=finite(measures.valid_loss), metrics=measures.metrics)

    def train(self) -> EpochRecord:
        """Train to the end of the next epoch that was not shown yet."""
        if self._generator is None:
            self.begin()
        while True:
            record = self._train()
            if record.epoch > self._shown:
                self._shown = record.epoch
                return record

    def close(self) -> None:
        """End the loop."""
        generator, self._generator = self._generator, None
        if isinstance(generator, Generator):
            try:
                generator.close()
            except Exception as error:
                logger.warning("Loop.train raised %s when it was ended", described(error))

    def _train(self) -> EpochRecord:
        started = time.perf_counter()
        epoch = self._epoch + 1
        measures = self._next(mix_seed(self._seed, epoch))
        step = measures.step if measures.step is not None else self._counted(epoch)
        if step < self._step:
            raise TrialError(f"after epoch {epoch} Loop.train yields {step} for step, after {self._step} before")
        self._epoch, self._step = epoch, step
        if (state := self._context.take()) is not None:
            tensors, rest = state
            self.saved = SlotState(tensors, epoch, step, self._initial_loss, loop=rest)
        return EpochRecord(
            epoch=epoch,
            step=step,
            valid_loss=finite(measures.valid_loss),
            seconds=time.perf_counter() - started,
            metrics=measures.metrics,
            diverged_at_step=step if self._has_diverged(measures) else None,
            **measures.others,
        )

    def _counted(self, epoch: int) -> int:
        """Steps of the first optimizer that the context built; one for each epoch if it built none."""
        steps = self._context.steps
        return steps[0] if steps else epoch

    def _has_diverged(self, measures: LoopMeasures) -> bool:
        assert self._initial_loss is not None
        losses = (measures.valid_loss, measures.train_loss or 0.0)
        return not all(map(math.isfinite, losses)) or measures.valid_loss > divergence_limit(self._initial_loss)

    def _next(self, seed: int) -> LoopMeasures:
        """Run the user's code up to its next yield."""
        when = f"after epoch {self._epoch + 1}" if self._generator is not None else "before training"
        try:
            with RandomStream(seed):
                if self._generator is None:
                    self._generator = self._started()
                found = next(self._generator)
            return read_measures(found, self._loop.metrics, when)
        except StopIteration:
            ended = f"ended after {self._epoch} of {self._context.epochs} epochs"
            self._generator = None
            raise TrialError(f"Loop.train {ended}: it must yield before training and after each epoch") from None
        except (TrialError, AbandonedError):
            self.close()
            raise
        except (Exception, SystemExit) as error:
            self._generator = None
            if is_out_of_memory(error):
                raise
            logger.info("%s", redact(traceback.format_exc()))
            raise TrialError(f"Loop.train raised {described(error)}") from None

    def _started(self) -> Iterator[Mapping[str, float]]:
        generator: object = self._loop.train(self._context)
        if not isinstance(generator, Iterator):
            raise TrialError(f"Loop.train must be a generator: it has no yield, it returned {type(generator).__name__}")
        return generator


def trainer_of(
    task: Task | Loop,
    *,
    epochs: int,
    slots: int | None,
    device: str,
    precision: str,
    schedule: ScheduleSettings,
    stopping: Callable[[], bool],
    most: int = FUSED_WIDTH,
    compiles: str = "off",
    batch_size: int = 64,
    calibration: Calibration | None = None,
) -> Trainer | LoopTrainer:
    """The trainer of a task, or of a loop of the user's own.

    Raises:
        TaskError: the task cannot be trained, or the study asks for what a loop must see to itself.
    """
    if isinstance(task, Task):
        return Trainer(
            task,
            epochs=epochs,
            slots=slots,
            device=device,
            precision=precision,
            schedule=schedule,
            most=most,
            compiles=compiles,
            batch_size=batch_size,
            calibration=calibration,
        )
    if precision != "auto":
        raise TaskError(f"precision: a Loop sees to its precision itself; leave {precision!r} out of the study file")
    return LoopTrainer(task, epochs=epochs, slots=slots, device=device, schedule=schedule, stopping=stopping)
