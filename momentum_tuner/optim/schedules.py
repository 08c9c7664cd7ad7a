"""Schedules as factors of a trial's own learning rate and momentum, so that all slots share a formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from momentum_tuner.catalog import SCHEDULE_OPTIONS, SCHEDULES
from momentum_tuner.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """A schedule over a trial's whole budget, as torch.optim.lr_scheduler has it: see `make_schedule`.

    Attributes:
        name: a name in `catalog.SCHEDULES`.
        total_steps: optimizer steps of a whole trial, warmup included.
        steps_per_epoch: optimizer steps of one epoch.
        options: a value for every option that `catalog.SCHEDULES[name]` lists.
        warmup_steps: steps of linear warmup, before the first step of the schedule itself.
        warmup_start: factor of the learning rate at step 0 of the warmup.
    """

    name: str
    total_steps: int
    steps_per_epoch: int
    options: Mapping[str, float]
    warmup_steps: int = 0
    warmup_start: float = 0.1

    @property
    def cycles_momentum(self) -> bool:
        """Whether `momentum_factor` differs from 1 anywhere."""
        return self.name == "one_cycle"

    def learning_rate_factor(self, step: NDArray[np.int64]) -> NDArray[np.float64]:
        """The learning rate at `step` divided by the trial's learning rate.

        Args:
            step: steps counted from 0, in any shape; from `total_steps` on the last step's factor stays.

        Returns:
            float64, in the shape of `step`.
        """
        step = np.clip(step, 0, self.total_steps - 1)
        factor = self._main_factor(np.maximum(step - self.warmup_steps, 0))
        if self.warmup_steps:
            rising = self.warmup_start + (1.0 - self.warmup_start) * step / self.warmup_steps
            factor = np.where(step < self.warmup_steps, rising, factor)
        return factor

    def momentum_factor(self, step: NDArray[np.int64]) -> NDArray[np.float64]:
        """Momentum (for Adam beta1) at `step` divided by the trial's own: 1, except in `one_cycle`.

        Args:
            step: steps counted from 0, in any shape; from `total_steps` on the last step's factor stays.

        Returns:
            float64, in the shape of `step`.
        """
        step = np.clip(step, 0, self.total_steps - 1)
        if not self.cycles_momentum:
            return np.ones(step.shape)
        height, _ = self._cycle(step)
        return 1.0 - (1.0 - self.options["base_momentum_fraction"]) * height

    def _main_factor(self, step: NDArray[np.int64]) -> NDArray[np.float64]:
        """The factor at `step` of the schedule itself, counted from the end of the warmup."""
        match self.name:
            case "cosine":  # CosineAnnealingLR
                final = self.options["final_fraction"]
                return final + (1.0 - final) * _cosine_fall(step / (self.total_steps - self.warmup_steps))
            case "step":  # StepLR
                return np.float64(self.options["gamma"]) ** (step // self._steps_per_drop)
            case "one_cycle":  # OneCycleLR
                height, rising = self._cycle(step)
                initial = 1.0 / self.options["div_factor"]
                foot = np.where(rising, initial, initial / self.options["final_div_factor"])
                return foot + (1.0 - foot) * height
            case _:
                return np.ones(step.shape)

    @property
    def _steps_per_drop(self) -> int:
        return round(self.options["every_epochs"] * self.steps_per_epoch)

    def _cycle(self, step: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """How far `step` is up the cycle, from 0 at its feet to 1 at its peak; whether it is on the rise."""
        last = self.total_steps - 1
        peak = self.options["peak_fraction"] * self.total_steps - 1.0
        rising = step <= peak
        # A rise or a fall without length has no second step, and so no division to make.
        rise = 1.0 - _cosine_fall(step / (peak or 1.0))
        fall = _cosine_fall((step - peak) / ((last - peak) or 1.0))
        return np.where(rising, rise, fall), rising


def make_schedule(
    name: str,
    *,
    total_steps: int,
    steps_per_epoch: int,
    options: Mapping[str, float] | None = None,
    warmup_epochs: float = 0.0,
    warmup_start: float = 0.1,
) -> Schedule:
    """The schedule `name` over `total_steps` steps, with lr(step) = learning_rate * factor(step).

    - `constant`: 1.
    - `cosine`: CosineAnnealingLR down to `final_fraction`.
    - `step`: StepLR, times `gamma` every `every_epochs` epochs.
    - `one_cycle`: OneCycleLR; its peak is the trial's learning rate, where momentum is down to
      `base_momentum_fraction` of the trial's.

    A warmup is LinearLR, followed through SequentialLR by the schedule, which spans the remaining steps.

    Args:
        name: a name in `catalog.SCHEDULES`.
        total_steps: optimizer steps of a whole trial.
        steps_per_epoch: optimizer steps of one epoch.
        options: options of the schedule; the catalog has the defaults of those left out.
        warmup_epochs: length of the linear warmup in epochs, rounded to steps.
        warmup_start: factor of the learning rate at step 0 of the warmup, in (0, 1].

    Raises:
        InputError: a name is unknown, a value is not allowed, the warmup leaves no step for the schedule, or
            `one_cycle`, which has its own, is given a warmup.
    """
    if name not in SCHEDULES:
        raise InputError(f"schedule {name!r} is unknown: use one of {', '.join(SCHEDULES)}")
    given = options or {}
    if unknown := [key for key in given if key not in SCHEDULES[name]]:
        allowed = ", ".join(SCHEDULES[name]) or "none"
        raise InputError(f"schedule {name!r} has no option {unknown[0]!r}: its options are {allowed}")
    if total_steps < 1 or steps_per_epoch < 1:
        raise InputError(f"schedule {name!r} needs at least one step: {total_steps=}, {steps_per_epoch=}")
    merged = {**SCHEDULES[name], **given}
    for key, value in [*merged.items(), ("warmup_epochs", warmup_epochs), ("warmup_start", warmup_start)]:
        if not SCHEDULE_OPTIONS[key].allows(value):
            raise InputError(f"{key} of schedule {name!r} is {value:g}: it must be in {SCHEDULE_OPTIONS[key].bounds}")
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if warmup_steps and name == "one_cycle":
        raise InputError("schedule 'one_cycle' has a warmup of its own: leave out warmup_epochs or use 'cosine'")
    if warmup_steps >= total_steps:
        raise InputError(
            f"a warmup of {warmup_steps} steps leaves none of the {total_steps} of the whole trial: "
            "lower warmup_epochs, or raise the budget's epochs"
        )
    schedule = Schedule(name, total_steps, steps_per_epoch, merged, warmup_steps, warmup_start)
    if name == "step" and schedule._steps_per_drop < 1:
        raise InputError(f"every_epochs of schedule 'step' is {merged['every_epochs']:g}: less than one step")
    return schedule


def _cosine_fall(progress: NDArray[np.floating]) -> NDArray[np.float64]:
    """From 1 at progress 0 to 0 at progress 1, along half a cosine."""
    height: NDArray[np.float64] = 0.5 * (1.0 + np.cos(np.pi * progress))
    return height
