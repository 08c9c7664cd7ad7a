"""What the search trials tell of an optimizer: how wide its good learning rates lie, and where it diverges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from momentum_tuner.catalog import OPTIMIZERS
from momentum_tuner.comparison.confirmation import read_confirmation
from momentum_tuner.comparison.outcome import plain_values
from momentum_tuner.database import Database, Ticket
from momentum_tuner.metrics import LOSSES, stability_bound
from momentum_tuner.tickets import StudyRecord, best_settings, search_kind

WITHIN = 0.05
"""How much worse than the best an objective may be to count as good."""
SENSITIVITY_DECADES = 1.5
SAME_MOMENTUM = 1.5
"""The factor by which 1 - momentum may differ from the best trial's to count as the best momentum."""
BINS = 8
"""Most bins of 1 - momentum in which an edge is looked for."""
_CURVE_POINTS = 33


@dataclass(frozen=True)
class SearchTrial:
    """One search trial that has ended.

    Attributes:
        number: its number in Optuna's study.
        learning_rate: what it trained with.
        momentum: the same; None for an optimizer that has none.
        outcome: `complete`, `pruned`, `diverged` or `failed`.
        value: the objective's value; of a pruned trial that at which it was pruned.
        measures: its final measures.
    """

    number: int
    learning_rate: float
    momentum: float | None
    outcome: str
    value: float | None
    measures: Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One search trial on a stability map."""

    trial: int
    learning_rate: float
    one_minus_momentum: float | None
    objective: float | None
    outcome: str


@dataclass(frozen=True)
class MeasuredEdge:
    """Where the trials of one bin of 1 - momentum begin to diverge.

    Attributes:
        low: smallest 1 - momentum in the bin; None for an optimizer without momentum.
        high: largest.
        trials: how many are in it.
        stable: the largest learning rate that did not diverge; None if all did.
        diverged: the smallest that did; None if none did.
        edge: between the two (their geometric mean); None where either is missing, or where they overlap: then the
            bin is too wide to tell, or divergence is a matter of more than these two hyperparameters.
    """

    low: float | None
    high: float | None
    trials: int
    stable: float | None
    diverged: float | None
    edge: float | None


@dataclass(frozen=True)
class PredictedEdge:
    """The learning rate above which a quadratic of the measured sharpness diverges, at one momentum.

    Trials of momentum at 0.9 and more count as diverged up to 5% before: there the transient alone takes the loss of a
    quadratic over ten times the initial one.
    """

    one_minus_momentum: float
    learning_rate: float


@dataclass(frozen=True)
class StabilityMap:
    """An optimizer's search over learning rate and 1 - momentum.

    Attributes:
        study: the study's name.
        optimizer: whose trials.
        points: every search trial that has ended.
        measured: the edge of divergence by bins of 1 - momentum, ascending.
        sharpness: that the prediction is made from; None if it was not measured.
        predicted: bound/sharpness along 1 - momentum, ascending; empty without a sharpness, and for an optimizer
            whose bound is not known (with dampening, and Adam and its kin).
    """

    study: str
    optimizer: str
    points: tuple[Point, ...]
    measured: tuple[MeasuredEdge, ...]
    sharpness: float | None
    predicted: tuple[PredictedEdge, ...]

    def flat(self) -> dict[str, Any]:
        """As plain JSON values."""
        found: dict[str, Any] = plain_values(asdict(self))
        return found


def momentum_of(optimizer: str, settings: Mapping[str, Any]) -> float | None:
    """The momentum coefficient of a setting: 0 for plain SGD, None for an optimizer that has none."""
    found = settings.get("momentum", OPTIMIZERS[optimizer].constants.get("momentum"))
    return None if found is None else float(found)


def search_trials(database: Database, study: StudyRecord, optimizer: str) -> list[SearchTrial]:
    """A contestant's search trials that have ended and had a setting, in their order."""
    with database.read() as session:
        rows = session.execute(
            sa.select(Ticket.trial_number, Ticket.settings, Ticket.outcome, Ticket.value, Ticket.measures)
            .where(
                Ticket.study_id == study.id,
                Ticket.optimizer == optimizer,
                Ticket.kind == search_kind(study.spec, optimizer),
                Ticket.state == "done",
                Ticket.trial_number.is_not(None),
            )
            .order_by(Ticket.trial_number)
        ).all()
    return [
        SearchTrial(
            number=row.trial_number,
            learning_rate=float(row.settings["learning_rate"]),
            momentum=momentum_of(optimizer, row.settings),
            outcome=row.outcome,
            value=row.value,
            measures=row.measures or {},
        )
        for row in rows
        if row.settings
    ]


def stable_width(trials: Sequence[SearchTrial], maximize: bool) -> float | None:
    """Decades of learning rate, at the best momentum, whose objective is within 5% of the best.

    Only trials whose objective is known count: complete ones, and diverged ones, which are worth what the untrained
    model is. Around the best trial, among those with the same 1 - momentum up to a factor of 1.5, the learning rates
    are followed in both directions until a trial is worse; where the objective crosses the limit between it and the
    one before is interpolated linearly over log(learning rate). Where no trial is worse the width ends at the last
    good one: it is at least that.

    Returns:
        None without a completed trial, or if no other trial's objective is known at that momentum.
    """
    best = _best(trials, maximize)
    if best is None or best.value is None:
        return None
    sign = -1.0 if maximize else 1.0
    limit = sign * best.value + WITHIN * abs(best.value)
    near = [t for t in _known(trials) if _same_momentum(t, best)]
    costs: dict[float, float] = {}  # of equal learning rates the better
    for t in near:
        cost = math.inf if t.value is None else sign * t.value
        costs[t.learning_rate] = min(cost, costs.get(t.learning_rate, math.inf))
    if len(near) < 2:
        return None
    rates = sorted(costs)
    middle = rates.index(best.learning_rate)
    upwards = _reach(rates[middle:], costs, limit)
    downwards = _reach(rates[middle::-1], costs, limit)
    return abs(upwards - downwards)


def lr_sensitivity(trials: Sequence[SearchTrial], metric: str, maximize: bool) -> float | None:
    """Mean loss that a learning rate within 1.5 decades of the best costs (after Wortsman et al. 2023).

    Of each trial min(objective, untrained model's) - best objective; the other way round where more is better. What an
    untrained model has none of, such as steps to target, is taken as it is, and where even the best is worse than the
    untrained model nothing is lost: a cost is never below 0. Pruned
    trials are left out, as nobody knows what they would have come to: with a pruner this is the cost among the
    survivors and the diverged, and smaller than without.

    Args:
        trials: the search.
        metric: the objective's.
        maximize: its direction.

    Returns:
        None without a completed trial, or if no other trial's objective is known there.
    """
    best = _best(trials, maximize)
    if best is None or best.value is None:
        return None
    sign = -1.0 if maximize else 1.0
    costs = []
    for t in _known(trials):
        far = abs(math.log10(t.learning_rate / best.learning_rate))
        if t.value is None or far > SENSITIVITY_DECADES:
            continue
        untrained = _untrained(metric, t.measures)
        most = math.inf if untrained is None else sign * (untrained - best.value)
        costs.append(min(sign * (t.value - best.value), max(most, 0.0)))
    return float(np.mean(costs)) if len(costs) > 1 else None


def stability_map(database: Database, study: StudyRecord, optimizer: str) -> StabilityMap:
    """Where a contestant's search trials lay, where they diverged, and where theory says that they should.

    The sharpness is the median over the confirmation trials of its best setting, or failing that over its completed
    search trials.

    Raises:
        InputError: the optimizer is not in this study.
    """
    study.spec.hyperparameters(optimizer)
    trials = search_trials(database, study, optimizer)
    sharpness, dampened = None, False
    for best in best_settings(database, study, contestants=True):
        if best.optimizer == optimizer:
            found = read_confirmation(database, study, best).numbers("sharpness")
            found = found or [float(t.measures["sharpness"]) for t in trials if _has_sharpness(t)]
            sharpness = float(np.median(found)) if found else None
            dampened = bool(best.settings.get("dampening"))
            break
    return StabilityMap(
        study=study.name,
        optimizer=optimizer,
        points=tuple(Point(t.number, t.learning_rate, _one_minus(t.momentum), t.value, t.outcome) for t in trials),
        measured=measured_edges(trials),
        sharpness=sharpness,
        predicted=() if dampened else _predicted(optimizer, trials, sharpness),
    )


def measured_edges(trials: Sequence[SearchTrial]) -> tuple[MeasuredEdge, ...]:
    """The edge of divergence by bins of 1 - momentum: up to 8, even on a log scale; one for each value if they are few.

    A pruned trial did not diverge as long as it trained. Failed ones tell nothing.
    """
    told = [t for t in trials if t.outcome in ("complete", "pruned", "diverged")]
    without = [t for t in told if t.momentum is None]
    edges = [_edge(None, None, without)] if without else []
    values = sorted({1.0 - t.momentum for t in told if t.momentum is not None})
    if not values:
        return tuple(edges)
    groups: dict[int, list[SearchTrial]] = {}
    for t in told:
        if t.momentum is not None:
            groups.setdefault(_bin(1.0 - t.momentum, values), []).append(t)
    for _, group in sorted(groups.items()):
        inside = [1.0 - t.momentum for t in group if t.momentum is not None]
        edges.append(_edge(min(inside), max(inside), group))
    return tuple(edges)


def _bin(one_minus_momentum: float, values: Sequence[float]) -> int:
    if len(values) <= BINS:
        return values.index(one_minus_momentum)
    part = math.log(one_minus_momentum / values[0]) / math.log(values[-1] / values[0])
    return min(int(part * BINS), BINS - 1)


def _edge(low: float | None, high: float | None, trials: Sequence[SearchTrial]) -> MeasuredEdge:
    stable = max((t.learning_rate for t in trials if t.outcome != "diverged"), default=None)
    diverged = min((t.learning_rate for t in trials if t.outcome == "diverged"), default=None)
    bracketed = stable is not None and diverged is not None and stable < diverged
    edge = math.sqrt(stable * diverged) if bracketed and stable and diverged else None
    return MeasuredEdge(low, high, len(trials), stable, diverged, edge)


def _predicted(optimizer: str, trials: Sequence[SearchTrial], sharpness: float | None) -> tuple[PredictedEdge, ...]:
    values = sorted({1.0 - t.momentum for t in trials if t.momentum is not None})
    rule = OPTIMIZERS[optimizer].rule
    if rule not in ("sgd", "momentum_classic", "nesterov_lookahead") or not values or not sharpness or sharpness < 0.0:
        return ()
    nesterov = rule == "nesterov_lookahead" or OPTIMIZERS[optimizer].constants.get("nesterov") == 1.0
    curve = np.geomspace(values[0], values[-1], _CURVE_POINTS).tolist() if len(values) > 1 else values
    return tuple(PredictedEdge(value, stability_bound(1.0 - value, nesterov) / sharpness) for value in curve)


def _one_minus(momentum: float | None) -> float | None:
    return None if momentum is None else 1.0 - momentum


def _has_sharpness(trial: SearchTrial) -> bool:
    return trial.outcome == "complete" and trial.measures.get("sharpness") is not None


def _known(trials: Sequence[SearchTrial]) -> list[SearchTrial]:
    """Those whose objective is that of a whole budget."""
    return [t for t in trials if t.outcome == "diverged" or (t.outcome == "complete" and t.value is not None)]


def _best(trials: Sequence[SearchTrial], maximize: bool) -> SearchTrial | None:
    complete = [t for t in trials if t.outcome == "complete" and t.value is not None]
    order = -1.0 if maximize else 1.0
    return min(complete, key=lambda t: (order * (t.value or 0.0), t.number), default=None)


def _same_momentum(trial: SearchTrial, best: SearchTrial) -> bool:
    if trial.momentum is None or best.momentum is None:
        return trial.momentum == best.momentum
    return abs(math.log((1.0 - trial.momentum) / (1.0 - best.momentum))) <= math.log(SAME_MOMENTUM) + 1e-12


def _reach(rates: Sequence[float], costs: Mapping[float, float], limit: float) -> float:
    """How far, in log10, the costs stay within the limit along these learning rates, the best's first."""
    for inside, outside in itertools.pairwise(rates):
        if costs[outside] > limit:
            rise = costs[outside] - costs[inside]
            part = (limit - costs[inside]) / rise
            return math.log10(inside) + part * math.log10(outside / inside)
    return math.log10(rates[-1])


def _untrained(metric: str, measures: Mapping[str, Any]) -> float | None:
    """The objective's value of the untrained model; None for what has none, as steps, ratios and sharpness."""
    if metric == "contraction":
        return 1.0
    found = measures.get("initial_valid_loss" if metric in LOSSES else f"initial_{metric}")
    return None if found is None else float(found)
