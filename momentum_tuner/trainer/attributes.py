"""What a model keeps in plain attributes, which all slots share, rather than in buffers, of which each has its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from momentum_tuner.errors import TaskError

Attribute = tuple[str, str, object]
"""Name of a module within another, of its attribute, and the value, or of a container its length."""


def plain_attributes(module: nn.Module) -> list[Attribute]:
    """Numbers, texts and lengths of lists among the attributes of a module and those below it."""
    found: list[Attribute] = []
    for name, layer in module.named_modules():
        for attribute, value in vars(layer).items():
            if isinstance(value, int | float | str | None):
                found.append((name, attribute, value))
            elif isinstance(value, list | dict | set):
                found.append((name, attribute, _Length(len(value))))
    return found


class _Length(int):
    """Of a container, which tells it from a number."""


def check_attributes(model: nn.Module, step: Callable[[], Tensor]) -> None:
    """See that no training step counts in an attribute of the model, as those of one trial would count for all.

    What changes once, such as a cache, does no harm, nor does a list that grows and is not used.

    Args:
        model: which takes the steps.
        step: takes one and the same step again and again, and returns its loss.

    Raises:
        TaskError: one does.
    """
    before = plain_attributes(model)
    step()
    if plain_attributes(model) == before:
        return
    second, kept = step(), set(plain_attributes(model))
    third, changed = step(), [one for one in plain_attributes(model) if one not in kept]
    alike = torch.equal(second, third)
    for name, attribute, value in changed:
        if not (alike and isinstance(value, _Length)):
            raise TaskError(
                f"task.model: {f'{name}.{attribute}'.lstrip('.')} changes in every training step, and all trials would "
                "share it; let the model keep it in a buffer, by register_buffer, of which each trial has its own"
            )
