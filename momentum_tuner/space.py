"""A study's search space as Optuna distributions, and Optuna's parameters back as hyperparameters.

Coefficients such as `momentum` are searched as `one_minus_momentum` on a log scale, everything else under its own
name: between 0.9 and 0.99 lies as much as between 0.99 and 0.999.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from momentum_tuner.catalog import HYPERPARAMETERS, OPTIMIZERS
from momentum_tuner.spec import BATCH_SIZE, Range, Setting, StudySpec, grid_axis

_ROUNDING = 1e-9
_SIGNIFICANT = 6

_TORCH_DEFAULTS: Mapping[str, float] = {
    "dampening": 0.0,
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "alpha": 0.99,
    "eps": 1e-8,
}
_TORCH_WEIGHT_DECAY: Mapping[str, float] = {"AdamW": 0.01}


def distributions(spec: StudySpec, optimizer: str) -> dict[str, BaseDistribution]:
    """The Optuna distribution of each parameter that is searched for an optimizer, by its name in Optuna."""
    searched = spec.hyperparameters(optimizer)
    return {
        optuna_name(name, setting): _distribution(name, setting)
        for name, setting in searched.items()
        if isinstance(setting, Range | tuple)
    }


def optuna_name(name: str, setting: Setting) -> str:
    """The name of a hyperparameter in Optuna: `one_minus_momentum` for a range of `momentum`, else its own."""
    complement = isinstance(setting, Range) and name != BATCH_SIZE and HYPERPARAMETERS[name].complement
    return f"one_minus_{name}" if complement else name


def settings(spec: StudySpec, optimizer: str, params: Mapping[str, float]) -> dict[str, float]:
    """All hyperparameters of a trial from Optuna's parameters, with the fixed ones filled in; `batch_size` is an int.

    Raises:
        ValueError: a parameter is missing, unknown, or outside its distribution.
    """
    _same_names(params, distributions(spec, optimizer))
    found: dict[str, float] = {}
    for name, setting in spec.hyperparameters(optimizer).items():
        if isinstance(setting, int | float):
            found[name] = setting
            continue
        key = optuna_name(name, setting)
        value = _inside(key, params[key], _distribution(name, setting))
        found[name] = value if key == name else _clipped(1.0 - value, setting)
    return found


def params_of(spec: StudySpec, optimizer: str, settings: Mapping[str, float]) -> dict[str, float]:
    """Optuna's parameters from all hyperparameters of a trial: the inverse of `settings`.

    Raises:
        ValueError: a hyperparameter is missing, or outside its distribution by more than rounding.
    """
    found: dict[str, float] = {}
    for name, setting in spec.hyperparameters(optimizer).items():
        if isinstance(setting, int | float):
            continue
        if name not in settings:
            raise ValueError(f"{name} is missing in the settings of {optimizer}")
        key = optuna_name(name, setting)
        value = settings[name] if key == name else 1.0 - settings[name]
        found[key] = _inside(key, value, _distribution(name, setting))
    return found


def grid(spec: StudySpec, optimizer: str) -> list[dict[str, float]]:
    """Every point of the grid as Optuna's parameters, in a pseudo-random order that `spec.seed` fixes.

    A range is cut into `sampler.points` values (8 if the sampler is not the grid), even on the scale on which it is
    searched, ends included.

    The study file's grid holds the budget of its own optimizers. A reference beside them searches less, so that its
    grid may not: then the points of finer and finer grids follow, each of which holds the one before, and where there
    is nothing finer all points again. A larger budget so keeps the beginning.
    """
    points = spec.sampler.points or 8
    found = _grid(spec, optimizer, points)
    if optimizer in spec.optimizers:
        return found
    known = {tuple(point.items()) for point in found}
    while len(found) < spec.budget.trials:
        points = 2 * points - 1
        finer = [point for point in _grid(spec, optimizer, points) if tuple(point.items()) not in known]
        if not finer:
            return list(itertools.islice(itertools.cycle(found), spec.budget.trials))
        found += finer
        known.update(tuple(point.items()) for point in finer)
    return found


def _grid(spec: StudySpec, optimizer: str, points: int) -> list[dict[str, float]]:
    """The grid with so many values for each range, in its pseudo-random order."""
    axes = {
        optuna_name(name, setting): grid_axis(name, setting, points)
        for name, setting in spec.hyperparameters(optimizer).items()
        if isinstance(setting, Range | tuple)
    }
    ordered = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    draws = random.Random(spec.seed)  # of the module, only random() is promised to stay the same
    keys = [draws.random() for _ in ordered]
    return [ordered[index] for index in sorted(range(len(ordered)), key=keys.__getitem__)]


def torch_line(optimizer: str, settings: Mapping[str, float]) -> str | None:
    """The line of Python that makes this optimizer with torch.optim, or None if torch has none that is equal.

    What equals torch's default is left out. A finite `clip_norm` adds a second line, a comment with the call that
    clips the gradient.
    """
    torch_class = OPTIMIZERS[optimizer].torch_class
    if torch_class is None:
        return None
    defaults = {name: HYPERPARAMETERS[name].default for name in OPTIMIZERS[optimizer].hyperparameters}
    values = {
        name: _short(name, value) for name, value in {**defaults, **OPTIMIZERS[optimizer].constants, **settings}.items()
    }
    arguments = [f"lr={values['learning_rate']!r}"]
    if values.get("momentum"):
        arguments.append(f"momentum={values['momentum']!r}")
        if values.get("nesterov"):  # torch refuses nesterov without momentum, where it changes nothing
            arguments.append("nesterov=True")
    torch_defaults = {**_TORCH_DEFAULTS, "weight_decay": _TORCH_WEIGHT_DECAY.get(torch_class, 0.0)}
    betas = [values[name] for name in ("beta1", "beta2") if name in values]
    if betas and betas != [torch_defaults["beta1"], torch_defaults["beta2"]]:
        arguments.append(f"betas=({betas[0]!r}, {betas[1]!r})")
    for name in ("dampening", "alpha", "eps", "weight_decay"):
        if name in defaults and values[name] != torch_defaults[name]:
            arguments.append(f"{name}={values[name]!r}")
    line = f"torch.optim.{torch_class}(model.parameters(), {', '.join(arguments)})"
    if math.isfinite(values["clip_norm"]):
        clip = f"torch.nn.utils.clip_grad_norm_(model.parameters(), {values['clip_norm']!r})"
        line += f"\n# and {clip} before each step"
    return line


def torch_notes(spec: StudySpec, optimizer: str, settings: Mapping[str, float]) -> list[str]:
    """Comments to stand under `torch_line`: what a trial trained with that is not the optimizer's.

    A batch size that was searched, without which the learning rate says little, and a schedule that changes it.
    """
    notes = []
    if BATCH_SIZE in settings and isinstance(spec.hyperparameters(optimizer).get(BATCH_SIZE), Range | tuple):
        notes.append(f"# {BATCH_SIZE}={settings[BATCH_SIZE]:g}")
    schedule = spec.schedule
    options = dict(schedule.options)
    if schedule.warmup_epochs:
        options |= {"warmup_epochs": schedule.warmup_epochs, "warmup_start": schedule.warmup_start}
    if schedule.name != "constant" or schedule.warmup_epochs:
        values = [f"{name}={value:.6g}" for name, value in options.items()]
        notes.append(f"# schedule: {', '.join([f'{schedule.name} over {spec.budget.epochs} epochs', *values])}")
    return notes


def _distribution(name: str, setting: Range | tuple[float, ...]) -> BaseDistribution:
    if isinstance(setting, tuple):
        return CategoricalDistribution(setting)
    if name == BATCH_SIZE:
        return IntDistribution(int(setting.low), int(setting.high), log=bool(setting.log))
    if HYPERPARAMETERS[name].complement:
        return FloatDistribution(1.0 - setting.high, 1.0 - setting.low, log=True)
    return FloatDistribution(setting.low, setting.high, log=bool(setting.log))


def _same_names(params: Mapping[str, float], expected: Mapping[str, BaseDistribution]) -> None:
    if params.keys() != expected.keys():
        raise ValueError(f"the parameters are {sorted(params)}, but {sorted(expected)} are searched")


def _inside(key: str, value: float, distribution: BaseDistribution) -> float:
    """The value, moved into its distribution if only rounding has it outside."""
    if isinstance(distribution, CategoricalDistribution):
        choices = [choice for choice in distribution.choices if isinstance(choice, int | float)]
        near = [choice for choice in choices if math.isclose(choice, value, rel_tol=_ROUNDING)]
        if near:
            return min(near, key=lambda choice: abs(choice - value))
    elif isinstance(distribution, IntDistribution):
        if distribution.low <= value <= distribution.high and value == int(value):
            return int(value)
    elif isinstance(distribution, FloatDistribution):
        inside = min(max(value, distribution.low), distribution.high)
        if math.isclose(inside, value, rel_tol=_ROUNDING):
            return inside
    raise ValueError(f"{key} = {value!r} is not in {distribution}")


def _clipped(value: float, setting: Setting) -> float:
    return min(max(value, setting.low), setting.high) if isinstance(setting, Range) else value


def _short(name: str, value: float) -> float:
    """The value to 6 significant digits, or to as many more as keep a coefficient apart from 1."""
    digits = _SIGNIFICANT
    if name in HYPERPARAMETERS and HYPERPARAMETERS[name].complement and value < 1.0:
        digits += max(0, -math.floor(math.log10(1.0 - value)) - 3)
    return float(f"{value:.{digits}g}")
