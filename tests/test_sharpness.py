"""Sharpness: the largest eigenvalue of the full Hessian, in whichever way the model allows; no trial fails of it."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from momentum_tuner.metrics import stability_bound
from momentum_tuner.tasks import Task, digits_cnn, digits_mlp, digits_rnn, double_well, quadratic, rosenbrock
from momentum_tuner.trainer import ScheduleSettings, Trainer, TrialSettings
from momentum_tuner.trainer import sharpness as measuring
from momentum_tuner.trainer.lanczos import MOST_PRODUCTS, TOLERANCE, largest_eigenvalues
from momentum_tuner.trainer.objective import Objective

torch.set_num_threads(1)

ONE_PERCENT = 0.01


def never():
    return False


def examples(count=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return x, torch.sin(2 * x.sum(1, keepdim=True)) + 0.1 * torch.randn(count, 1, generator=generator)


def mean_square(model, batch):
    return mse_loss(model(batch[0]), batch[1])


def perceptron():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def make_task(model=perceptron, **changes):
    fields = {"model": model, "loss": mean_square, "train": TensorDataset(*examples())}
    return Task(**(fields | {"valid": TensorDataset(*examples(16, seed=1))} | changes))


def trained(task, settings, *, epochs=2, mode="fused", precision="float64", **options):
    """A trainer whose trials, by their place in `settings`, have trained so long."""
    trainer = Trainer(task, epochs=epochs, slots=len(settings), mode=mode, precision=precision, **options)
    for key, one in enumerate(settings):
        trainer.admit(key, one)
    for _ in range(epochs):
        list(trainer.train_epoch())
    return trainer


def sgd(rate=0.05, momentum=0.9, batch=32, seed=0, **others):
    return TrialSettings("momentum", {"learning_rate": rate, "momentum": momentum, **others}, batch, seed)


def three_seeds():
    return [sgd(rate, seed=seed) for seed, rate in enumerate((0.01, 0.05, 0.1))]


def full_spectrum(task, state, batch, training=False):
    """All eigenvalues of the Hessian at an exported state, from torch's own full one in float64."""
    model = task.model().double().train(training)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    row = state.tensors["parameters"].double()
    batch = batch and tuple(t.double() if t.is_floating_point() else t for t in batch)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return task.loss(self.model, batch)

    def loss(row):
        pieces = row.split([shape.numel() for shape in shapes.values()])
        named = {f"model.{n}": piece.view(shapes[n]) for n, piece in zip(shapes, pieces, strict=True)}
        return functional_call(Loss(), named)

    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, row))


# --- the eigenvalue itself


def spectra():
    """Eigenvalues by name: easy ones, and ones that fool simpler searches."""
    drawn = np.random.default_rng(0)
    return {
        "one": [3.0],
        "two": [-1.0, 2.0],
        "zero": [0.0] * 5,
        "all the same": [2.0] * 40,
        "evenly spread": np.linspace(0, 1, 300),
        "a few outliers": [*drawn.uniform(0, 0.1, 300), 1.0, 2.0, 10.0],
        "two largest close together": [*drawn.uniform(0, 1, 300), 9.8, 10.0],
        "negative ones dominate": [-1000.0, -500.0, -30.0, *drawn.uniform(-1, 1, 300), 2.0],
        "all negative": -drawn.uniform(1, 100, 200),
        "as of random data": np.linalg.eigvalsh(np.cov(drawn.normal(size=(200, 400)))),
        "over many orders": np.geomspace(1e-8, 1e4, 300),
    }


def rotated(eigenvalues, seed, dtype):
    size = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    return torch.tensor(basis * np.asarray(eigenvalues) @ basis.T, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", spectra())
def test_the_largest_eigenvalue_is_found_to_1_percent_whatever_the_spectrum(name, dtype):
    eigenvalues = spectra()[name]
    matrices = torch.stack([rotated(eigenvalues, seed, dtype) for seed in range(10)])
    products = []

    def multiply(vectors):
        products.append(1)
        return torch.einsum("nij,nj->ni", matrices, vectors)

    found = largest_eigenvalues(multiply, matrices[:, 0])
    worst = np.abs(found - max(eigenvalues)).max()
    print(f"{name}: {len(products)} products, off by {worst:.1e} of {max(eigenvalues):g}")
    assert worst <= TOLERANCE * abs(max(eigenvalues))


def test_the_search_is_not_fooled_by_a_start_that_hardly_has_the_right_direction():
    """It is settled at the second largest eigenvalue for a while, by any look at the residual."""
    size = 200
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start /= start.norm()
    eigenvalues = torch.linspace(0, 1, size, dtype=torch.float64)
    eigenvalues[:2] = torch.tensor([10.4, 10.0], dtype=torch.float64)
    basis = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = basis[:, 0] - basis[:, 0] @ start * start
    basis[:, 0] = first / first.norm() + 0.02 / size**0.5 * start  # a fiftieth of a random direction's share
    basis = torch.linalg.qr(basis)[0]
    assert abs(basis[:, 0] @ start) * size**0.5 == pytest.approx(0.02, rel=1e-3)
    matrix = basis * eigenvalues @ basis.T
    found = largest_eigenvalues(lambda v: v @ matrix, start[None])
    assert found == pytest.approx([10.4], rel=TOLERANCE)


def test_each_matrix_is_searched_as_if_alone_and_one_that_is_not_finite_has_no_value():
    matrices = torch.stack(
        [rotated(spectra()[n], 0, torch.float64)[:200, :200] for n in ("evenly spread", "all negative")]
    )
    matrices = torch.cat([matrices, torch.full((1, 200, 200), torch.nan, dtype=torch.float64)])

    def search(some):
        return largest_eigenvalues(lambda v: torch.einsum("nij,nj->ni", some, v), some[:, 0])

    together = search(matrices)
    assert math.isnan(together[2])
    for one in (0, 1):
        assert search(matrices[one : one + 1])[0] == pytest.approx(together[one], rel=1e-9)


# --- of models


@pytest.mark.parametrize("mode", ["fused", "sequential"])
def test_the_sharpness_of_a_perceptron_is_the_largest_eigenvalue_of_its_full_hessian(mode):
    task = make_task()
    trainer = trained(task, three_seeds(), mode=mode)
    found = trainer.sharpness(trainer.keys)
    expected = {key: float(full_spectrum(task, trainer.export(key), examples())[-1]) for key in trainer.keys}
    print(expected)
    assert found == pytest.approx(expected, rel=ONE_PERCENT)
    assert min(expected.values()) < 0.8 * max(expected.values()), "they differ"


BUILT_IN = {
    "mlp": lambda: digits_mlp(hidden=5),
    "cnn": lambda: digits_cnn(channels=2),
    "cnn with batch norm": lambda: digits_cnn(channels=2, batch_norm=True),
    "rnn": lambda: digits_rnn(hidden=5),
    "lstm": lambda: digits_rnn(cell="lstm", hidden=4),
    "gru": lambda: digits_rnn(cell="gru", hidden=4),
}


@pytest.mark.parametrize("mode", ["fused", "sequential"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_sharpness_of_every_kind_of_network_is_that_of_the_full_hessian(name, mode):
    built = BUILT_IN[name]()
    task = replace(built, train=TensorDataset(*(t[:64] for t in built.train.tensors)))
    trainer = trained(task, [sgd(0.05, batch=16, seed=seed) for seed in (0, 1)], epochs=1, mode=mode, precision="auto")
    before = {key: trainer.export(key) for key in trainer.keys}
    found = trainer.sharpness(trainer.keys)
    expected = {
        key: float(full_spectrum(task, state, task.train.tensors, training=True)[-1]) for key, state in before.items()
    }
    assert found == pytest.approx(expected, rel=ONE_PERCENT)
    for key, state in before.items():
        after = trainer.export(key)
        assert after.tensors.keys() == state.tensors.keys()
        assert all(torch.equal(after.tensors[name], value) for name, value in state.tensors.items())


class Attentive(nn.Module):
    """Attention over an image's rows, by torch's kernels, the fast ones of which have no second derivative."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(8, 3 * 8)
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        queries, keys, values = self.inputs(images).unflatten(2, (2, 12)).transpose(1, 2).chunk(3, dim=3)
        attended = scaled_dot_product_attention(queries, keys, values)  # [batch, 2 heads, 8 rows, 4]
        return self.head(attended.transpose(1, 2).flatten(2).mean(1))


def test_attention_has_a_sharpness(caplog):
    images, labels = (t[:64] for t in digits_mlp().train.tensors)
    task = make_task(
        Attentive,
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        train=TensorDataset(images, labels),
        valid=TensorDataset(images, labels),
    )
    trainer = trained(task, [sgd(0.05, batch=64)], epochs=1, mode="sequential")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = full_spectrum(task, trainer.export(0), (images, labels))[-1]
    assert trainer.sharpness([0])[0] == pytest.approx(float(expected), rel=ONE_PERCENT)
    assert not caplog.records


class Drop(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 1))

    def forward(self, x):
        return self.layers(x)


def test_dropout_is_off():
    trainer = trained(make_task(lambda: Drop(0.5)), three_seeds())
    plain = Trainer(make_task(lambda: Drop(0.0)), epochs=1, slots=1, precision="float64")
    for key in trainer.keys:
        expected = full_spectrum(plain.task, trainer.export(key), examples())[-1]
        assert trainer.sharpness([key])[key] == pytest.approx(float(expected), rel=ONE_PERCENT)


@pytest.mark.parametrize("mode", ["fused", "sequential"])
def test_autocast_is_off(mode):
    task = make_task()
    trainer = trained(task, three_seeds(), mode=mode, precision="bfloat16")
    same = Trainer(task, epochs=1, slots=3, mode=mode, precision="float32")
    for key, one in enumerate(three_seeds()):
        same.admit(key, one, trainer.export(key))
    assert trainer.sharpness([0, 1, 2]) == same.sharpness([0, 1, 2])


# --- of landscapes


def test_the_sharpness_of_a_quadratic_is_its_largest_eigenvalue():
    trainer = trained(quadratic(dim=30, kappa=70, smallest=0.5), [sgd(1e-3)])
    assert trainer.sharpness([0])[0] == pytest.approx(35.0, rel=TOLERANCE)


def test_the_sharpness_of_curved_landscapes_is_that_of_the_point_where_a_trial_is():
    for task in (rosenbrock(dim=4, jitter=0.1), double_well(jitter=0.5)):
        trainer = trained(task, [sgd(1e-4, seed=seed) for seed in range(4)])
        expected = {key: float(full_spectrum(task, trainer.export(key), None)[-1]) for key in trainer.keys}
        assert len({round(value, 3) for value in expected.values()}) == 4
        assert trainer.sharpness(trainer.keys) == pytest.approx(expected, rel=TOLERANCE)


class Saddle(nn.Module):
    def __init__(self, curvatures):
        super().__init__()
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)
        self.theta = nn.Parameter(torch.full((len(curvatures),), 0.1, dtype=torch.float64))

    def forward(self):
        return 0.5 * (self.curvatures * self.theta.square()).sum()


@pytest.mark.parametrize("curvatures", [[-80.0, -50.0, 1.0, 0.5], [-3.0, -2.0, -1.0], [0.0, 0.0]])
def test_a_saddle_is_as_sharp_as_its_largest_curvature_not_its_largest_in_magnitude(curvatures):
    task = Task(model=lambda: Saddle(curvatures), loss=lambda model, _: model(), steps_per_epoch=1)
    trainer = trained(task, [sgd(1e-6)], epochs=1)
    assert trainer.sharpness([0])[0] == pytest.approx(max(curvatures), rel=TOLERANCE, abs=1e-12)


def test_a_linear_loss_is_flat():
    line = nn.Linear(4, 1).double()
    task = Task(model=lambda: line, loss=lambda model, _: model.weight.sum() + 10 * model.bias.sum(), steps_per_epoch=1)
    trainer = trained(task, [sgd(1e-6)], epochs=1)
    assert trainer.sharpness([0]) == {0: 0.0}


# --- what is measured


def test_weight_decay_adds_its_curvature_unless_it_is_decoupled():
    hyper = {"learning_rate": 1e-9, "momentum": 0.9, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "alpha": 0.9}
    names = ("sgd", "momentum", "nesterov", "momentum_classic", "nesterov_lookahead", "adam", "rmsprop", "adamw")
    settings = [TrialSettings(name, hyper | {"weight_decay": 0.25}, 1, 0) for name in names]
    trainer = trained(quadratic(dim=3, kappa=10), settings, epochs=1)
    found = dict(zip(names, trainer.sharpness(trainer.keys).values(), strict=True))
    assert found == pytest.approx(dict.fromkeys(names, 10.25) | {"adamw": 10.0}, rel=TOLERANCE)


def test_it_is_measured_on_the_first_512_examples():
    x, y = examples(700)
    task = make_task(train=TensorDataset(torch.cat([x[:512], 3 * x[512:]]), y))
    trainer = trained(task, [sgd()], epochs=1)
    state = trainer.export(0)
    first, all_of_them = (
        float(full_spectrum(task, state, tuple(t[:n] for t in task.train.tensors))[-1]) for n in (512, 700)
    )
    assert abs(first / all_of_them - 1) > ONE_PERCENT
    assert trainer.sharpness([0])[0] == pytest.approx(first, rel=TOLERANCE)


def test_an_iterables_first_batch_is_the_same_every_time():
    data = TensorDataset(*examples())
    task = make_task(train=DataLoader(data, batch_size=16, shuffle=True))
    trainer = trained(task, [sgd()], epochs=1)
    found = trainer.sharpness([0])
    again = Trainer(task, epochs=2, slots=1, mode="fused", precision="float64")
    again.admit(0, sgd(), trainer.export(0))
    assert again.sharpness([0]) == found
    batches = [(x, 2 * y) for x, y in DataLoader(data, batch_size=32)]
    task = replace(task, train=batches)
    trainer = trained(task, [sgd()], epochs=1)
    expected = full_spectrum(task, trainer.export(0), batches[0])[-1]
    assert trainer.sharpness([0])[0] == pytest.approx(float(expected), rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_trial_is_as_sharp_alone_as_among_others(precision):
    built = digits_cnn(channels=2, batch_norm=True)
    task = replace(built, train=TensorDataset(*(t[:512] for t in built.train.tensors)), steps_per_epoch=2)
    settings = [sgd(10 ** -(1 + i % 4), seed=i % 5) for i in range(20)]
    trainer = trained(task, settings, epochs=1, precision=precision)
    found = trainer.sharpness(trainer.keys)
    assert list(found) == trainer.keys
    for key in (3, 17):
        alone = trainer.sharpness([key])
        assert alone[key] == pytest.approx(found[key], rel=1e-3 if precision == "float32" else 1e-9)
    other = Trainer(task, epochs=1, slots=1, mode="sequential", precision=precision)
    other.admit(0, settings[3], trainer.export(3))
    assert other.sharpness([0])[0] == pytest.approx(found[3], rel=1e-3 if precision == "float32" else 1e-9)


def test_measuring_changes_nothing_in_training():
    task = make_task(lambda: Drop(0.3))

    def losses(measured):
        trainer = Trainer(task, epochs=3, slots=2, mode="fused")
        for key in (0, 1):
            trainer.admit(key, sgd(seed=key))
        found = []
        for _ in range(3):
            found += [record.train_loss for _, record in trainer.train_epoch()]
            if measured:
                assert len(trainer.sharpness([0, 1])) == 2
        return found, torch.get_rng_state().tolist()

    torch.manual_seed(0)
    expected = losses(False)
    torch.manual_seed(0)
    assert losses(True) == expected


# --- what does not work


class Once(torch.autograd.Function):
    """The square, whose gradient cannot be differentiated."""

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Custom(nn.Module):
    """A layer with an operation that does something out of the ordinary."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return self.operation(self.layers(x))


def test_a_model_without_a_second_derivative_has_no_sharpness_and_one_line_says_why(caplog):
    trainer = trained(make_task(lambda: Custom(Once.apply)), three_seeds(), mode="sequential")
    for _ in range(2):
        assert trainer.sharpness([0, 1, 2]) == {0: None, 1: None, 2: None}
    assert len(caplog.records) == 1
    assert "a trial has no sharpness: RuntimeError: trying to differentiate twice" in caplog.text
    assert [record.epoch for _, record in trainer.train_epoch()] == [3] * 3


def branching(x):
    """Needs the value of a tensor, which vmap does not have."""
    return x * 2 if bool(x.sum() > 1e9) else x


def test_a_model_that_vmap_cannot_batch_is_measured_one_slot_at_a_time(caplog):
    task = make_task(lambda: Custom(branching))
    trainer = trained(task, three_seeds(), mode="auto")
    assert "the model trains one slot at a time" in caplog.text
    expected = {key: float(full_spectrum(task, trainer.export(key), examples())[-1]) for key in trainer.keys}
    assert trainer.sharpness(trainer.keys) == pytest.approx(expected, rel=ONE_PERCENT)


def test_a_model_whose_fused_hessian_is_wrong_is_measured_one_slot_at_a_time(caplog, monkeypatch):
    task = make_task()
    trainer = trained(task, three_seeds())
    right = Objective.smooth_loss

    def wrong(self, rows, buffers, data, fused):
        return right(self, rows, buffers, data, fused) * (1.5 if fused else 1.0)

    monkeypatch.setattr(Objective, "smooth_loss", wrong)
    expected = {key: float(full_spectrum(task, trainer.export(key), examples())[-1]) for key in trainer.keys}
    with caplog.at_level(logging.INFO):
        assert trainer.sharpness(trainer.keys) == pytest.approx(expected, rel=ONE_PERCENT)
    assert "one slot at a time: ArithmeticError: the fused Hessian differs from the solo one by 50.0%" in caplog.text


def test_an_error_of_a_slot_alone_says_nothing_of_fused_ones(caplog, monkeypatch):
    trainer = trained(make_task(), three_seeds())
    expected = trainer.sharpness(trainer.keys)
    asked = []
    right = Objective.smooth_loss

    def failing(self, rows, buffers, data, fused):
        asked.append((len(rows), fused))
        if len(rows) == 1 and len(asked) == 1:
            raise ValueError("a slot alone fails")
        return right(self, rows, buffers, data, fused)

    monkeypatch.setattr(Objective, "smooth_loss", failing)
    alone = trainer.keys[0]
    assert trainer.sharpness([alone]) == {alone: None}
    assert [r.message for r in caplog.records] == ["a trial has no sharpness: ValueError: a slot alone fails"]
    assert trainer.sharpness(trainer.keys) == pytest.approx(expected, rel=1e-6)
    assert asked == [(1, False), (3, True)]


@pytest.mark.parametrize(("room", "tried"), [(3, [4, 2, 2, 2]), (1, [4, 2]), (0, None)])
def test_without_memory_fewer_slots_are_measured_at_once(room, tried, caplog, monkeypatch):
    """No real memory can be full here, so the loss says that it is. A slot alone is measured without vmap."""
    trainer = trained(make_task(), [sgd(10 ** -(1 + i % 3), seed=i) for i in range(6)])
    expected = trainer.sharpness(trainer.keys)
    again = Trainer(make_task(), epochs=2, slots=6, mode="fused", precision="float64")
    for key in trainer.keys:
        again.admit(key, sgd(10 ** -(1 + key % 3), seed=key), trainer.export(key))
    asked = []
    right = Objective.smooth_loss

    def full(self, rows, buffers, data, fused):
        if fused:
            asked.append(len(rows))
        if len(rows) > room:
            raise torch.OutOfMemoryError("a test's memory is full")
        return right(self, rows, buffers, data, fused)

    monkeypatch.setattr(Objective, "smooth_loss", full)
    monkeypatch.setattr(measuring, "EXAMPLES_AT_ONCE", 4 * 96)
    found = again.sharpness(again.keys)
    if tried is None:
        assert found == dict.fromkeys(range(6))
        assert [r.message for r in caplog.records] == [
            "a trial has no sharpness: OutOfMemoryError: a test's memory is full"
        ]
    else:
        assert asked == tried
        assert found == pytest.approx(expected, rel=1e-6)
        assert not caplog.records
    assert len(list(again.train_epoch())) == 6


def test_what_is_not_settled_has_no_sharpness(caplog, monkeypatch):
    monkeypatch.setattr("momentum_tuner.trainer.lanczos.MOST_PRODUCTS", 2)
    trainer = trained(make_task(), [sgd()])
    assert trainer.sharpness([0]) == {0: None}
    assert f"was not found by {MOST_PRODUCTS} Hessian-vector products" in caplog.text


def test_a_pause_leaves_out_the_trials_that_are_not_done(monkeypatch):
    monkeypatch.setattr(measuring, "EXAMPLES_AT_ONCE", 2 * 96)
    trainer = trained(make_task(), [sgd(seed=seed) for seed in range(6)])
    everything = trainer.sharpness(trainer.keys)
    assert trainer.sharpness(trainer.keys, pause=lambda: True) == {}
    asked, most = [], 12

    def later():
        asked.append(1)
        return len(asked) > most

    found = trainer.sharpness(trainer.keys, pause=later)
    assert list(found) in ([0, 1], [0, 1, 2, 3])
    assert found == {key: everything[key] for key in found}
    assert len(asked) == most + 1, "it is asked before each product"
    assert trainer.sharpness([]) == {}


# --- the margin


def test_the_margin_is_by_the_last_steps_learning_rate_and_momentum():
    task = quadratic(dim=3, kappa=10, steps_per_epoch=5)
    schedule = ScheduleSettings("one_cycle", {"base_momentum_fraction": 0.5, "peak_fraction": 0.3})
    trainer = Trainer(task, epochs=4, slots=1, schedule=schedule)
    trainer.admit(0, sgd(1e-3, 0.8))
    for _ in range(2):  # half of its budget, as neither rate would say much at the cycle's end
        list(trainer.train_epoch())
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3, momentum=0.8)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    cycle = one_cycle(optimizer, 1e-3, total_steps=20, pct_start=0.3, base_momentum=0.4, max_momentum=0.8)
    for _ in range(9):
        optimizer.step()
        cycle.step()
    (group,) = optimizer.param_groups
    expected = group["lr"] * 10.0 / stability_bound(group["momentum"], False)
    assert trainer.stability_margin(0, 10.0) == pytest.approx(expected, rel=1e-9)
    assert group["lr"] < 0.9e-3 and 0.41 < group["momentum"] < 0.79


def test_the_margin_of_a_constant_schedule_counts_dampening_and_leaves_out_adam():
    hyper = {"learning_rate": 0.01, "momentum": 0.5, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8}
    settings = [TrialSettings(name, hyper, 1, 0) for name in ("momentum", "sgd", "nesterov", "momentum_0.9", "adam")]
    settings.append(sgd(0.01, 0.5, dampening=0.25))
    trainer = trained(quadratic(dim=3, kappa=10), settings, epochs=1)
    found = [trainer.stability_margin(key, 10.0) for key in trainer.keys]
    assert found.pop(4) is None
    assert found == pytest.approx([0.1 / 3, 0.1 / 2, 0.1 / 1.5, 0.1 / 3.8, 0.1 * 0.75 / 3])
