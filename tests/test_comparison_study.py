"""`compare_study` on real databases, against numbers computed by hand."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import sqlalchemy as sa

from momentum_tuner.comparison import compare_study, performance_profile
from momentum_tuner.comparison.statistics import sign_flip_p
from momentum_tuner.database import Study, Ticket
from momentum_tuner.tickets import best_settings, note_data

from .recorded import Recorded

SEEDS = range(1000, 1010)


@pytest.fixture
def make_study(sqlite_database, make_spec):
    def make(database=sqlite_database, phase="done", **sections):
        defaults = {
            "optimizers": ["sgd", "momentum_0.9"],
            "budget": {"trials": 1, "epochs": 10},
            "confirm": {"seeds": 10},
            "target": 0.5,
        }
        return Recorded(database, make_spec(**{**defaults, **sections}), phase)

    return make


def contestants(comparison):
    return {c.optimizer: c for c in comparison.optimizers}


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def varied(around, seeds=SEEDS, spread=0.05, seed=0):
    draws = random.Random(seed)
    return {s: around * math.exp(draws.gauss(0.0, spread)) for s in seeds}


# Speed


def test_contestants_and_their_pair_are_compared_as_by_hand(make_study, database):
    study = make_study(database, confirm={"seeds": 4})
    sgd = study.search("sgd", 0.3, learning_rate=0.5)
    textbook = study.search("momentum_0.9", 0.2, learning_rate=0.05)
    slow, fast = {1: 400.0, 2: 600.0, 3: None, 4: 800.0}, {1: 200.0, 2: 250.0, 3: 500.0, 4: 800.0}
    study.reach("sgd", sgd, slow)
    study.reach("momentum_0.9", textbook, fast)
    found = compare_study(database, study.record)
    assert (found.study, found.phase, found.target, found.target_metric) == ("digits-mlp", "done", 0.5, "valid_loss")
    assert (found.maximize, found.reference) == (False, "momentum_0.9")
    assert found.budget == {"trials": 1, "epochs": 10, "seeds": 4, "steps": 1000}
    assert [c.optimizer for c in found.optimizers] == ["momentum_0.9", "sgd"]
    first, second = found.optimizers
    assert first.steps_to_target == pytest.approx(geometric_mean([200, 250, 500, 800]))
    assert second.steps_to_target == pytest.approx(geometric_mean([400, 600, 2000, 800])), "a miss is twice the budget"
    assert [(c.learning_rate, c.momentum, c.seeds, c.trial) for c in found.optimizers] == [
        (0.05, 0.9, 4, 0),
        (0.5, 0.0, 4, 0),
    ]
    assert [(c.miss_rate, c.divergence_rate) for c in found.optimizers] == [(0.0, 0.0), (0.25, 0.0)]
    (pair,) = found.pairs
    assert (pair.a, pair.b, pair.seeds) == ("momentum_0.9", "sgd", 4)
    ratios = [200 / 400, 250 / 600, 500 / 2000, 800 / 800]
    assert pair.speed_ratio == pytest.approx(geometric_mean(ratios))
    assert pair.p == pytest.approx(4 / 16), "three seeds of one sign, one tie: as extreme are 2 x 2 of 16 flips"
    assert pair.low < pair.speed_ratio < pair.high
    assert found.notes == ("with fewer than 6 seeds no p can be below 0.05",)


def test_measures_are_means_over_seeds(make_study):
    study = make_study(confirm={"seeds": 3})
    sgd = study.search("sgd", 0.3)
    extra = [
        {
            "oscillation": 0.1,
            "layer_grad_ratio": 2.0,
            "mean_valid_loss": 0.5,
            "sharpness": 8.0,
            "stability_margin": 0.8,
        },
        {"oscillation": 0.4, "layer_grad_ratio": 4.0, "mean_valid_loss": 0.7, "sharpness": 10.0},
        {"layer_grad_ratio": 6.0, "mean_valid_loss": 0.9},
    ]
    study.confirm("sgd", sgd, 1, [1.0, 0.6, 0.3], spikes=2, **extra[0])
    study.confirm("sgd", sgd, 2, [1.2, 0.4, 0.5], spikes=0, **extra[1])
    study.confirm("sgd", sgd, 3, [1.4, 0.9, None], outcome="diverged", spikes=7, **extra[2])
    (found,) = compare_study(study.database, study.record).optimizers
    assert found.divergence_rate == pytest.approx(1 / 3)
    assert found.miss_rate == pytest.approx(1 / 3)
    assert found.best_valid_loss == pytest.approx((0.3 + 0.4 + 1.4) / 3), "a diverged trial counts as untrained"
    mean = (0.3 + 0.4 + 1.4) / 3
    assert found.seed_std == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in (0.3, 0.4, 1.4)) / 2))
    assert found.oscillation == pytest.approx(0.25)
    assert found.spikes == pytest.approx(3.0)
    assert found.layer_grad_ratio == pytest.approx(4.0)
    assert found.mean_valid_loss == pytest.approx(0.7)
    assert found.sharpness == pytest.approx(9.0)
    assert found.stability_margin == pytest.approx(0.8)
    assert found.steps_to_target == pytest.approx(geometric_mean([100 + 100 / 3, 100 * 0.7 / 0.8, 2000]))


def test_seeds_are_paired_whatever_the_order_of_their_rows(make_study, sqlite_database, make_spec):
    # Hard and easy seeds differ far more than the two contestants do on each.
    slow = {s: 100.0 * (1.2**n) for n, s in enumerate(SEEDS)}
    fast = {s: v / 1.2 * (1.0 + 0.02 * (s % 3)) for s, v in slow.items()}
    comparisons = []
    for name, seed in (("ordered", None), ("shuffled", 3)):
        study = make_study(name=name)
        sgd, textbook = study.search("sgd", 0.3), study.search("momentum_0.9", 0.2)
        orders = [list(slow), list(slow)]
        if seed is not None:
            for number, order in enumerate(orders):
                random.Random(seed + number).shuffle(order)
        study.reach("sgd", sgd, {s: slow[s] for s in orders[0]})
        study.reach("momentum_0.9", textbook, {s: fast[s] for s in orders[1]})
        comparisons.append(compare_study(study.database, study.record))
    ordered, shuffled = comparisons
    assert ordered.pairs == shuffled.pairs
    (pair,) = ordered.pairs
    assert pair.speed_ratio == pytest.approx(geometric_mean([fast[s] / slow[s] for s in SEEDS]))
    assert pair.high - pair.low < 0.03, "unpaired, the interval would be wider than from 0.5 to 1.3"
    assert pair.verdict == "momentum_0.9 is 1.18x faster than sgd (10 seeds)"


def test_a_pair_is_compared_on_the_seeds_that_both_have_and_led_by_the_one_that_is_faster_there(make_study):
    study = make_study(confirm={"seeds": 3})
    sgd, textbook = study.search("sgd", 0.3), study.search("momentum_0.9", 0.2)
    study.reach("sgd", sgd, {1: 400.0, 2: 500.0, 3: 100.0})
    study.reach("momentum_0.9", textbook, {1: 300.0, 2: 400.0})
    found = compare_study(study.database, study.record)
    assert [c.optimizer for c in found.optimizers] == ["sgd", "momentum_0.9"], "over its three seeds sgd is faster"
    (pair,) = found.pairs
    assert (pair.a, pair.b, pair.seeds) == ("momentum_0.9", "sgd", 2)
    assert pair.speed_ratio == pytest.approx(geometric_mean([300 / 400, 400 / 500]))
    assert "the confirmation is not over: 5 of 6 trials have ended" in found.notes


def test_all_pairs_are_there_in_order_and_their_p_is_corrected_over_them(make_study):
    study = make_study(optimizers=["sgd", "momentum", "nesterov", "momentum_0.9"])
    speeds = {"sgd": 500.0, "momentum": 480.0, "nesterov": 300.0, "momentum_0.9": 490.0}
    steps = {o: varied(v, seed=n) for n, (o, v) in enumerate(speeds.items())}
    for optimizer, mine in steps.items():
        settings = study.search(optimizer, 0.3, momentum=0.5 if optimizer in ("momentum", "nesterov") else None)
        study.reach(optimizer, settings, mine)
    found = compare_study(study.database, study.record)
    means = {o: geometric_mean(list(mine.values())) for o, mine in steps.items()}
    order = sorted(means, key=means.get)
    assert [c.optimizer for c in found.optimizers] == order
    assert [(p.a, p.b) for p in found.pairs] == list(itertools.combinations(order, 2))
    logs = {(a, b): [math.log(steps[a][s] / steps[b][s]) for s in SEEDS] for a, b in itertools.combinations(order, 2)}
    plain = {pair: sign_flip_p(np.array(values)) for pair, values in logs.items()}
    corrected, largest = {}, 0.0
    for rank, pair in enumerate(sorted(plain, key=plain.get)):
        largest = max(largest, min(1.0, (6 - rank) * plain[pair]))
        corrected[pair] = largest
    assert {(p.a, p.b): p.p for p in found.pairs} == pytest.approx(corrected)
    assert len({round(p, 6) for p in corrected.values()}) > 1
    assert {p.a for p in found.pairs if "faster" in p.verdict} == {"nesterov"}


def test_divergence_is_compared_too(make_study):
    study = make_study()
    sgd, textbook = study.search("sgd", 0.3), study.search("momentum_0.9", 0.2)
    steps = varied(200.0)
    study.reach("sgd", sgd, steps, oscillation=0.2)
    for seed in SEEDS:
        study.confirm("momentum_0.9", textbook, seed, [1.0, 0.9, None], outcome="diverged", spikes=3, oscillation=0.5)
    found = compare_study(study.database, study.record)
    assert contestants(found)["momentum_0.9"].divergence_rate == 1.0
    assert contestants(found)["momentum_0.9"].miss_rate == 1.0
    (pair,) = found.pairs
    assert (pair.a, pair.b) == ("sgd", "momentum_0.9")
    assert pair.speed_ratio == pytest.approx(geometric_mean(list(steps.values())) / 2000)
    assert {d.measure: (d.value, d.low, d.high) for d in pair.stability} == {
        "oscillation": pytest.approx((-0.3, -0.51595, 0.10105), abs=1e-4),
        "spikes": pytest.approx((-3.0, -4.2827, -1.9567), abs=1e-3),
        "divergence_rate": pytest.approx((-1.0, -1.0, -0.44493), abs=1e-4),
    }


def test_a_trial_that_reached_the_target_before_it_diverged_is_no_miss(make_study):
    study = make_study(confirm={"seeds": 1}, optimizers=["momentum_0.9"])
    textbook = study.search("momentum_0.9", 0.2)
    study.confirm("momentum_0.9", textbook, 1, [1.0, 0.4, 0.1], outcome="diverged")
    (found,) = compare_study(study.database, study.record).optimizers
    assert (found.divergence_rate, found.miss_rate) == (1.0, 0.0)
    assert found.steps_to_target == pytest.approx(100 * 0.5 / 0.6)


# The target


def test_an_automatic_target_is_the_references_median_best_and_5_percent_worse(make_study):
    study = make_study(target="auto", confirm={"seeds": 4})
    sgd, textbook = study.search("sgd", 0.1), study.search("momentum_0.9", 0.9)
    for seed, best in enumerate([0.30, 0.20, 0.24, 0.50]):
        study.confirm("momentum_0.9", textbook, seed, [1.0, best, best + 0.1])
        study.confirm("sgd", sgd, seed, [1.0, 0.9, best])
    found = compare_study(study.database, study.record)
    assert found.target == pytest.approx(1.05 * 0.27)
    assert contestants(found)["momentum_0.9"].miss_rate == 0.5
    assert any("momentum_0.9 itself misses the target in 2 of 4 seeds" in note for note in found.notes)


def test_a_diverged_seed_of_the_reference_counts_with_the_best_it_reached(make_study):
    study = make_study(target="auto", confirm={"seeds": 3}, optimizers=["momentum_0.9"])
    textbook = study.search("momentum_0.9", 0.9)
    study.confirm("momentum_0.9", textbook, 1, [1.0, 0.4])
    study.confirm("momentum_0.9", textbook, 2, [1.0, 0.2])
    study.confirm("momentum_0.9", textbook, 3, [1.0, 0.3, 0.001], outcome="diverged")
    assert compare_study(study.database, study.record).target == pytest.approx(1.05 * 0.3)


def test_a_metric_of_the_task_is_the_target_where_it_is_the_objective(make_study):
    study = make_study(
        target="auto", confirm={"seeds": 2}, objective={"metric": "valid_accuracy", "direction": "maximize"}
    )
    sgd, textbook = study.search("sgd", 0.97), study.search("momentum_0.9", 0.96)
    for seed in (1, 2):
        study.confirm("momentum_0.9", textbook, seed, [1.0, 0.9, 0.8], accuracies=[0.1, 0.8, 0.7 + 0.1 * seed])
        study.confirm("sgd", sgd, seed, [1.0, 0.9, 0.8], accuracies=[0.1, 0.5, 1.0])
    found = compare_study(study.database, study.record)
    assert (found.target_metric, found.maximize) == ("valid_accuracy", True)
    target = 0.95 * 0.85
    assert found.target == pytest.approx(target)
    assert contestants(found)["sgd"].steps_to_target == pytest.approx(100 + 100 * (target - 0.5) / 0.5)


def test_any_other_objective_has_the_validation_loss_as_its_target(make_study):
    study = make_study(objective={"metric": "mean_valid_loss", "direction": "minimize"})
    found = compare_study(study.database, study.record)
    assert (found.target_metric, found.maximize) == ("valid_loss", False)


def test_a_negative_loss_has_its_target_above_it(make_study):
    study = make_study(target="auto", confirm={"seeds": 1}, optimizers=["momentum_0.9"])
    study.confirm("momentum_0.9", study.search("momentum_0.9", -2.0), 1, [1.0, -2.0])
    assert compare_study(study.database, study.record).target == pytest.approx(-1.9)


def test_a_target_that_an_untrained_model_reaches_is_noted(make_study):
    study = make_study(target=2.0, confirm={"seeds": 1}, optimizers=["momentum_0.9"])
    study.reach("momentum_0.9", study.search("momentum_0.9", 0.2), {1: 300.0})
    found = compare_study(study.database, study.record)
    assert found.optimizers[0].steps_to_target == 1.0
    assert any("untrained model" in note for note in found.notes)


# Which trials count


def test_after_a_study_grew_only_trials_of_the_present_best_setting_count(make_study, database):
    study = make_study(database, confirm={"seeds": 2})
    textbook = study.search("momentum_0.9", 0.5)
    old = study.search("sgd", 0.4, learning_rate=0.1)
    study.reach("momentum_0.9", textbook, {1: 300.0, 2: 300.0})
    study.reach("sgd", old, {1: 100.0, 2: 100.0})
    assert contestants(compare_study(database, study.record))["sgd"].steps_to_target == pytest.approx(100.0)
    new = study.search("sgd", 0.3, learning_rate=0.2)
    found = compare_study(database, study.record)
    assert contestants(found)["sgd"].seeds == 0
    assert contestants(found)["sgd"].steps_to_target is None
    assert found.pairs == ()
    assert "the confirmation is not over: 2 of 4 trials have ended" in found.notes
    study.reach("sgd", {**new, "learning_rate": 0.2 * (1 + 1e-15)}, {1: 600.0, 2: 600.0})
    found = compare_study(database, study.record)
    assert contestants(found)["sgd"].steps_to_target == pytest.approx(600.0)
    assert contestants(found)["sgd"].learning_rate == 0.2
    assert found.pairs[0].speed_ratio == pytest.approx(0.5)


@pytest.mark.parametrize("change", [{"learning_rate": 0.1001}, {"batch_size": 32}, {"extra": 1.0}])
def test_a_setting_that_differs_in_anything_is_another(make_study, change):
    study = make_study(optimizers=["momentum_0.9"])
    textbook = study.search("momentum_0.9", 0.2, learning_rate=0.1)
    study.reach("momentum_0.9", {**textbook, **change}, {1: 300.0})
    (found,) = compare_study(study.database, study.record).optimizers
    assert found.seeds == 0


def test_failed_and_unfinished_confirmation_trials_are_left_out_and_noted(make_study):
    study = make_study(confirm={"seeds": 4}, optimizers=["momentum_0.9"])
    textbook = study.search("momentum_0.9", 0.2)
    study.reach("momentum_0.9", textbook, {1: 300.0, 2: 300.0, 3: 900.0})
    study.confirm("momentum_0.9", textbook, 4, [1.0], outcome="failed")
    with study.database.write() as session:
        session.execute(sa.update(Ticket).where(Ticket.seed == 3).values(state="finishing"))
    found = compare_study(study.database, study.record)
    assert (found.optimizers[0].seeds, found.optimizers[0].steps_to_target) == (2, pytest.approx(300.0))
    assert "momentum_0.9: 1 of its 4 confirmation trials failed, and are left out" in found.notes
    assert "the confirmation is not over: 3 of 4 trials have ended" in found.notes


def test_the_reference_has_a_search_of_its_own_where_the_study_does_not_name_it(make_study, database):
    study = make_study(database, optimizers=["sgd"], confirm={"seeds": 1})
    assert study.spec.contestants == ("sgd", "momentum_0.9")
    sgd, textbook = study.search("sgd", 0.3), study.search("momentum_0.9", 0.2, learning_rate=0.07)
    assert [b.optimizer for b in best_settings(database, study.record)] == ["sgd"]
    both = best_settings(database, study.record, contestants=True)
    assert [(b.optimizer, b.objective) for b in both] == [("momentum_0.9", 0.2), ("sgd", 0.3)]
    study.reach("sgd", sgd, {1: 400.0})
    study.reach("momentum_0.9", textbook, {1: 300.0})
    found = compare_study(database, study.record)
    assert [(c.optimizer, c.learning_rate, c.momentum) for c in found.optimizers] == [
        ("momentum_0.9", 0.07, 0.9),
        ("sgd", 0.1, 0.0),
    ]


def test_momentum_fixed_to_0_9_is_its_own_reference(make_study):
    study = make_study(optimizers=["sgd", "momentum"], space={"momentum": 0.9}, target="auto", confirm={"seeds": 1})
    settings = study.search("momentum", 0.2, momentum=0.9)
    study.confirm("momentum", settings, 1, [1.0, 0.2])
    found = compare_study(study.database, study.record)
    assert (found.reference, found.target) == ("momentum", pytest.approx(0.21))


# Phases


def test_a_study_that_has_just_begun_has_only_notes(make_study, database):
    study = make_study(database, phase="search", target="auto", budget={"trials": 3, "epochs": 10})
    study.search("sgd", 0.5, outcome="pruned")
    found = compare_study(database, study.record)
    assert (found.phase, found.optimizers, found.pairs, found.target) == ("search", (), (), None)
    assert found.budget == {"trials": 3, "epochs": 10, "seeds": 10}
    assert found.notes == (
        "the search is not over: 1 of 6 trials have ended",
        "sgd has no completed trial, and is not compared",
        "momentum_0.9 has no completed trial, and is not compared",
    )
    json.dumps(found.flat(), allow_nan=False)


def test_before_the_confirmation_the_settings_are_there_in_the_order_of_the_search(make_study):
    study = make_study(target="auto", phase="confirm")
    study.search("sgd", 0.3)
    study.search("momentum_0.9", 0.2)
    found = compare_study(study.database, study.record)
    assert [(c.optimizer, c.seeds, c.steps_to_target) for c in found.optimizers] == [
        ("momentum_0.9", 0, None),
        ("sgd", 0, None),
    ]
    assert (found.target, found.pairs) == (None, ())
    assert "no confirmation trial has ended yet, so there is no verdict yet" in found.notes


def test_while_the_reference_has_no_result_there_is_no_automatic_target(make_study):
    study = make_study(target="auto", phase="confirm")
    study.search("momentum_0.9", 0.2)
    study.reach("sgd", study.search("sgd", 0.3), {1: 300.0, 2: 300.0})
    found = compare_study(study.database, study.record)
    assert (found.target, found.pairs) == (None, ())
    assert contestants(found)["sgd"].best_valid_loss is not None
    assert contestants(found)["sgd"].miss_rate is None
    assert any(note.startswith("there is no target yet") for note in found.notes)


def test_a_study_without_confirmation_has_no_verdict(make_study):
    study = make_study(confirm={"seeds": 0}, optimizers=["sgd", "nesterov"], target="auto")
    study.search("sgd", 0.3)
    study.search("nesterov", 0.4, momentum=0.5)
    found = compare_study(study.database, study.record)
    assert found.reference is None
    assert [c.optimizer for c in found.optimizers] == ["sgd", "nesterov"]
    assert found.pairs == ()
    assert any("confirms nothing" in note for note in found.notes)


def test_a_contestant_without_a_completed_trial_is_left_out_and_the_others_are_compared(make_study):
    study = make_study(optimizers=["sgd", "nesterov", "momentum_0.9"], confirm={"seeds": 1})
    study.search("nesterov", 1.0, momentum=0.5, outcome="diverged")
    study.search("nesterov", None, momentum=0.5, outcome="failed")
    study.reach("sgd", study.search("sgd", 0.3), {1: 300.0})
    study.reach("momentum_0.9", study.search("momentum_0.9", 0.3), {1: 200.0})
    found = compare_study(study.database, study.record)
    assert [(p.a, p.b) for p in found.pairs] == [("momentum_0.9", "sgd")]
    assert "nesterov has no completed trial, and is not compared" in found.notes
    assert "nesterov: 1 of its 1 search trials failed" in found.notes


def test_the_phase_is_that_of_the_database_now(make_study):
    study = make_study(phase="search")
    before = study.record
    with study.database.write() as session:
        session.execute(sa.update(Study).values(phase="done"))
    assert compare_study(study.database, before).phase == "done"


def test_different_batch_sizes_are_compared_in_epochs_and_each_misses_at_twice_its_own_budget(make_study):
    study = make_study(confirm={"seeds": 1})
    sgd = study.search("sgd", 0.3, batch_size=32)
    study.reach("sgd", sgd, {1: None})
    study.reach("momentum_0.9", study.search("momentum_0.9", 0.3, batch_size=64), {1: None})
    found = compare_study(study.database, study.record)
    assert found.unit == "epochs"
    assert {c.optimizer: (c.budget_steps, c.steps_to_target, c.epochs_to_target) for c in found.optimizers} == {
        "sgd": (2000, pytest.approx(4000.0), pytest.approx(20.0)),
        "momentum_0.9": (1000, pytest.approx(2000.0), pytest.approx(20.0)),
    }
    assert found.pairs[0].verdict == "no difference shown with 1 seed"
    assert (
        "a step is not the same work for all: their best batch sizes are 32 (sgd), 64 (momentum_0.9), so speed is "
        "compared in epochs"
    ) in found.notes


def test_with_large_batches_missing_the_target_is_not_faster_than_reaching_it_with_small_ones(make_study):
    study = make_study(budget={"trials": 1, "epochs": 4}, confirm={"seeds": 6})
    small = dict(enumerate([440.0, 480.0, 670.0, 330.0, 660.0, 440.0]))  # of 1,600 steps
    large = dict(enumerate([None, 80.0, None, 81.0, 126.0, 197.0]))  # of 200
    study.reach("sgd", study.search("sgd", 0.3, batch_size=16), small)
    study.reach("momentum_0.9", study.search("momentum_0.9", 0.3, batch_size=128), large)
    found = compare_study(study.database, study.record)
    assert [c.optimizer for c in found.optimizers] == ["sgd", "momentum_0.9"]
    first, second = found.optimizers
    assert (found.to_target(first), found.to_target(second)) == (first.epochs_to_target, second.epochs_to_target)
    assert first.epochs_to_target == pytest.approx(geometric_mean([s / 400 for s in small.values()]))
    assert second.epochs_to_target == pytest.approx(geometric_mean([8, 1.6, 8, 1.62, 2.52, 3.94]))
    (pair,) = found.pairs
    assert (pair.a, pair.speed_ratio) == ("sgd", pytest.approx(first.epochs_to_target / second.epochs_to_target))
    factors = {line.optimizer: line.factors["digits-mlp"] for line in performance_profile([found]).lines}
    assert factors == {"sgd": 1.0, "momentum_0.9": pytest.approx(1.0 / pair.speed_ratio)}


def test_a_target_that_all_untrained_models_reach_is_a_tie_whatever_the_batch_size(make_study):
    study = make_study(target=2.0, confirm={"seeds": 2})
    study.reach("sgd", study.search("sgd", 0.3, batch_size=16), {1: 300.0, 2: 400.0})
    study.reach("momentum_0.9", study.search("momentum_0.9", 0.3), {1: 200.0, 2: 300.0})
    (pair,) = compare_study(study.database, study.record).pairs
    assert pair.speed_ratio == 1.0


def test_equal_budgets_are_compared_in_steps_also_where_the_batch_sizes_are_searched(make_study):
    study = make_study(confirm={"seeds": 2})
    study.reach("sgd", study.search("sgd", 0.3, batch_size=32), {1: 300.0, 2: 500.0})
    study.reach("momentum_0.9", study.search("momentum_0.9", 0.3, batch_size=32), {1: 200.0, 2: 400.0})
    found = compare_study(study.database, study.record)
    assert (found.unit, found.budget["steps"]) == ("steps", 2000)
    assert [found.to_target(c) for c in found.optimizers] == [c.steps_to_target for c in found.optimizers]
    assert found.optimizers[0].epochs_to_target == pytest.approx(geometric_mean([200, 400]) / 200)
    assert not any("epochs" in note for note in found.notes)


def test_trials_on_other_data_are_noted_before_all_else(make_study, sqlite_database):
    study = make_study()
    for digest in ("abc", "abc"):
        note_data(sqlite_database, study.record.id, {"name": "digits", "digest": digest})
    assert not any("same data" in note for note in compare_study(sqlite_database, study.record).notes)
    note_data(sqlite_database, study.record.id, {"name": "digits", "digest": "def"})
    first, *_ = compare_study(sqlite_database, study.record).notes
    assert first.startswith("not all trials learned from the same data (digests abc, def)")


def test_seeds_that_all_give_the_same_are_noted(make_study):
    study = make_study()
    study.reach("momentum_0.9", study.search("momentum_0.9", 0.3), dict.fromkeys(SEEDS, 250.0))
    sgd = study.search("sgd", 0.3)
    for seed in SEEDS:
        study.confirm("sgd", sgd, seed, [1.0 + 0.01 * seed, 0.9, None], outcome="diverged")
    notes = compare_study(study.database, study.record).notes
    assert [note for note in notes if "same result" in note] == [
        "momentum_0.9: all seeds gave the same result, so they count as no more than one"
    ]
