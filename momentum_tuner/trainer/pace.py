"""How a trainer trains: in the way that was found fastest, compiled once that repays what it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from momentum_tuner.trainer.calibration import (
    COMPILED,
    FUSED,
    SEQUENTIAL,
    SEQUENTIAL_WIDTH,
    Calibration,
    Stopwatch,
    Way,
    calibrate,
)
from momentum_tuner.trainer.data import Batch
from momentum_tuner.trainer.memory import first_line
from momentum_tuner.trainer.objective import EVALUATION, GRADIENT, Objective
from momentum_tuner.trainer.replay import IN_ADVANCE
from momentum_tuner.trainer.update import UPDATE

logger = logging.getLogger(__name__)


class Pace:
    """Chooses how slots train, and remembers what it measured for that.

    Args:
        objective: of the task, which is told how to train.
        batch: makes a minibatch of the usual size that all slots share.
        compiles: `on` compiles what slots do fused at its first call; `auto` leaves it to `consider_compiling`; `off`.
        calibration: what was measured before.
    """

    def __init__(
        self, objective: Objective, batch: Callable[[], Batch], compiles: str, calibration: Calibration | None
    ) -> None:
        self.calibration = calibration or Calibration()
        self.threads: int | None = None
        """CPU threads with which an operation is fastest, where that was measured; setting them is up to the caller."""
        self._objective = objective
        self._batch = batch
        self.considers = compiles == "auto"
        """Whether `consider_compiling` may still do something."""
        if compiles == "on":
            objective.replay.compiles = frozenset({GRADIENT, UPDATE, EVALUATION})
            objective.replay.patience = 0

    def choose(self, most: int) -> int:
        """Take the fastest way of training up to a width, measured now unless that is known; returns its width.

        What goes wrong in the measurement is left to the trials, which are the ones to say so.
        """
        objective = self._objective
        if not self._measure(most):
            return most if objective.batch_slots else min(most, SEQUENTIAL_WIDTH)
        way = self.calibration.best(most)
        self.threads = way.threads
        if way.mode == FUSED:
            objective.replay.in_advance = IN_ADVANCE  # as this or an earlier measurement has found that it pays
        elif way.mode == SEQUENTIAL and objective.batch_slots:
            times = self.calibration.least(FUSED) / self.calibration.seconds[way]
            objective.train_one_by_one(f"that is {times:.2g} times as fast as fused slots are here")
        return min(way.width, most)

    def choose_threads(self, width: int, most: int) -> None:
        """Take as many CPU threads as are fastest at a width that was asked for; all of them where that is not known.

        Args:
            width: slots at once.
            most: up to which width it is measured, if it is not known.
        """
        if self._objective.device.type == "cpu" and torch.get_num_threads() > 1 and self._measure(most):
            mode = FUSED if self._objective.batch_slots else SEQUENTIAL
            self.threads = self.calibration.fastest_threads(mode, width)

    def _measure(self, most: int) -> bool:
        """Measure the ways of training up to a width, unless they are known; whether they are then."""
        if not self.calibration.whole:
            objective = self._objective
            try:
                found = calibrate(objective, self._batch(), most, objective.batch_slots)
            except Exception as error:
                logger.info("the ways of training were not measured: %s", first_line(error))
                return False
            self.calibration = replace(found, compile_seconds=self.calibration.compile_seconds)
        return True

    def consider_compiling(
        self, width: int, trial_steps: float, sharing: int = 1, before: Callable[[], None] = lambda: None
    ) -> bool:
        """Compile the gradient at a width, if that is expected to save more time than it takes, and keep it if it does.

        One of the workers of a machine compiles; the others go on as they are, and open what it made when they are
        asked next. What goes wrong is left to the trials, which go on without compiled code.

        Args:
            width: slots that train fused.
            trial_steps: that are left to train, about.
            sharing: workers of this machine with as much left.
            before: called before it compiles.

        Returns:
            Whether that is settled for now; not if another worker is compiling.
        """
        if not self.considers or not self._objective.batch_slots or width < 2:
            return True
        try:
            return self._consider(width, trial_steps, sharing, before)
        except Exception as error:
            logger.info("training goes on without compiled code: %s", first_line(error))
            self.considers = False
            self._objective.replay.forget_compiled()
            return True

    def _consider(self, width: int, trial_steps: float, sharing: int, before: Callable[[], None]) -> bool:
        replay = self._objective.replay
        way = Way(FUSED, width, self.threads or torch.get_num_threads())
        if way not in self.calibration.seconds or not replay.is_captured(GRADIENT):
            self.calibration = self.calibration.having(way, self._stopwatch().seconds(way))
            if not replay.is_captured(GRADIENT):  # nor can it be compiled
                self.considers = False
                return True
        kept = replay.keeps_compiled(GRADIENT)
        if not self.calibration.expects_to_repay(way, trial_steps if kept else sharing * trial_steps, kept):
            return True
        with replay.turn_to_compile(GRADIENT) as mine:
            if mine:
                before()
                self._compile(way, replay.keeps_compiled(GRADIENT))
        return mine

    def _compile(self, way: Way, kept: bool) -> None:
        """Compile the gradient, and keep it if it is faster.

        Args:
            way: of training, in captured code.
            kept: whether the compiled code is there from before.
        """
        self.considers = False
        replay = self._objective.replay
        watch = self._stopwatch()
        seconds = watch.seconds(replace(way, mode=COMPILED))
        took = watch.spent
        if replay.failed:
            return
        before = self.calibration.seconds[way]
        self.calibration = self.calibration.having(replace(way, mode=COMPILED), seconds, None if kept else took)
        if seconds < before:
            replay.compiles |= {UPDATE, EVALUATION}
            with replay.compiling(EVALUATION):  # now, so that who waits for its turn has all of it then
                self._stopwatch().evaluate(way.width)
        else:
            replay.forget_compiled()
        logger.info("compiled in %.0f s: a step takes %.0f%% of the time it took", took, 100.0 * seconds / before)

    def _stopwatch(self) -> Stopwatch:
        return Stopwatch(self._objective, self._batch())
