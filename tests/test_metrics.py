"""The formulas of METRICS.md, each against a direct computation that shares no code with metrics.py."""

import math
from dataclasses import replace

import numpy as np
import pytest

from momentum_tuner.metrics import (
    EpochRecord,
    SpikeState,
    StepTable,
    contraction,
    count_spikes,
    divergence_limit,
    finite,
    mean_or_none,
    objective_value,
    stability_bound,
    stability_margin,
    steps_to_target,
    summarize_steps,
    trial_measures,
)


def epochs(*valid_losses, steps=10, **changes):
    """Records of a trial with these validation losses, the untrained model's first."""
    return [EpochRecord(epoch=i, step=i * steps, valid_loss=v, **changes) for i, v in enumerate(valid_losses)]


# --- spikes


def spike_steps(losses):
    """The steps, counted from 1, that are spikes: means by explicit weights over all steps before."""
    keep = 1 - 1 / 50
    deviations, found = {}, []
    for t in range(2, len(losses) + 1):
        before = np.arange(1, t)
        weights = keep ** (t - 1 - before)
        mean = np.dot(weights, losses[: t - 1]) / weights.sum()
        excess = losses[t - 1] - mean
        if t >= 50:
            earlier = np.arange(2, t)
            weights = keep ** (t - 1 - earlier)
            deviation = np.dot(weights, [deviations[s] for s in earlier]) / weights.sum()
            if excess > 6 * deviation:
                found.append(t)
        deviations[t] = abs(excess)
    return found


def noisy_losses(steps=400):
    losses = np.exp(-np.arange(400) / 150) + 0.05 * np.random.default_rng(0).standard_normal(400)
    losses[[10, 47, 49, 120, 121, 300]] += [0.7, 0.9, 1.8, 2.2, 2.2, 1.8]
    return losses[:steps]


def test_spikes_are_the_steps_beyond_six_trailing_mean_absolute_deviations():
    losses = noisy_losses()
    expected = spike_steps(losses)
    assert expected == [50, 121, 122, 301]  # those at step 11 and 48 stand out too, but before step 50
    assert count_spikes(losses, 1, SpikeState())[0] == len(expected)
    for upto in (49, 50, 120, 121, 122, 300, 301):
        assert count_spikes(losses[:upto], 1, SpikeState())[0] == sum(step <= upto for step in expected)


@pytest.mark.parametrize("cut", [1, 2, 49, 50, 120, 121, 399])
def test_the_trailing_means_are_carried_from_epoch_to_epoch(cut):
    losses = noisy_losses()
    whole, end = count_spikes(losses, 1, SpikeState())
    first, state = count_spikes(losses[:cut], 1, SpikeState())
    second, joined = count_spikes(losses[cut:], cut + 1, state)
    assert first + second == whole == 4
    assert joined == end
    # A trial that forgot the epoch before would count other steps.
    assert count_spikes(losses[121:122], 122, SpikeState())[0] == 0


def test_the_trailing_means_are_exponential_with_a_horizon_of_50_and_not_biased_by_their_start():
    losses = noisy_losses(80)
    _, state = count_spikes(losses, 1, SpikeState())
    weights = 0.98 ** np.arange(79, -1, -1)
    assert state.mean / state.weight == pytest.approx(np.dot(weights, losses) / weights.sum(), rel=1e-12)
    assert count_spikes(np.full(60, 7.0), 1, SpikeState())[1].deviation == pytest.approx(0.0, abs=1e-12)


def test_a_spike_needs_more_than_six_deviations():
    losses = np.where(np.arange(200) % 2 == 0, 1.0, -1.0)
    _, state = count_spikes(losses, 1, SpikeState())
    mean, deviation = state.mean / state.weight, state.deviation / state.deviation_weight
    for factor, spikes in ((5.999, 0), (6.001, 1), (-6.001, 0)):
        assert count_spikes(np.array([mean + factor * deviation]), 201, state)[0] == spikes


@pytest.mark.parametrize("loss", [0.5400112271308899, 0.5349120497703552, -0.5400112271308899])
def test_a_constant_loss_has_no_spikes(loss):
    """Of these losses the trailing mean is off by a rounding, while its mean deviation decays to nothing."""
    losses = np.full(1000, loss)
    assert count_spikes(losses, 1, SpikeState())[0] == 0
    losses[900] += 1e-9
    assert count_spikes(losses, 1, SpikeState())[0] == 1


def test_an_epoch_without_steps_leaves_the_means_alone():
    state = SpikeState(0.5, 1.0, 0.25, 0.125)
    assert count_spikes(np.empty(0), 30, state) == (0, state)


# --- one epoch's steps


def table(steps=7, slots=3, seed=0):
    rng = np.random.default_rng(seed)
    loss, norm, ratio, update = (rng.random((steps, slots)) for _ in range(4))
    return StepTable(loss, norm, ratio, update, rng.standard_normal((steps, slots)))


def test_an_epoch_is_summed_up_over_the_steps_that_each_slot_took():
    t = table(slots=6)
    taken = np.array([7, 4, 7, 1, 0, 7])
    found = summarize_steps(t, taken)
    for slot, steps in enumerate(taken.tolist()):
        rows = range(steps)
        assert found[slot] == pytest.approx(
            {
                "train_loss": sum(t.loss[i][slot] for i in rows) / steps,
                "grad_norm": sum(t.grad_norm[i][slot] for i in rows) / steps,
                "grad_norm_max": max(t.grad_norm[i][slot] for i in rows),
                "layer_grad_ratio": sum(t.layer_grad_ratio[i][slot] for i in rows) / steps,
                "update_norm": sum(t.update_norm[i][slot] for i in rows) / steps,
                "oscillation": len([i for i in rows if t.update_dot[i][slot] < 0]) / steps,
            }
            if steps
            else {},
            rel=1e-12,
        )


@pytest.mark.parametrize("steps", [1, 7, 22, 200])
def test_what_an_epoch_comes_to_does_not_depend_on_the_other_slots(steps):
    t = table(steps, 9)
    names = ("loss", "grad_norm", "layer_grad_ratio", "update_norm", "update_dot")
    together = summarize_steps(t, np.array([steps] * 8 + [steps // 2]))
    for slot in range(8):
        alone = StepTable(*(np.ascontiguousarray(getattr(t, name)[:, [slot]]) for name in names))
        assert summarize_steps(alone, np.array([steps])) == [together[slot]]


def test_oscillation_counts_negative_products_only():
    dots = np.array([[0.0], [-1e-300], [2.0], [-3.0], [0.0]])
    t = replace(table(5, 1), update_dot=dots)
    assert summarize_steps(t, np.array([5]))[0]["oscillation"] == 2 / 5
    assert summarize_steps(t, np.array([1]))[0]["oscillation"] == 0.0


def test_what_is_not_finite_is_missing_and_does_not_warn():
    t = table(2, 2)
    broken = replace(t, grad_norm=np.array([[1.0, 1.0], [np.inf, 1.0]]), update_norm=np.array([[np.nan, 1.0]] * 2))
    found, other = summarize_steps(broken, np.array([2, 2]))
    assert found["grad_norm"] is None and found["grad_norm_max"] is None and found["update_norm"] is None
    assert found["train_loss"] == pytest.approx(t.loss[:, 0].mean())
    assert other["grad_norm"] == 1.0


def test_a_mean_of_nothing_is_missing():
    assert mean_or_none(np.empty(0)) is None
    assert mean_or_none(np.array([1.0, 2.0, 6.0])) == 3.0
    assert [finite(v) for v in (1.5, math.inf, -math.inf, math.nan, None)] == [1.5, None, None, None, None]


# --- divergence


@pytest.mark.parametrize(("initial", "limit"), [(2.0, 20.0), (0.5, 5.0), (0.0, 0.0), (-2.0, 16.0)])
def test_a_loss_is_diverged_above_ten_times_the_initial_one(initial, limit):
    assert divergence_limit(initial) == pytest.approx(limit)


# --- records


def test_a_record_gives_its_measures_and_the_tasks_metrics_by_name():
    record = EpochRecord(epoch=3, step=30, valid_loss=0.5, grad_norm=2.0, metrics={"accuracy": 0.9, "step": 7.0})
    assert record.value("valid_loss") == 0.5
    assert record.value("grad_norm") == 2.0
    assert record.value("spikes") is None
    assert record.value("valid_accuracy") == record.value("accuracy") == 0.9
    assert record.value("valid_step") == 7.0
    assert record.value("valid_f1") is None


# --- steps to target


def test_steps_to_target_are_interpolated_between_the_two_evaluations_around_it():
    records = epochs(3.0, 2.0, 1.0, 0.5)
    assert steps_to_target(records, 1.25) == pytest.approx(10 + 10 * (2.0 - 1.25) / (2.0 - 1.0))
    assert steps_to_target(records, 2.9) == pytest.approx(1.0)
    assert steps_to_target(records, 0.75) == pytest.approx(25.0)


def test_a_target_met_exactly_is_reached_at_that_evaluation():
    assert steps_to_target(epochs(3.0, 2.0, 1.0), 2.0) == 10.0
    assert steps_to_target(epochs(3.0, 2.0, 1.0), 1.0) == 20.0
    assert steps_to_target(epochs(3.0, 2.0, 1.0), 3.0) == 0.0


def test_the_first_time_counts_even_if_the_loss_rises_again():
    assert steps_to_target(epochs(3.0, 1.0, 4.0, 0.5), 2.0) == pytest.approx(5.0)


def test_a_target_that_is_never_reached_is_missing():
    assert steps_to_target(epochs(3.0, 2.0, 1.0), 0.999) is None
    assert steps_to_target([], 1.0) is None


def test_evaluations_without_a_value_are_passed_over():
    assert steps_to_target(epochs(3.0, None, 1.0), 2.0) == pytest.approx(10.0)
    assert steps_to_target(epochs(None, 1.0), 2.0) == 10.0


def test_epochs_of_any_length_are_interpolated_by_their_steps():
    records = [EpochRecord(0, 0, valid_loss=4.0), EpochRecord(1, 7, valid_loss=3.0), EpochRecord(2, 27, valid_loss=1.0)]
    assert steps_to_target(records, 2.5) == pytest.approx(7 + 20 * 0.25)


def test_a_metric_to_maximize_reaches_its_target_from_below():
    records = [EpochRecord(i, 10 * i, metrics={"accuracy": a}) for i, a in enumerate([0.1, 0.5, 0.9])]
    assert steps_to_target(records, 0.6, "valid_accuracy", maximize=True) == pytest.approx(12.5)
    assert steps_to_target(records, 0.95, "valid_accuracy", maximize=True) is None


def test_the_model_of_an_epoch_in_which_the_trial_diverged_reaches_nothing():
    records = [*epochs(3.0, 2.0), EpochRecord(2, 14, valid_loss=0.1, diverged_at_step=14)]
    assert steps_to_target(records, 1.0) is None


# --- contraction


def distances(*values, steps=10):
    return [EpochRecord(i, i * steps, valid_loss=1.0, distance=d) for i, d in enumerate(values)]


def test_contraction_is_the_rate_per_step_over_the_second_half():
    values = [1.0, 5.0, 2.0, 0.3, 0.02]  # a transient first
    assert contraction(distances(*values)) == pytest.approx((0.02 / 2.0) ** (1 / 20), rel=1e-12)


def test_contraction_of_a_pure_rate_is_that_rate():
    assert contraction(distances(*(0.9 ** (7 * i) for i in range(9)), steps=7)) == pytest.approx(0.9, rel=1e-12)


def test_the_half_is_the_last_record_at_or_before_it():
    assert contraction(distances(8.0, 4.0, 1.0, 0.5)) == pytest.approx((0.5 / 4.0) ** (1 / 20), rel=1e-12)
    assert contraction(distances(8.0, 4.0)) == pytest.approx(0.5 ** (1 / 10), rel=1e-12)


def test_contraction_is_missing_without_an_optimum_or_a_step():
    assert contraction(epochs(3.0, 2.0, 1.0)) is None
    assert contraction(distances(1.0)) is None
    assert contraction(distances(0.0, 0.0)) is None


def test_contraction_is_that_of_the_steps_before_the_optimum_is_reached():
    assert contraction(distances(8.0, 4.0, 1.0, 0.5, 0.0, 0.0, 0.1, 0.0)) == contraction(distances(8.0, 4.0, 1.0, 0.5))
    assert contraction(distances(8.0, 4.0, 0.0)) == pytest.approx(0.5 ** (1 / 10), rel=1e-12)


def test_a_trial_that_is_at_the_optimum_after_an_epoch_contracts_to_nothing():
    assert contraction(distances(1.0, 0.0)) == 0.0
    assert contraction(distances(1.0, 0.0, 0.0)) == 0.0


# --- a trial


def full_trial():
    return [
        EpochRecord(0, 0, valid_loss=2.5, distance=4.0, metrics={"accuracy": 0.1}),
        EpochRecord(1, 10, 2.0, 1.5, 1.0, 3.0, 4.0, 0.1, 0.2, 1, 0.5, 2.0, {"accuracy": 0.5}),
        EpochRecord(2, 20, 1.0, 0.5, 1.0, 3.0, 8.0, 0.1, 0.4, 0, 0.25, 1.0, {"accuracy": 0.8}),
        EpochRecord(3, 30, 0.5, 0.7, 1.0, 3.0, 6.0, 0.1, 0.9, 2, 0.25, 0.5, {"accuracy": 0.9}),
    ]


def test_the_measures_of_a_trial_that_ran_its_budget():
    found = trial_measures(full_trial(), 3)
    assert found.best_valid_loss == 0.5 and found.final_valid_loss == 0.7
    assert found.mean_valid_loss == pytest.approx((1.5 + 0.5 + 0.7) / 3)
    assert found.train_loss == 0.5
    assert found.diverged is False and found.diverged_at_step is None
    assert found.contraction == pytest.approx((0.5 / 2.0) ** (1 / 20))
    assert found.oscillation == pytest.approx((0.2 + 0.4 + 0.9) / 3)
    assert found.spikes == 3
    assert found.layer_grad_ratio == pytest.approx(6.0)
    assert found.initial_valid_loss == 2.5
    assert found.best_metrics == {"accuracy": 0.8}  # of the model with the best validation loss
    assert found.final_metrics == {"accuracy": 0.9} and found.initial_metrics == {"accuracy": 0.1}
    assert (found.epochs, found.steps, found.seconds) == (3, 30, 1.0)


def test_a_diverged_trials_missing_epochs_count_as_its_initial_loss():
    stopped = EpochRecord(3, 24, 90.0, 0.1, oscillation=1.0, diverged_at_step=24, metrics={"accuracy": 1.0})
    found = trial_measures([*full_trial()[:3], stopped], 5)
    assert found.mean_valid_loss == pytest.approx((1.5 + 0.5 + 3 * 2.5) / 5)
    assert found.best_valid_loss == 0.5
    assert found.final_valid_loss is None and found.train_loss is None and found.contraction is None
    assert found.diverged and found.diverged_at_step == 24 and found.steps == 24
    assert found.final_metrics == {} and found.best_metrics == {"accuracy": 0.8}


def test_a_trial_that_diverges_in_its_first_epoch_counts_as_the_untrained_model():
    found = trial_measures([full_trial()[0], EpochRecord(1, 1, diverged_at_step=1)], 4)
    assert found.mean_valid_loss == 2.5
    assert found.best_valid_loss is None and found.oscillation is None and found.layer_grad_ratio is None
    assert found.best_metrics == {} and found.spikes == 0


def test_a_pruned_trial_has_no_mean_over_the_budget():
    found = trial_measures(full_trial()[:3], 3)
    assert found.mean_valid_loss is None
    assert found.final_valid_loss == 0.5 and found.best_valid_loss == 0.5 and not found.diverged


def test_a_trials_oscillation_is_over_its_steps_and_not_its_epochs():
    stopped = EpochRecord(2, 13, valid_loss=9.0, oscillation=1.0, diverged_at_step=13)  # steps 11, 12; step 13 failed
    records = [EpochRecord(0, 0), EpochRecord(1, 10, valid_loss=1.0, oscillation=0.2), stopped]
    assert trial_measures(records, 2).oscillation == pytest.approx((0.2 * 10 + 1.0 * 2) / 12)


def test_records_that_do_not_start_with_the_untrained_model_are_refused():
    for records in ([], full_trial()[1:]):
        with pytest.raises(ValueError, match="start with epoch 0"):
            trial_measures(records, 3)


# --- objective


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("valid_loss", 0.5),
        ("best_valid_loss", 0.5),
        ("final_valid_loss", 0.7),
        ("mean_valid_loss", 0.9),
        ("train_loss", 0.5),
        ("contraction", 0.25 ** (1 / 20)),
        ("valid_accuracy", 0.8),
        ("accuracy", 0.8),
        ("valid_f1", None),
    ],
)
def test_optuna_is_told_the_objective_of_a_whole_trial(metric, value):
    assert objective_value(trial_measures(full_trial(), 3), metric, 30) == pytest.approx(value)


def test_steps_of_larger_batches_count_as_the_work_they_are():
    reached = replace(trial_measures(full_trial(), 3), steps_to_target=20.0)
    missed = replace(reached, steps_to_target=None)
    assert objective_value(reached, "steps_to_target", 30) == 20.0
    assert objective_value(missed, "steps_to_target", 30) == 60.0
    assert objective_value(reached, "steps_to_target", 30, 240) == 160.0
    assert objective_value(missed, "steps_to_target", 30, 240) == 480.0
    assert objective_value(replace(reached, diverged=True), "steps_to_target", 30, 240) == 480.0


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("valid_loss", 2.5),
        ("best_valid_loss", 2.5),
        ("final_valid_loss", 2.5),
        ("mean_valid_loss", 2.5),
        ("train_loss", 2.5),
        ("contraction", 1.0),
        ("valid_accuracy", 0.1),
    ],
)
def test_a_diverged_trial_is_worth_what_the_untrained_model_was(metric, value):
    records = [*full_trial()[:3], EpochRecord(3, 24, diverged_at_step=24)]
    assert objective_value(trial_measures(records, 5), metric, 50) == value


# --- stability


def radius(rate, beta, nesterov):
    """Spectral radius of a step on `theta^2 / 2` as a map of (theta, velocity)."""
    look = beta if nesterov else 0.0
    # velocity' = beta velocity + theta;  theta' = theta - rate (velocity', or theta + beta velocity')
    own = 1.0 - rate * (1.0 + look if nesterov else 1.0)
    other = -rate * (look * beta if nesterov else beta)
    return max(abs(np.linalg.eigvals([[own, other], [1.0, beta]])))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.9, 0.99])
def test_the_stability_bound_is_where_the_spectral_radius_is_1(beta, nesterov):
    bound = stability_bound(beta, nesterov)
    assert radius(0.9999 * bound, beta, nesterov) < 1.0 < radius(1.0001 * bound, beta, nesterov)


def test_the_stability_bounds_are_those_of_metrics_md():
    found = [stability_bound(beta, nesterov) for beta in (0.0, 0.5, 0.9) for nesterov in (False, True)]
    assert [round(bound, 4) for bound in found] == [2.0, 2.0, 3.0, 1.5, 3.8, 1.3571]


@pytest.mark.parametrize(
    ("optimizer", "momentum", "dampening", "expected"),
    [
        ("sgd", 0.0, 0.0, 0.5),
        ("momentum", 0.5, 0.0, 1 / 3),
        ("momentum", 0.5, 0.25, 0.25),
        ("momentum", 0.0, 0.25, 0.5),  # torch does not dampen plain SGD
        ("momentum_0.9", 0.9, 0.0, 1 / 3.8),
        ("momentum_classic", 0.9, 0.0, 1 / 3.8),
        ("nesterov", 0.9, 0.0, 2.8 / 3.8),
        ("nesterov_lookahead", 0.9, 0.0, 2.8 / 3.8),
        ("adam", 0.0, 0.0, None),
        ("adamw", 0.0, 0.0, None),
        ("rmsprop", 0.0, 0.0, None),
    ],
)
def test_the_stability_margin_is_of_the_optimizers_own_bound(optimizer, momentum, dampening, expected):
    found = stability_margin(optimizer, 0.1, momentum, 10.0, dampening)
    assert found == (None if expected is None else pytest.approx(expected))


def test_momentum_with_dampening_is_stable_up_to_a_margin_of_1():
    beta, dampening = 0.8, 0.3
    for margin, stable in ((0.999, True), (1.001, False)):
        rate = margin / stability_margin("momentum", 1.0, beta, 1.0, dampening)
        theta, velocity = 1.0, 1.0
        for _ in range(20_000):
            velocity = beta * velocity + (1 - dampening) * theta
            theta -= rate * velocity
        assert (abs(theta) < 1.0) is stable
