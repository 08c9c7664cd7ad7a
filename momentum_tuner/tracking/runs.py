"""What MLflow is shown of a study and of a trial: names, params, tags, metrics, statuses. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from momentum_tuner.database import Ticket
from momentum_tuner.errors import redact
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import BestSetting, StudyProgress

TICKET_TAG = "momentum_tuner.ticket"
STUDY_TAG = "momentum_tuner.study"
SPEC_TAG = "momentum_tuner.spec"
PARENT_TAG = "mlflow.parentRunId"

STATUS: Mapping[str, str] = {
    "complete": "FINISHED",
    "diverged": "FINISHED",
    "pruned": "KILLED",
    "failed": "FAILED",
}
"""MLflow's status of a run by the outcome of its trial."""

EPOCH_MEASURES = (
    "train_loss",
    "valid_loss",
    "grad_norm",
    "grad_norm_max",
    "layer_grad_ratio",
    "update_norm",
    "oscillation",
    "spikes",
    "seconds",
    "distance",
)
FINAL_MEASURES = (
    "best_valid_loss",
    "mean_valid_loss",
    "contraction",
    "steps_to_target",
    "sharpness",
    "stability_margin",
)


@dataclass(frozen=True)
class Point:
    """One value of a metric: its step, and its time in milliseconds since 1970."""

    key: str
    value: float
    timestamp: int
    step: int


def run_name(optimizer: str, number: int, settings: Mapping[str, Any], kind: str = "search") -> str:
    """Such as `nesterov 0042 lr=0.031 beta=0.95`, or `nesterov confirm 0003 ...`."""
    parts = [f"{optimizer} confirm {number:04d}" if kind == "confirm" else f"{optimizer} {number:04d}"]
    if "learning_rate" in settings:
        parts.append(f"lr={settings['learning_rate']:.2g}")
    if "momentum" in settings:
        parts.append(f"beta={short_momentum(settings['momentum'])}")
    return " ".join(parts)


def short_momentum(momentum: float) -> str:
    """Two digits that matter: 0.95, 0.9973, 0: near 1 it is the distance to 1 that counts."""
    for digits in range(1, 7):
        text = f"{momentum:.{digits}f}"
        if abs(float(text) - momentum) <= 0.05 * (1.0 - momentum):
            return text.rstrip("0").rstrip(".") or "0"
    return f"{momentum:.6g}"


def trial_params(ticket: Ticket) -> dict[str, str]:
    """Params of a trial's run."""
    found = {"optimizer": ticket.optimizer, "seed": str(ticket.seed)}
    found |= {name: f"{value:.8g}" for name, value in (ticket.settings or {}).items()}
    return found


def trial_tags(ticket: Ticket) -> dict[str, str]:
    """Tags that change with what becomes of a trial."""
    found = {"attempts": str(ticket.attempts), "optimizer": ticket.optimizer, "kind": ticket.kind}
    if ticket.worker_id is not None:
        found["worker"] = ticket.worker_id
    if ticket.slot is not None:
        found["slot"] = str(ticket.slot)
    if ticket.outcome is not None:
        found["outcome"] = ticket.outcome
    if ticket.reason is not None:
        found["reason"] = redact(ticket.reason)[:500]
    return found


def epoch_points(records: Sequence[tuple[EpochRecord, float]]) -> list[Point]:
    """Points of epoch records with the time (seconds since 1970) they were recorded at."""
    points: list[Point] = []
    for record, recorded_at in records:
        timestamp = int(recorded_at * 1000)
        values: dict[str, Any] = {name: getattr(record, name) for name in EPOCH_MEASURES}
        values |= {f"valid_{name}": value for name, value in record.metrics.items()}
        points += [Point(n, float(v), timestamp, record.step) for n, v in values.items() if _is_number(v)]
    return points


def final_points(ticket: Ticket) -> list[Point]:
    """Points of a trial's final measures, at its last step."""
    measures = ticket.measures or {}
    step = int(measures.get("steps", 0))
    timestamp = int((ticket.finished_at or 0.0) * 1000)
    found = {name: measures[name] for name in FINAL_MEASURES if name in measures}
    if ticket.value is not None:
        found["objective"] = ticket.value
    if ticket.second_value is not None:
        found["second_objective"] = ticket.second_value
    if "diverged_at_step" in measures:
        found["diverged_at_step"] = measures["diverged_at_step"]
    return [Point(name, float(value), timestamp, step) for name, value in found.items() if _is_number(value)]


def _is_number(value: Any) -> bool:
    """Whether there is a value that MLflow can show: it has no infinity."""
    return value is not None and math.isfinite(value)


def study_params(spec: StudySpec) -> dict[str, str]:
    """Params of a study's parent run."""
    return {
        "task": spec.task.factory,
        "optimizers": ", ".join(spec.optimizers),
        "sampler": spec.sampler.name,
        "pruner": spec.pruner.name,
        "schedule": spec.schedule.name,
        "objective": ", ".join(f"{aim.direction} {aim.metric}" for aim in spec.objective.aims),
        "epochs": str(spec.budget.epochs),
        "seed": str(spec.seed),
    }


def study_tags(spec: StudySpec) -> dict[str, str]:
    """Tags of a study's parent run: what may grow, as params never change."""
    return {"trials_per_optimizer": str(spec.budget.trials)}


def study_result(progress: StudyProgress, best: Sequence[BestSetting]) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics and tags of a study that is done: its counts, its best value, and the best setting of each optimizer."""
    names = ("complete", "pruned", "diverged", "failed")
    values = {name: float(sum(getattr(o, name) for o in progress.optimizers)) for name in names}
    values["trials"] = float(progress.done)
    first = {b.optimizer: b for b in reversed(best)}  # with two aims an optimizer has several
    tags = {f"best_{o}_{name}": f"{value:.8g}" for o, b in first.items() for name, value in b.settings.items()}
    if best:
        values["objective"] = best[0].objective
        tags["best_optimizer"] = best[0].optimizer
    return values, tags
