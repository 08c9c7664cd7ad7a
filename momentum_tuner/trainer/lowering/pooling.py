"""Pooling of images whose examples lie innermost: many windows at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from momentum_tuner.trainer.lowering.convolution import (
    Pair,
    examples_first,
    examples_last,
    lies_examples_innermost,
    of_line,
    pair,
)
from momentum_tuner.trainer.lowering.slotwise import SlotFunction

_threshold_backward = torch.ops.aten.threshold_backward.grad_input


def lower_max_pooling(
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """`max_pool2d` over windows side by side, after a lowered convolution; NotImplemented for anything else."""
    window = _side_by_side(kernel_size, stride, padding)
    plain = pair(dilation) == (1, 1) and not ceil_mode and not return_indices
    if window is None or not plain or not lies_examples_innermost(x):
        return NotImplemented
    out, *_ = _MaxPooling.over(x[None], window)
    return out.squeeze(0)


def lower_average_pooling(
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """`avg_pool2d` over windows side by side that cover the images, after a lowered convolution; or NotImplemented."""
    window = _side_by_side(kernel_size, stride, padding)
    if window is None or divisor_override is not None or not lies_examples_innermost(x):
        return NotImplemented
    if any(n % k for n, k in zip(x.shape[2:], window, strict=True)):
        return NotImplemented
    return _AveragePooling.over(x[None], window).squeeze(0)


def lower_line_pooling(
    lower: Callable[..., Any], x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, *args: Any, **kwargs: Any
) -> Any:
    """`max_pool1d` or `avg_pool1d` as pooling of images of one row; `lower` is the lowering of that."""
    window, steps, edges = of_line(kernel_size, 1), of_line(stride or kernel_size, 1), of_line(padding, 0)
    if not isinstance(x, Tensor) or x.ndim != 3 or None in (window, steps, edges):
        return NotImplemented
    out = lower(x.unsqueeze(2), window, steps, edges, *args, **kwargs)
    return out if out is NotImplemented else out.squeeze(2)


def _side_by_side(kernel_size: Any, stride: Any, padding: Any) -> Pair | None:
    """The size of windows that neither overlap nor leave anything out between them."""
    window = pair(kernel_size)
    return window if pair(stride or kernel_size) == window and pair(padding) == (0, 0) else None


def _covered(x: Tensor, window: Pair) -> Tensor:
    """What the windows cover of images `[S, C, H, W, B]`: a few rows and columns may be left over."""
    height, width = (n // k * k for n, k in zip(x.shape[2:4], window, strict=True))
    return x[:, :, :height, :width]


def _lanes(x: Tensor, axis: int, count: int) -> list[Tensor]:
    """The first pixels along an axis of all windows, the second ones, and so on: views."""
    before = (slice(None),) * axis
    return [x[(*before, slice(first, None, count))] for first in range(count)]


def _best(lanes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The largest of each window, and by how much each lane but the first leads over those before it."""
    best, leads = lanes[0], []
    for lane in lanes[1:]:
        leads.append(lane - best)
        best = torch.maximum(best, lane)
    return best, leads


def _write_gradient(of_best: Tensor, leads: Sequence[Tensor], lanes: list[Tensor]) -> None:
    """Write the gradient by each lane: that of the best goes to the first of those that are as large."""
    for lane, lead in zip(lanes[:0:-1], leads[::-1], strict=True):
        _threshold_backward(of_best, lead, 0, grad_input=lane)
        of_best = torch.sub(of_best, lane, out=lanes[0] if lane is lanes[1] else None)
    if len(lanes) == 1:
        lanes[0].copy_(of_best)


class _MaxPooling(SlotFunction):
    @staticmethod
    def forward(x: Tensor, window: Pair) -> tuple[Tensor, ...]:
        """Of `x` `[S, B, C, H, W]` the largest of each window, and what the gradient is told by."""
        of_rows, leads = _best(_lanes(_covered(examples_last(x), window), 3, window[1]))
        best, more = _best(_lanes(of_rows, 2, window[0]))
        return examples_first(best), *leads, *more

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the gradient needs."""
        x, ctx.window = inputs
        ctx.size = x.shape[3:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, of_out: Tensor, *_: Any) -> tuple[Tensor, None]:
        """The gradient goes to the largest pixel of a window, of equal ones to the first, as torch has it."""
        return _MaxPoolingGradient.over(of_out, ctx.window, ctx.size, *ctx.saved_tensors), None


class _MaxPoolingGradient(SlotFunction):
    @staticmethod
    def forward(of_out: Tensor, window: Pair, size: Pair, *leads: Tensor) -> Tensor:
        of_out = examples_last(of_out)
        slots, channels, rows, _, examples = of_out.shape
        left_over = any(n % k for n, k in zip(size, window, strict=True))
        make = of_out.new_zeros if left_over else of_out.new_empty
        x = make(slots, channels, *size, examples)
        of_rows = of_out.new_empty(slots, channels, rows * window[0], of_out.shape[3], examples)
        within = window[1] - 1
        _write_gradient(of_out, leads[within:], _lanes(of_rows, 2, window[0]))
        _write_gradient(of_rows, leads[:within], _lanes(_covered(x, window), 3, window[1]))
        return examples_first(x)


class _AveragePooling(SlotFunction):
    @staticmethod
    def forward(x: Tensor, window: Pair) -> Tensor:
        """Of `x` `[S, B, C, H, W]` the mean of each window. Torch's own mean over these axes takes longer."""
        of_rows = _sum(_lanes(examples_last(x), 3, window[1]))
        return examples_first(_sum(_lanes(of_rows, 2, window[0])) / math.prod(window))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the gradient needs."""
        ctx.window = inputs[1]

    @staticmethod
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor, None]:
        """Each pixel of a window has its share."""
        return _AveragePoolingGradient.over(of_out, ctx.window), None


class _AveragePoolingGradient(SlotFunction):
    @staticmethod
    def forward(of_out: Tensor, window: Pair) -> Tensor:
        share = examples_last(of_out) / math.prod(window)
        slots, channels, rows, columns, examples = share.shape
        x = share[:, :, :, None, :, None].expand(-1, -1, -1, window[0], -1, window[1], -1)
        return examples_first(x.reshape(slots, channels, rows * window[0], columns * window[1], examples))


def _sum(lanes: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, lanes)
