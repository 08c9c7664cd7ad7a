"""Optuna's TPE for a batch of trials: what was told is looked at once, each trial of the batch sees those before it."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.sampler import (
    _split_trials,
    default_gamma,
    default_gamma_multiobjective,
)
from optuna.trial import FrozenTrial, TrialState

from momentum_tuner.parzen import ParzenEstimator

MOST_ABOVE = 400
"""Finished trials of the worse group that its density is made from: with all, a trial's cost grows with the study."""
_NEWEST = 25
"""So many of the newest have full weight in Optuna's density; they all are among them."""
_TAUGHT = (TrialState.COMPLETE, TrialState.PRUNED)
"""Ends of trials that have something to teach."""
_ABOVE_PER_DRAW = 64
"""With so many trials in the worse group, another one more does not change where to look: two are drawn at once."""


@dataclass
class _Fit:
    """The two groups of trials for some parameters: the density of the better one, the points of the worse one.

    Most trials that run count as worse, so that no two of a batch are drawn to the same point (constant liar).

    Attributes:
        below: the density of the better group.
        above: values of the worse group's trials by parameter, those drawn in this batch among them.
        drawn: values for the next trials of the batch.
    """

    below: _ParzenEstimator
    above: dict[str, NDArray[np.float64]]
    drawn: list[dict[str, float]] = field(default_factory=list)


@dataclass
class TPEMemory:
    """What the samplers of one study's batches hand on: of finished trials, which never change, what was found.

    Attributes:
        below: of them the better group of the last batch.
        told: those that taught something, of the first ones of the study, which have all ended.
        passed: how many first ones those are.
        ended: numbers of the finished trials after them that `below` was chosen from.
        starting: whether there were too few finished trials to learn from.
    """

    below: list[FrozenTrial] = field(default_factory=list)
    told: list[FrozenTrial] = field(default_factory=list)
    passed: int = 0
    ended: set[int] = field(default_factory=set)
    starting: bool = True

    def split(self, study: optuna.Study, trials: list[FrozenTrial]) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """The better and the worse group, each by number, as `_split_trials` makes them, which compares all trials.

        The best of all are among as many of before and those that ended since. Running trials that went on from a rung
        and have reported again count as if they were pruned now: with many slots they are the best there is for long.
        Of the worse group some are left out: see `_thinned`.

        Args:
            study: what is searched.
            trials: all of them, in the order of their numbers.
        """
        new = self._pass(trials)
        rest = [t for t in trials[self.passed :] if t.state in _TAUGHT or t.state is TrialState.RUNNING]
        ended = [t for t in rest if t.state.is_finished()]
        running = [t for t in rest if t.state is TrialState.RUNNING]
        told = [*self.told, *ended]
        if len(study.directions) > 1:
            below, above = _split_trials(study, [*self.told, *rest], default_gamma_multiobjective(len(told)))
            told = [t for t in above if t.state is not TrialState.RUNNING]
            return below, _thinned(told, [t for t in above if t.state is TrialState.RUNNING])
        size = default_gamma(len(told))
        candidates = told
        if len(self.below) == size:
            candidates = [*self.below, *(t for t in [*new, *ended] if t.number not in self.ended)]
            candidates.sort(key=lambda t: t.number)  # those that are alike keep their order
        self.below, _ = _split_trials(study, candidates, size)
        self.ended = {t.number for t in ended}
        promising = [_as_pruned(t) for t in running if len(t.intermediate_values) > 1]
        below, _ = _split_trials(study, sorted([*self.below, *promising], key=lambda t: t.number), size)
        best = {t.number for t in below}
        for number in best:
            at = bisect.bisect_left(told, number, key=lambda t: t.number)
            if at < len(told) and told[at].number == number:
                del told[at]
        return below, _thinned(told, [t for t in running if t.number not in best])

    def _pass(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Pass over the first trials that have all ended; returns those of them that teach something and are new."""
        before = len(self.told)
        while self.passed < len(trials) and trials[self.passed].state.is_finished():
            if trials[self.passed].state in _TAUGHT:
                self.told.append(trials[self.passed])
            self.passed += 1
        return self.told[before:]


class BatchTPESampler(optuna.samplers.TPESampler):
    """TPE with Optuna's defaults for the trials of one batch; a new one is made for the next batch.

    For each trial it draws what Optuna's own sampler draws from the same seed, as long as the worse group is small: of
    a large one some trials are left out (`MOST_ABOVE`), and several trials are drawn from one density of it.

    Args:
        space: the parameters, known in advance: Optuna would find them in all trials.
        memory: of the sampler of the study's last batch.
    """

    def __init__(self, space: Mapping[str, BaseDistribution], memory: TPEMemory | None = None) -> None:
        super().__init__()
        self._parzen_estimator_cls = ParzenEstimator
        self._memory = memory or TPEMemory()
        self._space = {name: space[name] for name in sorted(space) if not space[name].single()}
        self._fits: dict[tuple[str, ...], _Fit] = {}

    def seeded(self, seed: int) -> Self:
        """Itself, with new random numbers: for the next trial."""
        self._rng.rng.seed(seed)
        self._random_sampler._rng.rng.seed(seed)
        return self

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters, or none where they are drawn one by one: with two aims."""
        return dict(self._space) if self._is_multivariate(study) else {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """All parameters at once."""
        return {} if not search_space or self._starting(study) else self._sample(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """One parameter."""
        if self._starting(study):
            return self._random_sampler.sample_independent(study, trial, param_name, param_distribution)
        return self._sample(study, trial, {param_name: param_distribution})[param_name]

    def _starting(self, study: optuna.Study) -> bool:
        """Whether there are too few trials to learn from yet."""
        if self._memory.starting:
            told = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
            self._memory.starting = len(told) < self._n_startup_trials
        return self._memory.starting

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        key = tuple(search_space)
        if key not in self._fits:
            self._fits[key] = self._fit(study, search_space)
        fit = self._fits[key]
        if not fit.drawn:
            self._draw(fit, search_space)
        chosen = fit.drawn.pop(0)
        return {name: d.to_external_repr(chosen[name]) for name, d in search_space.items()}

    def _draw(self, fit: _Fit, search_space: dict[str, BaseDistribution]) -> None:
        """Draw the next trials; each is the best of as many candidates as Optuna draws for one."""
        above = self._parzen_estimator_cls(fit.above, search_space, self._parzen_estimator_parameters)
        trials = 1 + len(next(iter(fit.above.values()))) // _ABOVE_PER_DRAW
        samples = fit.below.sample(self._rng.rng, trials * self._n_ei_candidates)
        gains = self._compute_acquisition_func(samples, fit.below, above).reshape(trials, -1)
        best = gains.argmax(axis=1) + np.arange(trials) * self._n_ei_candidates
        for name, values in samples.items():
            fit.above[name] = np.append(fit.above[name], values[best])
        fit.drawn += [{name: values[i].item() for name, values in samples.items()} for i in best]

    def _fit(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> _Fit:
        below, above = self._memory.split(study, study.get_trials(deepcopy=False))
        return _Fit(
            self._build_parzen_estimator(study, search_space, below, handle_below=True),
            self._get_internal_repr(above, search_space, study),
        )


def _as_pruned(trial: FrozenTrial) -> FrozenTrial:
    """A running trial as it would be if it were pruned at its last report."""
    pruned = copy.copy(trial)
    pruned.state = TrialState.PRUNED
    return pruned


def _thinned(told: list[FrozenTrial], running: list[FrozenTrial]) -> list[FrozenTrial]:
    """Those that run, the newest, and of the others so many that `MOST_ABOVE` have ended, spread evenly; in order."""
    if len(told) > MOST_ABOVE:
        older = told[:-_NEWEST]
        spread = np.linspace(0, len(older) - 1, MOST_ABOVE - _NEWEST).round().astype(int)
        told = [*(older[i] for i in spread), *told[-_NEWEST:]]
    return sorted([*told, *running], key=lambda t: t.number)
