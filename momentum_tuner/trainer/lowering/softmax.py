"""Softmax over few classes, and the cross-entropy with it.

Torch's CPU kernel takes the numbers of a row one by one where they do not fill a vector register; over another axis
than the last it works on many rows at once, which is many times faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
    if not plain or not _few(x, 1) or x.ndim != 2 or target.is_floating_point():
        return NotImplemented
    return functional.nll_loss(
        over_few(torch.log_softmax, x), target, weight, ignore_index=ignore_index, reduction=reduction
    )
