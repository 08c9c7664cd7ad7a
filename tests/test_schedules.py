"""The schedules against torch.optim.lr_scheduler, step by step."""

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from momentum_tuner.catalog import SCHEDULES
from momentum_tuner.errors import InputError
from momentum_tuner.optim import make_schedule

STEPS = 200
WARMUP = 30
LEARNING_RATE = 0.3
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def torch_values(scheduler, *, optimizer_class=torch.optim.SGD, **options):
    """Learning rate and momentum (beta1 for Adam) in force at each of STEPS steps."""
    optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], lr=LEARNING_RATE, **options)
    schedule = scheduler(optimizer)
    rates, momenta = [], []
    for step in range(STEPS):
        group = optimizer.param_groups[0]
        rates.append(group["lr"])
        momenta.append(group["betas"][0] if "betas" in group else group["momentum"])
        optimizer.step()
        if step < STEPS - 1:
            schedule.step()
    return np.array(rates), np.array(momenta)


MAIN = {
    "constant": ({}, lambda o, steps: lr_scheduler.ConstantLR(o, factor=1.0)),
    "cosine": ({}, lambda o, steps: lr_scheduler.CosineAnnealingLR(o, steps)),
    "cosine to a fraction": (
        {"final_fraction": 0.05},
        lambda o, steps: lr_scheduler.CosineAnnealingLR(o, steps, 0.05 * LEARNING_RATE),
    ),
    "step": ({"every_epochs": 2.5, "gamma": 0.4}, lambda o, steps: lr_scheduler.StepLR(o, 25, 0.4)),
}


@pytest.mark.parametrize("case", MAIN)
def test_learning_rate_equals_torch_at_every_step(case):
    options, scheduler = MAIN[case]
    ours = make_schedule(case.split()[0], total_steps=STEPS, steps_per_epoch=10, options=options)
    expected, _ = torch_values(lambda o: scheduler(o, STEPS))
    np.testing.assert_allclose(LEARNING_RATE * ours.learning_rate_factor(np.arange(STEPS)), expected, **EXACT)
    assert not ours.cycles_momentum
    np.testing.assert_array_equal(ours.momentum_factor(np.arange(STEPS)), np.ones(STEPS))


@pytest.mark.parametrize("start", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("case", MAIN)
def test_warmup_equals_linear_lr_followed_through_sequential_lr(case, start):
    options, scheduler = MAIN[case]
    ours = make_schedule(
        case.split()[0],
        total_steps=STEPS,
        steps_per_epoch=10,
        options=options,
        warmup_epochs=WARMUP / 10,
        warmup_start=start,
    )

    def sequential(optimizer):
        warmup = lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=WARMUP)
        main = scheduler(optimizer, STEPS - WARMUP)
        return lr_scheduler.SequentialLR(optimizer, [warmup, main], milestones=[WARMUP])

    expected, _ = torch_values(sequential)
    np.testing.assert_allclose(LEARNING_RATE * ours.learning_rate_factor(np.arange(STEPS)), expected, **EXACT)


@pytest.mark.parametrize(
    ("optimizer_class", "torch_options"),
    [(torch.optim.SGD, {"momentum": 0.5}), (torch.optim.Adam, {"betas": (0.5, 0.999)})],
)
@pytest.mark.parametrize("peak_fraction", [0.0, 0.3, 0.4142, 1.0])
def test_one_cycle_equals_torch_in_learning_rate_and_momentum(optimizer_class, torch_options, peak_fraction):
    ours = make_schedule("one_cycle", total_steps=STEPS, steps_per_epoch=10, options={"peak_fraction": peak_fraction})

    def one_cycle(optimizer):  # torch's own defaults for everything else
        return lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=STEPS, pct_start=peak_fraction)

    rates, momenta = torch_values(one_cycle, optimizer_class=optimizer_class, **torch_options)
    step = np.arange(STEPS)
    assert ours.cycles_momentum
    np.testing.assert_allclose(LEARNING_RATE * ours.learning_rate_factor(step), rates, **EXACT)
    np.testing.assert_allclose(0.95 * ours.momentum_factor(step), momenta, **EXACT)


def test_one_cycle_options_are_torch_s():
    options = {
        "peak_fraction": 0.2,
        "div_factor": 5.0,
        "final_div_factor": 50.0,
        "base_momentum_fraction": 0.7,
    }
    ours = make_schedule("one_cycle", total_steps=STEPS, steps_per_epoch=10, options=options)
    rates, momenta = torch_values(
        lambda o: lr_scheduler.OneCycleLR(
            o,
            max_lr=LEARNING_RATE,
            total_steps=STEPS,
            pct_start=0.2,
            div_factor=5.0,
            final_div_factor=50.0,
            max_momentum=0.9,
            base_momentum=0.63,
        ),
        momentum=0.9,
    )
    np.testing.assert_allclose(LEARNING_RATE * ours.learning_rate_factor(np.arange(STEPS)), rates, **EXACT)
    np.testing.assert_allclose(0.9 * ours.momentum_factor(np.arange(STEPS)), momenta, **EXACT)


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_beyond_the_last_hold_its_value(name):
    schedule = make_schedule(name, total_steps=STEPS, steps_per_epoch=10)
    for factor in (schedule.learning_rate_factor, schedule.momentum_factor):
        beyond = factor(np.array([STEPS, STEPS + 1, 10 * STEPS]))
        np.testing.assert_array_equal(beyond, np.repeat(factor(np.array([STEPS - 1])), 3))


@pytest.mark.parametrize("name", SCHEDULES)
def test_factors_are_float64_in_the_shape_of_the_steps(name):
    schedule = make_schedule(name, total_steps=STEPS, steps_per_epoch=10)
    steps = np.arange(STEPS)
    for factor in (schedule.learning_rate_factor, schedule.momentum_factor):
        block = factor(steps.reshape(4, 50))
        assert block.shape == (4, 50)
        assert block.dtype == np.float64
        np.testing.assert_array_equal(block.ravel(), factor(steps))
        assert factor(np.array(7)) == factor(steps)[7]


@pytest.mark.parametrize("total_steps", [1, 2, 3])
@pytest.mark.parametrize("peak_fraction", [0.0, 0.3, 0.5, 1.0])
def test_a_cycle_of_few_steps_stays_between_its_feet_and_its_peak(total_steps, peak_fraction):
    schedule = make_schedule(
        "one_cycle", total_steps=total_steps, steps_per_epoch=1, options={"peak_fraction": peak_fraction}
    )
    factor = schedule.learning_rate_factor(np.arange(total_steps))
    assert ((factor > 0) & (factor <= 1)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cosin"}, "'cosin' is unknown: use one of constant, cosine, step, one_cycle"),
        ({"name": "step", "options": {"gama": 0.1}}, "no option 'gama': its options are every_epochs, gamma"),
        ({"name": "constant", "options": {"gamma": 0.1}}, "no option 'gamma': its options are none"),
        ({"name": "step", "options": {"gamma": 1.5}}, r"gamma of schedule 'step' is 1.5: .* \(0, 1\]"),
        ({"name": "step", "options": {"every_epochs": 0.01}}, "is 0.01: less than one step"),
        ({"name": "cosine", "options": {"final_fraction": float("nan")}}, r"is nan: it must be in \[0, 1\]"),
        (
            {"name": "one_cycle", "options": {"div_factor": 0}},
            r"div_factor .* is 0: it must be in \(0, inf\)",
        ),
        ({"name": "cosine", "warmup_start": 0.0}, r"warmup_start .* is 0: it must be in \(0, 1\]"),
        ({"name": "cosine", "warmup_epochs": -1.0}, r"warmup_epochs .* is -1: it must be in \[0, inf\)"),
        ({"name": "cosine", "warmup_epochs": 20.0}, "a warmup of 200 steps leaves none of the 200"),
        ({"name": "one_cycle", "warmup_epochs": 1.0}, "'one_cycle' has a warmup of its own"),
        ({"name": "cosine", "total_steps": 0}, "at least one step: total_steps=0"),
    ],
)
def test_impossible_schedules_are_refused_in_one_line(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        make_schedule(**({"total_steps": STEPS, "steps_per_epoch": 10} | arguments))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SCHEDULES)
def test_defaults_of_the_catalog_are_allowed_and_kept(name):
    assert make_schedule(name, total_steps=STEPS, steps_per_epoch=10).options == SCHEDULES[name]
