"""METRICS.md's known truths: rates and edges on quadratics, training at the edge, as the trainer measures them."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

from momentum_tuner.metrics import stability_bound, trial_measures
from momentum_tuner.tasks import Task, digits_mlp, quadratic, rosenbrock
from momentum_tuner.trainer import Trainer, TrialSettings

torch.set_num_threads(1)

EPOCHS = 8
STEPS = {10: 400, 100: 800}  # long enough for 2^(2/T), short enough for a distance above 1e-154

USUAL, BEST, LOOKAHEAD = "nesterov, usual", "nesterov, best", ", look-ahead form"


def known_rates(kappa):
    """Optimizer, learning rate, momentum and contraction by method, for eigenvalues in [1, kappa]."""
    root, other = math.sqrt(kappa), math.sqrt(3 * kappa + 1)
    polyak = 4 / (root + 1) ** 2, ((root - 1) / (root + 1)) ** 2, (root - 1) / (root + 1)
    usual = 1 / kappa, (root - 1) / (root + 1), 1 - 1 / root
    best = 4 / (3 * kappa + 1), (other - 2) / (other + 2), 1 - 2 / other
    return {
        "gradient descent": ("sgd", 2 / (kappa + 1), 0.0, (kappa - 1) / (kappa + 1)),
        "momentum": ("momentum", *polyak),
        "momentum, textbook form": ("momentum_classic", *polyak),
        USUAL: ("nesterov", *usual),
        USUAL + LOOKAHEAD: ("nesterov_lookahead", *usual),
        BEST: ("nesterov", *best),
        BEST + LOOKAHEAD: ("nesterov_lookahead", *best),
    }


def run(task, settings, epochs, initial_loss=None):
    """The records of all settings, trained in one fused batch; `initial_loss` replaces what 10x is measured from."""
    trainer = Trainer(task, epochs=epochs, slots=len(settings), mode="fused")
    records = {}
    for key, (optimizer, learning_rate, momentum) in settings.items():
        hyper = {"learning_rate": learning_rate, "momentum": momentum}
        trial = TrialSettings(optimizer, hyper, 1, 0)
        records[key] = [trainer.admit(key, trial)]
        if initial_loss is not None:
            start = replace(trainer.export(key), initial_loss=initial_loss)
            trainer.release(key)
            trainer.admit(key, trial, start)
    for _ in range(epochs):
        for key, record in trainer.train_epoch():
            records[key].append(record)
            if record.diverged_at_step is not None:
                trainer.release(key)
    return records


@pytest.fixture(scope="module", params=STEPS)
def measured(request):
    """Condition number, and the measured contraction by method."""
    kappa = request.param
    settings = {name: row[:3] for name, row in known_rates(kappa).items()}
    task = quadratic(kappa=kappa, steps_per_epoch=STEPS[kappa] // EPOCHS)
    records = run(task, settings, EPOCHS)
    return kappa, {name: trial_measures(r, EPOCHS).contraction for name, r in records.items()}


def test_the_table_of_known_rates_is_that_of_metrics_md():
    found = {kappa: [row[3] for row in known_rates(kappa).values()] for kappa in (10, 100)}
    assert [round(v, 4) for v in found[10]] == [0.8182, 0.5195, 0.5195, 0.6838, 0.6838, 0.6408, 0.6408]
    assert [round(v, 4) for v in found[100]] == [0.9802, 0.8182, 0.8182, 0.9, 0.9, 0.8847, 0.8847]


def test_gradient_descent_contracts_at_its_known_rate(measured):
    kappa, found = measured
    assert found["gradient descent"] == pytest.approx((kappa - 1) / (kappa + 1), abs=1e-3)


@pytest.mark.parametrize("method", [m for m in known_rates(10) if m != "gradient descent"])
def test_momentum_and_nesterov_contract_at_their_known_rates(measured, method):
    kappa, found = measured
    rate = known_rates(kappa)[method][3]
    print(f"kappa {kappa}: {found[method]:.4f}, theory {rate:.4f}")
    assert found[method] == pytest.approx(rate, abs=3e-3)
    # What is left is the polynomial factor of a defective optimum.
    assert found[method] / 2 ** (2 / STEPS[kappa]) == pytest.approx(rate, abs=1e-4)


def test_the_accelerated_methods_rank_as_theory_says(measured):
    _, found = measured
    assert found["momentum"] < found[BEST] < found[USUAL] < found["gradient descent"]


@pytest.mark.parametrize("steps", [500, 1000, 5000])
@pytest.mark.parametrize("kappa", [2, 10])
def test_the_rates_hold_where_the_distance_underflows_before_the_end(kappa, steps):
    settings = {name: row[:3] for name, row in known_rates(kappa).items()}
    records = run(quadratic(kappa=kappa, steps_per_epoch=50), settings, steps // 50)
    for method, (*_, rate) in known_rates(kappa).items():
        measured = trial_measures(records[method], steps // 50).contraction
        # Down to 1e-292, which is 1e-50 of what torch squares without underflow.
        took = min(steps, math.log(1e-292) / math.log(rate))
        assert rate - 1e-4 <= measured <= rate * 3 ** (2 / (took - 50)), method


def test_what_cannot_come_nearer_to_an_optimum_that_is_not_zero_keeps_its_rate():
    def contractions(epochs):
        settings = {momentum: ("momentum", 1e-3, momentum) for momentum in (0.9, 0.97)}
        records = run(rosenbrock(), settings, epochs)
        return [trial_measures(records[momentum], epochs).contraction for momentum in (0.9, 0.97)]

    slow, fast = contractions(60)
    assert contractions(200) == pytest.approx([slow, fast], abs=2e-3)
    assert fast < slow - 1e-3 and slow < 0.999


@pytest.mark.parametrize(("precision", "below"), [("float32", 1e-30), ("float64", 1e-290)])
def test_a_distance_is_told_down_to_where_its_dtype_rounds_it(precision, below):
    trainer = Trainer(quadratic(dim=2, kappa=2), epochs=100, slots=1, precision=precision)
    records = [trainer.admit("a", TrialSettings("sgd", {"learning_rate": 2 / 3}, 1, 0))]  # a third is left by a step
    for _ in range(100):
        records += [record for _, record in trainer.train_epoch()]
    there = [r.distance for r in records if r.distance]
    assert below < there[-1] < below * 3**51
    assert all(r.distance == 0.0 for r in records[len(there) :])
    for before, after in itertools.pairwise(there):
        assert after / before == pytest.approx(3.0**-50, rel=1e-5)


# --- stability edges, for one mode of curvature 1

EDGES = {
    ("sgd", 0.0): 2.0,
    ("momentum", 0.5): 3.0,
    ("momentum", 0.9): 3.8,
    ("momentum_classic", 0.9): 3.8,
    ("nesterov", 0.5): 1.5,
    ("nesterov", 0.9): 3.8 / 2.8,
    ("nesterov_lookahead", 0.5): 1.5,
    ("nesterov_lookahead", 0.9): 3.8 / 2.8,
}
EDGE_EPOCHS, EDGE_STEPS = 40, 50
ALLOWED = 100.0  # below its edge, momentum at beta = 0.9 first overshoots to 171x its initial loss


def heights(optimizer, rate, beta, steps):
    """Loss before each step on `theta^2 / 2` from theta = 1, by the textbook recurrence."""
    theta, velocity, found = 1.0, 0.0, []
    for _ in range(steps):
        gradient = theta - rate * beta * velocity if optimizer == "nesterov_lookahead" else theta
        found.append(gradient**2 / 2)  # the loss where the gradient is taken
        velocity = beta * velocity + gradient
        theta -= rate * (gradient + beta * velocity if optimizer == "nesterov" else velocity)
    return np.array(found)


def slowest_root(optimizer, rate, beta):
    """Spectral radius of the recurrence in (theta_t, theta_{t-1})."""
    if "nesterov" in optimizer:
        return max(abs(np.roots([1, -(1 + beta) * (1 - rate), beta * (1 - rate)])))
    return max(abs(np.roots([1, -(1 + beta - rate), beta])))


@pytest.fixture(scope="module")
def at_the_edges():
    settings = {
        (optimizer, beta, factor): (optimizer, factor * edge, beta)
        for (optimizer, beta), edge in EDGES.items()
        for factor in (0.999, 1.001)
    }
    task = quadratic(dim=1, kappa=1, steps_per_epoch=EDGE_STEPS)
    return run(task, settings, EDGE_EPOCHS, initial_loss=ALLOWED * 0.5)


def test_the_edges_are_those_of_metrics_md():
    for (optimizer, beta), edge in EDGES.items():
        bound = 2 * (1 + beta) / (1 + 2 * beta) if "nesterov" in optimizer else 2 * (1 + beta)
        assert edge == pytest.approx(bound, rel=1e-12)
        assert slowest_root(optimizer, 0.999 * edge, beta) < 1 < slowest_root(optimizer, 1.001 * edge, beta)


@pytest.mark.parametrize(("optimizer", "beta"), EDGES)
def test_just_below_the_edge_a_trial_is_bounded_and_shrinks(at_the_edges, optimizer, beta):
    records = at_the_edges[optimizer, beta, 0.999]
    distances = [r.distance for r in records]
    assert len(records) == EDGE_EPOCHS + 1
    assert all(r.diverged_at_step is None for r in records)
    assert all(later < before for before, later in itertools.pairwise(distances[::10]))
    assert max(distances) < 10 and distances[-1] < 0.05
    measured = trial_measures(records, EDGE_EPOCHS).contraction
    assert measured == pytest.approx(slowest_root(optimizer, 0.999 * EDGES[optimizer, beta], beta), abs=1e-3)


@pytest.mark.parametrize(("optimizer", "beta"), EDGES)
def test_just_above_the_edge_a_trial_grows_until_it_is_diverged(at_the_edges, optimizer, beta):
    records = at_the_edges[optimizer, beta, 1.001]
    losses = heights(optimizer, 1.001 * EDGES[optimizer, beta], beta, EDGE_EPOCHS * EDGE_STEPS)
    expected = int(np.argmax(losses > 10 * ALLOWED * losses[0])) + 1
    assert records[-1].diverged_at_step == expected > 1
    assert all(r.diverged_at_step is None for r in records[:-1])
    grown = [r.distance for r in records[1:-1]]
    assert all(later > before for before, later in itertools.pairwise(grown))


# --- the edge that the sharpness predicts, and the one that training finds

PREDICTED = [("sgd", 0.0), ("momentum", 0.5), ("momentum", 0.9), ("nesterov", 0.5), ("nesterov", 0.9)]
LANES, ROUNDS, BISECTING = 12, 4, 12
"""Learning rates of each optimizer in a round of the search, its rounds, and the epochs of a trial in it."""


@pytest.fixture(scope="module")
def measured_edges():
    """A quadratic; by optimizer and momentum, a learning rate at which training on it shrinks, and the next that grows.

    Every round trains a grid of rates, all fused, and goes on between the last that shrinks and the first that grows.
    """
    task = quadratic(dim=6, kappa=30, smallest=0.2, start="random", steps_per_epoch=50)
    edges = {key: (1e-3, 10.0) for key in PREDICTED}
    for _ in range(ROUNDS):
        settings = {
            (*key, rate): (key[0], rate, key[1])
            for key, (low, high) in edges.items()
            for rate in np.geomspace(low, high, LANES)
        }
        records = run(task, settings, BISECTING, initial_loss=1e6)
        for key, (low, high) in edges.items():
            rates = np.geomspace(low, high, LANES)
            grows = [unstable(records[*key, rate]) for rate in rates]
            first = grows.index(True)
            assert first > 0 and all(grows[first:]), "what grows at a rate grows at any larger one"
            edges[key] = rates[first - 1], rates[first]
    return task, edges


def unstable(records):
    """Whether a trial diverged, or moved away from the optimum in the second half of its steps."""
    return records[-1].diverged_at_step is not None or trial_measures(records, BISECTING).contraction > 1


def test_the_edge_predicted_from_the_sharpness_is_the_one_that_training_finds(measured_edges):
    task, edges = measured_edges
    trainer = Trainer(task, epochs=1, slots=1)
    trainer.admit(0, TrialSettings("sgd", {"learning_rate": 1e-3}, 1, 0))
    sharpness = trainer.sharpness([0])[0]
    for (optimizer, beta), (low, high) in edges.items():
        predicted = stability_bound(beta, optimizer == "nesterov") / sharpness
        print(f"{optimizer} {beta}: predicted {predicted:.5f}, measured between {low:.5f} and {high:.5f}")
        assert high / low < 1.002
        assert predicted == pytest.approx(math.sqrt(low * high), rel=0.01)


# --- the edge of stability (Cohen et al. 2021)

EXAMPLES, TARGET = 300, 15.0
"""Examples of the full batch, and the sharpness at which each optimizer is at its edge."""
AT_ONCE, TO_THE_EDGE, AT_THE_EDGE = 50, 22, 10
"""Steps of an epoch, epochs until all are at their edge, and epochs in which they are watched there."""


def memorizing_digits():
    """A tanh network that learns labels drawn at random by heart: that takes sharper and sharper minima."""
    images = digits_mlp().train.tensors[0][:EXAMPLES].flatten(1)
    images = images - images.mean(0)
    labels = torch.randint(10, (EXAMPLES,), generator=torch.Generator().manual_seed(0))
    x, y = images / images.std(), one_hot(labels, 10).float()

    def loss(model, batch):
        return 0.5 * (model(batch[0]) - batch[1]).square().sum(1).mean()

    layers = (lambda: nn.Linear(64, 32), nn.Tanh, lambda: nn.Linear(32, 32), nn.Tanh, lambda: nn.Linear(32, 10))
    return Task(
        model=lambda: nn.Sequential(*(layer() for layer in layers)),
        loss=loss,
        train=[(x, y)] * AT_ONCE,
        valid=TensorDataset(x[:8], y[:8]),
    )


@pytest.fixture(scope="module")
def watched_at_the_edge():
    """By optimizer and seed, the margins at the start and at each epoch at the edge, and the losses in between."""
    optimizers = {"sgd": 0.0, "momentum": 0.9, "nesterov": 0.9}
    trainer = Trainer(memorizing_digits(), epochs=TO_THE_EDGE + AT_THE_EDGE, slots=3 * len(optimizers), mode="fused")
    for optimizer, beta in optimizers.items():
        rate = stability_bound(beta, optimizer == "nesterov") / TARGET
        for seed in range(3):
            hyper = {"learning_rate": rate, "momentum": beta}
            trainer.admit((optimizer, seed), TrialSettings(optimizer, hyper, EXAMPLES, seed))

    def margins():
        return {key: trainer.stability_margin(key, value) for key, value in trainer.sharpness(trainer.keys).items()}

    start, late, losses = margins(), {key: [] for key in trainer.keys}, {key: [] for key in trainer.keys}
    for epoch in range(TO_THE_EDGE + AT_THE_EDGE):
        for key, record in trainer.train_epoch():
            losses[key].append(record.train_loss)
        if epoch >= TO_THE_EDGE:
            for key, margin in margins().items():
                late[key].append(margin)
    return start, late, losses


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov"])
def test_full_batch_training_settles_at_the_edge_of_stability(watched_at_the_edge, optimizer):
    start, late, losses = watched_at_the_edge
    for seed in range(3):
        key = optimizer, seed
        mean, loss = np.mean(late[key]), losses[key]
        print(
            f"{key}: {start[key]:.3f} -> {mean:.3f} ({min(late[key]):.3f} to {max(late[key]):.3f}), loss {loss[-1]:.4f}"
        )
        assert start[key] < 0.4, "it begins far from the edge"
        assert mean == pytest.approx(1.0, abs=0.1)
        assert loss[-1] < 0.9 * loss[TO_THE_EDGE], "and learns on there"
