"""Two contestants compared seed by seed, in numbers and in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from momentum_tuner.comparison.confirmation import ConfirmedTrial
from momentum_tuner.comparison.outcome import Difference, Pair
from momentum_tuner.comparison.statistics import (
    ROUNDING,
    SIGNIFICANCE,
    Array,
    Interval,
    SpeedRatio,
    count_interval,
    counted_steps,
    holm,
    mean_interval,
    rate_interval,
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

    def alike(self, seeds: Collection[int]) -> bool:
        """Whether several seeds gave the same result: then nothing in them is random, and they count as one."""
        first, *others = [self._result(seed) for seed in seeds]
        return bool(others) and all(_same(x, y) for other in others for x, y in zip(first, other, strict=True))

    def _result(self, seed: int) -> list[float | None]:
        trial = self.trials[seed]
        losses = [trial.measures.get(name) for name in ("initial_valid_loss", "best_valid_loss")]
        return [self.steps[seed], trial.value, *losses]


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
    if speed.smallest is not None:
        return f"{words}, which could have shown {times(1.0 / speed.smallest)}"
    if seeds == 1:
        return words
    if speed.missed:
        return f"{words}: neither reached the target"
    if speed.ratio == 1.0:
        return f"{words}: equal in each"
    return f"{words}, which are all alike" + (" and count as one" if speed.alike else "")


def times(factor: float) -> str:
    """A factor above 1, such as `1.32x`; with as many digits as tell it from 1."""
    if factor >= 100.0:
        return f"{factor:.0f}x"
    decimals = 2 if factor >= 1.01 else 1 - math.floor(math.log10(factor - 1.0))
    return f"{factor:.{decimals}f}x"


def _speed(a: Raced, b: Raced, seeds: Sequence[int]) -> SpeedRatio:
    return speed_ratio(a.counted(seeds), b.counted(seeds), a.common_steps, _alike(a, b, seeds))


def _alike(a: Raced, b: Raced, seeds: Sequence[int]) -> bool:
    return a.alike(seeds) and b.alike(seeds)


def _same(one: float | None, other: float | None) -> bool:
    return one == other if one is None or other is None else math.isclose(one, other, rel_tol=ROUNDING)


def _stability(a: Raced, b: Raced, seeds: Sequence[int]) -> tuple[Difference, ...]:
    """Paired differences, each over the seeds where both have the measure; seeds that are all alike count as one."""
    intervals: dict[str, Callable[[Array, Array], Interval]] = {
        "oscillation": lambda x, y: mean_interval(x - y, -1.0, 1.0),
        "spikes": lambda x, y: count_interval(x, y, -float(b.budget_steps), float(a.budget_steps)),
        "divergence_rate": lambda x, y: rate_interval(x - y),
    }
    told = 1 if _alike(a, b, seeds) else len(seeds)
    found = []
    for measure, interval_of in intervals.items():
        values = [(_value(a.trials[s], measure), _value(b.trials[s], measure)) for s in seeds]
        known = np.array([(x, y) for x, y in values if x is not None and y is not None][:told])
        if known.size:
            interval = interval_of(known[:, 0], known[:, 1])
            found.append(Difference(measure, interval.value, interval.low, interval.high))
    return tuple(found)


def _value(trial: ConfirmedTrial, measure: str) -> float | None:
    if measure == "divergence_rate":
        return float(trial.diverged)
    found = trial.measures.get(measure)
    return None if found is None else float(found)
