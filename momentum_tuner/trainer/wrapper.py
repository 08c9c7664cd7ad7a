"""A task's model, with its loss and metrics as the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from momentum_tuner.tasks import Task
from momentum_tuner.trainer.dropout import key_dropout


class Wrapper(nn.Module):
    """The task's model, with its loss and metrics as the forward pass, so that `functional_call` reaches all."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.key_names, self.calls = key_dropout(model)

    def calm(self) -> None:
        """Train, but without what is random in it: dropout is off, while batch norm goes by the batch's statistics."""
        self.train()
        norms = [layer for layer in self.modules() if isinstance(layer, _NormBase) and layer.training]
        self.eval()
        for module in (self, *norms):
            module.training = True

    def forward(self, batch: Any, then: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The loss, or what `then` makes of it; in eval mode `[1 + metrics]`, the loss and the metrics."""
        self.calls.begin(remember=then is not None)
        if self.training:
            loss = self.task.loss(self.model, batch)
            return loss if then is None else then(loss)
        with _called_once(self.model):
            loss = self.task.loss(self.model, batch)
            others = [metric(self.model, batch) for metric in self.task.metrics.values()]
        wide = torch.promote_types(loss.dtype, torch.float32)  # a bfloat16 tells apart two accuracies of 0.4%
        return torch.stack([value.to(wide) for value in (loss, *others)])


@contextmanager
def _called_once(model: nn.Module) -> Iterator[None]:
    """Let the loss and the metrics share one forward pass, where they call the model on the very same tensors.

    An output that was changed in place since is not given out again.
    """
    seen: list[tuple[tuple[Any, ...], Tensor, int]] = []
    before = model.__dict__.get("forward")
    forward = model.forward

    def remembering(*args: Any, **kwargs: Any) -> Any:
        for known, out, version in seen:
            same = len(known) == len(args) and all(a is b for a, b in zip(known, args, strict=True))
            if same and not kwargs and out._version == version:
                return out
        out = forward(*args, **kwargs)
        if isinstance(out, Tensor) and not kwargs:
            seen.append((args, out, out._version))
        return out

    model.__dict__["forward"] = remembering
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if before is not None:
            model.__dict__["forward"] = before
