"""What a task shows in a first step: what that keeps in memory, and what vmap says of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from momentum_tuner.trainer.memory import first_line

logger = logging.getLogger(__name__)


def bytes_kept(step: Callable[[], tuple[Tensor, list[Tensor]]], batch: Any) -> int | None:
    """What a forward pass keeps for its gradient, besides what is there anyway.

    Args:
        step: returns the loss, and tensors that are there anyway.
        batch: which is, too.

    Returns:
        Bytes, or None where that is not to be known: not of a loss with derivatives of its own.
    """
    kept: dict[int, int] = {}  # by address

    def keep(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            memory = tensor.untyped_storage()
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor.detach()

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, there = step()
    except Exception as error:  # which the trials are the ones to say, if it is not of the hooks themselves
        logger.debug("what an example takes of memory is not known: %s", first_line(error))
        return None
    for tensor in (*there, *(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del loss  # whose graph has kept it all, so that no address was used twice
    return sum(kept.values())


@contextmanager
def vmap_warnings() -> Iterator[list[str]]:
    """Collect torch's warnings that an operation has no batching rule and runs as a slow loop, in short form."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    for warning in caught:
        text = str(warning.message)
        if "performance drop" in text:
            operation = text.split("batching rule for ", 1)[-1].split(".", 1)[0]
            found.append(f"vmap has no batching rule for {operation} and would loop over the slots")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
