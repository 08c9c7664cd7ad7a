"""The paired statistics of METRICS.md's verdict, as pure functions over NumPy arrays; SciPy resamples.

Two contestants trained from the same seeds are compared by their differences, seed by seed. Speed is compared on logs:
the mean difference of logs is the log of the geometric mean of the ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 10_000
"""Bootstrap resamples, and random sign flips where there are too many to go through all of them."""
SEED = 0
"""Fixes the resamples: the same results give the same interval, always."""
SIGNIFICANCE = 0.05
"""1 - the level of every interval."""
POWER = 0.8
"""How often seeds like these would show the smallest ratio that they are said to have been able to show."""
LEAST_FOR_P = 6
"""The fewest seeds whose sign flips can give a p below 5%: 2 of 2^6."""

ROUNDING = 1e-6
"""Relative difference in results that float32 training leaves between equal trials."""
_BATCH = 10_000_000  # numbers that are resampled at once


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SpeedRatio:
    """How much sooner one contestant reaches the target than another.

    Attributes:
        ratio: geometric mean over seeds of the ratio of steps to target; below 1 the first is faster.
        low: lower end of its 95% interval.
        high: upper end.
        p: of the sign-flip permutation test on the logs, not corrected for other pairs.
        smallest: the ratio nearest to 1 that these seeds could have shown; None if they tell nothing of it.
        missed: whether both missed the target in every seed.
        alike: whether the seeds count as one.
    """

    ratio: float
    low: float
    high: float
    p: float
    smallest: float | None
    missed: bool = False
    alike: bool = False


def counted_steps(steps: Sequence[float | None], budget_steps: int, common_steps: int) -> Array:
    """Steps to target, `[seeds]`, as parts of a common budget, where a miss (None) counts as twice that budget.

    Contestants of different batch sizes have different budgets of steps for the same work: what one reaches after half
    of its budget counts as half of the common one, so that a miss counts as worse than any hit, whoever's it is. Steps
    are counted from 1, so a target that the untrained model reaches counts as 1.

    Args:
        steps: of one contestant, in its own steps.
        budget_steps: its budget.
        common_steps: the budget that all are counted in: the largest of theirs.
    """
    scale = common_steps / budget_steps
    return np.array([2.0 * common_steps if s is None else max(s * scale, 1.0) for s in steps], dtype=np.float64)


def geometric_mean(values: Array) -> float:
    """Of `[n]` positive values, at least one."""
    return math.exp(float(np.log(values).mean()))


def speed_ratio(a: Array, b: Array, common_steps: int, alike: bool = False) -> SpeedRatio:
    """Compare two contestants' steps to target, seed by seed; a seed that both miss is a tie.

    Args:
        a: `[seeds]` of `counted_steps`, at least one.
        b: the same seeds of the other contestant.
        common_steps: the budget that both are counted in; no ratio can be outside what it allows.
        alike: whether nothing is random in the seeds, so that they are one result several times.
    """
    neither = (a >= 2.0 * common_steps) & (b >= 2.0 * common_steps)
    logs = np.log(a) - np.log(b)
    logs[neither | (np.abs(logs) < ROUNDING)] = 0.0
    most = math.log(2.0 * common_steps)
    least = -most
    told = logs[:1] if alike else logs
    interval = mean_interval(told, least, most)
    smallest = smallest_difference(told)
    return SpeedRatio(
        ratio=math.exp(interval.value),
        low=math.exp(interval.low),
        high=math.exp(interval.high),
        p=sign_flip_p(told),
        smallest=None if smallest is None else math.exp(max(-smallest, least)),
        missed=bool(neither.all()),
        alike=alike,
    )


def mean_interval(differences: Array, least: float, most: float) -> Interval:
    """The mean of paired differences with its 95% bootstrap interval, made to hold with few seeds.

    The plain percentile interval is too narrow: n seeds resampled spread by sqrt((n - 1)/n) less than they should, and
    its quantiles are the normal's, not Student's. Both are made up for by stretching it around the mean by
    sqrt(n/(n - 1)) t(n - 1)/z, as Hesterberg (2015) does with the percentiles themselves. It keeps the bootstrap's
    asymmetry. And where the sign-flip test, which is exact for an optimizer compared with itself, does not reject at
    5%, the interval reaches to 0, so that the two never contradict each other; fewer than 6 seeds have no such test.

    Coverage in 2,000 simulations each, and that of the plain percentile interval (23% of seeds miss on digits-mlp):

    | seeds                                       | 5    | 10   | 20   | plain: 5 | 10   | 20   |
    |---------------------------------------------|------|------|------|----------|------|------|
    | normal differences                          | 0.95 | 0.95 | 0.95 | 0.85     | 0.91 | 0.93 |
    | heavy tails (t with 3 degrees of freedom)   | 0.95 | 0.95 | 0.94 | 0.82     | 0.90 | 0.93 |
    | skewed (exponential)                        | 0.89 | 0.90 | 0.93 | 0.77     | 0.86 | 0.89 |
    | half of the seeds tie                       | 0.99 | 0.99 | 0.95 | 0.89     | 0.89 | 0.91 |
    | momentum with itself on digits-mlp          | 0.97 | 0.95 | 0.95 | 0.82     | 0.88 | 0.93 |
    | the same against itself made 1.3x slower    | 0.97 | 0.94 | 0.95 | 0.82     | 0.88 | 0.93 |

    So an optimizer compared with itself differs from itself in at most 5% of comparisons. BCa intervals were no wider
    than the plain ones where they were needed (0.79, 0.85 and 0.93 for momentum with itself); bootstrap-t is better
    for skewed differences (0.92, 0.94, 0.94), but has no bound where seeds tie and 0.88 to 0.91 with 10% misses.
    A contestant that nearly always misses is beyond any interval from 5 seeds, as those may all be misses (0.83).

    Equal differences cannot be resampled into anything else, and yet they are no certainty: n seeds alike leave open
    what up to 1 - 0.025^(1/n) of all seeds would give (Clopper and Pearson's bound for nothing in n), which may be
    anything that is possible. So far the interval reaches.

    Args:
        differences: `[seeds]`, at least one.
        least: the smallest difference that is possible; the interval does not pass it. It is all that one seed tells.
        most: the largest.
    """
    from scipy import stats

    n = len(differences)
    value = float(differences.mean())
    if n == 1:
        return Interval(value, least, most)
    if np.ptp(differences) == 0.0:
        value = float(differences[0])  # the mean of equal numbers may be rounded
        unseen = 1.0 - (SIGNIFICANCE / 2) ** (1.0 / n)
        return Interval(value, value - unseen * (value - least), value + unseen * (most - value))
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH // n),
        confidence_level=1.0 - SIGNIFICANCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    quantiles = float(stats.t.isf(SIGNIFICANCE / 2, n - 1) / stats.norm.isf(SIGNIFICANCE / 2))
    stretch = math.sqrt(n / (n - 1)) * quantiles
    low = max(value - stretch * (value - float(found.low)), least)
    high = min(value + stretch * (float(found.high) - value), most)
    if n >= LEAST_FOR_P and not low <= 0.0 <= high and sign_flip_p(differences) > SIGNIFICANCE:
        low, high = min(low, 0.0), max(high, 0.0)
    return Interval(value, low, high)


def rate_interval(differences: Array) -> Interval:
    """The difference of two paired rates with its 95% score interval (Tango 1998), which holds with few seeds.

    Rates have no spread where nothing happens: resampling 3 seeds of which none diverged says that none ever does.
    Tango's interval has those differences in it that a score test does not reject. Coverage, exact from the multinomial
    distribution, of two independent rates:

    | seeds        | 2    | 3    | 5    | 6    | 10   | 20   |
    |--------------|------|------|------|------|------|------|
    | 0.2 and 0    | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 0.98 |
    | 0.5 and 0    | 1.00 | 1.00 | 0.97 | 0.98 | 0.99 | 0.97 |
    | 0.8 and 0    | 0.96 | 0.90 | 0.94 | 0.98 | 0.97 | 0.97 |
    | 0.2 and 0.2  | 1.00 | 1.00 | 1.00 | 0.99 | 0.96 | 0.95 |
    | 0.5 and 0.2  | 1.00 | 0.98 | 0.98 | 0.97 | 0.96 | 0.94 |
    | 0.9 and 0.1  | 0.96 | 0.90 | 0.95 | 0.97 | 0.96 | 0.96 |

    Args:
        differences: `[seeds]`, at least one, each -1, 0 or 1.

    Returns:
        From one seed all that is possible.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17 (1998), 891-908.
    """
    n = len(differences)
    value = float(differences.mean())
    if n == 1:
        return Interval(value, -1.0, 1.0)
    more, less = int((differences > 0.0).sum()), int((differences < 0.0).sum())
    return Interval(value, _least_rate(more, less, n), -_least_rate(less, more, n))


def _least_rate(more: int, less: int, n: int) -> float:
    """The smallest difference of rates that the score test does not reject, of n pairs with so many of each sign."""
    from scipy import optimize, stats

    if less == n:
        return -1.0
    z = float(stats.norm.isf(SIGNIFICANCE / 2))

    def excess(d: float) -> float:
        a, b, c = 2.0 * n, (2.0 * n - more + less) * d - more - less, -less * d * (1.0 - d)
        rare = (math.sqrt(max(b * b - 4.0 * a * c, 0.0)) - b) / (2.0 * a)  # its likeliest probability, of `less`
        return (more - less - n * d) ** 2 - z * z * n * (2.0 * rare + d * (1.0 - d))

    # At the estimate itself nothing is in excess; just below it there may be 0 as well.
    return float(optimize.brentq(excess, -1.0, (more - less) / n - 1e-9))


def count_interval(a: Array, b: Array, least: float, most: float) -> Interval:
    """The mean difference of paired counts with its 95% interval.

    Where all differences are equal, mostly as nothing was counted at all, it is that of two Poisson rates: Garwood's
    exact limits for each, combined by squaring and adding (Zou and Donner 2008). None in 10 seeds leaves 0.37 a seed.
    Counts that come in crowds are less certain than that.

    Args:
        a: `[seeds]`, at least one.
        b: the same seeds of the other contestant.
        least: the smallest difference that is possible.
        most: the largest.
    """
    from scipy import stats

    n = len(a)
    differences = a - b
    if n == 1 or np.ptp(differences) > 0.0:
        return mean_interval(differences, least, most)
    below, above = [], []
    for total in (float(a.sum()), float(b.sum())):
        below.append(total - stats.chi2.ppf(SIGNIFICANCE / 2, 2.0 * total) / 2.0 if total else 0.0)
        above.append(stats.chi2.isf(SIGNIFICANCE / 2, 2.0 * total + 2.0) / 2.0 - total)
    value = float(differences[0])
    low, high = value - math.hypot(below[0], above[1]) / n, value + math.hypot(above[0], below[1]) / n
    return Interval(value, max(low, least), min(high, most))


def sign_flip_p(differences: Array) -> float:
    """Two-sided p of the paired permutation test: how often random signs give a mean as far from 0 as this.

    All 2^n assignments of signs are gone through where they are no more than 10,000 (13 seeds), else 10,000 random
    ones. It is exact if the differences are symmetric about 0, as those of an optimizer with itself are.

    Args:
        differences: `[seeds]`, at least one.
    """
    from scipy import stats

    if len(differences) == 1:
        return 1.0
    found = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH // len(differences)),
        rng=np.random.default_rng(SEED),
    )
    return float(found.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for being several, by Holm's step-down method; SciPy has no such function.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none becomes smaller than one before it, or
    larger than 1.
    """
    corrected = [0.0] * len(p)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def smallest_difference(differences: Array) -> float | None:
    """The smallest true mean difference that seeds like these would show in 80% of repetitions.

    It is (t(0.975) + t(0.8)) s / sqrt(n), with Student's quantiles for n - 1 degrees of freedom and the spread s of
    the differences between seeds: the usual minimal detectable difference of a paired test at 5%. What lies beyond may
    still be missed in one of five comparisons, and what lies below can be shown by luck.

    Args:
        differences: `[seeds]`.

    Returns:
        0 or more; None from fewer than two seeds and from equal differences, which have no spread.
    """
    from scipy import stats

    n = len(differences)
    if n < 2 or np.ptp(differences) == 0.0:
        return None
    quantiles = stats.t.isf(SIGNIFICANCE / 2, n - 1) + stats.t.isf(1.0 - POWER, n - 1)
    return float(quantiles * differences.std(ddof=1) / math.sqrt(n))
