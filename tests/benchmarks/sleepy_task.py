"""digits_mlp with steps that wait, as those of a model on a GPU do for whoever watches from the CPU."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from momentum_tuner import Task
from momentum_tuner.tasks import digits_mlp


def build(step_seconds: float, steps: int) -> Task:
    """A step of all slots together takes `step_seconds` more than it would; an epoch has so many steps."""
    task = digits_mlp(hidden=8)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            time.sleep(step_seconds)
            model.steps = getattr(model, "steps", 0) + 1  # so that steps are not replayed without the wait
        return task.loss(model, batch)

    return replace(task, loss=loss, steps_per_epoch=steps)
