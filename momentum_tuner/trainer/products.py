"""How products of float32 matrices are computed: on a CPU by the faster of two libraries, on CUDA how exactly."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_SLOTS, _SIZES = 8, (32, 64, 256)
_ADVANTAGE = 0.9
_TIMED = 5


@contextmanager
def fast_products(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let oneDNN multiply float32 matrices on the CPU where it is faster than the BLAS that torch takes, and as exact.

    Torch hands such products to oneDNN only where it may round them to bfloat16. A CPU without matrix units for
    bfloat16 gains nothing by that, so oneDNN computes in float32 all the same, and on many CPUs faster than MKL.
    """
    if device.type != "cpu" or dtype != torch.float32 or not _pays():
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@contextmanager
def rounding(device: torch.device, precision: str) -> Iterator[None]:
    """Whether CUDA may round the factors of float32 products to TF32, which has 10 bits for a fraction.

    Args:
        device: where the products are.
        precision: `tfloat32` lets it, in convolutions and recurrent layers too; `float32` does not; any other leaves it
            as torch or the user has set it.
    """
    wanted = {"tfloat32": "tf32", "float32": "ieee"}.get(precision)
    if device.type != "cuda" or wanted is None:
        yield
        return
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]  # type: ignore[attr-defined]
    before = [settings.fp32_precision for settings in backends]
    try:
        for settings in backends:
            settings.fp32_precision = wanted
        yield
    finally:
        for settings, value in zip(backends, before, strict=True):
            settings.fp32_precision = value


@functools.cache
def _pays() -> bool:
    """Whether oneDNN's products are exact here, and faster, by measurement."""
    if not torch._C._has_mkldnn or torch.cpu._is_amx_tile_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    times: dict[str, list[float]] = {before: [], "bf16": []}
    try:
        for size in _SIZES:
            first, second = torch.randn(2, _SLOTS, size, size, generator=generator)
            exact = first.double() @ second.double()
            errors = {}
            for precision in times:
                settings.fp32_precision = precision
                errors[precision] = float((torch.bmm(first, second) - exact).abs().max())
                times[precision].append(min(_seconds(first, second) for _ in range(_TIMED)))
            if errors["bf16"] > 2.0 * errors[before]:
                return False
    finally:
        settings.fp32_precision = before
    return times["bf16"][1] < _ADVANTAGE * times[before][1]


def _seconds(first: Tensor, second: Tensor) -> float:
    started = time.perf_counter()
    torch.bmm(first, second)
    return time.perf_counter() - started


@contextmanager
def without_libraries(wanted: bool = True) -> Iterator[None]:
    """Torch's own operations in place of oneDNN's and cuDNN's, if that is wanted."""
    if not wanted:
        yield
        return
    onednn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch._C._set_cudnn_enabled(cudnn)
