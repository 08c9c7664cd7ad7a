"""Captured graphs as compiled code: one compilation serves every width but 1, and is kept for later runs.

On a CPU the code is compiled ahead of time into a library of its own (AOTInductor): a call goes straight to it, and a
later run only opens it. Elsewhere it is torch.compile's, on CUDA with graphs of its kernels, as small models wait there
for the launch of one after the other. Of the processes of a machine that want the same code one compiles it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import operator
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, fx, nn

logger = logging.getLogger(__name__)

Compiled = Callable[..., Sequence[Tensor]]

MOST_SLOTS = 1024
"""The greatest width that compiled code is asked for."""


def compile_graph(graph: fx.GraphModule, tensors: Sequence[Tensor], stacked: Sequence[bool]) -> Compiled:
    """A graph compiled for all widths above 1, or those that it can serve; this may take minutes.

    Where another process compiles the same graph it waits for that.

    Args:
        graph: of `capture.capture`.
        tensors: an example of its arguments, of more than one row; they are left as they are.
        stacked: which of them have one row per slot.

    Raises:
        Exception: whatever went wrong, such as a missing C++ compiler.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled_code())
    mark = _mark(graph)
    with _locked(mark.with_suffix(".compiling"), wait=True):
        return _compile(graph, mark, tensors, stacked)


def turn_to_compile(graph: fx.GraphModule) -> AbstractContextManager[bool]:
    """Whether no other process of this machine has its turn to compile a graph; if so, this one has it meanwhile."""
    return _locked(_mark(graph).with_suffix(".turn"), wait=False)


def _compile(graph: fx.GraphModule, mark: Path, tensors: Sequence[Tensor], stacked: Sequence[bool]) -> Compiled:
    if tensors[0].device.type == "cpu":
        kept = _open(mark)
        if kept is not None and len(tensors[0]) in kept.widths:
            return kept
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of torch's own code
            path, widths = _compile_ahead(graph, tensors, stacked)
        _write(mark, f"{widths.start} {widths.stop} {path}")
        return _Library(path, widths)
    examples = [t.clone() for t in tensors]
    for example, has_rows in zip(examples, stacked, strict=True):
        if has_rows:
            torch._dynamo.maybe_mark_dynamic(example, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled: Compiled = torch.compile(
            graph.forward, mode="reduce-overhead" if tensors[0].device.type == "cuda" else None
        )
        compiled(*examples)
    _write(mark, "")
    return _WithoutRecompiling(compiled)


def was_compiled(graph: fx.GraphModule) -> bool:
    """Whether the compiled code of a graph is kept from before."""
    return _mark(graph).exists()


def compiled_code() -> Path:
    """Where compiled code is kept between runs: `TORCHINDUCTOR_CACHE_DIR`, or a folder of the user's cache.

    Code for another number of threads is other code, which torch's cache does not tell apart.
    """
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    torchs_own = str(Path(tempfile.gettempdir()) / "torchinductor_")  # where it puts its own choice, which lasts a boot
    if folder and not folder.startswith(torchs_own):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "momentum-tuner" / f"compiled-{torch.get_num_threads()}"


class _Library:
    """The code of a library that was compiled ahead of time.

    It takes for granted that its arguments are contiguous and that their width is one of those that it serves.
    """

    def __init__(self, path: str, widths: range) -> None:
        self.widths = widths
        self._run = torch._C._aoti.AOTIModelContainerRunnerCpu(path, 1).run

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        if len(tensors[0]) not in self.widths:
            raise ValueError(f"the code does not serve {len(tensors[0])} slots")
        contiguous = [t if t.is_contiguous() else t.contiguous() for t in tensors]
        found: Sequence[Tensor] = self._run(contiguous)
        for tensor, copy in zip(tensors, contiguous, strict=True):
            if tensor is not copy and 0 not in tensor.stride():
                tensor.copy_(copy)  # which the code may have written to
        return found


class _WithoutRecompiling:
    """Code of torch.compile, which is compiled anew for no width.

    Raises:
        RuntimeError: it would have to be.
    """

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self._widths: set[int] = set()

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        if len(tensors[0]) in self._widths:
            return self._compiled(*tensors)
        with torch.compiler.set_stance("fail_on_recompile"):
            found = self._compiled(*tensors)
        self._widths.add(len(tensors[0]))
        return found


class _Module(nn.Module):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph

    def forward(self, *tensors: Tensor) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self.graph_module(*tensors)
        return found


def _compile_ahead(graph: fx.GraphModule, tensors: Sequence[Tensor], stacked: Sequence[bool]) -> tuple[str, range]:
    """Compile a graph into a library; returns its path and the widths that it serves."""
    slots = torch.export.Dim("slots", min=2)
    examples = tuple(t.clone(memory_format=torch.contiguous_format) for t in tensors)
    shapes = tuple({0: slots} if has_rows else {} for has_rows in stacked)
    with torch.no_grad():
        program = torch.export.export(_Module(graph), examples, dynamic_shapes=(shapes,), strict=False)
        module = program.module(check_guards=False)
        library = torch._inductor.aot_compile(module, examples)
    assert isinstance(library, str)
    return library, _widths_served(module, len(tensors[0]))


def _widths_served(module: fx.GraphModule, width: int) -> range:
    """The widths around one for which holds what the compiler took for granted, of which its code sees nothing.

    A convolution's number of groups, say, is a constant to it, and so is the width then.
    """
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    example = next(node for node in module.graph.nodes if node.op == "placeholder").meta["val"]
    guards = {guard.expr for guard in example.fake_mode.shape_env.guards}

    def serves(width: int) -> bool:
        # On plain numbers: sympy's own substitution would take longer than the compiler, for a thousand widths.
        found = (sympy_interp(PythonReferenceAnalysis, dict.fromkeys(g.free_symbols, width), g) for g in guards)
        return all(found)

    lowest = highest = width
    while lowest > 2 and serves(lowest - 1):
        lowest -= 1
    while highest < MOST_SLOTS and serves(highest + 1):
        highest += 1
    return range(lowest, highest + 1)


def _open(mark: Path) -> _Library | None:
    """The library that a mark tells of, if it is still there."""
    try:
        first, end, path = mark.read_text().split(" ", 2)
        return _Library(path, range(int(first), int(end)))
    except (OSError, RuntimeError, ValueError):
        return None


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a file's lock, which ends with the process too; False if another process has it and is not waited for.

    Where there can be no lock some work may be done twice.
    """
    with ExitStack() as stack:
        mine = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError as error:
            logger.info("no lock of compiled code: %s", error)
        yield mine


def _write(mark: Path, text: str) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    unfinished = mark.with_name(f"{mark.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(mark)


def _mark(graph: fx.GraphModule) -> Path:
    """A file that says that a graph has been compiled, and where the library is."""
    digest = hashlib.sha256(f"{torch.__version__} {torch.get_num_threads()} {_processor()} {graph.code}".encode())
    for argument in graph.meta["arguments"]:
        digest.update(str(argument).encode())
    for node in graph.graph.find_nodes(op="get_attr"):
        constant = operator.attrgetter(str(node.target))(graph)
        digest.update(f"{node.target} {constant.dtype} {constant.tolist()}".encode())
    return compiled_code() / "graphs" / digest.hexdigest()


@functools.cache
def _processor() -> str:
    """What kind of processor this is: code for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    return "".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
