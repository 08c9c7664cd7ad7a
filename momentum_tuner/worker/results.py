"""What a worker makes of a ticket's settings and of a trial's records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from momentum_tuner.errors import describe_failure, describe_traceback
from momentum_tuner.metrics import EpochRecord, TrialMeasures
from momentum_tuner.tickets import Claim, Result
from momentum_tuner.trainer import TrialSettings


def trial_settings(held: Claim) -> TrialSettings:
    """What the trainer gets for a ticket."""
    assert held.settings is not None
    hyperparameters = {name: float(value) for name, value in held.settings.items() if name != "batch_size"}
    return TrialSettings(held.optimizer, hyperparameters, int(held.settings["batch_size"]), held.seed)


def rung_value(metric: str, records: Sequence[EpochRecord], maximize: bool) -> float | None:
    """What a trial reports at a rung: the best value of the objective so far, or the running mean or last value.

    `contraction` has no value before the end: its rungs report the distance to the optimum.
    """
    trained = records[1:]
    match metric:
        case "mean_valid_loss":
            values = [r.valid_loss for r in trained if r.valid_loss is not None]
            return sum(values) / len(values) if values else None
        case "final_valid_loss":
            return trained[-1].valid_loss
        case "train_loss":
            return trained[-1].train_loss
        case "contraction":
            return trained[-1].distance
    name = "valid_loss" if metric == "best_valid_loss" else metric
    found = [value for value in (r.value(name) for r in trained) if value is not None]
    if not found:
        return None
    return max(found) if maximize else min(found)


def flat_measures(measures: TrialMeasures) -> dict[str, Any]:
    """A trial's measures as plain JSON values; the task's metrics at the best epoch are `valid_<metric>`."""
    found = asdict(measures)
    best, final, initial = (found.pop(name) for name in ("best_metrics", "final_metrics", "initial_metrics"))
    found |= {f"valid_{name}": value for name, value in best.items()}
    found |= {f"final_valid_{name}": value for name, value in final.items()}
    found |= {f"initial_valid_{name}": value for name, value in initial.items()}
    return {name: value for name, value in found.items() if value is not None}


def failure(error: Exception) -> Result:
    """What becomes of a trial that raised an error."""
    return Result("failed", reason=describe_failure(error), traceback=describe_traceback(error))
