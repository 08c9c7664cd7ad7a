"""Optuna's successive halving and Hyperband for a batch of trials: what others reached at a rung is looked at once."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict

import optuna
from optuna.pruners._successive_halving import _completed_rung_key, _get_current_rung
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from momentum_tuner.trial_cache import TrialCache

_RUNG = _completed_rung_key(0).removesuffix("0")


class BatchHalvingPruner(optuna.pruners.SuccessiveHalvingPruner):
    """Decides as Optuna's own pruner does, and leaves the same marks on the trials.

    Optuna collects and sorts the values of all trials at a rung for each trial that it judges. Here those of finished
    trials are kept, sorted, and those of the others as long as the storage's batch lasts.

    Args:
        min_resource: epochs at the first rung.
        reduction_factor: one of so many trials goes on from each rung.
        min_early_stopping_rate: how many rungs are left out.
    """

    def __init__(self, min_resource: int, reduction_factor: int, min_early_stopping_rate: int = 0) -> None:
        super().__init__(min_resource, reduction_factor, min_early_stopping_rate)
        self._ended: set[int] = set()
        self._passed = 0
        """So many trials, the first of the study, have all ended and were looked at."""
        self._reached_by_ended: defaultdict[str, list[float]] = defaultdict(list)
        self._batch: int | None = None
        self._running: list[FrozenTrial] = []
        self._values: dict[str, list[float]] = {}

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial ends at the rung that it has reached."""
        step = trial.last_step
        if step is None:
            return False
        value = trial.intermediate_values[step]
        rung = _get_current_rung(trial)
        if rung and step == self._epochs_to(rung - 1):  # who marked it may not have lived to act on the decision
            rung -= 1
        while step >= self._epochs_to(rung):
            if math.isnan(value):
                return True
            key = _completed_rung_key(rung)
            reached = self._reached(study, key)
            if key not in trial.system_attrs:
                bisect.insort(reached, value)
                study._storage.set_trial_system_attr(trial._trial_id, key, value)
            # The first ones, of whom there are too few to take a share, go on if they are the best so far.
            last = max(len(reached) // self._reduction_factor, 1) - 1
            if value > reached[last] if study.direction is StudyDirection.MINIMIZE else value < reached[-1 - last]:
                return True
            rung += 1
        return False

    def _epochs_to(self, rung: int) -> int:
        assert self._min_resource is not None
        return int(self._min_resource * self._reduction_factor ** (self._min_early_stopping_rate + rung))

    def _reached(self, study: optuna.Study, key: str) -> list[float]:
        """The values at a rung, sorted."""
        batch = study._storage.batch_number if isinstance(study._storage, TrialCache) else None
        if batch is None or batch != self._batch:
            self._look(study)
        self._batch = batch
        if key not in self._values:
            running = [trial.system_attrs[key] for trial in self._running if key in trial.system_attrs]
            self._values[key] = sorted([*self._reached_by_ended[key], *running])
        return self._values[key]

    def _look(self, study: optuna.Study) -> None:
        """Take in what has changed since the last batch."""
        self._values.clear()
        trials = study.get_trials(deepcopy=False)
        new = [trial for trial in trials[self._passed :] if trial.number not in self._ended]
        self._running = [trial for trial in new if not trial.state.is_finished()]
        for trial in new:
            if trial.state.is_finished():
                self._ended.add(trial.number)
                for key, value in trial.system_attrs.items():
                    if key.startswith(_RUNG):
                        bisect.insort(self._reached_by_ended[key], value)
        while self._passed < len(trials) and trials[self._passed].number in self._ended:
            self._passed += 1


class BatchHyperbandPruner(optuna.pruners.HyperbandPruner):
    """Optuna's Hyperband, whose brackets halve as above.

    Args:
        min_resource: epochs at the first rung of the first bracket.
        max_resource: epochs of a trial.
        reduction_factor: one of so many trials goes on from each rung.
    """

    def __init__(self, min_resource: int, max_resource: int, reduction_factor: int) -> None:
        super().__init__(min_resource, max_resource, reduction_factor)
        self._factor = reduction_factor

    def _try_initialization(self, study: optuna.Study) -> None:
        super()._try_initialization(study)
        self._pruners = [
            BatchHalvingPruner(self._min_resource, self._factor, bracket) for bracket in range(len(self._pruners))
        ]
