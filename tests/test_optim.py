"""The update rules against torch.optim, against a NumPy transcription of the textbook, and against theory."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from momentum_tuner.catalog import OPTIMIZERS
from momentum_tuner.optim import OPTIONAL_HYPERPARAMETERS, RULES, clip_scale, lookahead_point, make_schedule

STEPS = 200
PARAMETERS = 6
CURVATURE = torch.logspace(-2, 1, PARAMETERS, dtype=torch.float64)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def update_of(rule):
    """A rule's whole update as one function."""

    def update(params, grads, moments, hyper, count, out):
        return rule.apply(params, grads, moments, rule.prepare(hyper, count), out)

    return update


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loss(theta: Tensor, step: int = 0) -> Tensor:
    """Ill conditioned, with curved valleys and a tilt that turns at every step, as minibatches do."""
    bowl = 0.5 * (CURVATURE * theta**2).sum(-1)
    valley = 0.5 * ((theta[..., 1:] - theta[..., :-1] ** 2) ** 2).sum(-1)
    tilt = torch.sin(torch.arange(PARAMETERS, dtype=theta.dtype) + step)
    return bowl + valley + 0.3 * theta @ tilt


def rosenbrock(theta: Tensor, step: int = 0) -> Tensor:
    x, y = theta.unbind(-1)
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def parabola(theta: Tensor, step: int = 0) -> Tensor:
    return 0.5 * (torch.tensor([1.0, 10.0], dtype=theta.dtype) * theta**2).sum(-1)


def gradient(theta: Tensor, step: int = 0, of=loss) -> Tensor:
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(of(theta, step).sum(), theta)[0]


def start(slots: int) -> Tensor:
    return torch.randn(slots, PARAMETERS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def stack(settings: list[dict[str, float]]) -> dict[str, Tensor]:
    return {name: torch.tensor([float(s[name]) for s in settings], dtype=torch.float64) for name in settings[0]}


def train(rule_name, theta, hyper, steps=STEPS, *, of=loss, schedule=None, momentum_name="momentum"):
    """Parameters after every step: [steps, slots, parameters]."""
    rule = RULES[rule_name]
    theta, out = theta.clone(), torch.empty_like(theta)
    moments = {name: torch.zeros_like(theta) for name in rule.moments}
    path = []
    for step in range(steps):
        now = dict(hyper)
        if schedule is not None:
            now["learning_rate"] = hyper["learning_rate"] * float(schedule.learning_rate_factor(np.array(step)))
            now[momentum_name] = hyper[momentum_name] * float(schedule.momentum_factor(np.array(step)))
        at = lookahead_point(theta, moments["velocity"], now["momentum"]) if rule.lookahead else theta
        grads = gradient(at, step, of)
        if "clip_norm" in hyper:
            grads *= clip_scale(grads.norm(dim=1), hyper["clip_norm"])[:, None]
        count = torch.full(theta.shape[:1], step + 1.0, dtype=theta.dtype)
        update = update_of(rule)(theta, grads, moments, now, count, out)
        assert update is out
        theta += update
        path.append(theta.clone())
    return torch.stack(path)


def train_with_torch(optimizer_class, theta, settings, *, scheduler=None, clip_norm=None, steps=STEPS):
    """The same with an optimizer of torch.optim for each slot."""
    paths = []
    for slot, options in enumerate(settings):
        parameter = torch.nn.Parameter(theta[slot].clone())
        optimizer = optimizer_class([parameter], **options)
        schedule = scheduler(optimizer) if scheduler else None
        path = []
        for step in range(steps):
            parameter.grad = gradient(parameter, step)
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_([parameter], clip_norm[slot])
            optimizer.step()
            if schedule is not None:
                schedule.step()
            path.append(parameter.detach().clone())
        paths.append(torch.stack(path))
    expected = torch.stack(paths, dim=1)
    assert expected.abs().max() < 100  # a diverging path would compare nothing
    return expected


SGD_SETTINGS = [
    {"lr": 0.02, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
    {"lr": 0.05, "momentum": 0.0, "dampening": 0.7, "weight_decay": 0.1, "nesterov": False},
    {"lr": 0.01, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
    {"lr": 0.03, "momentum": 0.8, "dampening": 0.5, "weight_decay": 0.01, "nesterov": False},
    {"lr": 0.01, "momentum": 0.95, "dampening": 0.0, "weight_decay": 0.0, "nesterov": True},
    {"lr": 0.005, "momentum": 0.99, "dampening": 0.0, "weight_decay": 0.2, "nesterov": True},
]
CLIP_NORMS = [float("inf"), 0.3, 1.0, 0.5, float("inf"), 2.0]


def sgd_hyper(settings=SGD_SETTINGS):
    hyper = stack(settings)
    hyper["learning_rate"] = hyper.pop("lr")
    return hyper


def test_sgd_momentum_and_nesterov_mixed_in_one_batch_equal_torch_at_every_step():
    theta = start(len(SGD_SETTINGS))
    expected = train_with_torch(torch.optim.SGD, theta, SGD_SETTINGS)
    torch.testing.assert_close(train("sgd", theta, sgd_hyper()), expected, **EXACT)


def test_gradients_clipped_per_slot_equal_clip_grad_norm():
    theta = 3 * start(len(SGD_SETTINGS))
    hyper = sgd_hyper() | {"clip_norm": torch.tensor(CLIP_NORMS, dtype=torch.float64)}
    expected = train_with_torch(torch.optim.SGD, theta, SGD_SETTINGS, clip_norm=CLIP_NORMS)
    torch.testing.assert_close(train("sgd", theta, hyper), expected, **EXACT)


ADAM_SETTINGS = [
    {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    {"lr": 0.1, "betas": (0.0, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    {"lr": 0.003, "betas": (0.98, 0.99), "eps": 1e-6, "weight_decay": 0.5},
]


def adam_hyper(settings=ADAM_SETTINGS):
    return stack(
        [
            {
                "learning_rate": s["lr"],
                "beta1": s["betas"][0],
                "beta2": s["betas"][1],
                "eps": s["eps"],
                "weight_decay": s["weight_decay"],
            }
            for s in settings
        ]
    )


@pytest.mark.parametrize(("rule", "optimizer_class"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_and_adamw_equal_torch_at_every_step(rule, optimizer_class):
    theta = start(len(ADAM_SETTINGS))
    expected = train_with_torch(optimizer_class, theta, ADAM_SETTINGS)
    torch.testing.assert_close(train(rule, theta, adam_hyper()), expected, **EXACT)


def test_rmsprop_equals_torch_at_every_step():
    settings = [
        {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0},
        {"lr": 0.05, "alpha": 0.5, "eps": 1e-2, "weight_decay": 0.3},
    ]
    hyper = stack(settings)
    hyper["learning_rate"] = hyper.pop("lr")
    theta = start(len(settings))
    expected = train_with_torch(torch.optim.RMSprop, theta, settings)
    torch.testing.assert_close(train("rmsprop", theta, hyper), expected, **EXACT)


CLASSIC_SETTINGS = [
    {"learning_rate": 0.02, "momentum": 0.0, "weight_decay": 0.0},
    {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0},
    {"learning_rate": 0.005, "momentum": 0.97, "weight_decay": 0.2},
]


def textbook(theta, setting, at):
    """v = beta v + lr g; theta -= v, where g is the gradient of loss + weight_decay / 2 |theta|^2 at `at`."""
    theta, v, path = theta.numpy().copy(), np.zeros(PARAMETERS), []
    beta, decay = setting["momentum"], setting["weight_decay"]
    for step in range(STEPS):
        point = at(theta, beta, v)
        g = gradient(torch.from_numpy(point), step).numpy() + decay * point
        v = beta * v + setting["learning_rate"] * g
        theta = theta - v
        path.append(theta)
    return torch.from_numpy(np.stack(path))


@pytest.mark.parametrize(
    ("rule", "at"),
    [
        ("momentum_classic", lambda theta, beta, v: theta),
        ("nesterov_lookahead", lambda theta, beta, v: theta - beta * v),
    ],
)
def test_textbook_rules_equal_their_formulas_at_every_step(rule, at):
    theta = start(len(CLASSIC_SETTINGS))
    expected = torch.stack([textbook(*pair, at) for pair in zip(theta, CLASSIC_SETTINGS, strict=True)], dim=1)
    torch.testing.assert_close(train(rule, theta, stack(CLASSIC_SETTINGS)), expected, **EXACT)


def test_classic_momentum_equals_torch_form_until_the_learning_rate_changes():
    theta, hyper = start(len(CLASSIC_SETTINGS)), stack(CLASSIC_SETTINGS)
    drop = make_schedule("step", total_steps=STEPS, steps_per_epoch=10, options={"every_epochs": 10})
    classic = train("momentum_classic", theta, hyper, schedule=drop)
    torch_form = train("sgd", theta, hyper, schedule=drop)
    torch.testing.assert_close(classic[:100], torch_form[:100], **EXACT)
    apart = (classic[100] - torch_form[100]).norm(dim=1)
    assert apart[0] == 0  # without momentum the two stay one
    assert (apart[1:] > 1e-3).all()


def test_torch_nesterov_walks_through_the_lookahead_points_at_constant_learning_rate():
    theta = start(1)
    lr, beta = 0.01, 0.9
    hyper = stack([{"learning_rate": lr, "momentum": beta}])
    path = train("nesterov_lookahead", theta, hyper)
    velocity = -torch.diff(path, dim=0, prepend=theta[None])
    torch_form = train("sgd", theta, hyper | {"nesterov": torch.ones(1, dtype=torch.float64)})
    torch.testing.assert_close(path - beta * velocity, torch_form, **EXACT)


def test_largest_stable_step_on_a_quadratic_is_the_known_one():
    # lr * curvature: 2 (1 + beta) for momentum, 2 (1 + beta) / (1 + 2 beta) for Nesterov; METRICS.md
    beta = 0.9
    bounds = {0.0: 2 * (1 + beta), 1.0: 2 * (1 + beta) / (1 + 2 * beta)}
    hyper = stack(
        [
            {"learning_rate": share * bound, "momentum": beta, "nesterov": flag}
            for flag, bound in bounds.items()
            for share in (0.999, 1.001)
        ]
    )
    theta = torch.ones(4, 1, dtype=torch.float64)
    last = train("sgd", theta, hyper, 3000, of=lambda theta, step: 0.5 * theta[:, 0] ** 2)[-1, :, 0].abs()
    assert (last[[0, 2]] < 1e-1).all()
    assert (last[[1, 3]] > 10).all()


def momentum_of(optimizer):
    group = optimizer.param_groups[0]
    return group["betas"][0] if "betas" in group else group["momentum"]


@pytest.mark.parametrize(
    ("schedule_name", "options", "scheduler"),
    [
        (
            "cosine",
            {"final_fraction": 0.1},
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS, 0.1 * o.param_groups[0]["lr"]),
        ),
        (
            "one_cycle",
            {"peak_fraction": 0.4, "div_factor": 10.0, "base_momentum_fraction": 0.5},
            lambda o: torch.optim.lr_scheduler.OneCycleLR(
                o,
                max_lr=o.param_groups[0]["lr"],
                total_steps=STEPS + 1,
                pct_start=0.4,
                div_factor=10.0,
                max_momentum=momentum_of(o),
                base_momentum=0.5 * momentum_of(o),
            ),
        ),
    ],
)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_rule_with_schedule_equals_torch_optimizer_with_scheduler(rule, schedule_name, options, scheduler):
    if rule == "sgd":
        optimizer_class, settings, hyper = torch.optim.SGD, SGD_SETTINGS[2:], sgd_hyper(SGD_SETTINGS[2:])
    else:
        optimizer_class, settings, hyper = torch.optim.Adam, ADAM_SETTINGS, adam_hyper()
    theta = start(len(settings))
    total = STEPS + (schedule_name == "one_cycle")  # OneCycleLR allows no step after its last
    schedule = make_schedule(schedule_name, total_steps=total, steps_per_epoch=10, options=options)
    ours = train(rule, theta, hyper, schedule=schedule, momentum_name="momentum" if rule == "sgd" else "beta1")
    theirs = train_with_torch(optimizer_class, theta, settings, scheduler=scheduler)
    torch.testing.assert_close(ours, theirs, **EXACT)


DEFAULTS = {
    "momentum": 0.9,
    "dampening": 0.1,
    "weight_decay": 0.01,
    "nesterov": 0.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "alpha": 0.99,
    "eps": 1e-8,
}


def hyper_of(rule, learning_rate=0.01, **changes):
    values = {"learning_rate": learning_rate} | DEFAULTS | changes
    return {name: values[name] for name in RULES[rule].hyperparameters}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("landscape", "learning_rate", "adaptive_rate", "steps"),
    [(parabola, 0.02, 0.02, 500), (rosenbrock, 3e-4, 0.01, 1500)],
)
def test_every_rule_descends_to_the_minimum(rule, landscape, learning_rate, adaptive_rate, steps):
    lr = learning_rate if "momentum" in RULES[rule].hyperparameters else adaptive_rate
    hyper = stack([hyper_of(rule, lr, weight_decay=0.0, dampening=0.0)])
    theta = torch.tensor([[-1.2, 1.0]], dtype=torch.float64)
    last = landscape(train(rule, theta, hyper, steps, of=landscape)[-1])
    assert last < 0.01 * landscape(theta)


@pytest.mark.parametrize("rule", RULES)
def test_leaving_out_a_hyperparameter_means_zero(rule):
    theta = start(2)
    zeros = dict.fromkeys(OPTIONAL_HYPERPARAMETERS, 0.0)
    full = stack([hyper_of(rule, 0.01, **zeros), hyper_of(rule, 0.02, **zeros)])
    short = {name: value for name, value in full.items() if name not in OPTIONAL_HYPERPARAMETERS}
    torch.testing.assert_close(train(rule, theta, short), train(rule, theta, full), **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_a_slot_with_learning_rate_zero_stands_still(rule):
    hyper = stack([hyper_of(rule, 0.0), hyper_of(rule, 0.01)])
    theta = start(2)
    last = train(rule, theta, hyper, 5)[-1]
    assert torch.equal(last[0], theta[0])
    assert not torch.isclose(last[1], theta[1]).any()


def one_update(rule, device="cpu", dtype=torch.float64, slots=3, update=None, **hyper):
    """Tensors and result of one call of a rule's update, after a first step."""
    generator = torch.Generator().manual_seed(1)
    make = lambda: torch.rand(slots, PARAMETERS, generator=generator).to(device, dtype)  # noqa: E731
    params, grads, out = make(), make(), make()
    moments = {name: make() for name in RULES[rule].moments}
    values = {
        name: torch.full((slots,), value, device=device, dtype=dtype) for name, value in hyper_of(rule, **hyper).items()
    }
    count = torch.full((slots,), 2.0, device=device, dtype=dtype)
    (update or update_of(RULES[rule]))(params, grads, moments, values, count, out)
    return params, grads, moments, out


@pytest.mark.parametrize("rule", RULES)
def test_update_leaves_parameters_and_gradients_unchanged(rule):
    params, grads, *_ = one_update(rule)
    generator = torch.Generator().manual_seed(1)
    for tensor in (params, grads):
        assert torch.equal(tensor, torch.rand(3, PARAMETERS, generator=generator).double())


@pytest.mark.parametrize("rule", RULES)
def test_update_reads_no_value_back_to_the_host(rule):
    one_update(rule, device="meta")  # a meta tensor has no values: reading one raises


class Allocations(TorchDispatchMode):
    """Counts new tensors of at least `numel` elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in [*args, *(kwargs or {}).values()] if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in given}
        if isinstance(result, Tensor) and result.numel() >= self.numel:
            self.count += result.untyped_storage().data_ptr() not in known
        return result


@pytest.mark.parametrize("rule", RULES)
def test_update_allocates_no_tensor_of_the_parameters_size(rule):
    def counted(*args):
        with Allocations(3 * PARAMETERS) as allocations:
            update_of(RULES[rule])(*args)
        counts.append(allocations.count)

    counts = []
    one_update(rule, update=counted)
    assert counts == [1 if rule == "rmsprop" else 0]  # rmsprop needs one for weight decay, see there


@pytest.mark.parametrize("rule", RULES)
def test_compiled_update_is_one_graph_and_equals_the_eager_one(rule):
    compiled = torch.compile(update_of(RULES[rule]), fullgraph=True, backend="aot_eager")
    for expected, got in zip(one_update(rule)[2:], one_update(rule, update=compiled)[2:], strict=True):
        torch.testing.assert_close(got, expected, **EXACT)


def test_clip_scale_is_one_below_the_bound_and_at_infinity():
    norm = torch.tensor([0.5, 2.0, 1e30, float("inf"), float("inf")])
    bound = torch.tensor([1.0, 1.0, float("inf"), float("inf"), 1.0])
    torch.testing.assert_close(clip_scale(norm, bound), torch.tensor([1.0, 0.5, 1.0, 1.0, 0.0]), rtol=1e-6, atol=0)


def test_lookahead_point_is_ahead_by_momentum_times_velocity_and_writes_where_told():
    theta, velocity = start(2), start(2).flip(0)
    out = torch.empty_like(theta)
    expected = theta - torch.tensor([[0.5], [0.9]], dtype=torch.float64) * velocity
    got = lookahead_point(theta, velocity, torch.tensor([0.5, 0.9], dtype=torch.float64), out=out)
    assert got is out
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_catalog_optimizer_has_a_rule_that_reads_its_hyperparameters(optimizer):
    entry = OPTIMIZERS[optimizer]
    named = {*entry.hyperparameters, *entry.constants} - {"clip_norm"}  # clipping is not the rule's
    assert named <= set(RULES[entry.rule].hyperparameters)
    assert set(RULES[entry.rule].hyperparameters) - named <= OPTIONAL_HYPERPARAMETERS
