"""Lowering: torch functions that vmap cannot batch, or not well, in operations that it batches well.

It works on the functions that modules call (`torch.lstm` is what `nn.LSTM` calls), so that a user's model profits as it
is, and what it does not know, such as a packed sequence, goes on to torch itself. The results are torch's to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from momentum_tuner.trainer.lowering.attention import lower_attention, lower_multi_head_attention
from momentum_tuner.trainer.lowering.convolution import (
    PatchMemory,
    lower_convolution,
    lower_line_convolution,
    lower_view,
)
from momentum_tuner.trainer.lowering.normalization import lower_batch_norm
from momentum_tuner.trainer.lowering.pooling import (
    lower_average_pooling,
    lower_line_pooling,
    lower_max_pooling,
)
from momentum_tuner.trainer.lowering.recurrent import layer_by_layer, lower_recurrent
from momentum_tuner.trainer.lowering.softmax import lower_cross_entropy, lower_softmax

Drop = Callable[[Tensor, float], Tensor]


def _recurrent(lower: Callable[..., Any], kind: Any) -> Callable[..., Any]:
    def lowered(drop: Drop, *args: Any, **kwargs: Any) -> Any:
        return NotImplemented if kwargs else lower(kind, drop, args)

    return lowered


_RECURRENT: Mapping[Any, str] = MappingProxyType(
    {torch.rnn_tanh: "tanh", torch.rnn_relu: "relu", torch.gru: "gru", torch.lstm: "lstm"}
)


def _lower_embedding(
    x: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, *args: Any, **kwargs: Any
) -> Any:
    """An embedding whose gradient is sparse, for which vmap has no rules, as one whose gradient is dense."""
    options = dict(zip(("norm_type", "scale_grad_by_freq", "sparse"), args, strict=False)) | kwargs
    if max_norm is not None or not options.get("sparse"):
        return NotImplemented
    return functional.embedding(x, weight, padding_idx, **(options | {"sparse": False}))


_WITH_DROPOUT: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {
        **{func: _recurrent(lower_recurrent, kind) for func, kind in _RECURRENT.items()},
        functional.multi_head_attention_forward: lower_multi_head_attention,
        functional.scaled_dot_product_attention: lower_attention,
    }
)
"""Functions that may draw random numbers for a dropout within."""

_PLAIN: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {
        **dict.fromkeys((torch.softmax, functional.softmax, Tensor.softmax), partial(lower_softmax, torch.softmax)),
        **dict.fromkeys(
            (torch.log_softmax, functional.log_softmax, Tensor.log_softmax), partial(lower_softmax, torch.log_softmax)
        ),
        functional.cross_entropy: lower_cross_entropy,
        functional.embedding: _lower_embedding,
        functional.batch_norm: lower_batch_norm,
        Tensor.view: lower_view,
        torch.avg_pool1d: partial(lower_line_pooling, lower_average_pooling),
        functional.avg_pool2d: lower_average_pooling,
        **dict.fromkeys((functional.max_pool1d, torch.max_pool1d), partial(lower_line_pooling, lower_max_pooling)),
        **dict.fromkeys((functional.max_pool2d, torch.max_pool2d), lower_max_pooling),
    }
)


_WITH_PATCHES: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {torch.conv1d: lower_line_convolution, torch.conv2d: lower_convolution}
)
"""Functions that keep patches."""


class Lowering(TorchFunctionMode):
    """While it is active, torch functions are lowered.

    Args:
        drop: the dropout within them.
        all_of_them: all that can be; otherwise no more than the dropout within them asks for.
    """

    def __init__(self, drop: Drop, all_of_them: bool = True) -> None:
        super().__init__()
        self._drop = drop
        self._memory = PatchMemory()
        self._with_dropout: dict[Any, Callable[..., Any]] = {**_WITH_DROPOUT}
        self._plain: dict[Any, Callable[..., Any]] = {}
        if all_of_them:
            self._plain |= _PLAIN
            self._plain |= {func: partial(lower, memory=self._memory) for func, lower in _WITH_PATCHES.items()}
        else:
            self._with_dropout |= {func: _recurrent(layer_by_layer, func) for func in _RECURRENT}

    def __enter__(self) -> Lowering:
        """Begin a forward pass."""
        self._memory.held = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Call the function, or what stands in for it."""
        kwargs = kwargs or {}
        out = NotImplemented
        if func in self._with_dropout:
            out = self._with_dropout[func](self._drop, *args, **kwargs)
        elif func in self._plain:
            if "input" in kwargs:  # the first argument of all of them
                args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
            out = self._plain[func](*args, **kwargs)
        return func(*args, **kwargs) if out is NotImplemented else out


def draws_within(model: nn.Module) -> bool:
    """Whether a model has layers with a dropout of their own, which only a lowering can tie to the trial."""
    return any(
        (isinstance(layer, nn.RNNBase) and layer.dropout > 0 and layer.num_layers > 1)
        or (isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0)
        for layer in model.modules()
    )
