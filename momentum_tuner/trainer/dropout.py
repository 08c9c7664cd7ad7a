"""Dropout whose mask depends on the trial alone, never on its slot or its neighbours.

vmap can draw random numbers only for the whole batch of slots at once, so that a trial's mask would depend on
where it sits. Here the mask is a hash of a key (the trial's seed, epoch and step), the number of the call within the
forward pass, and the position: the same trial drops the same units in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from momentum_tuner.trainer.randomness import FIRST, GOLDEN, SECOND, mix_seed

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(value: Tensor) -> Tensor:
    """splitmix64's finalizer over int64; the arithmetic right shift is made logical by a mask."""
    value = (value ^ ((value >> 30) & ((1 << 34) - 1))) * _signed(FIRST)
    value = (value ^ ((value >> 27) & ((1 << 37) - 1))) * _signed(SECOND)
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def step_keys(seeds: list[tuple[int, int]], steps: int) -> NDArray[np.int64]:
    """Keys `[steps, slots]` for slots that train `(seed, epoch)`."""
    return np.array([[mix_seed(seed, epoch, step) for seed, epoch in seeds] for step in range(steps)], dtype=np.int64)


class _Calls:
    """Counts the dropout calls of one forward pass, and makes those that no layer of their own stands for."""

    def __init__(self) -> None:
        self.made = 0
        self.key: Tensor | None = None
        self._numbers: dict[int, int] | None = None

    def begin(self, remember: bool) -> None:
        """Begin a forward pass.

        Args:
            remember: which call is which, for parts of the pass that are computed anew for their gradient.
        """
        self.made = 0
        self._numbers = {} if remember else None

    def number(self) -> int:
        """The number of a call in its forward pass, from 1; of one that is made anew the same.

        Calls are told apart by torch's random state, which checkpointing puts back for that.
        """
        if self._numbers is None:
            self.made += 1
            return self.made
        drawn = int(torch.randint(1 << 62, (), device="cpu"))
        return self._numbers.setdefault(drawn, len(self._numbers) + 1)

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Dropout within another function, under the key of the step.

        Raises:
            RuntimeError: there is no key, as the model was not known to draw random numbers.
        """
        if self.key is None:
            raise RuntimeError("it draws random numbers for a dropout that is no layer of its own")
        return _dropped(x, p, self.key, self.number(), x.shape)


class KeyedDropout(nn.Module):
    """Stands in for `nn.Dropout` and its channel-wise forms; `key` is set for each step by the trainer.

    Args:
        p: probability of dropping.
        channelwise: drop whole channels, as `nn.Dropout2d` does.
        calls: the counter that all layers of a model share.
    """

    key: Tensor

    def __init__(self, p: float, channelwise: bool, calls: _Calls) -> None:
        super().__init__()
        self.p = p
        self.channelwise = channelwise
        self.calls = calls
        self.register_buffer("key", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """`x` with each element (or channel) dropped with probability p, the rest scaled by 1/(1 - p)."""
        if not self.training or self.p == 0.0:
            return x
        shape = (*x.shape[:2], *(1 for _ in x.shape[2:])) if self.channelwise else x.shape
        return _dropped(x, self.p, self.key, self.calls.number(), shape)


def _dropped(x: Tensor, p: float, key: Tensor, call: int, shape: Sequence[int]) -> Tensor:
    """Dropout number `call` of a forward pass, with a mask of `shape`, which `x` broadcasts."""
    if p >= 1.0:
        return torch.zeros_like(x)
    index = torch.arange(1, math.prod(shape) + 1, device=x.device, dtype=torch.int64) * _signed(GOLDEN)
    bits = _mix(_mix(key + _signed(call * SECOND)) + index)
    keep = ((bits >> 11) & ((1 << 53) - 1)) >= int(p * (1 << 53))
    return x * keep.view(shape).to(x.dtype) / (1.0 - p)


def key_dropout(model: nn.Module) -> tuple[list[str], _Calls]:
    """Replace the model's dropout layers by `KeyedDropout`; return the names of their key buffers and the counter."""
    calls = _Calls()
    names: list[str] = []
    for name, module in list(model.named_modules()):
        for child_name, child in list(module._modules.items()):  # named_children leaves out a layer's second name
            if type(child) in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
                assert isinstance(child, nn.modules.dropout._DropoutNd)
                keyed = KeyedDropout(child.p, type(child) is not nn.Dropout, calls)
                keyed.train(child.training)
                setattr(module, child_name, keyed)
                names.append(f"{name}.{child_name}.key" if name else f"{child_name}.key")
    return names, calls
