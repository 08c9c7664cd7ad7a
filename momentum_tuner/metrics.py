"""Convergence and stability measures, exactly as METRICS.md defines them, as pure functions over NumPy arrays.

The trainer records a few numbers per step and slot (`StepTable`); everything else is derived here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from momentum_tuner.catalog import OPTIMIZERS

Array = NDArray[np.float64]

SPIKE_HORIZON = 50
SPIKE_DEVIATIONS = 6.0
SPIKE_ROUNDING = 1e-12
DIVERGENCE_FACTOR = 10.0


@dataclass(frozen=True)
class StepTable:
    """What the trainer records of each step of one epoch; every array is `[steps, slots]`.

    Attributes:
        loss: minibatch loss before the update.
        grad_norm: global L2 norm of the minibatch gradient.
        layer_grad_ratio: largest over smallest per-tensor RMS gradient.
        update_norm: L2 norm of u_t.
        update_dot: <u_t, u_{t-1}>, zero on a trial's first step.
    """

    loss: Array
    grad_norm: Array
    layer_grad_ratio: Array
    update_norm: Array
    update_dot: Array


@dataclass(frozen=True)
class EpochRecord:
    """One row of the table `epochs`: the state of a trial after an epoch (epoch 0: before training).

    Attributes:
        epoch: epochs done, 0 for the untrained model.
        step: optimizer steps done; in a diverged trial's last record the step at which it diverged.
        train_loss: mean minibatch loss over the epoch, before each update; where the gradient is taken, so at the
            looked-ahead point for `nesterov_lookahead`.
        valid_loss: loss on the whole validation set; None if it is not finite.
        grad_norm: mean over the epoch's steps of the gradient's global L2 norm.
        grad_norm_max: its maximum.
        layer_grad_ratio: largest over smallest per-tensor RMS gradient, mean over the epoch.
        update_norm: mean L2 norm of the update.
        oscillation: share of the epoch's steps with <u_t, u_{t-1}> < 0.
        spikes: steps whose loss stands out of its trailing mean, see `count_spikes`.
        seconds: wall time of the epoch divided by the slots that shared it.
        distance: L2 distance to the task's known optimum, where it names one.
        metrics: the task's own metrics on the validation set by name, without the prefix `valid_`.
        diverged_at_step: the step at which the trial diverged, if it did.
    """

    epoch: int
    step: int
    train_loss: float | None = None
    valid_loss: float | None = None
    grad_norm: float | None = None
    grad_norm_max: float | None = None
    layer_grad_ratio: float | None = None
    update_norm: float | None = None
    oscillation: float | None = None
    spikes: int | None = None
    seconds: float | None = None
    distance: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    diverged_at_step: int | None = None

    def value(self, metric: str) -> float | None:
        """The measure called `metric` (`valid_loss`, `valid_accuracy`, `grad_norm`, ...), None if missing."""
        if metric in _SCALARS:
            found: float | None = getattr(self, metric)
            return found
        return self.metrics.get(metric.removeprefix("valid_"))


_SCALARS = frozenset(f.name for f in fields(EpochRecord)) - {"metrics"}


@dataclass(frozen=True)
class SpikeState:
    """The trailing mean of one trial's loss and of its absolute deviation, carried from epoch to epoch.

    Attributes:
        weight: sum of the exponential weights so far; dividing by it removes the start's bias.
        mean: weighted sum of the losses.
        deviation_weight: as `weight`, for the deviations, which start one step later.
        deviation: weighted sum of the absolute deviations from the trailing mean.
    """

    weight: float = 0.0
    mean: float = 0.0
    deviation_weight: float = 0.0
    deviation: float = 0.0


def count_spikes(losses: Array, first_step: int, state: SpikeState) -> tuple[int, SpikeState]:
    """Count the steps whose loss exceeds the trailing mean by more than 6 trailing mean absolute deviations.

    Both are exponential means with a horizon of 50 steps over the steps before, corrected for their start;
    steps count from step 50 on. An excess of less than 1e-12 of the mean is the mean's own rounding.

    Args:
        losses: `[steps]`, one trial's minibatch losses, all finite.
        first_step: the number of the first of them, counted from 1.
        state: what the call for the steps before returned.
    """
    keep = 1.0 - 1.0 / SPIKE_HORIZON
    weight, mean = state.weight, state.mean
    deviation_weight, deviation = state.deviation_weight, state.deviation
    spikes = 0
    for step, loss in enumerate(losses.tolist(), start=first_step):
        if weight > 0.0:
            excess = loss - mean / weight
            if (
                step >= SPIKE_HORIZON
                and deviation_weight > 0.0
                and excess > SPIKE_DEVIATIONS * deviation / deviation_weight
                and excess > SPIKE_ROUNDING * abs(mean / weight)
            ):
                spikes += 1
            deviation = keep * deviation + (1.0 - keep) * abs(excess)
            deviation_weight = keep * deviation_weight + (1.0 - keep)
        mean = keep * mean + (1.0 - keep) * loss
        weight = keep * weight + (1.0 - keep)
    return spikes, SpikeState(weight, mean, deviation_weight, deviation)


def divergence_limit(initial_loss: float) -> float:
    """The loss above which a trial that began at `initial_loss` is diverged: 10x the initial loss.

    For an initial loss below zero, where ten times it would lie below, the same distance above it.
    """
    return initial_loss + (DIVERGENCE_FACTOR - 1.0) * abs(initial_loss)


def mean_or_none(values: Array) -> float | None:
    """Arithmetic mean of `[n]` values; None if there are none or it is not finite."""
    return finite(float(values.mean())) if values.size else None


def finite(value: float | None) -> float | None:
    """The value itself, or None if it is NaN, infinite or missing: what is not finite is not stored."""
    return value if value is not None and math.isfinite(value) else None


def summarize_steps(table: StepTable, taken: NDArray[np.int64]) -> list[dict[str, float | None]]:
    """The measures of each slot's epoch from the steps that it took (fewer than the epoch's if it diverged)."""
    names = ("loss", "grad_norm", "layer_grad_ratio", "update_norm", "update_dot")
    columns = [np.ascontiguousarray(getattr(table, name).T) for name in names]  # [slots, steps] each
    found: list[dict[str, float | None]] = [{} for _ in taken]
    with np.errstate(over="ignore", invalid="ignore"):
        for steps in np.unique(taken[taken > 0]).tolist():
            which = np.flatnonzero(taken == steps)
            loss, norm, ratio, update, dot = (column[which, :steps] for column in columns)
            means = (np.add.reduce(values, axis=1) / steps for values in (loss, norm, ratio, update))
            measures = [*means, norm.max(axis=1), np.count_nonzero(dot < 0, axis=1) / steps]
            for slot, values in zip(which.tolist(), np.stack(measures, axis=1).tolist(), strict=True):
                train_loss, grad_norm, ratio_mean, update_norm, largest, oscillation = map(finite, values)
                found[slot] = {
                    "train_loss": train_loss,
                    "grad_norm": grad_norm,
                    "grad_norm_max": largest,
                    "layer_grad_ratio": ratio_mean,
                    "update_norm": update_norm,
                    "oscillation": oscillation,
                }
    return found


@dataclass(frozen=True)
class TrialMeasures:
    """The measures of one trial, derived from its epoch records (METRICS.md, "Of one trial").

    `sharpness` and `stability_margin` are measured at the end of a trial that ran its budget, and added then.
    """

    best_valid_loss: float | None
    final_valid_loss: float | None
    mean_valid_loss: float | None
    train_loss: float | None
    diverged: bool
    diverged_at_step: int | None
    contraction: float | None
    steps_to_target: float | None
    oscillation: float | None
    spikes: int
    layer_grad_ratio: float | None
    best_metrics: Mapping[str, float]
    final_metrics: Mapping[str, float]
    initial_valid_loss: float | None
    initial_metrics: Mapping[str, float]
    epochs: int
    steps: int
    seconds: float
    sharpness: float | None = None
    stability_margin: float | None = None


@dataclass(frozen=True)
class Target:
    """The value that a measure of the validation set has to reach."""

    value: float
    metric: str = "valid_loss"
    maximize: bool = False


def trial_measures(records: Sequence[EpochRecord], budget_epochs: int, target: Target | None = None) -> TrialMeasures:
    """Derive a trial's measures from its records in order, the untrained epoch 0 first.

    A diverged trial's missing epochs count as its initial loss in `mean_valid_loss`; a trial that was pruned
    has none. The best of a metric is its value at the epoch of the best validation loss, so that the numbers
    shown together belong to one model.
    """
    if not records or records[0].epoch != 0:
        raise ValueError("records start with epoch 0, the untrained model")
    initial = records[0].valid_loss
    trained = records[1:]
    last = records[-1]
    diverged = last.diverged_at_step is not None
    usable = [r for r in trained if r.valid_loss is not None and r.diverged_at_step is None]
    losses = [r.valid_loss for r in usable if r.valid_loss is not None]
    best = min(usable, key=lambda r: r.valid_loss if r.valid_loss is not None else math.inf, default=None)
    mean = None
    if diverged and initial is not None:
        mean = (sum(losses) + initial * (budget_epochs - len(losses))) / budget_epochs
    elif len(losses) == budget_epochs:
        mean = sum(losses) / budget_epochs
    steps = [_measured_steps(r, before) for before, r in itertools.pairwise(records)]
    waves = [(r.oscillation, n) for r, n in zip(trained, steps, strict=True) if r.oscillation is not None]
    counted = sum(n for _, n in waves)
    return TrialMeasures(
        best_valid_loss=best.valid_loss if best else None,
        final_valid_loss=None if diverged else last.valid_loss,
        mean_valid_loss=mean,
        train_loss=None if diverged else last.train_loss,
        diverged=diverged,
        diverged_at_step=last.diverged_at_step,
        contraction=None if diverged else contraction(records),
        steps_to_target=steps_to_target(records, target.value, target.metric, target.maximize) if target else None,
        oscillation=sum(o * n for o, n in waves) / counted if counted else None,
        spikes=sum(r.spikes or 0 for r in trained),
        layer_grad_ratio=mean_or_none(
            np.array([r.layer_grad_ratio for r in trained if r.layer_grad_ratio is not None])
        ),
        best_metrics=dict(best.metrics) if best else {},
        final_metrics={} if diverged else dict(last.metrics),
        initial_valid_loss=initial,
        initial_metrics=dict(records[0].metrics),
        epochs=last.epoch,
        steps=last.step,
        seconds=sum(r.seconds or 0.0 for r in trained),
    )


def _measured_steps(record: EpochRecord, before: EpochRecord) -> int:
    """Steps that a record's means are over: without the one at which the loss stopped a diverged trial."""
    stopped = record.diverged_at_step is not None and record.valid_loss is not None
    return record.step - before.step - stopped


def contraction(records: Sequence[EpochRecord]) -> float | None:
    """(dist_T / dist_t0)^(1/(T - t0)) with t0 = T/2: the rate per step without the transient.

    T is the last record before the distance is 0, as it is where the numbers resolve it no more: a trial that gets
    there is among the best, and what comes after says nothing of its rate. t0 is the last record at or before half of
    those steps. None without a known optimum; 0 for a trial that is there after its first epoch.
    """
    resolved: list[tuple[int, float]] = []
    for record in records:
        if not record.distance:
            break
        resolved.append((record.step, record.distance))
    if len(resolved) < 2:
        return 0.0 if resolved and len(records) > 1 and records[1].distance == 0.0 else None
    step, distance = resolved[-1]
    start_step, start = [(s, d) for s, d in resolved if s <= step / 2][-1]
    return float((distance / start) ** (1.0 / (step - start_step)))


def stability_bound(beta: float, nesterov: bool) -> float:
    """Largest lr * curvature at which momentum does not diverge on a quadratic.

    2(1 + beta), and with Nesterov's gradient 2(1 + beta)/(1 + 2 beta): both are 2, that of plain SGD, at beta = 0. They
    hold for torch's form and, at a constant learning rate, for the textbook's and the look-ahead one, which follow the
    same recurrence then.

    Source: the roots of theta's recurrence, as in Cohen et al. 2021, "Gradient descent on neural networks typically
    occurs at the edge of stability", appendix B.
    """
    return 2.0 * (1.0 + beta) / (1.0 + 2.0 * beta) if nesterov else 2.0 * (1.0 + beta)


def stability_margin(
    optimizer: str, learning_rate: float, momentum: float, sharpness: float, dampening: float = 0.0
) -> float | None:
    """How close to its bound lr * sharpness is: above 1 a quadratic with that sharpness diverges (Cohen et al. 2021).

    Full-batch training drives it to 1 and keeps it there. With small minibatches the sharpness settles lower, near
    2(1 - beta)/lr: the number says how far training is from the edge, not how well it goes.

    Args:
        optimizer: a name of `catalog.OPTIMIZERS`.
        learning_rate: of the last step, with its schedule's factor.
        momentum: likewise; of no effect where the optimizer has none.
        sharpness: the largest curvature of what is minimized.
        dampening: of the gradient on its way into the velocity, which scales the learning rate by 1 - dampening.

    Returns:
        lr * sharpness / `stability_bound`; clipping of the gradient, which bounds what diverges, is not counted in.
        None for Adam, AdamW and RMSprop, whose step sizes differ from parameter to parameter, so that the sharpness
        alone does not bound them.
    """
    found = OPTIMIZERS[optimizer]
    if found.rule not in ("sgd", "momentum_classic", "nesterov_lookahead"):
        return None
    nesterov = found.rule == "nesterov_lookahead" or found.constants.get("nesterov") == 1.0
    effective = learning_rate * (1.0 - dampening) if momentum > 0.0 else learning_rate
    return effective * sharpness / stability_bound(momentum, nesterov)


def steps_to_target(
    records: Sequence[EpochRecord], target: float, metric: str = "valid_loss", maximize: bool = False
) -> float | None:
    """First step at which `metric` reaches `target`, linear between the two evaluations around it.

    None if it is never reached. Evaluations with a missing value are passed over, and so is a diverged trial's last
    one: its model was stopped in the middle of an epoch.
    """
    sign = -1.0 if maximize else 1.0
    before: tuple[float, float] | None = None
    for record in records:
        value = record.value(metric)
        if value is None or record.diverged_at_step is not None:
            continue
        gap = sign * (value - target)
        if gap <= 0.0:
            if before is None:
                return float(record.step)
            step, gap_before = before
            return step + (record.step - step) * gap_before / (gap_before - gap)
        before = (float(record.step), gap)
    return None


MISS_FACTOR = 2.0
"""A trial that never reaches the target counts as one that needs this many times its budget."""


def objective_value(
    measures: TrialMeasures, metric: str, budget_steps: int, common_steps: int | None = None
) -> float | None:
    """The value Optuna is told for a trial that ran its budget or diverged; None if there is none.

    `valid_loss` means the best over the epochs, any other `valid_<metric>` its value at that epoch. A diverged trial
    is worth what the untrained model was, so that the sampler learns from it and no ranking rewards it; its
    contraction and its oscillation are 1, it spikes at every step and never reaches a target. What has no upper bound
    (sharpness, the ratio of gradients) is missing then.

    Args:
        measures: of the trial.
        metric: an objective of a study file.
        budget_steps: optimizer steps of a whole trial.
        common_steps: of a trial of the study's smallest batch size, in which steps to target are counted: a step of a
            larger one is more work, and a trial that misses the target must not be worth more than one that reaches it.
    """
    if metric == "steps_to_target":
        common_steps = common_steps or budget_steps
        if measures.diverged or measures.steps_to_target is None:
            return MISS_FACTOR * common_steps
        return measures.steps_to_target * (common_steps / budget_steps)
    if measures.diverged:
        at_worst = {"contraction": 1.0, "oscillation": 1.0, "spikes": float(budget_steps)}
        if metric in LOSSES:
            return measures.initial_valid_loss
        return at_worst.get(metric, measures.initial_metrics.get(metric.removeprefix("valid_")))
    name = "best_valid_loss" if metric == "valid_loss" else metric
    if name in _MEASURES:
        value: float | None = getattr(measures, name)
        return value
    return measures.best_metrics.get(metric.removeprefix("valid_"))


_MEASURES = frozenset(f.name for f in fields(TrialMeasures))
LOSSES = frozenset({"valid_loss", "best_valid_loss", "final_valid_loss", "mean_valid_loss", "train_loss"})
"""The objectives that the untrained model's validation loss stands for where a trial diverged."""
