"""Lets a graph write results to memory that nothing reads any more: new memory is one more block to bring to the cache.

Torch's own pass for this (`torch.fx.passes.reinplace`) takes only graphs without operations in place, which gradients
have, and runs them on fake tensors at one width to find out what shares memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten

LIES = "lies"
"""What a node's `meta` calls how its tensor lies in memory, at two widths: None if that is not known."""
VIEWS = frozenset(
    {
        _aten.view.default,
        _aten._unsafe_view.default,
        _aten.expand.default,
        _aten.permute.default,
        _aten.transpose.int,
        _aten.t.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.unsqueeze.default,
    }
)
"""Operations whose result has the memory of their input from its first number on."""
_ELEMENTWISE: Mapping[Any, Any] = {
    _aten.add.Tensor: _aten.add_.Tensor,
    _aten.sub.Tensor: _aten.sub_.Tensor,
    _aten.mul.Tensor: _aten.mul_.Tensor,
    _aten.div.Tensor: _aten.div_.Tensor,
    _aten.add.Scalar: _aten.add_.Scalar,
    _aten.mul.Scalar: _aten.mul_.Scalar,
    _aten.div.Scalar: _aten.div_.Scalar,
    _aten.masked_fill.Scalar: _aten.masked_fill_.Scalar,
    _aten.relu.default: _aten.relu_.default,
    _aten.tanh.default: _aten.tanh_.default,
    _aten.sigmoid.default: _aten.sigmoid_.default,
    _aten.exp.default: _aten.exp_.default,
    _aten.neg.default: _aten.neg_.default,
}
"""What an operation is called where it writes to its first argument."""
_GRADIENTS: Mapping[Any, Any] = {
    _aten.threshold_backward.default: _aten.threshold_backward.grad_input,
    _aten.tanh_backward.default: _aten.tanh_backward.grad_input,
    _aten.sigmoid_backward.default: _aten.sigmoid_backward.grad_input,
}
"""Elementwise gradients, where they write to `grad_input`."""
_SYMMETRIC = frozenset({_aten.add.Tensor, _aten.mul.Tensor})
_NEW = frozenset(
    {
        *_ELEMENTWISE,
        *_GRADIENTS,
        *(_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default),
        *(_aten.clone.default, _aten.cat.default, _aten.stack.default, _aten.where.self),
        *(_aten.sum.dim_IntList, _aten.mean.dim, _aten._log_softmax.default, _aten._softmax.default),
    }
)
"""Operations whose result has memory of its own."""


def lie_alike(node: fx.Node, other: fx.Node) -> bool:
    """Whether the tensors of two nodes are known to lie alike in memory, at every width."""
    lies = node.meta.get(LIES)
    return lies is not None and bool(lies == other.meta.get(LIES))


def reuse_memory(graph: fx.Graph) -> None:
    """Let elementwise operations write to an argument that nothing reads later.

    Args:
        graph: of `torch.ops.aten`, whose nodes say in `meta[LIES]` how they lie; what it returns stays the same to the
            last bit.
    """
    memory = _Memory(list(graph.nodes))
    for node in graph.nodes:
        if node.target in _ELEMENTWISE or node.target in _GRADIENTS:
            for place in (0, 1) if node.target in _SYMMETRIC and not node.kwargs else (0,):
                if memory.may_take(node, node.args[place]):
                    memory.merge(node, node.args[place])
                    _write_to(node, place)
                    break


def _write_to(node: fx.Node, place: int) -> None:
    """Let a node write to one of its arguments."""
    if node.target in _GRADIENTS:
        node.kwargs = {**node.kwargs, "grad_input": node.args[place]}
        node.target = _GRADIENTS[node.target]
        return
    node.args = (node.args[place], *node.args[:place], *node.args[place + 1 :])
    node.target = _ELEMENTWISE[node.target]


class _Memory:
    """Which nodes share memory, and where in the graph it is used for the last time.

    Args:
        nodes: of a graph, in order.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._at = {node: at for at, node in enumerate(nodes)}
        self._owner: dict[fx.Node, fx.Node] = {}
        self._last: dict[fx.Node, int] = {}
        self._own: set[fx.Node] = set()
        """Owners of memory that the graph has made, all of whose users are known."""
        for node in nodes:
            self._owner[node] = node
            self._last[node] = max((self._at[user] for user in node.users), default=self._at[node])
            if node.target in _NEW:
                self._own.add(node)
            else:  # a view, an operation in place, or one that is not known here
                first = node.target in VIEWS
                for other in node.all_input_nodes[:1] if first else node.all_input_nodes:
                    self.merge(node, other)
                    if not first:
                        self._own.discard(self._find(other))

    def may_take(self, node: fx.Node, other: Any) -> bool:
        """Whether a node may write its result where one of its arguments is."""
        if not isinstance(other, fx.Node) or not lie_alike(node, other):
            return False
        owner = self._find(other)
        overlaps = any(one is not other and self._find(one) is owner for one in node.all_input_nodes)
        return owner in self._own and self._last[owner] == self._at[node] and not overlaps

    def merge(self, node: fx.Node, other: fx.Node) -> None:
        """Note that a node has another one's memory."""
        mine, owner = self._find(node), self._find(other)
        if mine is not owner:
            self._owner[mine] = owner
            self._last[owner] = max(self._last[owner], self._last[mine])

    def _find(self, node: fx.Node) -> fx.Node:
        while self._owner[node] is not node:
            node = self._owner[node]
        return node
