"""A model's parameters as one flat row, and its buffers by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from momentum_tuner.errors import TaskError


@dataclass(frozen=True)
class Layout:
    """Where each trainable parameter lies in a row of the flat `[slots, parameters]` tensor.

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
            TaskError: the model has none, or they differ in dtype.
        """
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

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """The parameters by name as views of a row `[parameters]`."""
        pieces = torch.split(row, list(self.sizes))
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
    """
    prefix = "buffer/model."  # a trainer's model is a part of the module that computes its loss
    values = Layout.of(model).views(tensors["parameters"])
    values |= {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith("buffer/")}
    unknown = model.load_state_dict(values, strict=False).unexpected_keys
    if unknown:
        raise TaskError(f"task.model: it has no {unknown[0]}, which was trained")
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
