"""Fused functions that are captured once they have been called often enough to repay it, and compiled if asked to."""

from __future__ import annotations

import logging
import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from momentum_tuner.trainer.capture import capture, copies, runner
from momentum_tuner.trainer.compiling import compile_graph, turn_to_compile, was_compiled
from momentum_tuner.trainer.memory import first_line, is_out_of_memory

logger = logging.getLogger(__name__)

PATIENCE = 32
"""Calls of a kind before it is captured: that takes as long as some ten to hundred calls save."""
IN_ADVANCE = 3
"""Kinds of each function that are captured at their first call, where a graph is known to pay."""
MOST_VALUES = 4
"""Kinds alike but for plain values: where there are more, such as names of files, the values hardly come again."""
MOST_SHAPES = 64
"""Shapes of which kinds are kept, those that were called most, as each graph takes memory."""
NARROWEST = 2
"""Slots at which a graph is compared as soon as it is there. One that gives the same there and at some greater width,
and was made of traces at two more, serves all between: no number that it computes from the width is bent."""
SAME = 1e-4
"""Relative difference of a graph's results from the function's own above which the graph is not used."""

Runner = Callable[..., Sequence[Tensor]]


@dataclass
class _Kind:
    """Calls that one graph serves: alike but for their width and values."""

    first: bool = True
    """Whether it was the first of its shapes."""
    calls: int = 0
    refused: bool = False
    graph: fx.GraphModule | None = None
    captured: Runner | None = None
    widest: int = 0
    """The greatest width at which the captured graph gave the same."""
    compiled: Runner | None = None
    runners: dict[int, Runner] = field(default_factory=dict)
    """What serves each width that has been seen, once its results were compared, there or on both sides."""


@dataclass(slots=True)
class Call:
    """A function that `Replay` has been told of."""

    replay: Replay
    name: str
    kind: _Kind
    function: Runner
    stacked: Sequence[bool]

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What it returns for tensors like those of its example, of any number of slots."""
        return self.replay.run(self, tensors)


class Replay:
    """Calls functions of stacked tensors, from their graphs where those give the same.

    Args:
        model: the module that they call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.patience = PATIENCE
        self.in_advance = 0
        """Kinds of each function that are captured at their first call, besides one more for every `PATIENCE` calls."""
        self.compiles: frozenset[str] = frozenset()
        """Names of the functions that are compiled."""
        self.failed = False
        """Whether compiling failed."""
        self._model = model
        self._kinds: dict[tuple[Hashable, ...], dict[Hashable, _Kind]] = {}  # by name and shapes, then by plain values
        self._live: Counter[str] = Counter()  # calls that no graph served
        self._tried: Counter[str] = Counter()  # kinds that were captured, or could not be

    def call(self, name: str, function: Callable[..., list[Tensor]], *arguments: tuple[Any, bool]) -> Sequence[Tensor]:
        """What a function returns.

        Args:
            name: of the function.
            function: only its arguments may change from call to call.
            arguments: each a tensor, or a nesting of tensors, and whether they have one row per slot. The first has.
        """
        flat = [_flatten(value) for value, _ in arguments]
        leaves = [leaf for found, _ in flat for leaf in found]
        stacked = [has_rows for (found, _), (_, has_rows) in zip(flat, arguments, strict=True) for _ in found]
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in at]
        rows = [stacked[i] for i in at]
        others = tuple((i, leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))

        def call(*tensors: Tensor) -> list[Tensor]:
            filled = list(leaves)
            for i, tensor in zip(at, tensors, strict=True):
                filled[i] = tensor
            rest = iter(filled)
            return function(*(rebuild([next(rest) for _ in found]) for found, rebuild in flat))

        return self.prepare(name, call, tensors, rows, values=others)(tensors)

    def prepare(
        self,
        name: str,
        function: Runner,
        tensors: Sequence[Tensor],
        stacked: Sequence[bool],
        variant: Hashable = (),
        values: Hashable = (),
    ) -> Call:
        """A function that will be called with such tensors again and again, or once.

        Args:
            name: of the function.
            function: of tensors; only they may change from call to call.
            tensors: an example; the first has one row per slot.
            stacked: which of them have one row per slot.
            variant: what else tells the functions of this name apart.
            values: what it takes besides tensors.
        """
        shapes = [(t.shape[1:] if rows else t.shape, t.dtype, rows) for t, rows in zip(tensors, stacked, strict=True)]
        alike = self._kinds.get(key := (name, *shapes, variant))
        if alike is None:
            if len(self._kinds) >= MOST_SHAPES:
                del self._kinds[min(self._kinds, key=lambda key: sum(k.calls for k in self._kinds[key].values()))]
            alike = self._kinds[key] = {}
        try:
            kind = alike.get(values)
        except TypeError:  # a value that cannot be hashed
            kind = _Kind(refused=True)
        if kind is None:
            kind = _Kind(first=not alike)
            if len(alike) < MOST_VALUES:
                alike[values] = kind
            else:
                kind.refused = True
        return Call(self, name, kind, function, stacked)

    def run(self, call: Call, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What a prepared function returns for these tensors."""
        kind = call.kind
        kind.calls += 1
        width = len(tensors[0])
        known = kind.runners.get(width)
        if known is None and NARROWEST <= width < kind.widest and not self._is_compiled(call.name, kind):
            assert kind.captured is not None
            known = kind.runners[width] = kind.captured
        if known is not None and kind.calls & (kind.calls - 1):  # at powers of 2 it is compared again
            return known(*tensors)
        if kind.refused or (kind.captured is None and not self._pays(call.name, kind)):
            return call.function(*tensors)
        return self._begin(call.name, kind, call.function, tensors, call.stacked)

    def _pays(self, name: str, kind: _Kind) -> bool:
        """Whether a kind is captured at this call."""
        self._live[name] += 1
        if kind.calls > self.patience:
            return True
        allowed = self.in_advance + self._live[name] // PATIENCE if self.in_advance else 0
        return kind.first and self._tried[name] < allowed

    def is_compiling(self, name: str) -> bool:
        """Whether a function of this name is to be compiled, and may be."""
        return name in self.compiles and not self.failed

    @contextmanager
    def compiling(self, *names: str) -> Iterator[None]:
        """Compile what is called meanwhile of some functions."""
        before, self.compiles = self.compiles, self.compiles | set(names)
        for name in names:
            for kind in self._of(name):
                kind.runners.clear()
        try:
            yield
        finally:
            self.compiles = before

    def forget_compiled(self) -> None:
        """Go on with the graphs as they were captured."""
        for alike in self._kinds.values():
            for kind in alike.values():
                kind.compiled = None
                kind.runners.clear()

    def keeps_compiled(self, name: str) -> bool:
        """Whether a captured graph of a function has been compiled before, in this or an earlier run."""
        return any(kind.graph is not None and was_compiled(kind.graph) for kind in self._of(name))

    @contextmanager
    def turn_to_compile(self, name: str) -> Iterator[bool]:
        """Whether no other process of this machine has its turn to compile a function; if so, this one has it."""
        with ExitStack() as stack:
            graphs = [kind.graph for kind in self._of(name) if kind.graph is not None]
            yield all([stack.enter_context(turn_to_compile(graph)) for graph in graphs])

    def is_captured(self, name: str) -> bool:
        """Whether there is a graph of a function."""
        return any(kind.graph is not None for kind in self._of(name))

    def _of(self, name: str) -> list[_Kind]:
        return [kind for key, alike in self._kinds.items() if key[0] == name for kind in alike.values()]

    def _begin(
        self, name: str, kind: _Kind, call: Runner, tensors: Sequence[Tensor], stacked: Sequence[bool]
    ) -> Sequence[Tensor]:
        """Call the function itself, and let what gives the same serve this width from now on."""
        if kind.captured is None:
            self._tried[name] += 1
            if not self._capture(kind, call, tensors, stacked):
                return call(*tensors)
        assert kind.graph is not None and kind.captured is not None
        width = len(tensors[0])
        candidates: list[Runner] = [kind.captured]
        if self._is_compiled(name, kind) and width > 1:
            candidates[:0] = self._compiled(kind, kind.graph, tensors, stacked)
        rows = list(zip(tensors, stacked, strict=True))
        owns = [[t.clone() if has_rows else t for t, has_rows in rows] for _ in candidates]
        expected = call(*tensors)
        for candidate, own in zip(candidates, owns, strict=True):
            if _gives(candidate, own, [*expected, *tensors]):
                kind.runners[width] = candidate
                if candidate is kind.captured:
                    kind.widest = max(kind.widest, width)
                return expected
        self._refuse(kind, width)
        return expected

    def _capture(self, kind: _Kind, call: Runner, tensors: Sequence[Tensor], stacked: Sequence[bool]) -> bool:
        """Capture a function; whether there is a graph that gives the same at `NARROWEST` slots."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = capture(call, tensors, stacked, self._model)
                captured: Runner = runner(graph).forward
                narrow, own = copies(tensors, stacked, NARROWEST), copies(tensors, stacked, NARROWEST)
                expected = call(*narrow)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logger.info("the steps are not captured: %s", first_line(error))
            kind.refused = True
            return False
        if not _gives(captured, own, [*expected, *narrow]):
            self._refuse(kind, NARROWEST)
            return False
        kind.graph, kind.captured = graph, captured
        return True

    def _refuse(self, kind: _Kind, width: int) -> None:
        """Use no graph from now on, as it is wrong at a width."""
        logger.info("the steps are not captured: their graph gives other results at %d slots", width)
        kind.refused = True
        kind.runners.clear()
        kind.widest = 0

    def _is_compiled(self, name: str, kind: _Kind) -> bool:
        """Whether a compiled graph serves a kind, or is to be made."""
        return name in self.compiles or kind.compiled is not None

    def _compiled(
        self, kind: _Kind, graph: fx.GraphModule, tensors: Sequence[Tensor], stacked: Sequence[bool]
    ) -> list[Runner]:
        """The compiled graph, if there can be one."""
        if kind.compiled is None and not self.failed:
            try:
                kind.compiled = compile_graph(graph, tensors, stacked)
            except Exception as error:
                logger.warning("training goes on without torch.compile, which failed: %s", first_line(error))
                self.failed = True
        return [] if kind.compiled is None else [kind.compiled]


def _gives(candidate: Runner, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether a graph gives what is expected: what it returns, and then what it leaves in its arguments."""
    try:
        found = [*candidate(*tensors), *tensors]
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    return _alike(found, expected)


def _flatten(value: Any) -> tuple[Sequence[Any], Callable[[list[Any]], Any]]:
    """The leaves of a nesting, and what makes another of the same structure; for common ones faster than torch's."""
    if value is None or isinstance(value, Tensor):
        return (value,), operator.itemgetter(0)
    if type(value) is tuple and all([isinstance(one, Tensor) for one in value]):
        return value, tuple
    leaves, structure = tree_flatten(value)
    return leaves, lambda leaves: tree_unflatten(leaves, structure)


def _alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all(a.shape == b.shape and relative_difference(a, b) < SAME for a, b in pairs)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm expected; infinite where only one of them is finite."""
    if found.is_floating_point():
        quick = float((found - expected).norm() / expected.norm())
        if math.isfinite(quick):
            return quick
    found, expected = found.double(), expected.double()
    finite = found.isfinite()
    if not torch.equal(finite, expected.isfinite()):
        return float("inf")
    scale = expected[finite].norm().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((found[finite] - expected[finite]).norm() / scale)
