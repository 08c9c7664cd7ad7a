"""What a study does with each hyperparameter: searches a range or a list of choices, or fixes it to a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from momentum_tuner.catalog import HYPERPARAMETERS, OPTIMIZERS
from momentum_tuner.spec.mistakes import mistake, not_allowed, refuse

BATCH_SIZE = "batch_size"

_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False, description="a finite number")]


class Range(BaseModel):
    """A hyperparameter searched from `low` to `high`, both included.

    Attributes:
        low: smallest value.
        high: largest value.
        log: whether it is searched on a log scale; None in a study file means the hyperparameter's usual scale.
            False for coefficients such as `momentum`, which are searched as log(1 - value).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: _Finite
    high: _Finite
    log: Annotated[bool | None, Field(strict=True)] = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            refuse([mistake(("high",), not_allowed(self.high, f"above low ({self.low!r})"))])
        if self.log and self.low <= 0:
            refuse([mistake(("low",), not_allowed(self.low, "above 0 on a log scale"))])
        return self


Setting: TypeAlias = Range | tuple[float, ...] | float
"""A range, a tuple of choices, or the number to which a hyperparameter is fixed."""

Space: TypeAlias = Mapping[str, Setting | Mapping[str, Setting]]
"""Settings by hyperparameter, and by optimizer the settings that replace them there."""

DEFAULT_RANGES: Mapping[str, Range] = {
    "learning_rate": Range(low=1e-4, high=1.0, log=True),
    "momentum": Range(low=0.0, high=0.999),
}
"""What is searched where a study file does not say."""

DEFAULT_BATCH_SIZE = 64


def is_setting(value: object) -> bool:
    """Whether an entry of `Space` is a setting, and not an optimizer's mapping of settings."""
    return value is not None and not isinstance(value, Mapping)


def names_of(optimizer: str) -> tuple[str, ...]:
    """What can be searched or fixed for an optimizer, in the order in which it is shown."""
    return (*OPTIMIZERS[optimizer].hyperparameters, BATCH_SIZE)


def owners_of(name: str, optimizers: Sequence[str] | None = None) -> list[str]:
    """Those of the optimizers (of all optimizers, if None) that have this hyperparameter."""
    return [optimizer for optimizer in optimizers or OPTIMIZERS if name in names_of(optimizer)]


def normal_form(
    optimizers: Sequence[str], space: Space, fixed: Mapping[str, float]
) -> tuple[dict[str, Setting | Mapping[str, Setting]], dict[str, float]]:
    """`space` and `fixed` with every default filled in and every number in `fixed`.

    So two files that ask for the same search hold the same, and a later change of a default changes no stored study.
    """
    searched: dict[str, Setting | Mapping[str, Setting]] = {
        name: value for name, value in space.items() if isinstance(value, Range | tuple | Mapping)
    }
    numbers = {name: value for name, value in space.items() if isinstance(value, int | float)} | dict(fixed)
    for name, default in DEFAULT_RANGES.items():
        owners = owners_of(name, optimizers)
        if name in numbers or is_setting(searched.get(name)) or not owners:
            continue
        if name not in searched:
            searched[name] = default
        else:  # `momentum` holds the settings of that optimizer, so the default goes to each
            for owner in owners:
                own = searched.get(owner, {})
                assert isinstance(own, Mapping)
                searched[owner] = {name: default, **own}
    for optimizer in optimizers:
        for name in names_of(optimizer):
            if name not in DEFAULT_RANGES and not is_setting(searched.get(name)):
                default_number = HYPERPARAMETERS[name].default if name != BATCH_SIZE else DEFAULT_BATCH_SIZE
                numbers.setdefault(name, default_number)
    return searched, numbers


def settings_of(optimizer: str, space: Space, fixed: Mapping[str, float]) -> dict[str, Setting]:
    """The settings that hold for one optimizer, from `space` and `fixed` in their normal form."""
    own = space.get(optimizer)
    own = own if isinstance(own, Mapping) else {}
    settings: dict[str, Setting] = {}
    for name in names_of(optimizer):
        common = space.get(name)
        setting = own[name] if name in own else fixed[name] if common is None or name in fixed else common
        assert not isinstance(setting, Mapping)
        if isinstance(setting, Range) and setting.log is None:
            setting = setting.model_copy(update={"log": False})
        settings[name] = setting
    return settings


def plain(space: Mapping[str, Setting | Mapping[str, Setting]]) -> dict[str, object]:
    """The settings as plain values: mappings, lists, numbers, and `inf` as text, which JSON has no number for."""
    return {name: _plain_setting(name, value) for name, value in space.items()}


def grid_axis(name: str, setting: Setting, points: int) -> tuple[float, ...]:
    """The values of one hyperparameter in a grid, ascending; of `1 - value` for a coefficient such as momentum.

    A range is cut evenly on the scale on which it is searched, ends included; choices are taken as they are.
    """
    if not isinstance(setting, Range):
        return setting if isinstance(setting, tuple) else (setting,)
    low, high, log = setting.low, setting.high, bool(setting.log)
    if name in HYPERPARAMETERS and HYPERPARAMETERS[name].complement:
        low, high, log = 1.0 - high, 1.0 - low, True
    inner = [step / (points - 1) for step in range(1, points - 1)]
    if log:
        values = [low, *(math.exp(math.log(low) + part * (math.log(high) - math.log(low))) for part in inner), high]
    else:
        values = [low, *(low + part * (high - low) for part in inner), high]
    if name == BATCH_SIZE:
        values = [round(value) for value in values]
    return tuple(sorted({min(max(value, low), high) for value in values}))


def _plain_setting(name: str, value: Setting | Mapping[str, Setting]) -> object:
    if isinstance(value, Mapping):
        return plain(value)
    if isinstance(value, Range):
        low, high = (int(end) if name == BATCH_SIZE else end for end in (value.low, value.high))
        return {"low": low, "high": high} | ({} if value.log is None else {"log": value.log})
    if isinstance(value, tuple):
        return [_plain_setting(name, choice) for choice in value]
    return "inf" if math.isinf(value) else value
