"""Contestants over several studies, as AlgoPerf's performance profile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from momentum_tuner.comparison.outcome import Comparison, Contestant, plain_values

LARGEST_TAU = 4.0
_TAUS = 61
_MOST_MISSES = 0.5
_ROUNDING = 1e-9


@dataclass(frozen=True)
class ProfileLine:
    """How a contestant does over the studies that it is in.

    Attributes:
        optimizer: the contestant.
        studies: in how many studies it was confirmed.
        factors: by study, its steps to target (epochs where that is the study's unit) over those of the fastest there;
            infinite for a miss.
        shares: for each tau, the share of its studies in which it is within that factor of the fastest.
        score: mean of the share over tau from 1 to 4; 1 is the fastest everywhere.
    """

    optimizer: str
    studies: int
    factors: Mapping[str, float]
    shares: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class Profile:
    """A performance profile (Dolan & More 2002; Dahl et al. 2023).

    Attributes:
        studies: the names of the studies.
        taus: factors from 1 to 4.
        lines: one for each contestant, the best score first.
    """

    studies: tuple[str, ...]
    taus: tuple[float, ...]
    lines: tuple[ProfileLine, ...]

    def flat(self) -> dict[str, Any]:
        """As plain JSON values."""
        found: dict[str, Any] = plain_values(asdict(self))
        return found


def performance_profile(comparisons: Sequence[Comparison]) -> Profile:
    """The share of studies in which a contestant is within a factor tau of the fastest, for tau from 1 to 4.

    The time of a contestant in a study is its geometric mean of steps to target over the confirmation seeds, of epochs
    where a step is not the same work for all. Where it misses the target with half of the seeds or more it counts as
    infinite: the median seed never got there. A study that does not have a contestant does not count for it; one that
    nobody solved counts for all that are in it.
    """
    factors: dict[str, dict[str, float]] = {}
    for comparison in comparisons:
        needed = [(c, comparison.to_target(c)) for c in comparison.optimizers]
        times = {c.optimizer: _time(c, found) for c, found in needed if found is not None}
        fastest = min(times.values(), default=math.inf)
        for optimizer, time in times.items():
            found = time / fastest if math.isfinite(time) else math.inf
            factors.setdefault(optimizer, {})[comparison.study] = found
    taus = np.linspace(1.0, LARGEST_TAU, _TAUS)
    lines = [
        ProfileLine(
            optimizer=optimizer,
            studies=len(found),
            factors=found,
            shares=tuple(float(np.mean([f <= tau * (1.0 + _ROUNDING) for f in found.values()])) for tau in taus),
            score=float(np.mean([max(0.0, LARGEST_TAU - f) for f in found.values()])) / (LARGEST_TAU - 1.0),
        )
        for optimizer, found in factors.items()
    ]
    lines.sort(key=lambda line: -line.score)
    return Profile(tuple(c.study for c in comparisons), tuple(taus.tolist()), tuple(lines))


def _time(contestant: Contestant, needed: float) -> float:
    missed = contestant.miss_rate is not None and contestant.miss_rate >= _MOST_MISSES
    return math.inf if missed else needed
