"""What a loop of the user's own yields, read and checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from momentum_tuner.errors import TrialError
from momentum_tuner.metrics import finite

OPTIONAL = ("train_loss", "grad_norm", "grad_norm_max", "layer_grad_ratio", "update_norm", "oscillation", "spikes")
"""Measures of an epoch that a loop may yield, by their names in `metrics.EpochRecord`."""


@dataclass(frozen=True)
class LoopMeasures:
    """What a loop yields of an epoch, as floats.

    Attributes:
        valid_loss: maybe not finite.
        train_loss: the same; None if it is not there.
        metrics: those of `Loop.metrics` that are finite, without `valid_`.
        others: those of `OPTIONAL` that are there, None where they are not finite.
        step: optimizer steps so far, if the loop counts them.
    """

    valid_loss: float
    train_loss: float | None
    metrics: Mapping[str, float]
    others: Mapping[str, Any]
    step: int | None


def read_measures(found: object, metrics: Sequence[str], when: str) -> LoopMeasures:
    """Read what a loop yields.

    Args:
        found: what it yields.
        metrics: `Loop.metrics`.
        when: such as "after epoch 3", for the message.

    Raises:
        TrialError: it is no mapping, lacks a measure or has an unknown one, or a value is no number.
    """
    if not isinstance(found, Mapping):
        raise TrialError(f"{when} Loop.train yields {_kind(found)}: yield a mapping such as {{'valid_loss': 0.3}}")
    required = ("valid_loss", *(f"valid_{name}" for name in metrics))
    known = (*required, *OPTIONAL, "step")
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise TrialError(
                f"{when} Loop.train yields {name!r}{hint}: it is no measure; name metrics of your own in Loop.metrics "
                "and yield them as valid_<metric>"
            )
    for name in required:
        if name not in found:
            raise TrialError(f"{when} Loop.train yields no {name}: it must be there each time")
    values = {name: _number(value, name, when) for name, value in found.items()}
    for name in ("spikes", "step"):
        if name in values and not (math.isfinite(values[name]) and values[name].is_integer() and values[name] >= 0):
            raise TrialError(f"{when} Loop.train yields {values[name]:g} for {name}, which counts: 0, 1, 2, ...")
    others: dict[str, Any] = {name: finite(values[name]) for name in OPTIONAL if name in values}
    if "spikes" in others:
        others["spikes"] = int(values["spikes"])
    return LoopMeasures(
        valid_loss=values["valid_loss"],
        train_loss=values.get("train_loss"),
        metrics={name: values[f"valid_{name}"] for name in metrics if math.isfinite(values[f"valid_{name}"])},
        others=others,
        step=int(values["step"]) if "step" in values else None,
    )


def _number(value: object, name: str, when: str) -> float:
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        return float(value)
    raise TrialError(f"{when} Loop.train yields {_kind(value)} for {name}: it must be a number")


def _kind(value: object) -> str:
    shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
    return f"{type(value).__name__}{shape}"
