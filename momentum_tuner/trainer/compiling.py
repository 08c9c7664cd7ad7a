"""torch.compile for captured graphs: one compilation serves every width but 1, and is kept for later runs."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

Compiled = Callable[..., Sequence[Tensor]]


def compile_graph(graph: fx.GraphModule, tensors: Sequence[Tensor], stacked: Sequence[bool]) -> Compiled:
    """A graph compiled for all widths above 1; this may take minutes.

    Args:
        graph: of `capture.capture`.
        tensors: an example of its arguments, of more than one row.
        stacked: which of them have one row per slot.

    Raises:
        Exception: whatever went wrong, such as a missing C++ compiler.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_code()))
    examples = [t.clone() for t in tensors]
    for example, has_rows in zip(examples, stacked, strict=True):
        if has_rows:
            torch._dynamo.maybe_mark_dynamic(example, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of torch's own code
        compiled: Compiled = torch.compile(graph.forward)
        compiled(*examples)
    mark = _mark(graph)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return compiled


def was_compiled(graph: fx.GraphModule) -> bool:
    """Whether the compiled code of a graph is kept from before."""
    return _mark(graph).exists()


def without_recompiling(compiled: Compiled, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Call compiled code at a width that it has not met.

    Raises:
        RuntimeError: it would have to be compiled anew.
    """
    with torch.compiler.set_stance("fail_on_recompile"):
        return compiled(*tensors)


def compiled_code() -> Path:
    """Where compiled code is kept between runs: `TORCHINDUCTOR_CACHE_DIR`, or a folder of the user's cache.

    Code for another number of threads is other code, which torch's cache does not tell apart.
    """
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "momentum-tuner" / f"compiled-{torch.get_num_threads()}"


def _mark(graph: fx.GraphModule) -> Path:
    """A file that says that a graph has been compiled."""
    what = f"{torch.__version__} {torch.get_num_threads()} {graph.code}"
    return compiled_code() / "graphs" / hashlib.sha256(what.encode()).hexdigest()
