"""A batch of TPE's trials is drawn as Optuna draws them one by one, and where it differs, as well."""

import copy
import itertools
import math
from statistics import median

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator, _ParzenEstimatorParameters
from optuna.samplers._tpe.sampler import _split_trials, default_gamma, default_weights
from optuna.trial import TrialState, create_trial

from momentum_tuner import batch_tpe
from momentum_tuner.batch_tpe import BatchTPESampler, TPEMemory
from momentum_tuner.parzen import ParzenEstimator

PLANE = {
    "learning_rate": FloatDistribution(1e-4, 1.0, log=True),
    "one_minus_momentum": FloatDistribution(1e-3, 1.0, log=True),
}
MIXED = {
    **PLANE,
    "batch_size": IntDistribution(16, 256, log=True),
    "clip_norm": CategoricalDistribution((1.0, math.inf)),
}


def valley(params):
    effective = math.log10(params["learning_rate"] / params["one_minus_momentum"])
    rest = math.log10(params["one_minus_momentum"])
    return (effective - 0.3) ** 2 + 0.1 * (rest + 1.2) ** 2 + (5.0 if effective > 1.0 else 0.0)


def told(space, count, directions=("minimize",), state=TrialState.COMPLETE):
    """A study of trials at random, every fifth of them pruned, some diverged, some that run."""
    study = optuna.create_study(directions=directions)
    generator = np.random.default_rng(count)
    for n in range(count):
        params = {}
        for name, d in space.items():
            if isinstance(d, CategoricalDistribution):
                params[name] = d.choices[generator.integers(len(d.choices))]
            else:
                value = float(np.exp(generator.uniform(math.log(d.low), math.log(d.high))))
                params[name] = round(value) if isinstance(d, IntDistribution) else value
        value = valley(params)
        pruned, running = n % 5 == 4, n >= count - 3
        study.add_trial(
            create_trial(
                state=TrialState.RUNNING if running else TrialState.PRUNED if pruned else TrialState.COMPLETE,
                params=params,
                distributions=space,
                values=None if pruned or running else [value, 1.0 / value][: len(directions)],
                intermediate_values={1: value} if pruned and len(directions) == 1 else {},
                system_attrs={"constraints:diverged": 1.0} if value > 5.0 and not running else {},
            )
        )
    return study


@pytest.mark.parametrize("directions", [("minimize",), ("maximize",), ("minimize", "minimize")])
@pytest.mark.parametrize("space", [PLANE, MIXED], ids=["plane", "mixed"])
@pytest.mark.parametrize("count", [8, 40, 60])
def test_the_trials_of_a_batch_are_those_that_optuna_draws_one_by_one(space, count, directions):
    batch, single = told(space, count, directions), told(space, count, directions)
    batch.sampler = BatchTPESampler(space)
    for seed in range(6):
        batch.sampler.seeded(seed)
        single.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        assert batch.ask(space).params == pytest.approx(single.ask(space).params, rel=1e-9)


@pytest.mark.parametrize("kernels", [0, 1, 25, 400])
def test_densities_and_draws_are_those_of_optunas_estimator(kernels):
    space = {**PLANE, "dampening": FloatDistribution(-1.0, 2.0)}
    generator = np.random.default_rng(kernels)
    points = {
        "learning_rate": 10.0 ** generator.uniform(-4, 0, kernels),
        "one_minus_momentum": 10.0 ** generator.uniform(-3, 0, kernels),
        "dampening": generator.uniform(-1.0, 2.0, kernels),
    }
    if kernels:  # a kernel at a corner, one on another
        points = {name: np.append(values, [space[name].high, values[0]]) for name, values in points.items()}
    parameters = _ParzenEstimatorParameters(1.0, True, False, default_weights, multivariate=True)
    theirs, ours = (kind(points, space, parameters) for kind in (_ParzenEstimator, ParzenEstimator))
    expected = theirs.sample(np.random.RandomState(0), 500)
    drawn = ours.sample(np.random.RandomState(0), 500)
    for name, d in space.items():
        assert drawn[name] == pytest.approx(expected[name], rel=1e-9)
        assert d.low <= drawn[name].min() <= drawn[name].max() <= d.high * (1 + 1e-12)
    assert ours.log_pdf(drawn) == pytest.approx(theirs.log_pdf(expected), rel=1e-9, abs=1e-9)


def test_a_thinned_group_has_all_that_run_and_the_newest_and_is_spread_over_the_rest(monkeypatch):
    monkeypatch.setattr(batch_tpe, "MOST_ABOVE", 60)
    trials = told(PLANE, 203).get_trials(deepcopy=False)
    running = [trial for trial in trials if trial.state is TrialState.RUNNING]
    ended = [trial for trial in trials if trial.state is not TrialState.RUNNING]
    found = [trial.number for trial in batch_tpe._thinned(ended, running)]
    assert found == sorted(found)
    assert len(found) == 63
    assert found[-28:] == list(range(175, 203))
    assert found[0] == 0
    assert max(b - a for a, b in itertools.pairwise(found)) <= 6


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_what_a_memory_splits_is_what_optuna_splits(direction, monkeypatch):
    """Trials end in any order, some by an error; many are alike, so that the order of those tells."""
    monkeypatch.setattr(batch_tpe, "MOST_ABOVE", 10_000)
    study = optuna.create_study(direction=direction)
    all_told = told(PLANE, 700).get_trials(deepcopy=False)
    for trial in all_told:
        if trial.state is TrialState.COMPLETE:
            trial.value = round(trial.value, 1)
            if trial.number % 20:  # fewer are complete than the better group has
                trial.state, trial.values, trial.intermediate_values = TrialState.PRUNED, None, {1: trial.value}
    generator = np.random.default_rng(0)
    ends = np.arange(700) + generator.integers(0, 60, 700)
    memory, promising = TPEMemory(), 0
    for now in range(10, 700, 30):
        running = [copy.copy(trial) for trial in all_told[:now]]
        for trial in running:
            if ends[trial.number] > now:
                trial.state, trial.values, trial.system_attrs = TrialState.RUNNING, None, {}
                reports = trial.number % 3  # of a trial that went on from a rung there are two
                trial.intermediate_values = {e: valley(trial.params) for e in (1, 3)[:reports]}
            elif trial.number % 37 == 36:
                trial.state, trial.values = TrialState.FAIL, None
        below, above = memory.split(study, running)
        judged = [copy.copy(trial) for trial in running if trial.state is not TrialState.FAIL]
        size = default_gamma(sum(trial.state is not TrialState.RUNNING for trial in judged))
        for trial in judged:
            if trial.state is TrialState.RUNNING and 3 in trial.intermediate_values:
                trial.state = TrialState.PRUNED
        expected = _split_trials(study, judged, size)
        promising += sum(running[t.number].state is TrialState.RUNNING for t in expected[0])
        assert ([t.number for t in below], [t.number for t in above]) == tuple([t.number for t in e] for e in expected)
    assert len(below) == 25
    assert promising > 0


def search(sampler_of, seed, slots, trials):
    """The true value of the best trial of a noisy search with so many trials at once, of which half end at a time."""
    study, noise = optuna.create_study(), np.random.default_rng(seed)
    running, values, asked = [], [], 0
    while asked < trials or running:
        draw = sampler_of()
        for _ in range(min(slots - len(running), trials - asked)):
            study.sampler = draw(1000 * seed + asked)
            running.append(study.ask(PLANE))
            asked += 1
        count = (len(running) + 1) // 2
        for trial in running[:count]:
            true = valley(trial.params)
            values.append(((true + 0.01) * float(np.exp(0.05 * noise.standard_normal())), true))
            study.tell(trial, values[-1][0])
        del running[:count]
    return min(values)[1]


def test_a_thinned_group_finds_as_good_a_point(monkeypatch):
    """Where the worse group is thinned, a batch differs from Optuna's own trials; by random search all are beaten."""
    monkeypatch.setattr(batch_tpe, "MOST_ABOVE", 150)

    def single():
        return lambda seed: optuna.samplers.TPESampler(seed=seed)

    def at_random():
        return lambda seed: optuna.samplers.RandomSampler(seed)

    ways = {"batch": lambda: BatchTPESampler(PLANE).seeded, "single": single, "random": at_random}
    found = {name: median(search(way, seed, 32, 288) for seed in range(8)) for name, way in ways.items()}
    assert found["batch"] < 1.5 * found["single"]
    assert found["batch"] < 0.2 * found["random"]
