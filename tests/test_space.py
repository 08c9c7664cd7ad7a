from __future__ import annotations

import inspect
import math
import random

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from momentum_tuner.catalog import HYPERPARAMETERS, OPTIMIZERS
from momentum_tuner.space import distributions, grid, params_of, settings, torch_line, torch_notes
from momentum_tuner.spec import StudySpec


def study(optimizers: list[str], **sections: object) -> StudySpec:
    document = {"name": "s", "task": {"factory": "a:b"}, "budget": {"trials": 4, "epochs": 4}, **sections}
    return StudySpec.model_validate({**document, "optimizers": optimizers})


EVERY_KIND = study(
    ["sgd", "nesterov", "adam"],
    space={
        "learning_rate": {"low": 1e-4, "high": 1.0},
        "momentum": {"low": 0.1, "high": 0.999},
        "weight_decay": [0.0, 1e-4],
        "batch_size": {"low": 16, "high": 256, "log": True},
        "beta1": {"low": 0.0, "high": 0.99},
        "beta2": [0.99, 0.999],
        "clip_norm": {"low": 0.5, "high": 10, "log": False},
        "adam": {"learning_rate": {"low": 1e-5, "high": 1e-2}, "eps": 1e-6},
    },
)


def test_only_what_is_searched_has_a_distribution():
    assert distributions(EVERY_KIND, "nesterov") == {
        "learning_rate": FloatDistribution(1e-4, 1.0, log=True),
        "one_minus_momentum": FloatDistribution(1.0 - 0.999, 0.9, log=True),
        "weight_decay": CategoricalDistribution((0.0, 1e-4)),
        "clip_norm": FloatDistribution(0.5, 10.0),
        "batch_size": IntDistribution(16, 256, log=True),
    }
    assert distributions(EVERY_KIND, "adam") == {
        "learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
        "one_minus_beta1": FloatDistribution(1.0 - 0.99, 1.0, log=True),
        "beta2": CategoricalDistribution((0.99, 0.999)),
        "weight_decay": CategoricalDistribution((0.0, 1e-4)),
        "clip_norm": FloatDistribution(0.5, 10.0),
        "batch_size": IntDistribution(16, 256, log=True),
    }
    assert distributions(study(["momentum"], fixed={"learning_rate": 0.1, "momentum": 0.9}), "momentum") == {}


def test_an_infinite_clip_norm_may_be_a_choice_that_optuna_stores():
    spec = study(["sgd"], space={"clip_norm": [1.0, math.inf]})
    distribution = distributions(spec, "sgd")["clip_norm"]
    stored = optuna.distributions.distribution_to_json(distribution)
    assert optuna.distributions.json_to_distribution(stored) == distribution


def test_settings_hold_every_hyperparameter_with_the_fixed_ones_filled_in():
    spec = study(["momentum"], space={"batch_size": [32, 64]}, fixed={"weight_decay": 0.01})
    found = settings(spec, "momentum", {"learning_rate": 0.1, "one_minus_momentum": 0.05, "batch_size": 32.0})
    assert found == {
        "learning_rate": 0.1,
        "momentum": 0.95,
        "dampening": 0.0,
        "weight_decay": 0.01,
        "clip_norm": math.inf,
        "batch_size": 32,
    }
    assert type(found["batch_size"]) is int
    assert list(found) == [*OPTIMIZERS["momentum"].hyperparameters, "batch_size"]


def test_the_ends_of_a_range_come_out_exactly():
    low, high = 0.1, 0.999
    distribution = distributions(EVERY_KIND, "nesterov")["one_minus_momentum"]
    assert isinstance(distribution, FloatDistribution)
    others = {"learning_rate": 1.0, "weight_decay": 0.0, "clip_norm": 0.5, "batch_size": 16}
    for end, momentum in ((distribution.low, high), (distribution.high, low)):
        assert settings(EVERY_KIND, "nesterov", {**others, "one_minus_momentum": end})["momentum"] == momentum
    for momentum in (low, high):
        params = params_of(EVERY_KIND, "nesterov", {**others, "momentum": momentum})
        assert distribution._contains(params["one_minus_momentum"])


@pytest.mark.parametrize("optimizer", EVERY_KIND.optimizers)
def test_settings_and_params_of_are_inverse_on_what_optuna_suggests(optimizer):
    space = distributions(EVERY_KIND, optimizer)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampling = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(200):
        params = sampling.ask(space).params
        found = settings(EVERY_KIND, optimizer, params)
        for name, value in found.items():
            assert name == "batch_size" or HYPERPARAMETERS[name].allows(value)
        again = params_of(EVERY_KIND, optimizer, found)
        assert again.keys() == params.keys()
        for name, value in again.items():
            assert space[name]._contains(space[name].to_internal_repr(value))
            assert math.isclose(value, params[name], rel_tol=0, abs_tol=2e-16) if "one_minus" in name else True
            assert value == params[name] or "one_minus" in name
        for name, value in settings(EVERY_KIND, optimizer, again).items():
            assert abs(value - found[name]) <= 1.2e-16 if name in ("momentum", "beta1") else value == found[name]


def test_coefficients_of_a_half_or_more_survive_the_round_trip_exactly():
    spec = study(["nesterov"], space={"momentum": {"low": 0.5, "high": 1 - 1e-12}}, fixed={"learning_rate": 0.1})
    rng = random.Random(0)
    for momentum in [0.5, 1 - 1e-12, *(1 - 10 ** rng.uniform(-12, math.log10(0.5)) for _ in range(1000))]:
        params = params_of(spec, "nesterov", {"momentum": momentum})
        assert settings(spec, "nesterov", params)["momentum"] == momentum


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2.0}, r"learning_rate = 2.0 is not in FloatDistribution\(high=1.0"),
        ({"momentum": 0.9995}, r"one_minus_momentum = 0.000\d* is not in FloatDistribution"),
        ({"weight_decay": 0.5}, r"weight_decay = 0.5 is not in CategoricalDistribution"),
        ({"batch_size": 16.5}, r"batch_size = 16.5 is not in IntDistribution"),
        ({"batch_size": math.inf}, r"batch_size = inf is not in IntDistribution"),
        ({"learning_rate": math.nan}, r"learning_rate = nan is not in FloatDistribution"),
    ],
)
def test_what_is_outside_its_distribution_is_refused(change, message):
    inside = {"learning_rate": 1.0, "momentum": 0.9, "weight_decay": 0.0, "clip_norm": 1.0, "batch_size": 16}
    with pytest.raises(ValueError, match=message):
        params_of(EVERY_KIND, "nesterov", {**inside, **change})


def test_other_names_than_those_searched_are_refused():
    spec = study(["sgd"])
    with pytest.raises(ValueError, match=r"^the parameters are \['lr'\], but \['learning_rate'\] are searched$"):
        settings(spec, "sgd", {"lr": 0.1})
    with pytest.raises(ValueError, match=r"^learning_rate is missing in the settings of sgd$"):
        params_of(spec, "sgd", {"lr": 0.1})


# The grid


def test_a_grid_has_every_point_once_and_its_ends_are_in_the_space():
    spec = study(["sgd", "nesterov"], sampler={"name": "grid", "points": 4}, space={"batch_size": [16, 64]})
    points = grid(spec, "nesterov")
    assert len(points) == len({tuple(point.items()) for point in points}) == 4 * 4 * 2
    assert len(grid(spec, "sgd")) == 4 * 2
    found = [settings(spec, "nesterov", point) for point in points]
    assert sorted({point["learning_rate"] for point in found}) == pytest.approx(
        [1e-4, 10 ** (-8 / 3), 10 ** (-4 / 3), 1.0]
    )
    assert {0.0, 0.999} <= {point["momentum"] for point in found}
    assert sorted({1 - point["momentum"] for point in found}) == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])
    for point in points:
        for name, distribution in distributions(spec, "nesterov").items():
            assert distribution._contains(distribution.to_internal_repr(point[name]))


def test_the_order_of_a_grid_is_mixed_and_fixed_by_the_seed():
    first, same, other = (study(["nesterov"], sampler={"name": "grid"}, seed=seed) for seed in (0, 0, 1))
    assert grid(first, "nesterov") == grid(same, "nesterov")
    assert grid(first, "nesterov") != grid(other, "nesterov")
    rates = [point["learning_rate"] for point in grid(first, "nesterov")]
    assert rates not in (sorted(rates), sorted(rates, reverse=True))
    axis = sorted(set(rates))
    assert [axis.index(rate) for rate in rates[:8]] == [
        5,
        4,
        6,
        3,
        7,
        5,
        6,
        5,
    ]  # on every machine and version of Python


def test_the_grid_of_a_reference_holds_the_budget_that_it_shares_with_those_that_search_more():
    def rates(trials):
        budget = {"trials": trials, "epochs": 1}
        spec = study(["momentum", "nesterov"], sampler={"name": "grid", "points": 3}, budget=budget)
        points = grid(spec, "momentum_0.9")
        assert all(distributions(spec, "momentum_0.9")["learning_rate"]._contains(p["learning_rate"]) for p in points)
        return [point["learning_rate"] for point in points]

    own = rates(3)
    assert sorted(own) == pytest.approx([1e-4, 1e-2, 1.0])
    assert rates(2) == own, "as it was before there were finer ones"
    assert sorted(rates(4)) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert sorted(rates(9)) == pytest.approx([10 ** (0.5 * exponent) for exponent in range(-8, 1)])
    assert rates(9)[:3] == own
    assert rates(9)[:5] == rates(4), "a larger budget keeps the points of the smaller one"


def test_a_reference_with_choices_only_has_them_again_and_again():
    spec = study(
        ["momentum"],
        sampler={"name": "grid", "points": 3},
        space={"learning_rate": [0.1, 0.2]},
        budget={"trials": 5, "epochs": 1},
    )
    rates = [point["learning_rate"] for point in grid(spec, "momentum_0.9")]
    assert sorted(rates[:2]) == [0.1, 0.2]
    assert rates == [*rates[:2], *rates[:2], rates[0]]


def test_a_grid_of_whole_numbers_has_each_once():
    spec = study(["sgd"], sampler={"name": "grid"}, space={"batch_size": {"low": 1, "high": 4}, "learning_rate": 0.1})
    points = grid(spec, "sgd")
    assert sorted(point["batch_size"] for point in points) == [1, 2, 3, 4]
    assert all(type(settings(spec, "sgd", point)["batch_size"]) is int for point in points)


@pytest.mark.parametrize("seed", range(20))
def test_every_point_of_a_random_grid_is_inside_its_distributions(seed):
    rng = random.Random(seed)
    low, high = sorted(rng.uniform(0, 0.9999) for _ in "ab")
    small, large = sorted(10 ** rng.uniform(-9, 3) for _ in "ab")
    spec = study(
        ["nesterov"],
        sampler={"name": "grid", "points": rng.randint(2, 9)},
        space={"momentum": {"low": low, "high": high}, "learning_rate": {"low": small, "high": large}},
    )
    space = distributions(spec, "nesterov")
    for point in grid(spec, "nesterov"):
        assert all(space[name]._contains(value) for name, value in point.items())
        found = settings(spec, "nesterov", point)
        assert low <= found["momentum"] <= high
        assert small <= found["learning_rate"] <= large


# The line for torch


@pytest.mark.parametrize(
    ("optimizer", "values", "line"),
    [
        ("sgd", {"learning_rate": 0.0312}, "SGD(model.parameters(), lr=0.0312)"),
        (
            "nesterov",
            {"learning_rate": 0.03123456789, "momentum": 0.95, "batch_size": 64},
            "SGD(model.parameters(), lr=0.0312346, momentum=0.95, nesterov=True)",
        ),
        ("nesterov", {"learning_rate": 1.0, "momentum": 0.0}, "SGD(model.parameters(), lr=1.0)"),
        (
            "momentum",
            {"learning_rate": 1e-5, "momentum": 0.9, "dampening": 0.5, "weight_decay": 1e-4, "clip_norm": math.inf},
            "SGD(model.parameters(), lr=1e-05, momentum=0.9, dampening=0.5, weight_decay=0.0001)",
        ),
        (
            "adam",
            {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
            "Adam(model.parameters(), lr=0.001)",
        ),
        (
            "adam",
            {"learning_rate": 1e-3, "beta1": 0.8, "beta2": 0.9999999876, "eps": 1e-6},
            "Adam(model.parameters(), lr=0.001, betas=(0.8, 0.9999999876), eps=1e-06)",
        ),
        ("adamw", {"learning_rate": 1e-3}, "AdamW(model.parameters(), lr=0.001, weight_decay=0.0)"),
        ("adamw", {"learning_rate": 1e-3, "weight_decay": 0.01}, "AdamW(model.parameters(), lr=0.001)"),
        ("rmsprop", {"learning_rate": 0.01, "alpha": 0.9}, "RMSprop(model.parameters(), lr=0.01, alpha=0.9)"),
        (
            "sgd",
            {"learning_rate": 0.1, "clip_norm": 1.0},
            "SGD(model.parameters(), lr=0.1)\n"
            "# and torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) before each step",
        ),
    ],
)
def test_the_line_for_torch(optimizer, values, line):
    assert torch_line(optimizer, values) == f"torch.optim.{line}"


@pytest.mark.parametrize(
    ("sections", "notes"),
    [
        ({"fixed": {"batch_size": 32}}, []),
        ({"space": {"batch_size": [16, 32]}}, ["# batch_size=32"]),
        ({"space": {"batch_size": {"low": 8, "high": 256, "log": True}}}, ["# batch_size=32"]),
        (
            {"schedule": {"name": "one_cycle"}, "space": {"batch_size": [16, 32]}},
            [
                "# batch_size=32",
                "# schedule: one_cycle over 20 epochs, peak_fraction=0.3, div_factor=25, final_div_factor=10000, "
                "base_momentum_fraction=0.894737",
            ],
        ),
        (
            {"schedule": {"name": "cosine", "warmup_epochs": 2}},
            ["# schedule: cosine over 20 epochs, final_fraction=0, warmup_epochs=2, warmup_start=0.1"],
        ),
        (
            {"schedule": {"warmup_epochs": 1.5}},
            ["# schedule: constant over 20 epochs, warmup_epochs=1.5, warmup_start=0.1"],
        ),
    ],
)
def test_what_else_a_setting_was_tuned_with_is_noted_where_it_was_searched_or_is_not_constant(
    make_spec, sections, notes
):
    spec = make_spec(optimizers=["sgd"], budget={"trials": 4, "epochs": 20}, confirm={"seeds": 2}, **sections)
    for contestant in ("sgd", "momentum_0.9"):
        assert torch_notes(spec, contestant, {"learning_rate": 0.1, "batch_size": 32}) == notes


@pytest.mark.parametrize("optimizer", ["momentum_classic", "nesterov_lookahead"])
def test_an_optimizer_that_torch_does_not_have_has_no_line(optimizer):
    assert torch_line(optimizer, {"learning_rate": 0.1, "momentum": 0.9}) is None


@pytest.mark.parametrize("optimizer", [name for name, each in OPTIMIZERS.items() if each.torch_class])
def test_the_line_makes_the_optimizer_with_these_settings(optimizer):
    rng = random.Random(optimizer)
    model = torch.nn.Linear(3, 2)
    for _ in range(50):
        values = {
            name: rng.choice([default, 1 - 10 ** rng.uniform(-9, 0) if known.complement else 10 ** rng.uniform(-6, 0)])
            for name in OPTIMIZERS[optimizer].hyperparameters
            for known in [HYPERPARAMETERS[name]]
            for default in [known.default]
        }
        line = torch_line(optimizer, values)
        assert line is not None
        made = eval(line, {"torch": torch, "model": model})
        assert type(made).__name__ == OPTIMIZERS[optimizer].torch_class
        group = dict(made.param_groups[0])
        group["learning_rate"] = group["lr"]
        group["beta1"], group["beta2"] = group.get("betas", (None, None))
        for name, value in values.items():
            if name != "clip_norm":
                assert group[name] == pytest.approx(value, rel=1e-5)
                if HYPERPARAMETERS[name].complement:
                    assert 1 - group[name] == pytest.approx(1 - value, rel=1e-3)
        assert group.get("nesterov", False) == (optimizer == "nesterov" and values["momentum"] > 0)
        assert ("clip_grad_norm_" in line) == math.isfinite(values["clip_norm"])


def test_what_the_line_leaves_out_is_a_default_of_the_installed_torch():
    for optimizer, entry in OPTIMIZERS.items():
        if entry.torch_class is None:
            continue
        signature = inspect.signature(getattr(torch.optim, entry.torch_class))
        line = torch_line(optimizer, {"learning_rate": 0.1, "momentum": 0.0})
        made = eval(str(line), {"torch": torch, "model": torch.nn.Linear(1, 1)})
        for name in ("dampening", "eps", "alpha", "betas"):
            if name in signature.parameters:
                assert made.param_groups[0][name] == signature.parameters[name].default
        assert made.param_groups[0]["weight_decay"] == 0.0
