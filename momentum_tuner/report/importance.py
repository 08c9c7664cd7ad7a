"""Which hyperparameters matter, from Optuna's studies, and how sure that is."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from momentum_tuner.database import Database
from momentum_tuner.search import study_name
from momentum_tuner.tickets import StudyRecord
from momentum_tuner.trial_tables import find_study_id, read_trials

Direction = Literal["minimize", "maximize"]

LEAST_TRIALS = 10
"""With fewer values importance is chance."""
_RESAMPLES = 40
_INTERVAL = (0.1, 0.9)


@dataclass(frozen=True)
class Importance:
    """How much each searched hyperparameter of a contestant matters.

    Attributes:
        optimizer: the contestant.
        trials: how many have a value: complete and diverged ones.
        shares: by hyperparameter, the most important first; they add up to 1. Empty where nothing can be said.
        low: lower end of the interval from resampled trials.
        high: upper end.
        reason: why nothing can be said.
    """

    optimizer: str
    trials: int
    shares: Mapping[str, float] = field(default_factory=dict)
    low: Mapping[str, float] = field(default_factory=dict)
    high: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None


def importances(database: Database, study: StudyRecord) -> list[Importance]:
    """The importance of the hyperparameters of each contestant, with two aims for the first."""
    found = []
    for optimizer in study.spec.contestants:
        with database.read() as session:
            study_id = find_study_id(session, study_name(study.name, optimizer))
            trials = [] if study_id is None else read_trials(session, {study_id: -1})[study_id]
        complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
        found.append(_importance(optimizer, complete, study.spec.objective.direction))
    return found


def _importance(optimizer: str, trials: Sequence[FrozenTrial], direction: Direction) -> Importance:
    names = sorted({name for t in trials for name in t.params})
    if len(trials) < LEAST_TRIALS:
        return Importance(
            optimizer,
            len(trials),
            reason=f"{len(trials)} trial{'' if len(trials) == 1 else 's'} with a value, fewer than {LEAST_TRIALS}",
        )
    if len(names) < 2:
        return Importance(optimizer, len(trials), reason="only one hyperparameter is searched")
    judged = [_by_first_aim(trial) for trial in trials]
    study = optuna.create_study(direction=direction)
    whole = _shares(study, judged, names)
    if whole is None:
        return Importance(optimizer, len(trials), reason="its trials do not differ enough")
    draws = random.Random(0)
    again = [_shares(study, draws.choices(judged, k=len(judged)), names) for _ in range(_RESAMPLES)]
    spread = {name: sorted(shares[name] for shares in again if shares is not None) for name in names}
    low, high = (
        {name: values[round(q * (len(values) - 1))] for name, values in spread.items() if values} for q in _INTERVAL
    )
    return Importance(
        optimizer,
        len(trials),
        shares=dict(sorted(whole.items(), key=lambda item: -item[1])),
        low={name: min(share, low.get(name, share)) for name, share in whole.items()},
        high={name: max(share, high.get(name, share)) for name, share in whole.items()},
    )


def _by_first_aim(trial: FrozenTrial) -> FrozenTrial:
    """The same trial, of a study with one aim."""
    judged = copy.copy(trial)
    judged.values = trial.values[:1]
    return judged


def _shares(study: optuna.Study, trials: Sequence[FrozenTrial], names: Sequence[str]) -> dict[str, float] | None:
    """PED-ANOVA's importance of each hyperparameter; None where trials do not differ.

    Args:
        study: an empty one, of the direction. It is lent the trials, as adding them copies each, which takes longer
            than all else.
        trials: complete ones, of one value; one may be there several times.
        names: of the hyperparameters.
    """
    if len({t.value for t in trials}) < 2:
        return None
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("error", UserWarning)  # its best tenth is all trials: then it would call all names equal
        study.get_trials = lambda *_, **__: list(trials)  # type: ignore[method-assign]
        try:
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except UserWarning:
            return None
    return {name: float(found.get(name, 0.0)) for name in names}
