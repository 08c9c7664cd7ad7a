"""Random numbers that follow from a trial alone: seeds from integers, and streams of the global generators."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_MASK = (1 << 64) - 1
# Constants of splitmix64 (Steele, Lea, Flood 2014).
GOLDEN = 0x9E3779B97F4A7C15
FIRST = 0xBF58476D1CE4E5B9
SECOND = 0x94D049BB133111EB


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers, well spread (splitmix64 chained)."""
    state = 0
    for part in parts:
        state = (state + (part & _MASK) + GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * FIRST) & _MASK
        state = ((state ^ (state >> 27)) * SECOND) & _MASK
        state ^= state >> 31
    return state >> 1


class RandomStream:
    """The global generators of torch, NumPy and Python as one seeded stream.

    `with stream:` puts the stream in their place and the caller's own state back afterwards; the next `with`
    goes on where the last one stopped.

    Args:
        seed: what the stream begins with.
        generators: further generators that belong to it, such as a DataLoader's own.
    """

    def __init__(self, seed: int, generators: Sequence[torch.Generator] = ()) -> None:
        on_devices = torch.cuda.default_generators if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        self._generators = (torch.default_generator, *on_devices, *generators)
        outer = self._read()
        self.reseed(seed)
        self._mine = self._read()
        self._write(outer)

    def reseed(self, seed: int) -> None:
        """Seed the generators themselves: for use inside `with`."""
        for generator in self._generators:
            generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def __enter__(self) -> RandomStream:
        self._outer = self._read()
        self._write(self._mine)
        return self

    def __exit__(self, *exc: object) -> None:
        self._mine = self._read()
        self._write(self._outer)

    def _read(self) -> tuple[Any, ...]:
        return [g.get_state() for g in self._generators], np.random.get_state(), random.getstate()

    def _write(self, state: tuple[Any, ...]) -> None:
        for generator, own in zip(self._generators, state[0], strict=True):
            generator.set_state(own)
        np.random.set_state(state[1])
        random.setstate(state[2])
