"""Optuna's TPE for a batch of trials: what was told is looked at once, each trial of the batch sees those before it."""

from __future__ import annotations

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

MOST_ABOVE = 400
"""Finished trials of the worse group that its density is made from: with all, a trial's cost grows with the study."""
_NEWEST = 25
"""So many of the newest have full weight in Optuna's density; they all are among them."""


@dataclass
class _Fit:
    """The two groups of trials for some parameters: the density of the better one, the points of the worse one.

    Trials that run count as worse, so that no two trials of a batch are drawn to the same point (constant liar).
    """

    below: _ParzenEstimator
    above: dict[str, NDArray[np.float64]]


@dataclass
class TPEMemory:
    """What the samplers of one study's batches hand on: of finished trials, which never change, the best ones.

    Attributes:
        below: the better group of the last batch.
        ended: numbers of the finished trials that it was chosen from.
    """

    below: list[FrozenTrial] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)

    def split(
        self, study: optuna.Study, trials: list[FrozenTrial], size: int
    ) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """The better and the worse group, each by number, as `_split_trials` makes them, which compares all trials.

        The best of all are among as many of before and those that ended since.
        """
        if len(study.directions) > 1:
            return _split_trials(study, trials, size)
        new = [t for t in trials if t.number not in self.ended]
        if len(self.below) == size:
            candidates = sorted([*self.below, *new], key=lambda t: t.number)  # those that are alike keep their order
            below, _ = _split_trials(study, candidates, size)
            best = {t.number for t in below}
            above = [t for t in trials if t.number not in best]
        else:
            below, above = _split_trials(study, trials, size)
        self.below = below
        self.ended.update(t.number for t in new if t.state.is_finished())
        return below, above


class BatchTPESampler(optuna.samplers.TPESampler):
    """TPE with Optuna's defaults for the trials of one batch; a new one is made for the next batch.

    For each trial it draws what Optuna's own sampler draws from the same seed, as long as there are no more than
    `MOST_ABOVE` trials in the worse group.

    Args:
        space: the parameters, known in advance: Optuna would find them in all trials.
        memory: of the sampler of the study's last batch.
    """

    def __init__(self, space: Mapping[str, BaseDistribution], memory: TPEMemory | None = None) -> None:
        super().__init__()
        self._memory = memory or TPEMemory()
        self._space = {name: space[name] for name in sorted(space) if not space[name].single()}
        self._starts: bool | None = None
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
        if self._starts is None:
            told = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
            self._starts = len(told) < self._n_startup_trials
        return self._starts

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        key = tuple(search_space)
        if key not in self._fits:
            self._fits[key] = self._fit(study, search_space)
        fit = self._fits[key]
        above = self._parzen_estimator_cls(fit.above, search_space, self._parzen_estimator_parameters)
        samples = fit.below.sample(self._rng.rng, self._n_ei_candidates)
        chosen = self._compare(samples, self._compute_acquisition_func(samples, fit.below, above))
        for name, value in chosen.items():
            fit.above[name] = np.append(fit.above[name], value)
        return {name: d.to_external_repr(chosen[name]) for name, d in search_space.items()}

    def _fit(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> _Fit:
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        trials = study.get_trials(deepcopy=False, states=states)
        told = sum(trial.state is not TrialState.RUNNING for trial in trials)
        gamma = default_gamma if len(study.directions) == 1 else default_gamma_multiobjective
        below, above = self._memory.split(study, trials, gamma(told))
        return _Fit(
            self._build_parzen_estimator(study, search_space, below, handle_below=True),
            self._get_internal_repr(_thinned(above), search_space, study),
        )


def _thinned(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Those that run, the newest, and of the others so many that `MOST_ABOVE` have ended, spread evenly; in order."""
    told = [i for i, trial in enumerate(trials) if trial.state is not TrialState.RUNNING]
    if len(told) <= MOST_ABOVE:
        return trials
    older = told[:-_NEWEST]
    spread = np.linspace(0, len(older) - 1, MOST_ABOVE - _NEWEST).round().astype(int)
    dropped = set(older) - {older[i] for i in spread}
    return [trial for i, trial in enumerate(trials) if i not in dropped]
