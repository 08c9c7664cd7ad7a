"""What MLflow is shown of a trial: name, params, tags, metrics, status. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from momentum_tuner.database import Ticket
from momentum_tuner.errors import redact
from momentum_tuner.metrics import EpochRecord

TICKET_TAG = "momentum_tuner.ticket"
STUDY_TAG = "momentum_tuner.study"
PARENT_TAG = "mlflow.parentRunId"
DESCRIPTION_TAG = "mlflow.note.content"
CHAMPION_TAG = "champion"
"""Of the best search trial of each optimizer."""

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


@dataclass
class Run:
    """A run as MLflow has it.

    Attributes:
        id: MLflow's id.
        status: `RUNNING`, `SCHEDULED`, `FINISHED`, `KILLED` or `FAILED`.
        params: its params; they never change.
        tags: its tags.
        has_data: whether it says what it learns from.
    """

    id: str
    status: str
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    has_data: bool = False

    def new_params(self, params: Mapping[str, str]) -> dict[str, str]:
        """Those that it has not got."""
        return {name: value for name, value in params.items() if name not in self.params}

    def new_tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        """Those that it has not got, or has otherwise."""
        return {name: value for name, value in tags.items() if self.tags.get(name) != value}


@dataclass(frozen=True)
class TrialRun:
    """A trial as its run is to show it.

    Attributes:
        key: its ticket.
        name: of the run.
        start: when it began, in seconds since 1970.
        params: its params.
        tags: its tags.
        points: of its metrics, those that MLflow may not have.
        status: `RUNNING`, `FINISHED`, `KILLED` or `FAILED`.
        end: when it ended, likewise; None while it runs.
    """

    key: str
    name: str
    start: float
    params: Mapping[str, str]
    tags: Mapping[str, str]
    points: Sequence[Point]
    status: str
    end: float | None


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
    if ticket.traceback is not None:
        # Indented, so that it is shown as it is, whatever it holds.
        found[DESCRIPTION_TAG] = "\n".join(f"    {line}" for line in redact(ticket.traceback).splitlines())
    return found


def epoch_points(records: Sequence[tuple[EpochRecord, float]]) -> list[Point]:
    """Points of epoch records with the time (seconds since 1970) they were recorded at."""
    points: list[Point] = []
    for record, recorded_at in records:
        timestamp = int(recorded_at * 1000)
        values: dict[str, Any] = {name: getattr(record, name) for name in EPOCH_MEASURES}
        values |= {f"valid_{name}": value for name, value in record.metrics.items()}
        points += [Point(n, float(v), timestamp, record.step) for n, v in values.items() if is_number(v)]
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
    return [Point(name, float(value), timestamp, step) for name, value in found.items() if is_number(value)]


def is_number(value: Any) -> bool:
    """Whether there is a value that MLflow can show: it has no infinity."""
    return value is not None and math.isfinite(value)
