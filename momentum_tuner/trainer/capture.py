"""A fused function as a graph of torch operations, which is replayed without vmap's and autograd's own work in Python.

The graph is made of two traces at different widths: a number that differs between them is a multiple of the width, or
off it by a constant, and is computed from the width when the graph is replayed. So one graph serves all widths.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.autograd_function import custom_function_call
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from momentum_tuner.trainer.attributes import plain_attributes
from momentum_tuner.trainer.lowering.slotwise import SlotFunction
from momentum_tuner.trainer.reuse import LIES, VIEWS, lie_alike, reuse_memory

logger = logging.getLogger(__name__)

Function = Callable[..., Sequence[Tensor]]
"""Takes tensors, of which the first has one row per slot, and returns tensors."""

_READING = frozenset(
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "is_nonzero")
) | {torch.equal, torch.allclose}
"""Functions by which Python reads a tensor's values, which a graph would not read again."""
_WIDTHS = (3, 5)
"""Of the two traces: above 1, for which torch takes shortcuts, and unlike each other."""


class NotCapturedError(Exception):
    """A function has no graph that serves all widths."""


def capture(function: Function, tensors: Sequence[Tensor], stacked: Sequence[bool], state: nn.Module) -> fx.GraphModule:
    """The graph of a function.

    Args:
        function: what to capture; only its tensors may change from call to call.
        tensors: an example of its arguments; they are left as they are.
        stacked: which of them have one row per slot.
        state: the module whose plain attributes must be the same after a call: what they say would be frozen.

    Returns:
        The graph, whose `meta["arguments"]` tells shape, dtype, device and whether it is stacked of each argument.

    Raises:
        NotCapturedError: it cannot be captured.
    """
    graphs, attributes = [], []
    for width in _WIDTHS:
        graphs.append(_trace(function, tensors, stacked, width))
        attributes.append(plain_attributes(state))
    if attributes[0] != attributes[1]:
        raise NotCapturedError("the model writes to its own attributes as it is called")
    nodes = [list(graph.graph.nodes) for graph in graphs]
    _generalize(*graphs)
    graph = graphs[0]
    for node, other in zip(*nodes, strict=True):
        lies = _lies(node), _lies(other)
        node.meta.clear()  # which holds tensors of the trace
        node.meta[LIES] = None if None in lies else lies
    _shorten(nodes[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    graph.meta["arguments"] = [
        (tuple(t.shape[1:] if has_rows else t.shape), t.dtype, t.device, has_rows)
        for t, has_rows in zip(tensors, stacked, strict=True)
    ]
    return graph


def _trace(function: Function, tensors: Sequence[Tensor], stacked: Sequence[bool], width: int) -> fx.GraphModule:
    """The graph at one width, on copies of the tensors' rows."""
    with _without_fakes(), _RefuseReading():
        graph: fx.GraphModule = make_fx(function)(*copies(tensors, stacked, width))
    for node in graph.graph.nodes:
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(getattr(node.target, "tags", ())):
            raise NotCapturedError(f"{node.target} depends on values")
    return graph


@contextmanager
def _without_fakes() -> Iterator[None]:
    """Keep make_fx from making a fake of each tensor for a node's `meta["val"]`: two fifths of its time, for nobody."""
    makes = proxy_tensor.extract_val
    proxy_tensor.extract_val = lambda *_, **__: None
    try:
        yield
    finally:
        proxy_tensor.extract_val = makes


def copies(tensors: Sequence[Tensor], stacked: Sequence[bool], width: int) -> list[Tensor]:
    """Copies of tensors, at another width: of their first rows, which are repeated if need be."""
    rows = torch.arange(width, device=tensors[0].device) % len(tensors[0])
    return [t[rows] if has_rows else t.clone() for t, has_rows in zip(tensors, stacked, strict=True)]


class _RefuseReading(TorchFunctionMode):
    """Sees that Python takes no tensor's value."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in _READING:
            raise NotCapturedError("Python code reads values of its tensors")
        if func is custom_function_call and not (args[0].generate_vmap_rule or issubclass(args[0], SlotFunction)):
            raise NotCapturedError(f"{args[0].__name__} has a rule for vmap in Python")
        return func(*args, **(kwargs or {}))


def _generalize(narrow: fx.GraphModule, wide: fx.GraphModule) -> None:
    """Replace what depends on the width in the narrow graph by what computes it."""
    nodes, others = list(narrow.graph.nodes), list(wide.graph.nodes)
    if [(n.op, _target(narrow, n)) for n in nodes] != [(n.op, _target(wide, n)) for n in others]:
        raise NotCapturedError("it runs other operations at another width")
    first = next(node for node in nodes if node.op == "placeholder")
    after_inputs = next(node for node in nodes if node.op != "placeholder")
    twin = dict(zip(others, nodes, strict=True))
    with narrow.graph.inserting_before(after_inputs):
        width = narrow.graph.call_function(torch.ops.aten.sym_size.int, (first, 0))
    known: dict[tuple[int, int], fx.Node] = {(1, 0): width}

    def of_width(times: int, plus: int) -> fx.Node:
        if (times, plus) not in known:
            with narrow.graph.inserting_before(after_inputs):
                product = width if times == 1 else narrow.graph.call_function(operator.mul, (width, times))
                known[times, plus] = narrow.graph.call_function(operator.add, (product, plus)) if plus else product
        return known[times, plus]

    def merge(here: Any, there: Any) -> Any:
        if isinstance(here, fx.Node):
            if not isinstance(there, fx.Node) or twin[there] is not here:
                raise NotCapturedError("its operations take other inputs at another width")
            return here
        if isinstance(here, list | tuple) and type(here) is type(there) and len(here) == len(there):
            return type(here)(merge(a, b) for a, b in zip(here, there, strict=True))
        if isinstance(here, dict) and isinstance(there, dict) and here.keys() == there.keys():
            return {name: merge(value, there[name]) for name, value in here.items()}
        if type(here) is type(there) and here == there:
            return here
        times, rest = divmod(there - here, _WIDTHS[1] - _WIDTHS[0]) if _both_whole(here, there) else (0, 1)
        if rest:
            raise NotCapturedError(f"{here!r} became {there!r} at another width")
        return of_width(times, here - times * _WIDTHS[0])

    for node, other in zip(nodes, others, strict=True):
        node.args = merge(node.args, other.args)
        node.kwargs = merge(node.kwargs, other.kwargs)


def _both_whole(here: Any, there: Any) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in (here, there))


def _target(module: fx.GraphModule, node: fx.Node) -> Any:
    """What a node does, to compare; of a constant tensor its values."""
    if node.op == "placeholder":
        return None
    if node.op != "get_attr":
        return node.target
    value = operator.attrgetter(str(node.target))(module)
    return (value.shape, value.dtype, value.tolist()) if isinstance(value, Tensor) else node.target


_aten = torch.ops.aten


def _shorten(nodes: Sequence[fx.Node]) -> None:
    """Let a graph do without what gives again what is there already: each operation costs a call.

    Views of views are often the tensor that they began with, turned back; and gradients look anew at what the forward
    pass has looked at.

    Args:
        nodes: of a graph that serves all widths.
    """
    views: dict[fx.Node, list[fx.Node]] = {}  # by what they are views of, itself the first
    begin: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        of = node.args[0] if node.args else None
        if not isinstance(of, fx.Node):
            continue
        if node.target is _aten.mul.Scalar and node.args[1] == 1:
            here, there = node.meta[LIES], of.meta[LIES]
            if here and there and here[0][::2] == there[0][::2]:  # shape and dtype
                node.replace_all_uses_with(of)
        elif node.target in VIEWS:
            first = begin.get(of, of)
            alike = views.setdefault(first, [first])
            known = next((one for one in alike if lie_alike(node, one)), None)
            if known is None:
                begin[node] = first
                alike.append(node)
            else:
                node.replace_all_uses_with(known)


def runner(graph: fx.GraphModule) -> fx.GraphModule:
    """A captured graph as Python runs it fastest."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    reuse_memory(copied)
    _call_bindings(copied)
    return fx.GraphModule(graph, copied)


_METHODS = frozenset(
    {
        *("view", "expand", "permute", "transpose", "unsqueeze", "squeeze", "split_with_sizes"),
        *("add_", "sub_", "mul_", "div_", "neg_", "exp_", "tanh_", "sigmoid_", "relu_"),
        *("masked_fill", "masked_fill_", "scatter_add_"),
    }
)
_FUNCTIONS = frozenset(
    {
        *("add", "sub", "rsub", "mul", "div", "neg", "exp", "log", "sqrt", "rsqrt", "pow", "tanh", "sigmoid", "relu"),
        *("_softmax", "_log_softmax", "where", "eq", "ne", "gather", "select", "sum", "mean", "amax", "cat", "stack"),
        *("clone", "mm", "bmm", "addmm", "baddbmm"),
    }
)


def _call_bindings(graph: fx.Graph) -> None:
    """Let a graph call common operations by torch's own bindings, which take half the time of `torch.ops`."""
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name.removeprefix("aten::")
        if name in _METHODS:
            node.op, node.target = "call_method", name
        elif name in _FUNCTIONS:
            node.target = getattr(torch, name)


def _lies(node: fx.Node) -> Any:
    """How a node's tensor lies in memory, None if it is none."""
    kind: Any = node.meta.get("tensor_meta")
    return (kind.shape, kind.stride, kind.dtype) if hasattr(kind, "stride") else None
