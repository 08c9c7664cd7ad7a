"""Optuna's TPE for a batch of trials: what was told is looked at once, each trial of the batch sees those before it."""

from __future__ import annotations

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
    """What the samplers of one study's batches hand on: of finished trials, which never change, the best ones.

    Attributes:
        below: of them the better group of the last batch.
        ended: numbers of the finished trials that it was chosen from.
        starting: whether there were too few finished trials to learn from.
    """

    below: list[FrozenTrial] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    starting: bool = True

    def split(
        self, study: optuna.Study, trials: list[FrozenTrial], size: int
    ) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """The better and the worse group, each by number, as `_split_trials` makes them, which compares all trials.

        The best of all are among as many of before and those that ended since. Running trials that went on from a rung
        and have reported again count as if they were pruned now: with many slots they are the best there is for long.
        """
        if len(study.directions) > 1:
            return _split_trials(study, trials, size)
        ended = [t for t in trials if t.state.is_finished()]
        if len(self.below) == size:
            ended = [*self.below, *(t for t in ended if t.number not in self.ended)]
            ended.sort(key=lambda t: t.number)  # those that are alike keep their order
        self.below, _ = _split_trials(study, ended, size)
        self.ended.update(t.number for t in trials if t.state.is_finished())
        promising = [_as_pruned(t) for t in trials if t.state is TrialState.RUNNING and len(t.intermediate_values) > 1]
        below, _ = _split_trials(study, sorted([*self.below, *promising], key=lambda t: t.number), size)
        best = {t.number for t in below}
        return below, [t for t in trials if t.number not in best]


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
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        trials = study.get_trials(deepcopy=False, states=states)
        told = sum(trial.state is not TrialState.RUNNING for trial in trials)
        gamma = default_gamma if len(study.directions) == 1 else default_gamma_multiobjective
        below, above = self._memory.split(study, trials, gamma(told))
        return _Fit(
            self._build_parzen_estimator(study, search_space, below, handle_below=True),
            self._get_internal_repr(_thinned(above), search_space, study),
        )


def _as_pruned(trial: FrozenTrial) -> FrozenTrial:
    """A running trial as it would be if it were pruned at its last report."""
    pruned = copy.copy(trial)
    pruned.state = TrialState.PRUNED
    return pruned


def _thinned(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Those that run, the newest, and of the others so many that `MOST_ABOVE` have ended, spread evenly; in order."""
    told = [i for i, trial in enumerate(trials) if trial.state is not TrialState.RUNNING]
    if len(told) <= MOST_ABOVE:
        return trials
    older = told[:-_NEWEST]
    spread = np.linspace(0, len(older) - 1, MOST_ABOVE - _NEWEST).round().astype(int)
    dropped = set(older) - {older[i] for i in spread}
    return [trial for i, trial in enumerate(trials) if i not in dropped]
