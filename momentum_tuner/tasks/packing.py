"""A loop's state, nested as `state_dict()` nests it, as tensors by name and plain JSON: nothing in it can run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

PREFIX = "loop/"
"""What the names of a packed state's tensors begin with."""


def pack(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Take a state apart; its tensors are copied to the CPU.

    Args:
        state: mappings, lists and tuples, in each other, of tensors, numbers, texts, truth values and None; the keys
            of mappings are texts or whole numbers.

    Returns:
        the tensors by name, and the rest as plain JSON values.

    Raises:
        TypeError: something else is in it; the message says where.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"the state to save must be a mapping, such as {{'model': model.state_dict()}}, not {state!r}")
    tensors: dict[str, Tensor] = {}
    return tensors, _packed(state, "state", tensors)


def _packed(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    match value:
        case Tensor():
            name = f"{PREFIX}{len(tensors)}"
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": name}
        case Mapping():
            pairs = [[_key(key, where), _packed(item, f"{where}[{key!r}]", tensors)] for key, item in value.items()]
            return {"mapping": pairs}
        case list() | tuple():
            items = [_packed(item, f"{where}[{index}]", tensors) for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where} is of type {type(value).__name__}, which is not saved: make it a tensor, number or text")


def _key(key: object, where: str) -> str | int:
    if type(key) in (str, int):
        return key  # type: ignore[return-value]
    raise TypeError(f"{where} has the key {key!r}, which is not saved: keys must be texts or whole numbers")


def unpack(tensors: Mapping[str, Tensor], packed: Any) -> dict[str, Any]:
    """A copy of the state that `pack` took apart, with its tensors on the CPU.

    Raises:
        ValueError: the two are not what `pack` returned.
    """
    state = _unpacked(packed, tensors)
    if not isinstance(state, dict):
        raise ValueError("the state of the loop is not a mapping")
    return state


def _unpacked(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    match packed:
        case {"tensor": str(name)} if name in tensors:
            return tensors[name].clone(memory_format=torch.contiguous_format)
        case {"mapping": list(pairs)}:
            return {_pair(pair)[0]: _unpacked(_pair(pair)[1], tensors) for pair in pairs}
        case {"tuple": list(items)}:
            return tuple(_unpacked(item, tensors) for item in items)
        case list(items):
            return [_unpacked(item, tensors) for item in items]
        case None | bool() | int() | float() | str():
            return packed
    raise ValueError(f"the state of the loop has {str(packed)[:60]!r} in it, which is none of its values")


def _pair(pair: Any) -> tuple[str | int, Any]:
    match pair:
        case [str() | int() as key, value]:
            return key, value
    raise ValueError("the state of the loop has a mapping whose items are no pairs")
