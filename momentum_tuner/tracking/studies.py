"""What MLflow is shown of a study, on its parent run: params, tags, curves; nothing here asks anybody."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from momentum_tuner.database import Load
from momentum_tuner.errors import redact
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import BestSetting
from momentum_tuner.tracking.runs import Point, is_number

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

SPEC_TAG = "momentum_tuner.spec"
"""The hash of the study file that the parent has."""
FILES_TAG = "momentum_tuner.files"
"""The same, once the parent has its report and the other files of a study that is done."""

OUTCOMES = ("complete", "pruned", "diverged", "failed")
_LONGEST_PARAM = 500


@dataclass(frozen=True)
class EndedTrial:
    """What the curves of a study need of a trial that has ended."""

    ticket: int
    kind: str
    outcome: str
    value: float | None
    best_valid_loss: float | None
    started_at: float
    finished_at: float


def study_params(spec: StudySpec) -> dict[str, str]:
    """What the study file says, as params of the parent run."""
    budget = f"{spec.budget.trials} trials of {spec.budget.epochs} epochs for each optimizer"
    found = {
        "task": spec.task.factory,
        "optimizers": ", ".join(spec.optimizers),
        "sampler": spec.sampler.name,
        "pruner": spec.pruner.name,
        "schedule": spec.schedule.name,
        "objective": ", ".join(f"{aim.direction} {aim.metric}" for aim in spec.objective.aims),
        "budget": budget,
        "confirmation_seeds": str(spec.confirm.seeds),
        "target": str(spec.target),
        "precision": spec.precision,
        "seed": str(spec.seed),
    }
    found |= {f"task.{name}": redact(json.dumps(value)) for name, value in spec.task.params.items()}
    found |= dict(_space("space", spec.model_dump(mode="json")["space"]))
    return {name: value[:_LONGEST_PARAM] for name, value in found.items()}


def _space(path: str, setting: Any) -> Iterator[tuple[str, str]]:
    """A range, choices, a number, or a mapping of these by name; infinity is text, as JSON has no number for it."""
    if isinstance(setting, Mapping) and "low" in setting:
        scale = " (log)" if setting.get("log") else ""
        yield path, f"{setting['low']:g} to {setting['high']:g}{scale}"
    elif isinstance(setting, Mapping):
        for name, part in setting.items():
            yield from _space(f"{path}.{name}", part)
    elif isinstance(setting, list | tuple):
        yield path, ", ".join(f"{float(choice):g}" for choice in setting)
    else:
        yield path, f"{float(setting):g}"


def best_params(best: Sequence[BestSetting]) -> dict[str, str]:
    """The best setting of all, and that of each optimizer: params of the parent of a study that is done.

    Args:
        best: the best settings, the best first; with two aims an optimizer has several, of which the first counts.
    """
    if not best:
        return {}
    first = {b.optimizer: b for b in reversed(best)}
    found = {"best_optimizer": best[0].optimizer, "best_trial": str(best[0].trial)}
    found |= {f"best_{name}": f"{value:.8g}" for name, value in best[0].settings.items()}
    return found | {f"best_{o}_{name}": f"{value:.8g}" for o, b in first.items() for name, value in b.settings.items()}


class StudyCurves:
    """A study's curves over its ended trials: counts, trials per hour, and the best values of the search.

    Each point follows from the trials up to it and not from later ones, so that it is the same whenever it is made.

    Args:
        spec: the study file.
    """

    def __init__(self, spec: StudySpec) -> None:
        self.last: EndedTrial | None = None
        """The last trial that they go over."""
        self.trials = 0
        """How many trials they go over."""
        self._better = max if spec.objective.maximize else min
        self._counts: Counter[str] = Counter()
        self._best: dict[str, float] = {}
        self._begun = math.inf

    def add(self, trial: EndedTrial) -> list[Point]:
        """Go on to the trial that ended next; returns its points."""
        self.last = trial
        self.trials += 1
        self._counts[trial.outcome] += 1
        self._begun = min(self._begun, trial.started_at)
        if trial.kind == "search" and trial.outcome == "complete":
            self._improve("objective", trial.value, self._better)
            self._improve("best_valid_loss", trial.best_valid_loss, min)
        values = {"trials": float(self.trials), **{name: float(self._counts[name]) for name in OUTCOMES}, **self._best}
        if trial.finished_at > self._begun:
            values["trials_per_hour"] = 3600.0 * self.trials / (trial.finished_at - self._begun)
        return [Point(name, value, int(trial.finished_at * 1000), self.trials) for name, value in values.items()]

    def _improve(self, name: str, value: float | None, better: Callable[[float, float], float]) -> None:
        if value is not None and is_number(value):
            self._best[name] = better(self._best.get(name, value), value)


def load_points(loads: Sequence[Load], created_at: float) -> list[Point]:
    """How busy workers were, under the names of MLflow, each with the worker: `system/<name>.<worker>`.

    The steps are seconds since the study was created, so that all workers share one axis. CPU and memory are those of
    the worker's process: 100% are one core.
    """
    points = []
    for load in loads:
        values = {
            "cpu_utilization_percentage": load.cpu_percent,
            "system_memory_usage_megabytes": load.memory_mb,
            "gpu_memory_usage_megabytes": load.gpu_memory_mb,
        }
        timestamp, step = int(load.sampled_at * 1000), int(load.sampled_at - created_at)
        points += [
            Point(f"system/{name}.{load.worker_id}", float(value), timestamp, step)
            for name, value in values.items()
            if value is not None and is_number(value)
        ]
    return points


def data_input(data: Mapping[str, Any]) -> DatasetInput:
    """What the trials of a study learn from, as MLflow has it: name, digest, sizes; nothing is copied."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    sizes = {name: data[name] for name in ("kind", "train", "valid") if data.get(name) is not None}
    dataset = Dataset(
        name=str(data["name"]),
        digest=str(data["digest"]),
        source_type="code",
        source=json.dumps({"tags": {"mlflow.source.name": data["source"]}}),
        profile=json.dumps(sizes),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "train")])


def beginning(name: str, phase: str) -> str:
    """The description of a study that is not done, in Markdown."""
    missing = {"search": "The search is", "confirm": "The confirmation of the best settings on fresh seeds is"}
    return (
        f"{missing.get(phase, 'The study is')} not complete, so there is no verdict yet: "
        f"`momentum-tuner status {name}` says how far it is.\n\n"
        "The study file is among the artifacts; `momentum-tuner run study.yaml` does it again."
    )
