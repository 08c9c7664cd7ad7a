"""The paths of confirmed settings over a landscape of two parameters, trained again to see where they went."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from momentum_tuner.errors import TaskError
from momentum_tuner.tasks import load_task
from momentum_tuner.tickets import BestSetting, StudyRecord

if TYPE_CHECKING:
    from momentum_tuner.trainer import Trainer

Array = NDArray[np.float64]

_DENSE_STEPS = 150
"""The first steps, of which every position is kept."""
_SPARSE_POSITIONS = 250
_GRID = 90
_MARGIN = 0.12
_MOST_SPREAD = 4.0
"""How many times the distance from start to optimum the plane may reach out on each side."""


@dataclass(frozen=True)
class Path2D:
    """One contestant's path.

    Attributes:
        optimizer: the contestant.
        steps: optimizer steps at the positions.
        positions: `[positions, 2]`.
        losses: at the positions.
        diverged: whether it ended by diverging.
    """

    optimizer: str
    steps: Sequence[int]
    positions: Array
    losses: Sequence[float]
    diverged: bool


@dataclass(frozen=True)
class Plane:
    """A landscape of two parameters and the paths over it.

    Attributes:
        x: `[n]`, values of the first parameter.
        y: `[n]`, values of the second.
        loss: `[n, n]`, row by row of `y`.
        optimum: the known minimum, if any.
        paths: one for each contestant.
        seed: of all paths.
    """

    x: Array
    y: Array
    loss: Array
    optimum: tuple[float, float] | None
    paths: tuple[Path2D, ...]
    seed: int


def trajectories(
    study: StudyRecord, settings: Sequence[BestSetting], seed: int, trusted: Collection[str] = ()
) -> Plane | None:
    """Train the best settings again over the study's landscape; None if it is no landscape of two parameters.

    Args:
        study: the study.
        settings: one for each contestant.
        seed: of all paths: those that began at one place are compared.
        trusted: what may be imported besides the built-in tasks.
    """
    spec = study.spec
    if not settings:
        return None
    try:
        base = Path(study.folder) if study.folder else None
        task = load_task(spec.task.factory, spec.task.params, base=base, trusted=trusted)
    except TaskError:  # not trusted, or not on this machine
        return None
    if task.train is not None:
        return None
    import torch
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    from momentum_tuner.trainer import ScheduleSettings, Trainer, TrialSettings

    with torch.random.fork_rng(devices=[]):
        model = task.model()
    if sum(p.numel() for p in model.parameters()) != 2 or any(not p.requires_grad for p in model.parameters()):
        return None
    schedule = spec.schedule
    trainer = Trainer(
        task,
        epochs=spec.budget.epochs,
        slots=len(settings),
        precision=spec.precision,
        schedule=ScheduleSettings(schedule.name, schedule.options, schedule.warmup_epochs, schedule.warmup_start),
    )
    dtype = parameters_to_vector(model.parameters()).dtype

    def height(x: float, y: float) -> float:
        with torch.no_grad():
            vector_to_parameters(torch.tensor([x, y], dtype=dtype), model.parameters())
            return float(task.loss(model, None))

    for best in settings:
        numbers = {name: float(value) for name, value in best.settings.items() if name != "batch_size"}
        trainer.admit(best.optimizer, TrialSettings(best.optimizer, numbers, int(best.settings["batch_size"]), seed))
    walked = _walk(trainer, spec.budget.epochs)
    paths = tuple(
        Path2D(name, steps, np.array(positions), [height(*p) for p in positions], name in walked.diverged)
        for name, (steps, positions) in walked.places.items()
    )
    optimum = None if task.optimum is None else (float(task.optimum[0]), float(task.optimum[1]))
    x, y = _window(paths, optimum)
    loss = np.array([[height(a, b) for a in x.tolist()] for b in y.tolist()])
    return Plane(x, y, loss, optimum, paths, seed)


@dataclass
class _Walked:
    places: dict[str, tuple[list[int], list[list[float]]]]
    diverged: set[str]


def _walk(trainer: Trainer, epochs: int) -> _Walked:
    """Positions at every one of the first steps, and at evenly spaced ones afterwards."""
    walked = _Walked({str(key): ([], []) for key in trainer.keys}, set())
    whole = trainer.steps_per_epoch(1) * epochs
    every = max(1, (whole - _DENSE_STEPS) // _SPARSE_POSITIONS)
    asked = 0

    def pause() -> bool:
        nonlocal asked
        asked += 1
        return asked <= _DENSE_STEPS or asked % every == 0

    def look() -> None:
        for key in trainer.keys:
            state = trainer.export(key)
            steps, positions = walked.places[str(key)]
            step = state.step + state.epoch_steps
            if not steps or steps[-1] < step:
                steps.append(step)
                positions.append(state.tensors["parameters"].double().tolist())

    look()
    while trainer.keys:
        for key, record in trainer.train_epoch(pause):
            if record.diverged_at_step is not None:
                walked.diverged.add(str(key))
            if record.diverged_at_step is not None or record.epoch >= epochs:
                look()
                trainer.release(key)
        look()
    return walked


def _window(paths: Sequence[Path2D], optimum: tuple[float, float] | None) -> tuple[Array, Array]:
    """The axes of a plane that holds the paths, but not all of what one that diverges runs away to."""
    starts = np.array([p.positions[0] for p in paths])
    anchors = np.vstack([starts, *([np.array([optimum])] if optimum is not None else [])])
    found = []
    for side in (0, 1):
        low, high = float(anchors[:, side].min()), float(anchors[:, side].max())
        reach = _MOST_SPREAD * max(high - low, float(np.ptp(anchors)), 1e-6)
        values = np.concatenate([p.positions[:, side] for p in paths])
        values = values[np.isfinite(values)]
        bottom, top = max(low - reach, float(values.min())), min(high + reach, float(values.max()))
        bottom, top = min(bottom, low), max(top, high)
        margin = _MARGIN * max(top - bottom, 1e-6)
        found.append(np.linspace(bottom - margin, top + margin, _GRID))
    return found[0], found[1]


def log_height(loss: Array) -> Array:
    """The logarithm of the loss over its minimum, bounded from below so that the floor does not take all colours."""
    above = loss - float(np.nanmin(loss))
    positive = above[above > 0.0]
    floor = float(np.quantile(positive, 0.02)) if positive.size else 1.0
    return np.log10(np.maximum(above, floor))
