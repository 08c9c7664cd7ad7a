"""Stable width, learning-rate sensitivity and the stability map, against numbers computed by hand."""

import json
import math

import numpy as np
import pytest
import torch

from momentum_tuner.comparison import stability_map
from momentum_tuner.comparison.landscape import (
    SearchTrial,
    lr_sensitivity,
    measured_edges,
    momentum_of,
    stable_width,
)
from momentum_tuner.errors import InputError
from momentum_tuner.metrics import stability_bound
from momentum_tuner.tasks import quadratic
from momentum_tuner.trainer import Trainer, TrialSettings

from .recorded import Recorded

torch.set_num_threads(1)


def trial(learning_rate, value, momentum=0.9, outcome="complete", number=0, **measures):
    return SearchTrial(number, learning_rate, momentum, outcome, value, measures)


# Stable width


def test_the_width_reaches_to_where_the_objective_crosses_5_percent_on_both_sides():
    trials = [trial(0.01, 1.4), trial(0.1, 1.0), trial(1.0, 1.02), trial(10.0, 1.12)]
    # Below: from 1.0 at 0.1 to 1.4 at 0.01 it crosses 1.05 after 1/8 of a decade; above, after 0.3 of one from 1.0.
    assert stable_width(trials, maximize=False) == pytest.approx(1.0 + 0.05 / 0.4 + 0.03 / 0.1)


def test_the_width_does_not_depend_on_the_order_and_mirrors_where_more_is_better():
    trials = [trial(1.0, -1.02), trial(0.01, -1.4), trial(10.0, -1.12), trial(0.1, -1.0)]
    assert stable_width(trials, maximize=True) == pytest.approx(1.0 + 0.05 / 0.4 + 0.03 / 0.1)


def test_the_width_ends_at_the_last_good_trial_where_none_is_worse():
    assert stable_width([trial(0.1, 1.0), trial(0.5, 1.04), trial(0.02, 1.01)], False) == pytest.approx(math.log10(25))


def test_a_worse_trial_in_between_ends_the_width():
    trials = [trial(0.1, 1.0), trial(1.0, 1.1), trial(10.0, 1.0, number=1)]
    assert stable_width(trials, False) == pytest.approx(0.5)


@pytest.mark.parametrize("order", [1, -1])
def test_of_equal_learning_rates_the_better_counts(order):
    trials = [trial(0.1, 1.0), trial(1.0, 1.5, 0.91), trial(1.0, 1.02, 0.9), trial(0.1, 1.2, 0.91)]
    assert stable_width(trials[::order], False) == pytest.approx(1.0)


def test_only_trials_at_the_best_momentum_count():
    trials = [trial(0.1, 1.0, 0.9), trial(0.3, 1.01, 0.86), trial(1.0, 1.01, 0.84), trial(0.01, 1.01, 0.94)]
    assert stable_width(trials, False) == pytest.approx(math.log10(3)), "1 - momentum within a factor of 1.5"
    without = [trial(0.1, 1.0, None), trial(1.0, 1.01, None)]
    assert stable_width(without, False) == pytest.approx(1.0)


def test_a_diverged_trial_bounds_the_width_and_a_pruned_or_failed_one_does_not():
    trials = [
        trial(0.1, 1.0),
        trial(0.2, 3.0, outcome="pruned"),
        trial(0.3, None, outcome="failed"),
        trial(1.0, 2.0, outcome="diverged"),
    ]
    assert stable_width(trials, False) == pytest.approx(0.05)
    trials[-1] = trial(1.0, None, outcome="diverged")
    assert stable_width(trials, False) == 0.0


@pytest.mark.parametrize(
    "trials",
    [[], [trial(0.1, 1.0)], [trial(0.1, 1.0), trial(1.0, 1.0, 0.0)], [trial(0.1, 2.0, outcome="diverged")]],
    ids=["none", "one", "none at that momentum", "none complete"],
)
def test_the_width_is_unknown_where_nothing_tells_it(trials):
    assert stable_width(trials, False) is None


# Sensitivity


def test_sensitivity_is_the_mean_excess_within_one_and_a_half_decades_capped_at_the_untrained_model():
    trials = [
        trial(0.1, 0.2, initial_valid_loss=2.0),
        trial(0.1 * 10**1.49, 0.5, 0.0, initial_valid_loss=2.0),
        trial(0.1 / 10**1.49, 3.0, initial_valid_loss=2.0),
        trial(0.1 * 10**1.51, 100.0, initial_valid_loss=2.0),
        trial(0.2, 2.4, outcome="diverged", initial_valid_loss=2.4),
        trial(0.2, 0.9, outcome="pruned", initial_valid_loss=2.0),
        trial(0.2, None, outcome="failed"),
    ]
    assert lr_sensitivity(trials, "valid_loss", False) == pytest.approx((0.0 + 0.3 + 1.8 + 2.2) / 4)


def test_sensitivity_of_an_accuracy_is_what_is_lost_of_it():
    trials = [
        trial(0.1, 0.9, initial_valid_accuracy=0.1),
        trial(0.2, 0.7, initial_valid_accuracy=0.1),
        trial(0.3, 0.05, initial_valid_accuracy=0.1),
    ]
    assert lr_sensitivity(trials, "valid_accuracy", True) == pytest.approx((0.0 + 0.2 + 0.8) / 3)


def test_sensitivity_of_a_contraction_is_capped_at_1():
    assert lr_sensitivity([trial(0.1, 0.5), trial(0.2, 1.3)], "contraction", False) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "metric", ["steps_to_target", "oscillation", "spikes", "layer_grad_ratio", "sharpness", "stability_margin"]
)
def test_the_untrained_loss_is_no_cap_for_what_is_no_loss(metric):
    trials = [trial(0.1, 180.0, initial_valid_loss=2.3), trial(0.2, 220.0, initial_valid_loss=2.3)]
    assert lr_sensitivity(trials, metric, False) == pytest.approx(20.0)


@pytest.mark.parametrize("metric", ["best_valid_loss", "final_valid_loss", "mean_valid_loss", "train_loss"])
def test_sensitivity_of_every_loss_is_capped_at_the_untrained_model(metric):
    trials = [trial(0.1, 0.3, initial_valid_loss=2.3), trial(0.2, 9.0, initial_valid_loss=2.3)]
    assert lr_sensitivity(trials, metric, False) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("metric", "values", "maximize", "untrained"),
    [
        ("valid_loss", (2.5, 3.0), False, {"initial_valid_loss": 2.3}),
        ("contraction", (1.2, 1.4), False, {}),
        ("valid_accuracy", (0.08, 0.05), True, {"initial_valid_accuracy": 0.1}),
    ],
)
def test_nothing_is_lost_where_even_the_best_is_worse_than_the_untrained_model(metric, values, maximize, untrained):
    trials = [trial(0.1, values[0], **untrained), trial(0.2, values[1], **untrained)]
    assert lr_sensitivity(trials, metric, maximize) == 0.0


def test_sensitivity_is_unknown_without_a_second_trial():
    assert lr_sensitivity([], "valid_loss", False) is None
    assert lr_sensitivity([trial(0.1, 1.0), trial(100.0, 2.0)], "valid_loss", False) is None


# The edge of divergence


def test_an_edge_lies_between_the_largest_stable_and_the_smallest_diverged_learning_rate():
    trials = [
        trial(0.1, 1.0, 0.9),
        trial(0.4, 1.0, 0.9, "pruned"),
        trial(0.9, 1.0, 0.9, "diverged"),
        trial(1.5, 1.0, 0.9, "diverged"),
        trial(0.5, None, 0.9, "failed"),
        trial(0.3, 1.0, 0.0),
        trial(2.0, 1.0, 0.5, "diverged"),
    ]
    ten, half, one = measured_edges(trials)
    assert (ten.low, ten.high, ten.trials) == (pytest.approx(0.1), pytest.approx(0.1), 4)
    assert (ten.stable, ten.diverged, ten.edge) == (0.4, 0.9, pytest.approx(0.6))
    assert (half.low, half.stable, half.diverged, half.edge) == (0.5, None, 2.0, None)
    assert (one.low, one.stable, one.diverged, one.edge) == (1.0, 0.3, None, None)


def test_no_edge_is_claimed_where_stable_and_diverged_learning_rates_overlap():
    (found,) = measured_edges([trial(0.5, 1.0), trial(0.4, 1.0, outcome="diverged")])
    assert (found.stable, found.diverged, found.edge) == (0.5, 0.4, None)


def test_many_values_fall_into_bins_that_are_even_on_a_log_scale():
    draws = np.random.default_rng(0)
    values = [1e-3, 1.0, *(10 ** draws.uniform(-3, 0, 200))]
    found = measured_edges([trial(0.1, 1.0, 1.0 - v) for v in values])
    assert len(found) == 8
    assert sum(edge.trials for edge in found) == 202
    for number, edge in enumerate(found):
        low, high = 10 ** (-3 + 3 * number / 8), 10 ** (-3 + 3 * (number + 1) / 8)
        assert low * (1 - 1e-9) <= edge.low <= edge.high <= high * (1 + 1e-9)


def test_an_optimizer_without_momentum_has_one_bin():
    (found,) = measured_edges([trial(0.1, 1.0, None), trial(0.4, 1.0, None, "diverged")])
    assert (found.low, found.high, found.edge) == (None, None, pytest.approx(0.2))
    assert measured_edges([]) == ()


@pytest.mark.parametrize(
    ("optimizer", "settings", "momentum"),
    [("sgd", {}, 0.0), ("momentum_0.9", {}, 0.9), ("nesterov", {"momentum": 0.7}, 0.7), ("adam", {"beta1": 0.9}, None)],
)
def test_momentum_is_in_the_setting_or_in_the_optimizer(optimizer, settings, momentum):
    assert momentum_of(optimizer, settings) == momentum


# The map


def test_the_map_has_every_trial_that_ended_and_the_predicted_edge(make_spec, database):
    study = Recorded(database, make_spec(optimizers=["nesterov"], confirm={"seeds": 2}))
    study.search("nesterov", 0.5, 0.1, 0.9)
    best = study.search("nesterov", 0.4, 0.02, 0.99)
    study.search("nesterov", 2.0, 0.4, 0.9, "diverged")
    study.search("nesterov", 1.5, 0.3, 0.0, "pruned")
    study.search("nesterov", None, 0.3, 0.5, "failed")
    study.confirm("nesterov", best, 1, [1.0, 0.4], sharpness=10.0)
    study.confirm("nesterov", best, 2, [1.0, 0.4], sharpness=14.0)
    study.confirm("nesterov", {**best, "learning_rate": 0.5}, 2, [1.0, 0.4], sharpness=1000.0)
    found = stability_map(database, study.record, "nesterov")
    points = [(p.trial, p.learning_rate, p.one_minus_momentum, p.objective, p.outcome) for p in found.points]
    assert points == [
        (0, 0.1, pytest.approx(0.1), 0.5, "complete"),
        (1, 0.02, pytest.approx(0.01), 0.4, "complete"),
        (2, 0.4, pytest.approx(0.1), 2.0, "diverged"),
        (3, 0.3, 1.0, 1.5, "pruned"),
        (4, 0.3, 0.5, None, "failed"),
    ]
    assert [(e.low, e.edge) for e in found.measured] == [
        (pytest.approx(0.01), None),
        (pytest.approx(0.1), pytest.approx(0.2)),
        (1.0, None),
    ]
    assert found.sharpness == 12.0
    ends = found.predicted[0], found.predicted[-1]
    assert [p.one_minus_momentum for p in ends] == [pytest.approx(0.01), pytest.approx(1.0)]
    assert [p.learning_rate for p in ends] == [
        pytest.approx(2 * 1.99 / (1 + 2 * 0.99) / 12.0),
        pytest.approx(2.0 / 12.0),
    ]
    flat = json.loads(json.dumps(found.flat(), allow_nan=False))
    assert flat["points"][2] == {
        "trial": 2,
        "learning_rate": 0.4,
        "one_minus_momentum": pytest.approx(0.1),
        "objective": 2.0,
        "outcome": "diverged",
    }


def test_the_sharpness_comes_from_completed_search_trials_where_none_was_confirmed(make_spec, sqlite_database):
    study = Recorded(sqlite_database, make_spec(optimizers=["sgd", "adam"], confirm={"seeds": 10}))
    for value, sharpness in ((0.5, 3.0), (0.4, 5.0), (0.3, 100.0)):
        study.search("sgd", value, 0.1, sharpness=sharpness)
    study.search("sgd", 2.0, 0.5, outcome="diverged", sharpness=9.0)
    study.search("adam", 0.5, 0.1, sharpness=3.0)
    study.search("momentum_0.9", 0.5, 0.1)
    found = stability_map(sqlite_database, study.record, "sgd")
    assert found.sharpness == 5.0
    assert [(p.one_minus_momentum, p.learning_rate) for p in found.predicted] == [(1.0, pytest.approx(2 / 5.0))]
    assert found.measured[0].stable == 0.1
    assert stability_map(sqlite_database, study.record, "adam").predicted == ()
    reference = stability_map(sqlite_database, study.record, "momentum_0.9")
    assert (len(reference.points), reference.points[0].one_minus_momentum) == (1, pytest.approx(0.1))
    assert (reference.sharpness, reference.predicted) == (None, ())


def test_no_edge_is_predicted_with_dampening(make_spec, sqlite_database):
    study = Recorded(sqlite_database, make_spec(optimizers=["momentum"]))
    study.search("momentum", 0.5, 0.1, 0.9, sharpness=3.0)
    assert len(stability_map(sqlite_database, study.record, "momentum").predicted) == 1
    study.search("momentum", 0.4, 0.1, 0.9, sharpness=3.0, dampening=0.5)
    assert stability_map(sqlite_database, study.record, "momentum").predicted == ()


def test_a_map_of_an_optimizer_that_is_not_in_the_study_is_refused(make_spec, sqlite_database):
    study = Recorded(sqlite_database, make_spec())
    with pytest.raises(InputError, match="adam"):
        stability_map(sqlite_database, study.record, "adam")


HEAVY_BALL_AT_09 = 0.961
"""Of its bound: beyond, the transient of momentum at 0.9 alone takes the loss over ten times the initial one."""


@pytest.mark.parametrize(
    ("optimizer", "edges"),
    [
        ("sgd", {0.0: 1.0}),
        ("momentum", {0.5: 1.0, 0.9: HEAVY_BALL_AT_09}),
        ("momentum_classic", {0.5: 1.0, 0.9: HEAVY_BALL_AT_09}),
        ("nesterov", {0.5: 1.0, 0.9: 1.0}),
        ("nesterov_lookahead", {0.5: 1.0, 0.9: 1.0}),
    ],
)
def test_the_predicted_edge_of_a_quadratic_is_where_the_trainer_begins_to_diverge(
    make_spec, sqlite_database, optimizer, edges
):
    sharpness = 10.0
    study = Recorded(sqlite_database, make_spec(optimizers=[optimizer]))
    trainer = Trainer(quadratic(dim=4, kappa=sharpness), epochs=20, slots=64, mode="fused")
    for beta, edge in edges.items():
        for factor in (0.99, 1.01):
            rate = factor * edge * stability_bound(beta, optimizer.startswith("nesterov")) / sharpness
            trainer.admit((beta, rate), TrialSettings(optimizer, {"learning_rate": rate, "momentum": beta}, 1, 0))
    diverged = dict.fromkeys(trainer.keys, False)
    for _ in range(20):
        for key, record in trainer.train_epoch():
            if record.diverged_at_step is not None:
                diverged[key] = True
                trainer.release(key)
    for (beta, rate), ended in diverged.items():
        momentum = None if optimizer == "sgd" else beta
        study.search(optimizer, 0.5, rate, momentum, "diverged" if ended else "complete", sharpness=sharpness)
    found = stability_map(sqlite_database, study.record, optimizer)
    measured = {round(1 - edge.low, 6): edge.edge for edge in found.measured}
    predicted = {round(1 - p.one_minus_momentum, 6): p.learning_rate for p in found.predicted}
    assert measured == pytest.approx({beta: edge * predicted[beta] for beta, edge in edges.items()}, rel=0.001)
