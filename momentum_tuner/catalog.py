"""What can be named in a study file: optimizers with their hyperparameters, schedules, samplers, pruners.

Free of heavy imports, so that a study file is checked without loading torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter of an update rule: its default and the values it may take.

    Attributes:
        default: the value where neither `space` nor `fixed` names it; the value of torch.optim.
        low: smallest allowed value.
        high: largest allowed value.
        low_open: whether `low` itself is not allowed.
        high_open: whether `high` itself is not allowed.
        complement: whether it is searched as `log(1 - value)`, the natural scale of an averaging coefficient.
        log: whether a range of it is searched on a log scale unless the study file says otherwise.
    """

    default: float
    low: float = 0.0
    high: float = float("inf")
    low_open: bool = False
    high_open: bool = False
    complement: bool = False
    log: bool = False

    def allows(self, value: float) -> bool:
        """Whether `value` is inside the bounds (never for NaN)."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    @property
    def bounds(self) -> str:
        """The allowed values as an interval, such as `[0, 1)`."""
        left = "(" if self.low_open else "["
        right = ")" if self.high_open or self.high == float("inf") else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


def _coefficient(default: float) -> Hyperparameter:
    return Hyperparameter(default, high=1.0, high_open=True, complement=True)


HYPERPARAMETERS: Mapping[str, Hyperparameter] = MappingProxyType(
    {
        "learning_rate": Hyperparameter(1e-2, low_open=True, high_open=True, log=True),
        "momentum": _coefficient(0.9),
        "dampening": Hyperparameter(0.0, high=1.0),
        "weight_decay": Hyperparameter(0.0, high_open=True, log=True),
        "beta1": _coefficient(0.9),
        "beta2": _coefficient(0.999),
        "alpha": _coefficient(0.99),
        "eps": Hyperparameter(1e-8, low_open=True, high_open=True, log=True),
        "clip_norm": Hyperparameter(float("inf"), low_open=True, log=True),
    }
)
"""Every hyperparameter of the update rules by name. `batch_size` is searched too, but belongs to the data."""


@dataclass(frozen=True)
class Optimizer:
    """An update rule under comparison.

    Attributes:
        rule: name of the update rule in `momentum_tuner.optim` that trains it.
        hyperparameters: those a study may search or fix for it, in the order in which they are shown.
        constants: hyperparameters of the rule that this optimizer pins, such as `nesterov = 1`.
        torch_class: the class of torch.optim that a tuned setting is pasted into, if there is one.
    """

    rule: str
    hyperparameters: tuple[str, ...]
    constants: Mapping[str, float] = field(default_factory=dict)
    torch_class: str | None = None


_COMMON = ("weight_decay", "clip_norm")

OPTIMIZERS: Mapping[str, Optimizer] = MappingProxyType(
    {
        "sgd": Optimizer("sgd", ("learning_rate", *_COMMON), {"momentum": 0.0, "nesterov": 0.0}, "SGD"),
        "momentum": Optimizer("sgd", ("learning_rate", "momentum", "dampening", *_COMMON), {"nesterov": 0.0}, "SGD"),
        "nesterov": Optimizer("sgd", ("learning_rate", "momentum", *_COMMON), {"nesterov": 1.0}, "SGD"),
        "momentum_0.9": Optimizer("sgd", ("learning_rate", *_COMMON), {"momentum": 0.9, "nesterov": 0.0}, "SGD"),
        "momentum_classic": Optimizer("momentum_classic", ("learning_rate", "momentum", *_COMMON)),
        "nesterov_lookahead": Optimizer("nesterov_lookahead", ("learning_rate", "momentum", *_COMMON)),
        "adam": Optimizer("adam", ("learning_rate", "beta1", "beta2", "eps", *_COMMON), {}, "Adam"),
        "adamw": Optimizer("adamw", ("learning_rate", "beta1", "beta2", "eps", *_COMMON), {}, "AdamW"),
        "rmsprop": Optimizer("rmsprop", ("learning_rate", "alpha", "eps", *_COMMON), {}, "RMSprop"),
    }
)
"""Optimizers by the name that a study file uses."""

TEXTBOOK = "momentum_0.9"
"""Momentum as textbooks set it: what the others are compared with, at a learning rate of its own."""

SCHEDULE_OPTIONS: Mapping[str, Hyperparameter] = MappingProxyType(
    {
        "warmup_epochs": Hyperparameter(0.0, high_open=True),
        "warmup_start": Hyperparameter(0.1, high=1.0, low_open=True),
        "final_fraction": Hyperparameter(0.0, high=1.0),
        "every_epochs": Hyperparameter(10, low_open=True, high_open=True),
        "gamma": Hyperparameter(0.1, high=1.0, low_open=True),
        "peak_fraction": Hyperparameter(0.3, high=1.0),
        "div_factor": Hyperparameter(25.0, low_open=True, high_open=True),
        "final_div_factor": Hyperparameter(1e4, low_open=True, high_open=True),
        "base_momentum_fraction": Hyperparameter(0.85 / 0.95, high=1.0),
    }
)
"""What each option of a schedule may be, and its default."""


def _defaults(*options: str) -> Mapping[str, float]:
    return MappingProxyType({name: SCHEDULE_OPTIONS[name].default for name in options})


SCHEDULES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "constant": _defaults(),
        "cosine": _defaults("final_fraction"),
        "step": _defaults("every_epochs", "gamma"),
        "one_cycle": _defaults("peak_fraction", "div_factor", "final_div_factor", "base_momentum_fraction"),
    }
)
"""Learning-rate schedules by name, with their options and defaults; all take `warmup_epochs` and `warmup_start`."""

SAMPLERS: Mapping[str, str] = MappingProxyType(
    {
        "tpe": "tree-structured Parzen estimator",
        "random": "uniform over the space",
        "qmc": "quasi-random (Sobol) points",
        "gp": "Gaussian process",
        "cmaes": "covariance matrix adaptation",
        "grid": "every point of a grid",
    }
)

DESIGNS = frozenset({"qmc", "grid"})
"""The samplers whose points are drawn before the search begins."""

PRUNERS: Mapping[str, str] = MappingProxyType(
    {
        "successive_halving": "asynchronous successive halving",
        "hyperband": "Hyperband",
        "median": "worse than the median at the same rung",
        "none": "every trial runs its whole budget",
    }
)
