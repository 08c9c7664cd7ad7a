"""Functions written for all slots at once, with a gradient of their own."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.autograd import Function


class SlotFunction(Function):
    """A function of tensors whose first axis is the slot.

    A caller inside vmap passes an axis of length 1 there, and vmap puts its slots into that axis: so `forward` sees the
    tensors of all slots as they lie in memory, and none of its operations needs a batching rule.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.vmap = staticmethod(functools.partial(_over_slots, cls))  # type: ignore[method-assign]

    @classmethod
    def over(cls, *args: Any) -> Any:
        """The function of these arguments; its gradient is known."""
        return cls.apply(*args)  # type: ignore[no-untyped-call]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing: for functions that are the gradient of another."""


def _over_slots(function: type[SlotFunction], info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """The rule by which vmap calls `function`: its slots become the first axis."""

    def with_slots(value: Any, axis: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        if axis is None:
            return value.expand(info.batch_size, *value.shape[1:])
        return (value.movedim(axis, 0) if axis else value).flatten(0, 1)

    out = function.over(*map(with_slots, args, in_dims))
    if isinstance(out, Tensor):
        return out.unsqueeze(1), 0
    return tuple(one.unsqueeze(1) for one in out), (0,) * len(out)
