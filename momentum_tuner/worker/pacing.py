"""How a worker trains a study: in the way that is fastest on its device, as the database remembers or it measures."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from momentum_tuner.database import Database
from momentum_tuner.errors import StorageError
from momentum_tuner.tasks import Loop, Task
from momentum_tuner.tickets import StudyRecord, open_tickets_per_worker
from momentum_tuner.trainer import FUSED_WIDTH, LoopTrainer, Trainer
from momentum_tuner.worker.calibrations import Calibrations
from momentum_tuner.worker.results import study_trainer, usual_batch_size
from momentum_tuner.worker_options import WorkerOptions

CONSIDER_SECONDS = 10.0
"""How often what is left to train is looked up, to see whether compiling repays."""
TRAINED = 0.5
"""The part of their budget that open trials are expected to train: many are pruned."""


class Pacing:
    """Makes a study's trainer, and has it compiled when that repays.

    Args:
        database: where measurements are kept.
        study: what is trained.
        options: device, slots, threads.
    """

    def __init__(self, database: Database, study: StudyRecord, options: WorkerOptions) -> None:
        self._database = database
        self._study = study
        self._options = options
        self._most = max(1, FUSED_WIDTH // options.sharing)
        self._batch_size = usual_batch_size(study.spec)
        self._next_look = 0.0
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._calibrations = Calibrations(database, study, self._batch_size, options.device, self._most)

    def make_trainer(self, task: Task | Loop, stopping: Callable[[], bool]) -> Trainer | LoopTrainer:
        """A trainer of the study's task that trains in the fastest way, with as many threads as that needs.

        Args:
            task: what to train; a loop of the user's own sees to its speed itself.
            stopping: whether the worker is to stop.
        """
        trainer = study_trainer(
            self._study.spec,
            task,
            slots=self._options.slots,
            device=self._options.device,
            stopping=stopping,
            most=self._most,
            compiles=self._options.compiles,
            calibration=self._calibrations.read() if isinstance(task, Task) else None,
        )
        if isinstance(trainer, LoopTrainer):
            return trainer
        if self._options.slots is not None:
            trainer.pace.choose_threads(trainer.width, self._most)
        self._calibrations.write(trainer.pace.calibration)
        if trainer.pace.threads is not None:
            torch.set_num_threads(trainer.pace.threads)
        return trainer

    def consider_compiling(self, trainer: Trainer | LoopTrainer, epochs_left: int, before: Callable[[], None]) -> None:
        """Let the trainer compile its step if what is left of the study repays that.

        Args:
            trainer: of `make_trainer`.
            epochs_left: of the trials that hold its slots.
            before: called before it compiles, which takes a minute or so.
        """
        if isinstance(trainer, LoopTrainer) or not trainer.pace.considers or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + CONSIDER_SECONDS
        try:
            waiting = open_tickets_per_worker(self._database, self._study.id)
        except StorageError:
            return  # the next call of the database says so
        epochs = epochs_left + waiting * TRAINED * self._study.spec.budget.epochs
        trainer.consider_compiling(epochs * trainer.steps_per_epoch(self._batch_size), self._options.sharing, before)
        self._calibrations.write(trainer.pace.calibration)
