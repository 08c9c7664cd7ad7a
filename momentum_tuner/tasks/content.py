"""What a task's trials learn from, by content: so that two runs can be told to have seen the same data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from momentum_tuner.tasks.loop import Loop
from momentum_tuner.tasks.task import Task, length

_DIGITS = 16
_MOST_BYTES = 64_000_000
"""Of a tensor with more, evenly spaced rows are read."""


def describe_data(task: Task | Loop, factory: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The name, a digest, the kind and the sizes of a task's data, as plain JSON values.

    The digest of tensors in memory is that of their values. Batches made on the fly, as by a DataLoader, are not read:
    their digest, a landscape's and a loop's is of the factory and its params.

    Args:
        task: the task.
        factory: what it was made by.
        params: the arguments of that.
    """
    digest = hashlib.sha256(json.dumps([factory, dict(params)], sort_keys=True, default=str).encode())
    found: dict[str, Any] = {"name": factory.rpartition(":")[2], "source": factory, "kind": "landscape"}
    if isinstance(task, Loop):
        return {**found, "kind": "loop", "digest": digest.hexdigest()[:_DIGITS]}
    for name, data in (("train", task.train), ("valid", task.valid)):
        if isinstance(data, TensorDataset):
            digest = digest if name == "valid" else hashlib.sha256()
            found["kind"] = "tensors"
            found[name] = [list(tensor.shape) for tensor in data.tensors]
            for tensor in data.tensors:
                _read(digest, tensor)
        elif data is not None:
            found["kind"] = "batches"
            found[name] = length(data)
    return {**found, "digest": digest.hexdigest()[:_DIGITS]}


def _read(digest: Any, tensor: Tensor) -> None:
    """Add a tensor's shape, type and values to a digest."""
    digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
    values = tensor.detach()
    size = values.numel() * values.element_size()
    if size > _MOST_BYTES and values.ndim:
        values = values[:: -(-size // _MOST_BYTES)]
    digest.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
