"""The comparison of one study, derived from what the database holds of it, in whatever phase it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from momentum_tuner.comparison.confirmation import Confirmation, read_confirmation, read_curves
from momentum_tuner.comparison.landscape import lr_sensitivity, momentum_of, search_trials, stable_width
from momentum_tuner.comparison.notes import notes_on, tally
from momentum_tuner.comparison.outcome import Comparison, Contestant, FrontPoint
from momentum_tuner.comparison.pairs import Raced, compare_pairs
from momentum_tuner.comparison.statistics import counted_steps, geometric_mean
from momentum_tuner.database import Database
from momentum_tuner.metrics import EpochRecord, steps_to_target
from momentum_tuner.tickets import BestSetting, StudyRecord, best_settings

TARGET_MARGIN = 0.05
"""How much worse than the reference's median best value an automatic target is."""

Curves = Mapping[str, Mapping[int, Sequence[EpochRecord]]]


def compare_study(database: Database, study: StudyRecord) -> Comparison:
    """Compare the contestants of a study on their confirmation trials.

    It can be asked for at any time: what cannot be said yet is None, and the notes say why.
    """
    spec = study.spec
    counted = tally(database, study)
    winners: dict[str, BestSetting] = {}
    settings = best_settings(database, study, contestants=True)
    for best in settings:
        winners.setdefault(best.optimizer, best)  # with two aims the first point of a front is what was confirmed
    confirmed = {optimizer: read_confirmation(database, study, best) for optimizer, best in winners.items()}
    curves: Curves = {optimizer: read_curves(database, c) for optimizer, c in confirmed.items()}
    metric, maximize = spec.target_aim.metric, spec.target_aim.maximize
    target = spec.target if isinstance(spec.target, float) else None
    if spec.target == "auto" and spec.reference is not None:
        target = auto_target(curves.get(spec.reference, {}), metric, maximize)
    raced = {} if target is None else _race(confirmed, curves, target, metric, maximize)
    speeds = {optimizer: geometric_mean(r.counted(r.steps)) for optimizer, r in raced.items()}
    # Where speed does not decide, the objective of the search does: the order of `confirmed`.
    ranked = sorted(confirmed, key=lambda optimizer: speeds.get(optimizer, math.inf))
    raced = {optimizer: raced[optimizer] for optimizer in ranked if optimizer in raced}
    budget = {"trials": spec.budget.trials, "epochs": spec.budget.epochs, "seeds": spec.confirm.seeds}
    if confirmed:
        budget["steps"] = _common_steps(confirmed)
    return Comparison(
        study=study.name,
        phase=counted.phase,
        target=target,
        target_metric=metric,
        maximize=maximize,
        reference=spec.reference,
        budget=budget,
        optimizers=tuple(_contestant(database, study, confirmed[o], raced.get(o)) for o in ranked),
        pairs=compare_pairs(list(raced.values())),
        notes=tuple(notes_on(spec, counted, confirmed, raced, target)),
        front=tuple(_front_point(study, best) for best in settings if best.second_objective is not None),
        unit="epochs" if len({_budget_steps(c) for c in confirmed.values()}) > 1 else "steps",
    )


def _front_point(study: StudyRecord, best: BestSetting) -> FrontPoint:
    values = [best.objective, best.second_objective or 0.0]
    return FrontPoint(
        optimizer=best.optimizer,
        trial=best.trial,
        learning_rate=best.settings["learning_rate"],
        momentum=momentum_of(best.optimizer, best.settings),
        values={aim.metric: value for aim, value in zip(study.spec.objective.aims, values, strict=True)},
    )


def auto_target(curves: Mapping[int, Sequence[EpochRecord]], metric: str, maximize: bool) -> float | None:
    """The median over seeds of the best value that the reference reached, and 5% towards worse.

    Args:
        curves: the reference's records by seed.
        metric: which value.
        maximize: whether more of it is better.

    Returns:
        None if no seed has a value.
    """
    reached = [value for value in (_best_value(records, metric, maximize) for records in curves.values())]
    known = [value for value in reached if value is not None]
    if not known:
        return None
    middle = float(np.median(known))
    margin = TARGET_MARGIN * abs(middle)
    return middle - margin if maximize else middle + margin


def _best_value(records: Sequence[EpochRecord], metric: str, maximize: bool) -> float | None:
    """The best of a trial's evaluations, those that `steps_to_target` looks at."""
    values = [r.value(metric) for r in records if r.diverged_at_step is None]
    known = [value for value in values if value is not None]
    if not known:
        return None
    return max(known) if maximize else min(known)


def _budget_steps(confirmation: Confirmation) -> int:
    """The steps of a whole budget: those of the setting's search trial, which ran it."""
    return int(confirmation.best.measures["steps"])


def _common_steps(confirmed: Mapping[str, Confirmation]) -> int:
    return max(_budget_steps(c) for c in confirmed.values())


def _race(
    confirmed: Mapping[str, Confirmation], curves: Curves, target: float, metric: str, maximize: bool
) -> dict[str, Raced]:
    """Those contestants that have a confirmation trial."""
    return {
        optimizer: Raced(
            optimizer=optimizer,
            budget_steps=_budget_steps(confirmation),
            common_steps=_common_steps(confirmed),
            trials=confirmation.trials,
            steps={
                seed: steps_to_target(records, target, metric, maximize) for seed, records in curves[optimizer].items()
            },
        )
        for optimizer, confirmation in confirmed.items()
        if confirmation.trials
    }


def _contestant(database: Database, study: StudyRecord, confirmation: Confirmation, raced: Raced | None) -> Contestant:
    best = confirmation.best
    objective = study.spec.objective
    maximize = objective.direction == "maximize"
    trials = list(confirmation.trials.values())
    search = search_trials(database, study, best.optimizer)
    values = [t.value for t in trials if t.value is not None]
    steps, epochs = None, None
    if raced is not None:
        steps = geometric_mean(counted_steps(list(raced.steps.values()), raced.budget_steps, raced.budget_steps))
        epochs = geometric_mean(raced.counted(raced.steps)) * study.spec.budget.epochs / raced.common_steps
    losses = [t.measures.get("initial_valid_loss" if t.diverged else "best_valid_loss") for t in trials]
    return Contestant(
        optimizer=best.optimizer,
        learning_rate=float(best.settings["learning_rate"]),
        momentum=momentum_of(best.optimizer, best.settings),
        settings=best.settings,
        trial=best.trial,
        budget_steps=_budget_steps(confirmation),
        seeds=len(trials),
        steps_to_target=steps,
        epochs_to_target=epochs,
        miss_rate=None if raced is None else float(np.mean([s is None for s in raced.steps.values()])),
        divergence_rate=float(np.mean([t.diverged for t in trials])) if trials else None,
        best_valid_loss=_mean([float(loss) for loss in losses if loss is not None]),
        seed_std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        mean_valid_loss=_mean(confirmation.numbers("mean_valid_loss")),
        oscillation=_mean(confirmation.numbers("oscillation")),
        spikes=_mean(confirmation.numbers("spikes")),
        layer_grad_ratio=_mean(confirmation.numbers("layer_grad_ratio")),
        sharpness=_mean(confirmation.numbers("sharpness")),
        stability_margin=_mean(confirmation.numbers("stability_margin")),
        stable_width=stable_width(search, maximize),
        lr_sensitivity=lr_sensitivity(search, objective.metric, maximize),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
