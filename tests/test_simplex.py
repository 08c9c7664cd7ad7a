"""The simplex of the last trials, alone on functions and at the end of a search on what theory says of quadratics."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from momentum_tuner.database import Ticket, migrate
from momentum_tuner.search import DIVERGED, design, make_samplers
from momentum_tuner.simplex import SimplexSampler
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import find_study, submit_study
from momentum_tuner.worker import StopSignal, run_worker
from momentum_tuner.worker_options import WorkerOptions

FIRST = 20


def sampler(maximize=False, seed=0):
    return SimplexSampler(FIRST, maximize, optuna.samplers.RandomSampler(seed=seed))


def bowl(trial):
    """A narrow valley along the diagonal, its bottom at 3e-3 and 0.4."""
    x = math.log10(trial.suggest_float("rate", 1e-5, 1.0, log=True) / 3e-3)
    y = trial.suggest_float("share", 0.0, 1.0) - 0.4
    return abs(x - y) + 0.1 * abs(x + y)


def searched(objective=bowl, trials=100, **options):
    study = optuna.create_study(direction="maximize" if options.get("maximize") else "minimize")
    for seed in range(trials):
        study.sampler = sampler(seed=seed, **options)  # a new one each time, as workers make them
        study.optimize(objective, n_trials=1)
    return study


def test_it_closes_in_where_a_sampler_alone_stays_away():
    study = searched()
    alone = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    alone.optimize(bowl, n_trials=100)
    assert study.best_value < 1e-3 < alone.best_value / 10
    assert study.best_params == pytest.approx({"rate": 3e-3, "share": 0.4}, rel=0.01)
    assert all(1e-5 <= t.params["rate"] <= 1.0 and 0.0 <= t.params["share"] <= 1.0 for t in study.trials)


def test_the_larger_the_better_if_the_study_says_so():
    assert searched(lambda trial: -bowl(trial), maximize=True).best_value > -1e-3


def test_a_best_setting_at_the_end_of_a_range_is_reached():
    def slope(trial):
        return trial.suggest_float("x", 0.0, 1.0) + trial.suggest_float("y", 1e-3, 1.0, log=True)

    assert searched(slope).best_value == pytest.approx(1e-3, abs=0.01)


def test_a_choice_keeps_what_is_best_and_a_space_of_choices_is_left_to_the_sampler():
    def with_choice(trial):
        return bowl(trial) + trial.suggest_categorical("cost", [0.0, 10.0])

    last = searched(with_choice).trials[FIRST:]
    assert {t.params["cost"] for t in last} == {0.0}

    choices = searched(lambda trial: trial.suggest_categorical("cost", [0.0, 10.0]), trials=60)
    assert {t.params["cost"] for t in choices.trials[FIRST:]} == {0.0, 10.0}


def test_what_runs_counts_as_bad_until_it_is_told_and_no_point_is_proposed_twice():
    study = searched(trials=FIRST + 5)
    study.sampler = sampler()
    study.ask().suggest_float("rate", 1e-5, 1.0, log=True)  # as a process that is in the midst of it
    waiting = [study.ask() for _ in range(6)]
    values = [bowl(trial) for trial in waiting]
    points = [tuple(trial.params.values()) for trial in waiting]
    assert len(set(points)) == 6
    for trial, value in zip(waiting, values, strict=True):
        study.tell(trial, value)
    study.optimize(bowl, n_trials=60)
    refined = [tuple(t.params.values()) for t in study.trials[FIRST:] if len(t.params) == 2]
    assert len(set(refined)) == len(refined)
    assert study.best_value < 3e-3


def test_a_trial_that_diverged_failed_or_was_pruned_is_no_place_to_begin():
    def told(state, values=None, constraint=None):
        study = searched(trials=FIRST - 1)
        study.enqueue_trial({"rate": 0.9, "share": 0.05})
        spoilt = study.ask()
        bowl(spoilt)
        if constraint is not None:
            spoilt.set_constraint(DIVERGED, constraint)
        best = study.best_trial
        study.tell(spoilt, values, state=state)
        study.sampler = sampler()
        proposed = study.ask()
        bowl(proposed)

        def decades(other):
            return abs(math.log10(proposed.params["rate"] / other.params["rate"]))

        return decades(best) < 0.7 and decades(spoilt) > 0.7  # of 5 decades, the first simplex has 12%

    assert told(TrialState.FAIL)
    assert told(TrialState.PRUNED)
    assert told(TrialState.COMPLETE, -1.0, constraint=1.0)
    assert not told(TrialState.COMPLETE, -1.0)


def test_the_last_trials_of_a_study_are_refined_if_its_file_says_so(make_spec):
    spec = make_spec(sampler={"name": "tpe", "refine": 3}, budget={"trials": 10, "epochs": 20})
    assert isinstance(make_samplers(spec, {}, 0)(6), optuna.samplers.TPESampler)
    assert isinstance(make_samplers(spec, {}, 0)(7), SimplexSampler)
    assert isinstance(
        make_samplers(make_spec(budget={"trials": 10, "epochs": 20}), {}, 0)(10), optuna.samplers.TPESampler
    )


# The tuner finds theory

DIM, STEPS = 20, 400


def best_possible(optimizer, kappa, points=150):
    """The smallest contraction of a fine grid over the space of the study, from its definition in METRICS.md."""
    eigenvalues = kappa ** np.linspace(0, 1, DIM)
    lr = np.geomspace(0.5 / kappa, 4.0 / kappa, points)[:, None, None]
    beta = (np.zeros(1) if optimizer == "sgd" else 1 - np.geomspace(0.05, 1.0, points))[None, :, None]
    theta = np.full((points, beta.shape[1], DIM), DIM**-0.5)
    velocity = np.zeros_like(theta)
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(STEPS):
            if step == STEPS // 2:
                halfway = np.linalg.norm(theta, axis=-1)
            gradient = eigenvalues * theta
            velocity = beta * velocity + gradient
            theta = theta - lr * (gradient + beta * velocity if optimizer == "nesterov" else velocity)
        rate = (np.linalg.norm(theta, axis=-1) / halfway) ** (2 / STEPS)
    return np.nanmin(rate)


@pytest.mark.parametrize("kappa", [10.0, 100.0])
def test_the_tuner_finds_theory(sqlite_database, kappa):
    migrate(sqlite_database)
    spec = StudySpec.model_validate(
        {
            "name": "theory",
            "task": {
                "factory": "momentum_tuner.tasks:quadratic",
                "params": {"dim": DIM, "kappa": kappa, "steps_per_epoch": STEPS // 2},
            },
            "optimizers": ["sgd", "momentum", "nesterov"],
            "space": {
                "learning_rate": {"low": 0.5 / kappa, "high": 4.0 / kappa},
                "momentum": {"low": 0.0, "high": 0.95},
            },
            "objective": {"metric": "contraction"},
            "budget": {"trials": 128, "epochs": 2},
            "sampler": {"name": "tpe", "refine": 80},
            "pruner": {"name": "none"},
            "confirm": {"seeds": 1},
            "target": 1e-6,
        }
    )
    submit_study(sqlite_database, spec, None, lambda optimizer: design(spec, optimizer))
    run_worker(sqlite_database.text, WorkerOptions(studies=("theory",), slots=4), StopSignal())
    assert find_study(sqlite_database, "theory").phase == "done"
    with sqlite_database.read() as session:
        wanted = sa.select(Ticket.optimizer, Ticket.measures).where(Ticket.kind == "confirm")
        confirmed = {optimizer: measures["contraction"] for optimizer, measures in session.execute(wanted)}
    for optimizer in spec.optimizers:
        assert math.log(confirmed[optimizer]) / math.log(best_possible(optimizer, kappa)) > 0.97, optimizer
