"""Two contestants compared seed by seed, in numbers and in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from momentum_tuner.comparison.confirmation import ConfirmedTrial
from momentum_tuner.comparison.outcome import Difference, Pair
from momentum_tuner.comparison.statistics import (
    SIGNIFICANCE,
    Array,
    SpeedRatio,
    counted_steps,
    holm,
    mean_interval,
    speed_ratio,
)


@dataclass(frozen=True)
class Raced:
    """A contestant's confirmation trials against the target.

    Attributes:
        optimizer: the contestant.
        budget_steps: the steps of its whole budget.
        common_steps: the largest such budget of all contestants, in which their speeds are compared.
        trials: its confirmation trials by seed.
        steps: steps to target by seed; None for a miss.
    """

    optimizer: str
    budget_steps: int
    common_steps: int
    trials: Mapping[int, ConfirmedTrial]
    steps: Mapping[int, float | None]

    def counted(self, seeds: Iterable[int]) -> Array:
        """Steps to target of these seeds, `[seeds]`, as parts of the common budget."""
        return counted_steps([self.steps[seed] for seed in seeds], self.budget_steps, self.common_steps)


def compare_pairs(raced: Sequence[Raced]) -> tuple[Pair, ...]:
    """All pairs of contestants that have seeds in common, in the order of the contestants; p corrected over them."""
    found: list[tuple[Raced, Raced, list[int], SpeedRatio]] = []
    for a, b in itertools.combinations(raced, 2):
        seeds = sorted(a.trials.keys() & b.trials.keys())
        if not seeds:
            continue
        speed = _speed(a, b, seeds)
        if speed.ratio > 1.0:  # on the seeds that both have
            a, b, speed = b, a, _speed(b, a, seeds)
        found.append((a, b, seeds, speed))
    corrected = holm([speed.p for *_, speed in found])
    return tuple(
        Pair(
            a=a.optimizer,
            b=b.optimizer,
            seeds=len(seeds),
            speed_ratio=speed.ratio,
            low=speed.low,
            high=speed.high,
            p=p,
            verdict=verdict(a.optimizer, b.optimizer, len(seeds), replace(speed, p=p), len(found)),
            smallest_ratio=speed.smallest,
            stability=_stability(a, b, seeds),
        )
        for (a, b, seeds, speed), p in zip(found, corrected, strict=True)
    )


def verdict(a: str, b: str, seeds: int, speed: SpeedRatio, pairs: int) -> str:
    """The comparison in words.

    "a is faster than b" only if the interval excludes 1; where the corrected p is not below 5% all the same, the words
    say so.

    Args:
        a: the one that is faster, or equal.
        b: the other.
        seeds: how many both have.
        speed: a's speed ratio to b, with the corrected p.
        pairs: over how many pairs p is corrected.
    """
    over = "1 seed" if seeds == 1 else f"{seeds} seeds"
    if speed.high < 1.0:
        words = f"{a} is {times(1.0 / speed.ratio)} faster than {b} ({over})"
        if speed.p > SIGNIFICANCE:
            words += f", but p = {speed.p:.2g}"
            words += f" after correction for {pairs} pairs" if pairs > 1 else ""
        return words
    words = f"no difference shown with {over}"
    if speed.smallest is None:
        return words if seeds == 1 else f"{words}: neither reached the target"
    if speed.smallest == 1.0:
        return f"{words}: equal in each"
    return f"{words}, which could have shown {times(1.0 / speed.smallest)}"


def times(factor: float) -> str:
    """A factor above 1, such as `1.32x`; with as many digits as tell it from 1."""
    if factor >= 100.0:
        return f"{factor:.0f}x"
    decimals = 2 if factor >= 1.01 else 1 - math.floor(math.log10(factor - 1.0))
    return f"{factor:.{decimals}f}x"


def _speed(a: Raced, b: Raced, seeds: Sequence[int]) -> SpeedRatio:
    return speed_ratio(a.counted(seeds), b.counted(seeds), a.common_steps)


def _stability(a: Raced, b: Raced, seeds: Sequence[int]) -> tuple[Difference, ...]:
    """Paired differences, each over the seeds where both have the measure."""
    bounds = {
        "oscillation": (-1.0, 1.0),
        "spikes": (-float(b.budget_steps), float(a.budget_steps)),
        "divergence_rate": (-1.0, 1.0),
    }
    found = []
    for measure, (least, most) in bounds.items():
        values = [(_value(a.trials[s], measure), _value(b.trials[s], measure)) for s in seeds]
        differences = np.array([x - y for x, y in values if x is not None and y is not None])
        if differences.size:
            interval = mean_interval(differences, least, most)
            found.append(Difference(measure, interval.value, interval.low, interval.high))
    return tuple(found)


def _value(trial: ConfirmedTrial, measure: str) -> float | None:
    if measure == "divergence_rate":
        return float(trial.diverged)
    found = trial.measures.get(measure)
    return None if found is None else float(found)
