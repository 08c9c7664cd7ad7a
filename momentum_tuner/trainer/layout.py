"""A model's parameters as one flat row or in segments, and its buffers by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from momentum_tuner.errors import TaskError
from momentum_tuner.tasks.task import check_parameters

ALONE = 1024
"""Elements from which a parameter has a segment of its own; all smaller ones share one, as each segment costs an update
some calls."""

Rows = tuple[Tensor, ...]
"""Rows `[parameters]` of slots, cut into segments: `[slots, segment's size]` each, contiguous.

So the weights of all slots lie side by side, as a library multiplies them without copying them first, and what a
product gives as their gradient need not be copied into a row.
"""


@dataclass(frozen=True)
class Layout:
    """Where each trainable parameter lies in a row `[parameters]`.

    Attributes:
        names: parameter names as `named_parameters` gives them (shared ones once).
        shapes: their shapes.
        sizes: their element counts; they lie in the row in this order, without gaps.
        dtype: the one dtype of all of them.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """The layout of a model's trainable parameters.

        Raises:
            TaskError: the model has none, or they differ in dtype, are complex or have no shape yet.
        """
        check_parameters(model)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise TaskError("task.model: the model has no trainable parameters")
        dtypes = {p.dtype for _, p in named}
        if len(dtypes) > 1:
            raise TaskError(
                f"task.model: its parameters have several dtypes ({', '.join(sorted(map(str, dtypes)))}); "
                "convert the model to one with .to(dtype)"
            )
        return cls(
            tuple(name for name, _ in named),
            tuple(p.shape for _, p in named),
            tuple(p.numel() for _, p in named),
            dtypes.pop(),
        )

    @property
    def parameters(self) -> int:
        """Number of trainable scalars, the length of a row."""
        return sum(self.sizes)

    @functools.cached_property
    def segments(self) -> tuple[tuple[int, ...], ...]:
        """The parameters of each segment, by their places in `names`; those that share one are in the last."""
        large = [(i,) for i, size in enumerate(self.sizes) if size >= ALONE]
        small = tuple(i for i, size in enumerate(self.sizes) if size < ALONE)
        return (*large, small) if small else tuple(large)

    def split(self, rows: Tensor) -> Rows:
        """Segments of one or more rows `[..., parameters]`, as views or copies."""
        pieces = torch.split(rows, list(self.sizes), dim=-1)
        return tuple(
            pieces[which[0]] if len(which) == 1 else torch.cat([pieces[i] for i in which], dim=-1)
            for which in self.segments
        )

    def join(self, segments: Rows) -> Tensor:
        """The rows `[..., parameters]` that segments were cut from."""
        return torch.cat(self.pieces(segments), dim=-1)

    def stack(self, rows: Sequence[Tensor]) -> Rows:
        """The rows `[parameters]` of several slots in segments, copied."""
        return tuple(segment.contiguous() for segment in self.split(torch.stack(list(rows))))

    def pieces(self, segments: Rows) -> list[Tensor]:
        """The flat parameters `[..., size]` within segments `[..., segment's size]`, in the order of `names`."""
        found: dict[int, Tensor] = {}
        for segment, which in zip(segments, self.segments, strict=True):
            sizes = [self.sizes[i] for i in which]
            found |= zip(which, [segment] if len(which) == 1 else torch.split(segment, sizes, dim=-1), strict=True)
        return [found[i] for i in range(len(found))]

    def views(self, segments: Rows) -> dict[str, Tensor]:
        """The parameters of one slot by name as views of its segments `[segment's size]`."""
        pieces = self.pieces(segments)
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def flatten(self, model: nn.Module) -> Tensor:
        """A model's trainable parameters as a new row `[parameters]`."""
        by_name = dict(model.named_parameters())
        return torch.cat([by_name[name].detach().reshape(-1) for name in self.names])


def fill_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give a model the weights and buffers of a slot.

    Args:
        model: of the slot's task.
        tensors: those of the slot's `SlotState`: `parameters` `[parameters]`, and `buffer/model.<name>`.

    Raises:
        TaskError: they are not those of such a model.
    """
    prefix = "buffer/model."  # a trainer's model is a part of the module that computes its loss
    layout = Layout.of(model)
    values = layout.views(layout.split(tensors["parameters"]))
    values |= {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith("buffer/")}
    there = dict(model.named_parameters()) | dict(model.named_buffers())  # a state dict lacks what is not persistent
    with torch.no_grad():
        for name, value in values.items():
            if name not in there or there[name].shape != value.shape:
                raise TaskError(f"task.model: it has no {name} of shape {list(value.shape)}, which was trained")
            there[name].copy_(value)
    return model


def state_beside_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Buffers and frozen parameters by name: what the model needs besides its trainable row."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return {**frozen, **dict(model.named_buffers())}


def differing(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> set[str]:
    """Names whose tensors are not equal in both mappings."""
    return {
        name
        for name, value in first.items()
        if value.shape != second[name].shape or not torch.equal(value, second[name])
    }


def running_statistics(model: nn.Module) -> set[str]:
    """Names of the buffers that batch and instance norm layers write to.

    They can be the same after a step, as a mean of 0 is where the inputs' mean is 0, and torch does not count the
    writes of its normalization as changes of the tensor's version.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _NormBase)]
    return {f"{name}.{buffer}" for name, layer in layers for buffer, _ in layer.named_buffers(recurse=False)}
