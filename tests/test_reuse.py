"""Captured graphs write to memory that nothing reads any more, and to no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from momentum_tuner.tasks import digits_cnn, digits_mlp, digits_rnn, digits_transformer
from momentum_tuner.tasks.task import Task
from momentum_tuner.trainer import Trainer
from momentum_tuner.trainer.capture import capture, runner
from momentum_tuner.trainer.state import TrialSettings


def in_memory_of_its_argument(x, bias):
    return [torch.relu(torch.bmm(x, x) + bias)]


def second_argument(x, bias):
    return [bias + torch.bmm(x, x)]


def read_later(x, bias):
    product = torch.bmm(x, x)
    return [(product + bias).tanh() * product]


def view_read_later(x, bias):
    product = torch.bmm(x, x)
    turned = product.transpose(1, 2)
    return [torch.bmm((product + bias).tanh(), turned)]


def view_of_result_read_later(x, bias):
    raised = torch.bmm(x, x) + bias
    turned = raised.transpose(1, 2)
    return [torch.bmm(raised.tanh(), turned)]


def part_read_later(x, bias):
    product = torch.bmm(x, x)
    first = product[:, :1]
    return [(product + bias).tanh() + first]


def returned(x, bias):
    product = torch.bmm(x, x)
    return [product, product + bias]


def view_returned(x, bias):
    product = torch.bmm(x, x)
    return [product.transpose(1, 2), product + bias]


def its_own_transpose(x, bias):
    product = torch.bmm(x, x)
    return [product * product.transpose(1, 2) + bias]


def itself(x, bias):
    product = torch.bmm(x, x)
    return [product * product + bias]


def an_argument_of_the_graph(x, bias):
    return [(x + bias).exp()]


def broadcast(x, bias):
    return [torch.bmm(x, x).sum(1, keepdim=True) + x + bias]


def another_order_of_numbers(x, bias):
    return [torch.bmm(x, x).transpose(1, 2) + x * 2 + bias]


def gradient(x, bias):
    with torch.enable_grad():
        rows = x.detach().requires_grad_()
        loss = (torch.relu(torch.bmm(rows, rows) + bias).tanh() * torch.bmm(rows, rows).sigmoid()).sum()
    (found,) = torch.autograd.grad(loss, rows)
    return [found]


IN_PLACE = {
    in_memory_of_its_argument: ("add_", "relu_"),
    second_argument: ("add_",),
    read_later: ("tanh_", "mul_"),
    view_read_later: ("tanh_",),
    view_of_result_read_later: ("add_",),
    part_read_later: ("tanh_",),
    returned: (),
    view_returned: (),
    its_own_transpose: ("add_",),
    itself: ("mul_", "add_"),
    an_argument_of_the_graph: ("exp_",),
    broadcast: ("add_",),
    another_order_of_numbers: ("add_",),
    gradient: ("add_", "relu_", "grad_input"),
}
"""What of each function works in place at least; the rest must not."""


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda function: function.__name__)
def test_what_is_read_later_stays_as_it_is(function):
    tensors = [torch.randn(4, 3, 3), torch.randn(4, 1, 3)]
    graph = runner(capture(function, tensors, [True, True], nn.Identity()))
    for word in IN_PLACE[function]:
        assert word in graph.code
    for width in (1, 4, 7):
        x, bias = torch.randn(width, 3, 3), torch.randn(width, 1, 3)
        before = x.clone(), bias.clone()
        expected = function(x, bias)
        found = graph(x, bias)
        assert all(map(torch.equal, found, expected))
        assert all(map(torch.equal, (x, bias), before))


TASKS: dict[str, Callable[[], Task]] = {
    "mlp": digits_mlp,
    "rnn": lambda: digits_rnn(cell="rnn"),
    "gru": lambda: digits_rnn(cell="gru"),
    "lstm": lambda: digits_rnn(cell="lstm"),
    "cnn": digits_cnn,
    "transformer": digits_transformer,
}


@pytest.mark.parametrize("name", TASKS)
def test_gradients_are_the_same_to_the_last_bit_in_place(name):
    trainer = Trainer(TASKS[name](), epochs=2, slots=3, device="cpu")
    replay = trainer.objective.replay
    replay.patience = 0
    for key in range(3):
        trainer.admit(key, TrialSettings("momentum", {"learning_rate": 0.05, "momentum": 0.9}, 64, key))
    list(trainer.train_epoch())
    graphs = [kind.graph for kind in replay._of("gradient") if kind.graph is not None]
    assert graphs
    for graph in graphs:
        tensors = [example(*kind) for kind in graph.meta["arguments"]]
        before = [tensor.clone() for tensor in tensors]
        in_place = runner(graph)
        assert "_(" in in_place.code.replace("mul_(", "").replace("scatter_add_(", "")
        with torch.no_grad():
            assert all(map(torch.equal, in_place(*tensors), graph(*tensors)))
        assert all(map(torch.equal, tensors, before))


def example(shape: Sequence[int], dtype: torch.dtype, device: torch.device, has_rows: bool) -> Tensor:
    """An argument of a graph, for three slots."""
    whole = (3, *shape) if has_rows else tuple(shape)
    if dtype.is_floating_point:
        return 0.1 * torch.randn(whole, dtype=dtype, device=device)
    return torch.randint(0, 10, whole, dtype=dtype, device=device)
