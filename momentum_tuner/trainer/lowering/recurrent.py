"""`torch.rnn_tanh`, `rnn_relu`, `lstm` and `gru`, what `nn.RNN`, `nn.LSTM` and `nn.GRU` call, step by step.

The inputs of all time steps are projected in one product; each step then is one product of all slots, and so is its
gradient, after which one product over all steps gives that of the weights. The formulas are those of torch's modules.

Shapes: S slots, T time steps, B examples, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from momentum_tuner.trainer.lowering.slotwise import SlotFunction

Drop = Callable[[Tensor, float], Tensor]
"""Dropout of a tensor with some probability."""

_tanh_backward = torch.ops.aten.tanh_backward
_sigmoid_backward = torch.ops.aten.sigmoid_backward
_relu_backward = torch.ops.aten.threshold_backward


def lower_recurrent(kind: str, drop: Drop, args: Sequence[Any]) -> Any:
    """The outputs and last states of a recurrent network, or NotImplemented for what is not lowered.

    Args:
        kind: `tanh`, `relu`, `gru` or `lstm`.
        drop: the dropout between layers.
        args: as `torch.gru` and its like take them.
    """
    if len(args) != 9 or not isinstance(args[2], list | tuple) or isinstance(args[1], Tensor) == (kind == "lstm"):
        return NotImplemented  # a packed sequence, whose second argument are batch sizes
    inputs, first, weights, biased, layers, dropout, training, bidirectional, batch_first = args
    directions = 2 if bidirectional else 1
    each = 4 if biased else 2
    if len(weights) != layers * directions * each:
        return NotImplemented  # a projection of the hidden state, `proj_size`
    device = inputs.device.type
    if torch.is_autocast_enabled(device):
        to = torch.get_autocast_dtype(device)
        states = tuple(s.to(to) for s in first) if kind == "lstm" else first.to(to)
        cast = (inputs.to(to), states, [w.to(to) for w in weights], *args[3:])
        with torch.autocast(device, enabled=False):
            return lower_recurrent(kind, drop, cast)

    hidden, cells = first if kind == "lstm" else (first, None)
    x = inputs.transpose(0, 1) if batch_first else inputs  # [T, B, inputs]
    last_hidden: list[Tensor] = []
    last_cells: list[Tensor] = []
    for layer in range(layers):
        if layer and dropout and training:
            x = drop(x, dropout)
        outputs = []
        for number in range(layer * directions, (layer + 1) * directions):
            cell = None if cells is None else cells[number]
            states, last = _run(
                kind, x, hidden[number], cell, weights[number * each : (number + 1) * each], number % directions == 1
            )
            outputs.append(states[:-1] if number % directions else states[1:])
            last_hidden.append(states[0] if number % directions else states[-1])
            last_cells += [] if last is None else [last]
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    x = x.transpose(0, 1) if batch_first else x
    ends = (torch.stack(pieces) for pieces in (last_hidden, last_cells) if pieces)
    return x, *ends


def layer_by_layer(function: Callable[..., Any], drop: Drop, args: Sequence[Any]) -> Any:
    """As `lower_recurrent`, by calls of `torch.lstm` and its like for a layer each, which can be differentiated twice.

    NotImplemented where there is no dropout between layers.
    """
    lstm = function is torch.lstm
    if len(args) != 9 or not isinstance(args[2], list | tuple) or isinstance(args[1], Tensor) == lstm:
        return NotImplemented
    x, first, weights, biased, layers, dropout, training, bidirectional, batch_first = args
    if not (dropout and training) or layers == 1:
        return NotImplemented
    states = [state.chunk(layers) for state in (first if lstm else (first,))]
    each = len(weights) // layers
    x = x.transpose(0, 1) if batch_first else x  # as which `lower_recurrent` drops
    ends = []
    for layer in range(layers):
        x = drop(x, dropout) if layer else x
        start = tuple(state[layer] for state in states)
        some = weights[layer * each : (layer + 1) * each]
        x, *end = function(x, start if lstm else start[0], some, biased, 1, 0.0, training, bidirectional, False)
        ends.append(end)
    return x.transpose(0, 1) if batch_first else x, *(torch.cat(end) for end in zip(*ends, strict=True))


def _run(
    kind: str, x: Tensor, hidden: Tensor, cell: Tensor | None, weights: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, Tensor | None]:
    """One layer in one direction: its states `[T + 1, B, H]` with the first one, and an LSTM's last cell `[B, H]`."""
    of_input, of_hidden, *biases = weights
    bias = biases[0] if biases else None
    if biases and kind != "gru":  # whose reset gate takes the hidden bias apart from the input's
        bias = biases[0] + biases[1]
    projected = linear(x, of_input, bias)[None]  # [1, T, B, gates]
    if kind == "lstm":
        assert cell is not None
        states, last, *_ = _Lstm.over(projected, hidden[None], cell[None], of_hidden[None], reverse)
        return states[0], last[0]
    if kind == "gru":
        of_gates = biases[1] if biases else of_hidden.new_zeros(len(of_hidden))
        states, *_ = _Gru.over(projected, hidden[None], of_hidden[None], of_gates[None], reverse)
    else:
        states = _Elman.over(projected, hidden[None], of_hidden[None], reverse, kind == "relu")
    return states[0], None


def _order(steps: int, reverse: bool) -> Iterable[int]:
    return reversed(range(steps)) if reverse else range(steps)


def _with_first(first: Tensor, states: Sequence[Tensor], reverse: bool) -> Tensor:
    """States `[S, T + 1, B, H]` in the order of time, the first one before those that follow it."""
    return torch.stack([*states, first] if reverse else [first, *states], 1)


def _after_and_before(states: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Of `_with_first`'s, the state after and the state before each step, `[S, T, B, H]` both."""
    return (states[:, :-1], states[:, 1:]) if reverse else (states[:, 1:], states[:, :-1])


def _of_weights(gates: Tensor, before: Tensor) -> Tensor:
    """Gradient `[S, gates, H]` of the hidden weights, from that of the gates `[S, T, B, gates]`."""
    return torch.bmm(gates.flatten(1, 2).mT, before.reshape(len(before), -1, before.shape[-1]))


def _tanh(x: Tensor, scale: float = 1.0) -> Tensor:
    """tanh(scale x), in memory that it takes from `x`.

    On a CPU torch's sigmoid is many times faster than its tanh, and exact enough: 2 sigmoid(2 x) - 1 is what its
    compiler makes of tanh.
    """
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        x = x if scale == 0.5 else x.mul_(2.0 * scale)
        return torch.rsub(x.sigmoid_(), -1.0, alpha=-2.0)
    return (x if scale == 1.0 else x.mul_(scale)).tanh_()


class _Elman(SlotFunction):
    """h' = tanh(x + W h), or relu."""

    @staticmethod
    def forward(projected: Tensor, first: Tensor, weight: Tensor, reverse: bool, relu: bool) -> Tensor:
        x, hidden, transposed = projected.unbind(1), first, weight.mT
        states = [first] * len(x)
        for t in _order(len(x), reverse):
            if relu:
                hidden = torch.baddbmm(x[t], hidden, transposed).relu_()
            else:
                hidden = _tanh(torch.baddbmm(x[t], hidden, transposed, beta=2, alpha=2), 0.5)
            states[t] = hidden
        return _with_first(first, states, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2], output)
        ctx.how = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *_ElmanGradient.over(grad, *ctx.saved_tensors, *ctx.how), None, None


class _ElmanGradient(SlotFunction):
    @staticmethod
    def forward(grad: Tensor, weight: Tensor, states: Tensor, reverse: bool, relu: bool) -> tuple[Tensor, ...]:
        after, before = _after_and_before(states, reverse)
        outer, hidden = _after_and_before(grad, reverse)[0].unbind(1), after.unbind(1)
        gates = list(hidden)
        later: Tensor | None = None
        for t in _order(len(gates), not reverse):
            whole = outer[t] if later is None else torch.baddbmm(outer[t], later, weight)
            later = gates[t] = _relu_backward(whole, hidden[t], 0) if relu else _tanh_backward(whole, hidden[t])
        assert later is not None
        of_gates = torch.stack(gates, 1)
        return of_gates, torch.bmm(later, weight), _of_weights(of_gates, before)


class _Gru(SlotFunction):
    """r, z = sigmoid(x + W h + b); n = tanh(x + r (W h + b)); h' = n + z (h - n)."""

    @staticmethod
    def forward(projected: Tensor, first: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> tuple[Tensor, ...]:
        x, hidden, transposed, size = projected.unbind(1), first, weight.mT, first.shape[-1]
        states = [first] * len(x)
        kept: list[Tensor] = [first] * (3 * len(x))
        for t in _order(len(x), reverse):
            gates = torch.baddbmm(bias[:, None], hidden, transposed)
            both = torch.add(x[t][..., : 2 * size], gates[..., : 2 * size]).sigmoid_()
            inner = gates[..., 2 * size :]
            new = _tanh(torch.addcmul(x[t][..., 2 * size :], both[..., :size], inner))
            hidden = states[t] = torch.lerp(new, hidden, both[..., size:])
            kept[3 * t : 3 * t + 3] = both, new, inner
        return _with_first(first, states, reverse), *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[2], *output)
        ctx.reverse = inputs[4]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        return *_GruGradient.over(ctx.reverse, grad, *ctx.saved_tensors), None


class _GruGradient(SlotFunction):
    @staticmethod
    def forward(reverse: bool, grad: Tensor, weight: Tensor, states: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        before = _after_and_before(states, reverse)[1]
        outer, earlier = _after_and_before(grad, reverse)[0].unbind(1), before.unbind(1)
        of_inputs, of_gates = list(outer), list(outer)
        carried: Tensor | None = None
        for t in _order(len(outer), not reverse):
            both, new, inner = kept[3 * t : 3 * t + 3]
            reset, update = both.chunk(2, -1)
            whole = outer[t] if carried is None else carried.add_(outer[t])
            past = whole * update
            of_new = _tanh_backward(whole - past, new)
            of_both = torch.cat((of_new * inner, (earlier[t] - new).mul_(whole)), -1)
            of_both = _sigmoid_backward(of_both, both)
            of_inputs[t] = torch.cat((of_both, of_new), -1)
            of_gates[t] = torch.cat((of_both, of_new * reset), -1)
            carried = torch.baddbmm(past, of_gates[t], weight)
        assert carried is not None
        gates = torch.stack(of_gates, 1)
        return torch.stack(of_inputs, 1), carried, _of_weights(gates, before), gates.sum((1, 2))


class _Lstm(SlotFunction):
    """i, f, o = sigmoid(x + W h); g = tanh(x + W h); c' = f c + i g; h' = o tanh(c')."""

    @staticmethod
    def forward(projected: Tensor, first: Tensor, cell: Tensor, weight: Tensor, reverse: bool) -> tuple[Tensor, ...]:
        x, hidden, transposed, size = projected.unbind(1), first, weight.mT, first.shape[-1]
        states = [first] * len(x)
        kept: list[Tensor] = []  # in the order of the steps
        cells: list[Tensor] = []
        for t in _order(len(x), reverse):
            gates = torch.baddbmm(x[t], hidden, transposed)
            both = gates[..., : 2 * size].sigmoid()  # the input and the forget gate
            new = _tanh(gates[..., 2 * size : 3 * size] * 2.0, 0.5)
            out = gates[..., 3 * size :].sigmoid()
            cell = (both[..., size:] * cell).addcmul_(both[..., :size], new)
            squashed = _tanh(cell * 2.0, 0.5)
            hidden = states[t] = out * squashed
            kept += both, new, out, squashed
            cells.append(cell)
        return _with_first(first, states, reverse), cells.pop(), *cells, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        states, _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(inputs[3], states, inputs[2], *kept)
        ctx.reverse = inputs[4]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_cell: Tensor, *_: Tensor) -> tuple[Any, ...]:
        return *_LstmGradient.over(ctx.reverse, grad, grad_cell, *ctx.saved_tensors), None


class _LstmGradient(SlotFunction):
    @staticmethod
    def forward(
        reverse: bool, grad: Tensor, of_cell: Tensor, weight: Tensor, states: Tensor, *kept: Tensor
    ) -> tuple[Tensor, ...]:
        before = _after_and_before(states, reverse)[1]
        outer = _after_and_before(grad, reverse)[0].unbind(1)
        cells, kept = kept[: len(outer)], kept[len(outer) :]  # the cell before each step
        gates = list(outer)
        later: Tensor | None = None
        for step, t in reversed(list(enumerate(_order(len(outer), reverse)))):
            both, new, out, squashed = kept[4 * step : 4 * step + 4]
            arriving, forget = both.chunk(2, -1)
            whole = outer[t] if later is None else torch.baddbmm(outer[t], later, weight)
            of_cell = _tanh_backward(whole * out, squashed).add_(of_cell)
            of_both = torch.cat((of_cell * new, of_cell * cells[step]), -1)
            pieces = (
                _sigmoid_backward(of_both, both),
                _tanh_backward(of_cell * arriving, new),
                _sigmoid_backward(whole * squashed, out),
            )
            later = gates[t] = torch.cat(pieces, -1)
            of_cell = of_cell * forget
        assert later is not None
        of_gates = torch.stack(gates, 1)
        return of_gates, torch.bmm(later, weight), of_cell, _of_weights(of_gates, before)
