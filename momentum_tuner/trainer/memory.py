"""What it looks like when memory runs out, and how the trainer says so."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch

T = TypeVar("T")

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc", "_STATUS_ALLOC_FAILED")
"""What torch's RuntimeErrors of that kind say: of its CPU allocator, of CUDA itself and of its libraries."""


class SlotsOutOfMemoryError(Exception):
    """Memory did not suffice; the slots are as they were after their last whole step.

    Attributes:
        keys: the trials that were to train together, or the one to be admitted.
    """

    def __init__(self, reason: str, keys: Iterable[Hashable]) -> None:
        self.keys = list(keys)
        slots = "1 slot" if len(self.keys) == 1 else f"{len(self.keys)} slots"
        super().__init__(f"out of memory at {slots}: {reason}")


class UnfinishedStepError(Exception):
    """A step broke off where it can be neither finished nor undone; its slots are of no more use."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def first_line(error: BaseException) -> str:
    """What an error says, in one line that names its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def free_memory() -> None:
    """Give back what nothing needs any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def within_memory(work: Callable[[], T], keys: Callable[[], Iterable[Hashable]]) -> T:
    """Do some work.

    Args:
        work: what to do; it leaves everything sound when it fails.
        keys: the trials it is for, should memory run out.

    Raises:
        SlotsOutOfMemoryError: memory ran out.
    """
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    # Not in the handler, where the error would keep its frames alive, and all the tensors in them.
    free_memory()
    raise SlotsOutOfMemoryError(reason, keys())
