"""`conv2d` and `conv1d` as one product for each slot, and what comes after it in the order that the product leaves.

Torch's own rule makes one grouped convolution of all slots and lets the examples be the outermost axis, channels and
pixels the inner ones. A product of the weights with all patches of the images leaves the examples innermost: so they
lie here, and what comes after goes through long runs of numbers rather than through rows of a few pixels. The layout is
in the strides alone; shapes are torch's.

Shapes: S slots, B examples, C channels, H x W pixels; P places of a kernel, K numbers under it, `C kh kw`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from momentum_tuner.trainer.lowering.slotwise import SlotFunction

Pair = tuple[int, int]

MOST_IN_PATCHES = 4 << 20
"""Numbers in the patches of a slot, of all layers: torch's own convolution needs no such memory."""


class PatchMemory:
    """Counts what the patches of a forward pass take."""

    def __init__(self) -> None:
        self.held = 0
        """Numbers in those that are kept for the gradient."""

    def takes(self, numbers: int) -> bool:
        """Whether there is room for more of them, which are then kept if there is to be a gradient."""
        if self.held + numbers > MOST_IN_PATCHES:
            return False
        if torch.is_grad_enabled():
            self.held += numbers
        return True


def lies_examples_innermost(x: Any) -> bool:
    """Whether images `[B, C, H, W]` lie as a lowered convolution leaves them."""
    return isinstance(x, Tensor) and x.device.type == "cpu" and x.ndim == 4 and x.stride(0) == 1 and len(x) > 1


def examples_last(x: Tensor) -> Tensor:
    """Images `[S, B, C, H, W]` as `[S, C, H, W, B]`, contiguous."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def examples_first(x: Tensor) -> Tensor:
    """Images `[S, C, H, W, B]` as `[S, B, C, H, W]`, in the memory in which they are."""
    return x.permute(0, 4, 1, 2, 3)


def pair(value: Any) -> Pair | None:
    """An option of two axes, such as a stride; None for what says something else."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, list | tuple) and all(isinstance(v, int) for v in value) and 1 <= len(value) <= 2:
        return value[0], value[-1]
    return None


def lower_convolution(
    x: Any,
    weight: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    memory: PatchMemory,
) -> Any:
    """`torch.conv2d` on a CPU; NotImplemented for groups, dilation, autocast and patches that take too much memory."""
    plain = isinstance(x, Tensor) and x.device.type == "cpu" and x.ndim == 4 and pair(dilation) == (1, 1)
    if not plain or groups != 1 or torch.is_autocast_enabled("cpu"):
        return NotImplemented
    steps, edges = pair(stride), pair(padding)
    if steps is None or edges is None or x.shape[1] != weight.shape[1]:
        return NotImplemented
    kernel = weight.shape[2:]
    places = [(n + 2 * e - k) // s + 1 for n, e, k, s in zip(x.shape[2:], edges, kernel, steps, strict=True)]
    if min(places) < 1 or not memory.takes(len(x) * math.prod(places) * weight[0].numel()):
        return NotImplemented
    out, _ = _Convolution.over(x[None], weight[None], None if bias is None else bias[None], steps, edges)
    return out.squeeze(0)


def lower_line_convolution(
    x: Any,
    weight: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    memory: PatchMemory,
) -> Any:
    """`torch.conv1d` as a convolution of images of one row."""
    steps, edges, holes = of_line(stride, 1), of_line(padding, 0), of_line(dilation, 1)
    if not isinstance(x, Tensor) or x.ndim != 3 or None in (steps, edges, holes):
        return NotImplemented
    out = lower_convolution(x.unsqueeze(2), weight.unsqueeze(2), bias, steps, edges, holes, groups, memory=memory)
    return out if out is NotImplemented else out.squeeze(2)


def of_line(value: Any, other: int) -> Pair | None:
    """An option of one axis, such as a stride, for images of one row; None for what says something else."""
    found = pair(value)
    return None if found is None or found[0] != found[1] else (other, found[1])


def lower_view(x: Tensor, *shape: Any, size: Any = (), **kwargs: Any) -> Any:
    """`Tensor.view` of what a lowered convolution has left in an order in which it cannot be: a copy instead."""
    shape = shape or (size,)
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
    known = not kwargs and len(sizes) > 0 and all(isinstance(n, int) for n in sizes)
    return x.reshape(sizes) if known and not x.is_contiguous() else NotImplemented


def _patches(x: Tensor, kernel: Sequence[int], stride: Pair, padding: Pair) -> Tensor:
    """What lies under the kernel at each place of images `[S, C, H, W, B]`: `[S, C, kh, kw, H', W', B]`, a view."""
    if any(padding):
        x = functional.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    return x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1]).permute(0, 1, 5, 6, 2, 3, 4)


class _Convolution(SlotFunction):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> tuple[Tensor, Tensor]:
        """Of `x` `[S, B, C, H, W]` and `weight` `[S, O, C, kh, kw]` the images `[S, B, O, H', W']`, and the patches
        `[S, K, P B]`; those of a minibatch that all slots share are made once.
        """
        slots, outputs = weight.shape[:2]
        shared = slots > 1 and x.stride(0) == 0
        patches = _patches(examples_last(x[:1] if shared else x), weight.shape[3:], stride, padding)
        size = patches.shape[4:]
        patches = patches.reshape(len(patches), -1, size.numel())
        flat = weight.reshape(slots, outputs, -1)
        if shared:
            flat, one = flat.flatten(0, 1), patches.squeeze(0)
            out = flat @ one if bias is None else torch.addmm(bias.reshape(-1, 1), flat, one)
        else:
            out = flat @ patches if bias is None else torch.baddbmm(bias.unsqueeze(2), flat, patches)
        return examples_first(out.view(slots, outputs, *size)), patches.expand(slots, -1, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the gradient needs."""
        x, weight, bias, ctx.stride, ctx.padding = inputs
        ctx.size, ctx.biased = x.shape[3:], bias is not None
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(weight, output[1])

    @staticmethod
    def backward(ctx: Any, of_out: Tensor, _: Any) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        """The gradients by images, weights and bias."""
        whole = ctx.needs_input_grad[0]
        of_x, of_weight, of_bias = _ConvolutionGradient.over(
            of_out, *ctx.saved_tensors, ctx.size, ctx.stride, ctx.padding, whole
        )
        return of_x if whole else None, of_weight, of_bias if ctx.biased else None, None, None


class _ConvolutionGradient(SlotFunction):
    @staticmethod
    def forward(
        of_out: Tensor, weight: Tensor, patches: Tensor, size: Pair, stride: Pair, padding: Pair, whole: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients by images, of no size unless the `whole` is wanted, by weights and by bias."""
        slots, _, channels, *kernel = weight.shape
        of_out = examples_last(of_out)
        places = of_out.shape[2:]
        flat = of_out.flatten(2)  # [S, O, P B]
        # In this order the products are fastest: the long axis is the one that is summed over.
        if slots > 1 and patches.stride(0) == 0:
            of_weight = (patches[0] @ flat.flatten(0, 1).mT).mT
        else:
            of_weight = torch.bmm(patches, flat.mT).mT
        of_weight = of_weight.reshape(weight.shape)
        of_x = of_out.new_empty(slots, 0)
        if whole:
            of_patches = torch.bmm(weight.flatten(2).mT, flat).view(slots, channels, *kernel, *places)
            of_x = examples_first(_folded(of_patches, size, stride, padding))
        return of_x, of_weight, flat.sum(2)


def _folded(of_patches: Tensor, size: Pair, stride: Pair, padding: Pair) -> Tensor:
    """The sum over all patches in which a pixel is: of `[S, C, kh, kw, H', W', B]` images `[S, C, H, W, B]`."""
    slots, channels, height, width, down, across, examples = of_patches.shape
    edge = [n + 2 * p for n, p in zip(size, padding, strict=True)]
    x = of_patches.new_zeros(slots, channels, *edge, examples)
    for i in range(height):
        for j in range(width):
            rows = slice(i, i + stride[0] * (down - 1) + 1, stride[0])
            columns = slice(j, j + stride[1] * (across - 1) + 1, stride[1])
            x[:, :, rows, columns].add_(of_patches[:, :, i, j])
    return x[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]
