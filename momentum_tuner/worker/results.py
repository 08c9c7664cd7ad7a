"""What a worker makes of a study, of a ticket's settings and of a trial's records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from momentum_tuner.errors import describe_failure, describe_traceback
from momentum_tuner.metrics import EpochRecord, TrialMeasures
from momentum_tuner.spec import StudySpec
from momentum_tuner.tasks import Loop, Task
from momentum_tuner.tickets import Claim, Result, TrialRecord
from momentum_tuner.trainer import (
    FUSED_WIDTH,
    Calibration,
    LoopTrainer,
    ScheduleSettings,
    Trainer,
    TrialSettings,
    trainer_of,
)


def study_trainer(
    spec: StudySpec,
    task: Task | Loop,
    *,
    slots: int | None,
    device: str,
    stopping: Callable[[], bool] = lambda: False,
    most: int = FUSED_WIDTH,
    compiles: str = "off",
    calibration: Calibration | None = None,
) -> Trainer | LoopTrainer:
    """The trainer of a study's trials.

    Args:
        spec: the study.
        task: its task.
        slots: trials at once, None for the trainer's choice.
        device: what to train on.
        stopping: whether the worker is to stop.
        most: the most slots that the trainer chooses.
        compiles: whether it compiles its step: on, off, or auto if that repays.
        calibration: what was measured of the task before.

    Raises:
        TaskError: the task cannot be trained as the study asks for.
    """
    schedule = spec.schedule
    return trainer_of(
        task,
        epochs=spec.budget.epochs,
        slots=slots,
        device=device,
        precision=spec.precision,
        schedule=ScheduleSettings(schedule.name, schedule.options, schedule.warmup_epochs, schedule.warmup_start),
        stopping=stopping,
        most=most,
        compiles=compiles,
        batch_size=usual_batch_size(spec),
        calibration=calibration,
    )


def usual_batch_size(spec: StudySpec) -> int:
    """The batch size of a study's trials; one of those that it searches."""
    setting = spec.hyperparameters(spec.optimizers[0])["batch_size"]
    if isinstance(setting, int | float):
        return int(setting)
    return int(sorted(setting)[len(setting) // 2] if isinstance(setting, tuple) else setting.low)


def smallest_batch_size(spec: StudySpec) -> int:
    """The smallest batch size that a trial of the study may have."""
    settings = [spec.hyperparameters(optimizer)["batch_size"] for optimizer in spec.contestants]
    return min(int(min(s) if isinstance(s, tuple) else s if isinstance(s, int | float) else s.low) for s in settings)


def trial_settings(trial: Claim | TrialRecord) -> TrialSettings:
    """What the trainer gets for a ticket."""
    assert trial.settings is not None
    hyperparameters = {name: float(value) for name, value in trial.settings.items() if name != "batch_size"}
    return TrialSettings(trial.optimizer, hyperparameters, int(trial.settings["batch_size"]), trial.seed)


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
