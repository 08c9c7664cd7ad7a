"""Functions that vmap cannot batch well, lowered, give what torch itself gives: values, gradients, curves of trials."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from momentum_tuner import Task
from momentum_tuner.trainer import Trainer, TrialSettings
from momentum_tuner.trainer.data import MemorySource
from momentum_tuner.trainer.dropout import _Calls
from momentum_tuner.trainer.lowering import Lowering, convolution, draws_within
from momentum_tuner.trainer.lowering.attention import lower_attention
from momentum_tuner.trainer.lowering.convolution import PatchMemory, lower_convolution, lower_line_convolution
from momentum_tuner.trainer.lowering.pooling import lower_average_pooling, lower_max_pooling
from momentum_tuner.trainer.lowering.recurrent import lower_recurrent
from momentum_tuner.trainer.lowering.softmax import lower_cross_entropy, lower_softmax

torch.set_num_threads(1)

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
LENGTH, BATCH, SIZE = 7, 3, 8
ALLOWED = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
HIDDEN = torch.tensor([[False] * 5 + [True] * 2, [False] * 7, [False] * 3 + [True] * 4])
EMPTY = torch.tensor([[False] * 5 + [True] * 2, [True] * 7, [True] * 3 + [False] * 4])
"""An example of nothing, and, where it is causal, one whose first rows have nothing to look at."""


def fail(*_):
    raise AssertionError("no dropout was asked for")


class Calls(nn.Module):
    """Calls a layer, or a function of three projections, in its own way."""

    def __init__(self, call, layer=None):
        super().__init__()
        self.layer = nn.Linear(SIZE, 3 * SIZE) if layer is None else layer
        self.call = call

    def forward(self, x):
        return self.call(self.layer, x)


def by_heads(function, layer, x):
    """A function of query, key and value `[batch, heads, length, features]`."""
    parts = (one.unflatten(-1, (2, -1)).transpose(1, 2) for one in layer(x).chunk(3, -1))
    return function(*parts)


def first_hidden(length):
    """A mask by which nothing may be looked at from the first position."""
    return (torch.arange(length) > 0)[:, None].expand(length, length)


def with_state(layer, x):
    """A recurrent layer with first states of its own, which get a gradient through x."""
    first = x[: layer.num_layers * (1 + layer.bidirectional), :, :6].sin()
    states = (first, first.cos()) if isinstance(layer, nn.LSTM) else first
    return layer(x, states)


def attention(masks):
    def call(layer, x):
        typed = {n: v.to(x.dtype) if torch.is_tensor(v) and v.is_floating_point() else v for n, v in masks.items()}
        return layer(x, x, x, **typed)

    return Calls(call, nn.MultiheadAttention(SIZE, 2))


KINDS = {"rnn": nn.RNN, "relu": partial(nn.RNN, nonlinearity="relu"), "gru": nn.GRU, "lstm": nn.LSTM}
MODELS = {
    f"{kind} {layers} {bidirectional} {batch_first} {bias}": partial(
        KINDS[kind], SIZE, 6, layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias
    )
    for kind in KINDS
    for layers, bidirectional, batch_first, bias in [
        (1, False, True, True),
        (1, True, False, False),
        (2, True, True, True),
        (2, False, False, True),
    ]
}
MODELS |= {f"{kind} with states": (lambda cell=KINDS[kind]: Calls(with_state, cell(SIZE, 6, 2))) for kind in KINDS}
MODELS |= {
    "attention": partial(attention, {}),
    "attention without weights": partial(attention, {"need_weights": False}),
    "attention, each head's weights": partial(attention, {"average_attn_weights": False}),
    "attention, causal": partial(attention, {"attn_mask": ~ALLOWED, "is_causal": True, "need_weights": False}),
    "attention, padded": partial(attention, {"key_padding_mask": HIDDEN}),
    "attention, both masks": partial(attention, {"key_padding_mask": HIDDEN, "attn_mask": ~ALLOWED}),
    "attention, a mask per head": partial(
        attention, {"attn_mask": torch.linspace(-1, 1, 2 * BATCH * LENGTH**2).view(-1, LENGTH, LENGTH)}
    ),
    "attention between two": lambda: Calls(
        lambda layer, x: layer(x[:4], x[..., :5], x[..., 1:4]), nn.MultiheadAttention(SIZE, 2, kdim=5, vdim=3)
    ),
    "attention, rows of nothing": partial(attention, {"key_padding_mask": EMPTY, "need_weights": False}),
    "attention, rows of nothing, both masks": partial(
        attention, {"key_padding_mask": EMPTY, "attn_mask": ~ALLOWED, "need_weights": False}
    ),
    "attention, rows of nothing, a mask per head": partial(
        attention,
        {
            "attn_mask": torch.where(EMPTY, -torch.inf, 0.3).repeat_interleave(2, 0)[:, None].repeat(1, LENGTH, 1),
            "need_weights": False,
        },
    ),
    "attention without batch": lambda: Calls(
        lambda layer, x: layer(x[:, 0], x[:, 1], x[:, 2]), nn.MultiheadAttention(SIZE, 2)
    ),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(SIZE, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    ),
    "decoder": lambda: Calls(
        lambda layer, x: layer(x, x[:4].cos()), nn.TransformerDecoderLayer(SIZE, 2, 16, dropout=0.0)
    ),
    "scaled dot product": lambda: Calls(partial(by_heads, F.scaled_dot_product_attention)),
    "scaled dot product, causal": lambda: Calls(
        partial(by_heads, partial(F.scaled_dot_product_attention, is_causal=True, scale=0.3))
    ),
    "scaled dot product, masked": lambda: Calls(
        partial(by_heads, partial(F.scaled_dot_product_attention, attn_mask=torch.eye(BATCH, dtype=torch.bool)))
    ),
    "scaled dot product, rows of nothing": lambda: Calls(
        partial(by_heads, partial(F.scaled_dot_product_attention, attn_mask=first_hidden(BATCH)))
    ),
    "scaled dot product, many keys": lambda: Calls(
        lambda layer, x: by_heads(F.scaled_dot_product_attention, layer, x.repeat(1, 6, 1))
    ),
    "scaled dot product, many keys, rows of nothing": lambda: Calls(
        lambda layer, x: by_heads(
            partial(F.scaled_dot_product_attention, attn_mask=first_hidden(6 * BATCH)), layer, x.repeat(1, 6, 1)
        )
    ),
    "softmax": lambda: Calls(lambda layer, x: (layer(x)[..., :10].softmax(-1), F.softmax(x, 2), torch.softmax(x, 1))),
    "log_softmax": lambda: Calls(lambda layer, x: (layer(x).log_softmax(-1), F.log_softmax(layer(x)[..., :5], dim=-1))),
}


class Images(nn.Module):
    """Looks at its input as images of 8 x 8 pixels, with 3 channels."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x[..., None] * x.cos()[..., None, :])


class Viewed(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.view(*self.shape)


MODELS |= {
    f"convolution {' '.join(f'{name}={value}' for name, value in options.items())}": partial(
        lambda options: Images(nn.Conv2d(3, 4, **options), nn.Tanh(), nn.Conv2d(4, 5, 2)), options
    )
    for options in [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 3, "stride": 2, "padding": 2},
        {"kernel_size": 4, "stride": 3, "padding": (2, 1)},
        {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1)},
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ]
}
MODELS |= {
    "convolution, pooled": lambda: Images(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3)
    ),
    "convolution, pooled, some left over": lambda: Images(
        nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d((3, 2)), nn.Tanh()
    ),
    "convolution, pooled over lines": lambda: Images(nn.Conv2d(3, 4, 2), nn.MaxPool2d((1, 4)), nn.MaxPool2d((3, 1))),
    "convolution, pooled with overlap": lambda: Images(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, stride=2, padding=1)),
    "convolution, averaged": lambda: Images(nn.Conv2d(3, 4, 3), nn.AvgPool2d((2, 3)), nn.AdaptiveAvgPool2d(1)),
    "convolution, batch norm": lambda: Images(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()
    ),
    "convolution, viewed": lambda: Images(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), Viewed(-1, 36), nn.Linear(36, 2)),
    "convolution, viewed by a shape": lambda: Images(nn.Conv2d(3, 4, 3), Viewed([7, 2, -1]), nn.Linear(72, 2)),
}

MODELS |= {
    f"convolution over lines {' '.join(f'{name}={value}' for name, value in options.items())}": partial(
        lambda options: nn.Sequential(nn.Conv1d(3, 4, **options), nn.Tanh(), nn.Conv1d(4, 5, 2)), options
    )
    for options in [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 4, "stride": 2, "bias": False},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "dilation": 2},
    ]
}
MODELS |= {
    "convolution over lines, pooled": lambda: nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool1d(3), nn.Conv1d(4, 2, 2), nn.Flatten(), nn.Linear(2, 2)
    ),
    "convolution over lines, pooled with overlap": lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.MaxPool1d(3, stride=1)),
    "convolution over lines, averaged": lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.AvgPool1d(2), nn.AvgPool1d(2)),
    "convolution over lines, batch norm": lambda: nn.Sequential(
        nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU()
    ),
}


def with_keywords(layer, x):
    """Functions called by their arguments' names, of images as `Images` makes them and of their lines."""
    images = F.conv2d(input=x[..., None] * x.cos()[..., None, :], weight=layer.weight, padding=1, bias=layer.bias)
    lines = torch.conv1d(input=x.transpose(1, 2), weight=layer.weight.flatten(0, 1)[:4, :, :1].repeat(1, 8, 1)[:, :8])
    halved = F.avg_pool2d(input=F.max_pool2d(input=images, kernel_size=2), kernel_size=2)
    norm = F.batch_norm(input=images, running_mean=None, running_var=None, training=True)
    shaped = images.view(size=(-1,)), images.view(dtype=images.dtype)
    lowered = torch.avg_pool1d(input=lines, kernel_size=1), F.max_pool1d(input=lines, kernel_size=1)
    classes = norm.flatten(1)[:, :9]
    targets = torch.arange(len(x)) % 9
    return (
        *(halved, *shaped, *lowered),
        torch.softmax(input=classes, dim=-1) + F.log_softmax(input=classes, dim=1),
        F.cross_entropy(input=classes, target=targets, reduction="mean"),
    )


MODELS |= {
    "convolution and more, called by keywords": lambda: Calls(with_keywords, nn.Conv2d(3, 4, 3)),
    "scaled dot product, called by keywords": lambda: Calls(
        partial(by_heads, lambda q, k, v: F.scaled_dot_product_attention(value=v, key=k, query=q))
    ),
}


def tensors_of(out):
    """All tensors in a model's output."""
    if isinstance(out, torch.Tensor):
        return [out]
    return [tensor for one in out or () for tensor in tensors_of(one)]


def loss_of(model, parameters, x):
    outputs = tensors_of(functional_call(model, parameters, (x,)))
    return sum(((number + 1.3) * out).sin().sum() for number, out in enumerate(outputs)), outputs


def assert_close(found, expected, tolerance):
    scale = expected.abs().max().clamp_min(1.0)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert ((found - expected).abs().max() / scale).item() < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_torch_alone_and_over_slots(name, dtype):
    torch.manual_seed(0)
    models = [MODELS[name]().to(dtype) for _ in range(3)]
    x = torch.randn(LENGTH, BATCH, SIZE, dtype=dtype)
    expected = []
    for model in models:
        inputs = x.clone().requires_grad_()
        loss, outputs = loss_of(model, dict(model.named_parameters()), inputs)
        gradients = torch.autograd.grad(loss, [inputs, *model.parameters()], materialize_grads=True)
        expected.append((outputs, gradients))
    names = [name for name, _ in models[0].named_parameters()]
    stacked = {n: torch.stack([m.get_parameter(n).detach() for m in models]) for n in names}

    def gradients_and_outputs(parameters, x):
        per_slot = grad(partial(loss_of, models[0]), argnums=(0, 1), has_aux=True)
        (of_parameters, of_inputs), outputs = per_slot(parameters, x)
        return [of_inputs, *of_parameters.values()], outputs

    with Lowering(fail):  # torch's warning of a slow fallback is an error in all tests
        fused, outputs = vmap(gradients_and_outputs, in_dims=(0, None))(stacked, x)
        alone, alone_outputs = gradients_and_outputs({n: v[0] for n, v in stacked.items()}, x)
    tolerance = TOLERANCE[dtype] * (10 if "convolution" in name else 1)  # sums over all pixels
    for slot, (expected_outputs, gradients) in enumerate(expected):
        for found, one in zip([*outputs, *fused], [*expected_outputs, *gradients], strict=True):
            assert_close(found[slot], one, tolerance)
    for found, one in zip([*alone_outputs, *alone], [*expected[0][0], *expected[0][1]], strict=True):
        assert_close(found, one, tolerance)


@pytest.mark.parametrize(
    "name", [name for name in MODELS if "with states" in name or name in ("encoder", "gru 2 True True True")]
)
def test_without_a_gradient_the_outputs_are_the_same(name):
    model = MODELS[name]().eval()
    x = torch.randn(LENGTH, BATCH, SIZE)
    with torch.no_grad():
        expected = tensors_of(model(x))
        parameters = {n: torch.stack([p, p]) for n, p in model.named_parameters()}
        with Lowering(fail):
            fused = vmap(lambda p: tensors_of(functional_call(model, p, (x,))))(parameters)
    for found, one in zip(fused, expected, strict=True):
        assert_close(found[1], one, 1e-6)


def lying_examples_innermost(x):
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2).requires_grad_()


@pytest.mark.parametrize("window", [2, 3, (1, 2), (4, 1)])
def test_the_largest_pixel_wins_and_the_first_of_equal_ones_has_the_gradient(window):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(-1, 2, (5, 2, 8, 7), generator=generator).double()  # many are equal
    pixels[0, 0, 3, 2] = torch.inf
    weight = torch.rand(F.max_pool2d(pixels, window).shape, generator=generator, dtype=torch.float64)
    x, reference = lying_examples_innermost(pixels), pixels.clone().requires_grad_()
    found, expected = lower_max_pooling(x, window), F.max_pool2d(reference, window)
    assert torch.equal(found, expected)
    of_x, of_reference = (
        torch.autograd.grad(out, leaf, weight)[0] for out, leaf in ((found, x), (expected, reference))
    )
    assert torch.equal(of_x, of_reference)
    with torch.no_grad():
        x[1, :, :, 3:5], x[2, 1, ::3], x[3, 1, 2, 2] = torch.inf, -torch.inf, torch.nan
        expected = F.max_pool2d(x.contiguous(), window)
        torch.testing.assert_close(lower_max_pooling(x, window), expected, rtol=0, atol=0, equal_nan=True)


def test_after_a_lowered_convolution_the_examples_stay_innermost():
    x = torch.randn(6, 3, 8, 8)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)]
    with Lowering(fail):
        for layer in layers:
            x = layer(x)
            assert x.stride(0) == 1, layer
        x = torch.randn(6, 3, 18)
        for layer in (
            nn.Conv1d(3, 4, 3),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(4, 2, 1),
            nn.AvgPool1d(2),
        ):
            x = layer(x)
            assert x.stride(0) == 1, layer


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"dilation": 2},
        {"stride": 1},
        {"ceil_mode": True},
        {"return_indices": True},
    ],
)
def test_windows_that_are_not_side_by_side_are_left_to_torch(options):
    x = lying_examples_innermost(torch.randn(6, 3, 8, 8))
    assert lower_max_pooling(x, 2, **options) is NotImplemented
    assert lower_max_pooling(x.contiguous(), 2) is NotImplemented


def test_averages_but_of_windows_side_by_side_are_left_to_torch():
    x = lying_examples_innermost(torch.randn(6, 3, 8, 6, dtype=torch.float64))
    assert torch.allclose(lower_average_pooling(x, (4, 3)), F.avg_pool2d(x, (4, 3)))
    for size, options in [(3, {}), (2, {"padding": 1}), (2, {"stride": 1}), (2, {"divisor_override": 3})]:
        assert lower_average_pooling(x, size, **options) is NotImplemented
    assert lower_average_pooling(x.contiguous(), 2) is NotImplemented


def test_convolutions_with_more_to_them_or_too_large_are_left_to_torch():
    x, weight = torch.randn(6, 4, 8, 8), torch.randn(8, 4, 3, 3)
    lower, lower_line = (partial(f, memory=PatchMemory()) for f in (lower_convolution, lower_line_convolution))
    assert lower(x, weight) is not NotImplemented
    assert lower(x, weight[:, :2], groups=2) is NotImplemented
    assert lower(x, weight, dilation=2) is NotImplemented
    assert lower(x, weight, padding="same") is NotImplemented
    assert lower(x[0], weight) is NotImplemented
    assert lower(x, weight, stride=(1.5, 1)) is NotImplemented
    assert lower(torch.empty(64, 64, 64, 64), torch.empty(64, 64, 3, 3)) is NotImplemented  # for its memory
    assert lower_line(x[:, 0], weight[0], padding="same") is NotImplemented
    assert lower_line(x[:, 0], weight[0], stride=(1.5,)) is NotImplemented
    assert lower_line(x[0, 0], weight[0]) is NotImplemented
    with torch.autocast("cpu", torch.bfloat16):
        assert lower(x, weight) is NotImplemented
    with Lowering(fail), pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        F.conv2d(x[..., :2, :2], weight)
    with Lowering(fail), pytest.raises(RuntimeError, match="to have 4 channels"):
        F.conv2d(x[:, :3], weight)


def test_the_patches_of_all_layers_of_a_forward_pass_share_the_memory_for_them(monkeypatch):
    monkeypatch.setattr(convolution, "MOST_IN_PATCHES", 2 * 6 * 64 * 36)  # of two layers
    x, weight = torch.randn(6, 4, 8, 8), torch.randn(4, 4, 3, 3, requires_grad=True)

    def lowered():
        """Whether the examples are innermost after each of three layers."""
        after = []
        out = x
        for _ in range(3):
            out = F.conv2d(out, weight, padding=1)
            after.append(out.stride(0) == 1)
        return after

    mode = Lowering(fail)
    for _ in range(2):
        with mode:
            assert lowered() == [True, True, False]
    with mode, torch.no_grad():  # where they are not kept
        assert lowered() == [True, True, True]


@pytest.mark.parametrize("classes", [3, 9, 40])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 1}, {"label_smoothing": 0.1}]
)
def test_cross_entropy_is_that_of_torch(classes, options):
    x = torch.randn(4, 9, classes, dtype=torch.float64)
    target = torch.arange(9) % 3
    weight = torch.linspace(0.5, 2, classes, dtype=torch.float64)

    def loss(x):
        return F.cross_entropy(x, target, **options).sum() + F.cross_entropy(x, target, weight, **options).sin().sum()

    expected = torch.stack([grad(loss)(one) for one in x])
    with Lowering(fail):
        assert_close(vmap(grad(loss))(x), expected, 1e-12)
        assert_close(loss(x[0]), loss(x[0].clone()), 1e-12)
        of_probabilities = F.cross_entropy(x[0], x[1].softmax(-1))
    assert_close(of_probabilities, F.cross_entropy(x[0], x[1].softmax(-1)), 1e-12)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_is_not_known_goes_to_torch_itself():
    x, few = torch.randn(3, 2, SIZE), torch.randn(3, 40)
    projecting = nn.LSTM(SIZE, 6, proj_size=2)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]))
    with Lowering(fail):
        assert torch.equal(projecting(x)[0], projecting.forward(x)[0])
        for cell in (nn.RNN, nn.GRU, nn.LSTM):
            assert cell(SIZE, 6)(packed)[0].batch_sizes.tolist() == [2, 2, 1]
    weights = [torch.empty(0)] * 5
    states = (torch.zeros(1, 2, 2), torch.zeros(1, 2, 6))
    rest = (True, 1, 0.0, True, False, False)
    assert lower_recurrent("lstm", fail, (x, states, weights, *rest)) is NotImplemented
    assert (
        lower_recurrent("lstm", fail, (packed.data, packed.batch_sizes, states, weights[:4], *rest[:-1]))
        is NotImplemented
    )
    assert (
        lower_recurrent("gru", fail, (packed.data, packed.batch_sizes, states[1], weights[:4], *rest[:-1]))
        is NotImplemented
    )
    assert lower_attention(fail, x, x, x, enable_gqa=True) is NotImplemented
    assert lower_softmax(torch.softmax, few, -1) is NotImplemented
    assert lower_softmax(torch.softmax, few.t(), 0) is NotImplemented
    for half in (few.bfloat16(), few.half()):
        assert lower_cross_entropy(half, torch.zeros(3, dtype=torch.int64)) is NotImplemented
    assert lower_cross_entropy(few, few.softmax(-1)) is NotImplemented


def test_where_torch_gives_no_numbers_for_rows_of_nothing_neither_does_the_lowering():
    layer, x = nn.MultiheadAttention(SIZE, 2), torch.randn(LENGTH, BATCH, SIZE)
    expected = layer(x, x, x, key_padding_mask=EMPTY)
    with Lowering(fail):
        found = layer(x, x, x, key_padding_mask=EMPTY)
    for one, other in zip(found, expected, strict=True):
        assert 0 < one.isnan().sum() < one.numel() and torch.equal(one.isnan(), other.isnan())


def test_under_autocast_the_products_are_rounded_as_torch_rounds_them():
    for cell, x in itertools.product((nn.RNN, nn.GRU, nn.LSTM), [torch.randn(LENGTH, BATCH, SIZE)]):
        layer = cell(SIZE, 6)
        exact = layer(x)[0]
        with torch.autocast("cpu", torch.bfloat16), Lowering(fail):
            rounded = layer(x)[0]
        loss = rounded.float().square().sum()
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        assert rounded.dtype == torch.bfloat16
        assert 1e-5 < (rounded.float() - exact).abs().max() < 0.03
        for found, one in zip(
            gradients, torch.autograd.grad(exact.square().sum(), list(layer.parameters())), strict=True
        ):
            assert found.dtype == torch.float32
            assert (found - one).norm() < 0.05 * one.norm()


def names_behind(node):
    """Of a gradient's operations."""
    return node.name() + "".join(names_behind(one) for one, _ in node.next_functions if one is not None)


def test_what_has_no_dropout_can_be_left_to_torch():
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(4, 3, 3, 3, requires_grad=True)
    with Lowering(fail):
        assert F.conv2d(x, weight).grad_fn.name() != "ConvolutionBackward0"
    with Lowering(fail, all_of_them=False):
        assert F.conv2d(x, weight).grad_fn.name() == "ConvolutionBackward0"
        states, _ = nn.GRU(SIZE, 6)(torch.randn(LENGTH, BATCH, SIZE))
    assert "_Gru" not in names_behind(states.grad_fn)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}, {"bias": False}])
@pytest.mark.parametrize("cell", [*KINDS.values(), partial(nn.LSTM, proj_size=2)])
def test_layer_by_layer_a_recurrent_network_gives_what_it_gives_at_once_and_drops_between(cell, options):
    torch.manual_seed(0)
    layer, x = cell(SIZE, 6, 3, dropout=0.4, **options), torch.randn(LENGTH, BATCH, SIZE)
    with Lowering(lambda x, p: x, all_of_them=False):
        found = tensors_of(layer(x))
    with Lowering(lambda x, p: x * p, all_of_them=False):
        dropped = tensors_of(layer(x))
        calm = tensors_of(layer.eval()(x))
    expected = tensors_of(layer(x))
    for one, without, other in zip(found, calm, expected, strict=True):
        assert_close(one, other, 1e-6)
        assert_close(without, other, 1e-6)
    assert (dropped[0] - found[0]).abs().max() > 1e-3
    if "proj_size" not in getattr(cell, "keywords", {}):
        kept = _Calls()
        kept.key = torch.tensor(1)
        layer.train()
        with Lowering(kept.drop, all_of_them=False):
            first = layer(x)[0]
        kept.made = 0
        with Lowering(kept.drop):
            assert_close(layer(x)[0], first, 1e-6)


# --- in the trainer

FEATURES, STEPS = 6, 3


def make_task(model, examples=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, FEATURES, generator=generator)
    y = x.sum(1, keepdim=True).sin()
    data = TensorDataset(x, y)
    return Task(
        model=model,
        loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        train=data,
        valid=TensorDataset(x[:8], y[:8]),
    )


class Reader(nn.Module):
    """Reads each example as a sequence of its features."""

    def __init__(self, layer, size):
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(1, 4), layer(), nn.Linear(size, 1)

    def forward(self, x):
        out = self.layer(self.embed(x[:, :, None]))
        return self.head((out[0] if isinstance(out, tuple) else out)[:, -1])


def recurrent(cell, dropout):
    return lambda: Reader(lambda: cell(4, 5, 2, batch_first=True, dropout=dropout), 5)


def transformer(dropout):
    return lambda: Reader(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout, batch_first=True), 4)


def normalized(model):
    """With buffers that follow the seed and that training writes to."""

    def build():
        norm = nn.BatchNorm1d(FEATURES)
        norm.register_buffer("start", torch.randn(FEATURES))
        return nn.Sequential(norm, model())

    return build


def curve(task, seeds, mode, which, epochs=2):
    """The records of one of some trials that train together."""
    trainer = Trainer(task, epochs=epochs, slots=len(seeds), mode=mode)
    for key, seed in enumerate(seeds):
        trainer.admit(key, TrialSettings("momentum", {"learning_rate": 0.05, "momentum": 0.8}, 8, seed))
    return [dict(trainer.train_epoch())[which] for _ in range(epochs)]


def losses(records):
    return [value for r in records for value in (r.train_loss, r.valid_loss, r.grad_norm)]


@pytest.mark.parametrize(
    "model",
    [
        transformer(0.0),
        transformer(0.3),
        recurrent(nn.LSTM, 0.3),
        recurrent(nn.GRU, 0.3),
        normalized(transformer(0.3)),
        normalized(recurrent(nn.LSTM, 0.3)),
    ],
)
def test_a_models_curve_is_the_same_alone_in_a_batch_and_one_at_a_time(model):
    task = make_task(model)
    assert Trainer(task, epochs=1).objective.reason is None
    expected = losses(curve(task, [3], "sequential", 0))
    for seeds, mode, which in ([[3], "fused", 0], [[1, 2, 3, 3], "fused", 2], [[3, 1], "sequential", 0]):
        assert losses(curve(task, seeds, mode, which)) == pytest.approx(expected, rel=1e-4)


class Words(nn.Module):
    """An encoder of texts, of which padding is hidden."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 1)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, words):
        return self.head(self.layers(self.embed(words), src_key_padding_mask=words == 0).mean(1))


def test_a_text_of_nothing_but_padding_does_not_end_a_trial():
    generator = torch.Generator().manual_seed(0)
    words, y = torch.randint(1, 11, (24, 7), generator=generator), torch.randn(24, 1, generator=generator)
    words[5], words[2, 4:] = 0, 0
    data = TensorDataset(words, y)
    rest = TensorDataset(words[6:], y[6:])  # in evaluation torch's own encoder says NaN of a text of nothing
    task = Task(model=Words, loss=lambda model, b: F.mse_loss(model(b[0]), b[1]), train=data, valid=rest)
    seed, rate, momentum = 3, 0.05, 0.8
    torch.manual_seed(seed)
    model = Words()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    expected = []
    for epoch in (1, 2):
        for at in MemorySource(data.tensors, 8).order((seed, epoch)):
            optimizer.zero_grad()
            loss = F.mse_loss(model(words[at]), y[at])
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
    for mode in ("fused", "sequential"):
        records = curve(task, [1, seed], mode, 1)
        assert [r.diverged_at_step for r in records] == [None, None]
        found = [r.train_loss for r in records]
        assert found == pytest.approx([sum(expected[:3]) / 3, sum(expected[3:]) / 3], rel=1e-4)


@pytest.mark.parametrize("model", [transformer, partial(recurrent, nn.LSTM)])
def test_a_dropout_within_a_layer_is_in_force(model):
    with_dropout, without = (losses(curve(make_task(model(p)), [3], "fused", 0)) for p in (0.3, 0.0))
    assert abs(with_dropout[0] / without[0] - 1) > 1e-3
    assert draws_within(model(0.3)()) and not draws_within(model(0.0)())
    assert not draws_within(nn.LSTM(2, 2, dropout=0.0)) and draws_within(nn.MultiheadAttention(4, 2, dropout=0.1))


def test_the_dropout_within_a_layer_drops_its_share_and_follows_the_key():
    calls = _Calls()
    with pytest.raises(RuntimeError, match="draws random numbers"):
        calls.drop(torch.ones(2), 0.5)
    calls.key = torch.tensor(3)
    first, second = calls.drop(torch.ones(100, 100), 0.25), calls.drop(torch.ones(100, 100), 0.25)
    assert (first > 0).float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert first.unique().tolist() == pytest.approx([0.0, 4 / 3]) and not torch.equal(first, second)
    calls.made = 0
    assert torch.equal(calls.drop(torch.ones(100, 100), 0.25), first)


class Backwards(nn.GRU):
    """A user's own layer, whose forward does more than its parent's."""

    def forward(self, x, first=None):
        return super().forward(x.flip(1), first)[0] * 2


class Packed(Reader):
    def forward(self, x):
        lengths = torch.arange(len(x)) % FEATURES + 1
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(x[:, :, None]), lengths, True, enforce_sorted=False)
        return self.head(self.layer(packed)[1][0][0] if isinstance(self.layer, nn.LSTM) else self.layer(packed)[1][0])


class Drawing(Reader):
    """Attention whose dropout only the call tells of."""

    def forward(self, x):
        h = self.embed(x[:, :, None])
        return self.head(F.scaled_dot_product_attention(h, h, h, dropout_p=0.2 * self.training)[:, -1])


def test_a_layer_derived_from_torchs_keeps_its_own_forward():
    task = make_task(lambda: Reader(lambda: Backwards(4, 5, batch_first=True), 5))
    assert Trainer(task, epochs=1).objective.reason is None
    expected = losses(curve(task, [3], "sequential", 0))
    assert losses(curve(task, [1, 3], "fused", 1)) == pytest.approx(expected, rel=1e-4)
    plain = make_task(lambda: Reader(lambda: nn.GRU(4, 5, batch_first=True), 5))
    assert abs(losses(curve(plain, [3], "sequential", 0))[0] / expected[0] - 1) > 1e-3


REFUSED = {
    "packed rnn": (lambda: Packed(lambda: nn.RNN(4, 5), 5), ""),
    "packed gru": (lambda: Packed(lambda: nn.GRU(4, 5), 5), ""),
    "packed lstm": (lambda: Packed(lambda: nn.LSTM(4, 5), 5), ""),
    "projecting lstm": (lambda: Reader(lambda: nn.LSTM(4, 5, batch_first=True, proj_size=3), 3), "Batching rule"),
    "dropout by call": (lambda: Drawing(nn.Identity, 4), "random numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_lowered_trains_one_at_a_time_and_says_why(name):
    model, reason = REFUSED[name]
    trainer = Trainer(make_task(model), epochs=1)
    assert not trainer.objective.batch_slots
    assert reason in trainer.objective.reason and "\n" not in trainer.objective.reason
