"""Softmax over few classes, and the cross-entropy with it.

Torch's CPU kernel takes the numbers of a row one by one where they do not fill a vector register; over another axis
than the last it works on many rows at once, which is many times faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from momentum_tuner.trainer.lowering.slotwise import SlotFunction

FEW = 16
"""Fewer numbers than this are worth turning the tensor over, by measurement (AVX-512, torch 2.13)."""


def _few(x: Any, dim: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.device.type == "cpu"
        and x.ndim > 1
        and x.shape[-1] < FEW
        and dim in (-1, x.ndim - 1)
    )


def over_few(kernel: Any, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A softmax over the last axis, with that axis moved forward meanwhile."""
    out: Tensor = kernel(x.mT.contiguous(), -2, dtype=dtype)
    return out.mT


def lower_softmax(kernel: Any, x: Any, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """`torch.softmax` or `torch.log_softmax`, however it was called; NotImplemented for many classes."""
    dtype = kwargs.get("dtype", args[-1] if args else None)
    if not _few(x, dim) or not isinstance(dtype, torch.dtype | None):
        return NotImplemented
    return over_few(kernel, x, dtype)


def lower_cross_entropy(
    x: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """`cross_entropy` with classes as targets; NotImplemented for anything else."""
    plain = size_average is None and reduce is None and label_smoothing == 0.0
    if not plain or not isinstance(x, Tensor) or x.ndim != 2 or target.is_floating_point():
        return NotImplemented
    full = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
    if weight is None and reduction == "mean" and full and target.dtype == torch.int64:
        loss, *_ = _CrossEntropy.over(x[None], target[None], ignore_index, _few(x, 1))
        return loss.squeeze(0)
    if not _few(x, 1):
        return NotImplemented
    return functional.nll_loss(
        over_few(torch.log_softmax, x), target, weight, ignore_index=ignore_index, reduction=reduction
    )


class _CrossEntropy(SlotFunction):
    """The mean over examples that count: in fewer operations than torch's, and with fewer yet for its gradient."""

    @staticmethod
    def forward(x: Tensor, target: Tensor, ignore_index: int, turned: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of `x` `[S, B, classes]` and `target` `[S, B]` the loss `[S]`, and what its gradient needs.

        `turned` is whether `x` is turned over meanwhile.
        """
        classes = 1 if turned else 2
        logs = torch.log_softmax(x.mT.contiguous() if turned else x, classes)
        left_out = target == ignore_index
        at = target.masked_fill(left_out, 0).unsqueeze(classes)
        share = (~left_out).to(x.dtype)  # [S, B], of each example in the mean
        share = share / share.sum(1, keepdim=True)
        of_target = logs.gather(classes, at).squeeze(classes).masked_fill(left_out, 0.0)
        return -(of_target * share).sum(1), logs, at, share

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the gradient needs."""
        _, logs, at, share = output
        ctx.mark_non_differentiable(at, share)
        ctx.save_for_backward(logs, at, share)
        ctx.turned = inputs[3]

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        """The gradient by `x`."""
        of_x: Tensor = _CrossEntropyGradient.over(of_loss, *ctx.saved_tensors, 1 if ctx.turned else 2)
        return of_x.mT if ctx.turned else of_x, None, None, None


class _CrossEntropyGradient(SlotFunction):
    @staticmethod
    def forward(of_loss: Tensor, logs: Tensor, at: Tensor, share: Tensor, classes: int) -> Tensor:
        share = (of_loss[:, None] * share).unsqueeze(classes)
        return logs.exp().mul_(share).scatter_add_(classes, at, -share)
