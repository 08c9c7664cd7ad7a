"""Importances are Optuna's, of the first aim, with an interval from resampled trials."""

import math
import random

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial

from momentum_tuner.report import importance

SPACE = {"learning_rate": FloatDistribution(1e-4, 1.0, log=True), "one_minus_momentum": FloatDistribution(1e-3, 1.0)}


def study_of(count, aims=1, direction="minimize"):
    """A study in which the learning rate decides, and its trials as they are stored."""
    draws = random.Random(1)
    study = optuna.create_study(directions=[direction] * aims)
    for _ in range(count):
        rate, rest = math.exp(draws.uniform(math.log(1e-4), 0.0)), draws.uniform(1e-3, 1.0)
        value = abs(math.log(rate) + 3.0) + 0.2 * rest
        values = [value, draws.random()][:aims]
        params = {"learning_rate": rate, "one_minus_momentum": rest}
        study.add_trial(create_trial(params=params, distributions=SPACE, values=values))
    return study, study.trials


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_shares_are_those_of_optuna(direction):
    study, trials = study_of(80, direction=direction)
    found = importance._importance("momentum", trials, direction)
    expected = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    assert found.trials == 80 and found.reason is None
    assert found.shares == pytest.approx(expected)
    assert list(found.shares) == sorted(expected, key=expected.get, reverse=True)
    assert sum(found.shares.values()) == pytest.approx(1.0)


def test_the_interval_holds_the_share_and_narrows_with_more_trials():
    few, many = (importance._importance("momentum", study_of(n)[1], "minimize") for n in (40, 640))
    for found in (few, many):
        for name, share in found.shares.items():
            assert 0.0 <= found.low[name] <= share <= found.high[name] <= 1.0
    name = "learning_rate"
    assert many.shares[name] > 0.8
    assert 0.0 < many.high[name] - many.low[name] < few.high[name] - few.low[name]


def test_of_two_aims_the_first_counts_and_trials_stay_as_they_are():
    (_, trials), (_, alone) = study_of(60, aims=2), study_of(60)
    for trial, other in zip(trials, alone, strict=True):
        other.values = trial.values[:1]
        other.params = dict(trial.params)
    found, expected = (importance._importance("momentum", some, "minimize") for some in (trials, alone))
    assert found == expected
    assert all(len(trial.values) == 2 for trial in trials)


def test_where_nothing_can_be_said_a_reason_is_given():
    assert importance._importance("m", study_of(3)[1], "minimize").reason == "3 trials with a value, fewer than 10"
    _, alike = study_of(20)
    for trial in alike:
        trial.values = [1.0]
    assert importance._importance("m", alike, "minimize").reason == "its trials do not differ enough"
    _, narrow = study_of(20)
    for trial in narrow:
        trial.params = {"learning_rate": trial.params["learning_rate"]}
    assert importance._importance("m", narrow, "minimize").reason == "only one hyperparameter is searched"
