"""Reading `space` and `fixed`: every value is checked against the catalog, every mistake is collected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic_core import InitErrorDetails

from momentum_tuner.catalog import HYPERPARAMETERS, OPTIMIZERS, Hyperparameter
from momentum_tuner.spec.mistakes import Loc, is_number, mistake, not_allowed, refuse, unknown
from momentum_tuner.spec.settings import BATCH_SIZE, Range, Setting, names_of, owners_of

_LARGEST_BATCH = 2**31 - 1


def is_override(name: str, value: object) -> bool:
    """Whether `name: value` in `space` holds the settings of one optimizer.

    `momentum` is both an optimizer and a hyperparameter: it means the optimizer if it holds names of hyperparameters.
    """
    if name not in OPTIMIZERS:
        return False
    if name not in HYPERPARAMETERS:
        return True
    return isinstance(value, Mapping) and any(key in HYPERPARAMETERS or key == BATCH_SIZE for key in value)


def read_space(document: object, optimizers: Sequence[str] | None) -> dict[str, Setting | Mapping[str, Setting]]:
    """The settings in `space`, checked against the catalog; `optimizers` is None if they are not known.

    Raises:
        pydantic.ValidationError: with every mistake that was found.
    """
    if not isinstance(document, Mapping):
        refuse([mistake((), not_allowed(document, "a mapping such as {learning_rate: {low: 1.0e-4, high: 1.0}}"))])
        return {}
    space: dict[str, Setting | Mapping[str, Setting]] = {}
    mistakes: list[InitErrorDetails] = []
    for name, value in document.items():
        if is_override(name, value):
            space[name] = _read_override(name, value, optimizers, mistakes)
        elif name not in HYPERPARAMETERS and name != BATCH_SIZE:
            mistakes.append(mistake((name,), unknown(name, _known(optimizers))))
        elif optimizers and not owners_of(name, optimizers):
            mistakes.append(mistake((name,), _nobody_has(name, optimizers)))
        elif (setting := _read_setting(name, value, (name,), mistakes)) is not None:
            space[name] = setting
    refuse(mistakes)
    return space


def read_fixed(document: object, optimizers: Sequence[str] | None) -> dict[str, float]:
    """The numbers in `fixed`, checked as `read_space` does."""
    if not isinstance(document, Mapping):
        refuse([mistake((), not_allowed(document, "a mapping such as {batch_size: 64}"))])
        return {}
    fixed: dict[str, float] = {}
    mistakes: list[InitErrorDetails] = []
    for name, value in document.items():
        if name not in HYPERPARAMETERS and name != BATCH_SIZE:
            allowed = [known for known in _known(optimizers) if known not in OPTIMIZERS or known in HYPERPARAMETERS]
            mistakes.append(mistake((name,), unknown(name, allowed)))
        elif optimizers and not owners_of(name, optimizers):
            mistakes.append(mistake((name,), _nobody_has(name, optimizers)))
        elif (number := _read_number(name, value, (name,), mistakes)) is not None:
            fixed[name] = number
    refuse(mistakes)
    return fixed


def _known(optimizers: Sequence[str] | None) -> list[str]:
    names = [name for name in (*HYPERPARAMETERS, BATCH_SIZE) if owners_of(name, optimizers)]
    return list(dict.fromkeys([*names, *(optimizers or OPTIMIZERS)]))


def _nobody_has(name: str, optimizers: Sequence[str]) -> str:
    return f"no optimizer of this study ({', '.join(optimizers)}) has it; it belongs to {', '.join(owners_of(name))}"


def _read_override(
    optimizer: str, document: object, optimizers: Sequence[str] | None, mistakes: list[InitErrorDetails]
) -> dict[str, Setting]:
    if optimizers and optimizer not in optimizers:
        text = f"{optimizer} is not among the optimizers of this study ({', '.join(optimizers)})"
        mistakes.append(mistake((optimizer,), text))
    if not isinstance(document, Mapping):
        allowed = f"a mapping of settings for {optimizer} only, such as {{learning_rate: {{low: 1.0e-4, high: 0.1}}}}"
        mistakes.append(mistake((optimizer,), not_allowed(document, allowed)))
        return {}
    settings: dict[str, Setting] = {}
    for name, value in document.items():
        loc = (optimizer, name)
        if name not in names_of(optimizer):
            mistakes.append(mistake(loc, unknown(name, names_of(optimizer))))
        elif (setting := _read_setting(name, value, loc, mistakes)) is not None:
            settings[name] = setting
    return settings


def _read_setting(name: str, value: object, loc: Loc, mistakes: list[InitErrorDetails]) -> Setting | None:
    if isinstance(value, Range):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return _read_range(name, value, loc, mistakes)
    if isinstance(value, list | tuple):
        return _read_choices(name, value, loc, mistakes)
    if is_number(value) or isinstance(value, str):
        return _read_number(name, value, loc, mistakes)
    allowed = "a range {low: ..., high: ...}, a list of choices, or a number"
    mistakes.append(mistake(loc, not_allowed(value, allowed)))
    return None


def _read_choices(
    name: str, values: Sequence[object], loc: Loc, mistakes: list[InitErrorDetails]
) -> tuple[float, ...] | None:
    if not values:
        mistakes.append(mistake(loc, not_allowed(values, "a list of at least one number")))
        return None
    before = len(mistakes)
    choices: list[float] = []
    for index, value in enumerate(values):
        choice = _read_number(name, value, (*loc, index), mistakes)
        if choice is not None and choice in choices:
            mistakes.append(mistake((*loc, index), f"{choice!r} is in the list twice"))
        elif choice is not None:
            choices.append(choice)
    return tuple(choices) if len(mistakes) == before else None


def _read_range(name: str, document: Mapping[str, object], loc: Loc, mistakes: list[InitErrorDetails]) -> Range | None:
    hyperparameter = HYPERPARAMETERS.get(name)
    before = len(mistakes)
    mistakes += [
        mistake((*loc, key), unknown(key, Range.model_fields)) for key in document if key not in Range.model_fields
    ]
    ends: dict[str, float] = {}
    for key in ("low", "high"):
        if key not in document:
            mistakes.append(mistake((*loc, key), f"is missing; it must be {_allowed(hyperparameter, a_number=True)}"))
        elif (end := _read_number(name, document[key], (*loc, key), mistakes)) is not None:
            if math.isinf(end):
                mistakes.append(mistake((*loc, key), not_allowed(document[key], "finite in a range")))
            else:
                ends[key] = end
    log = document.get("log")
    if not isinstance(log, bool | None):
        mistakes.append(mistake((*loc, "log"), not_allowed(log, "true or false")))
        log = None
    elif hyperparameter is not None and hyperparameter.complement:
        if log is not None:
            text = f"{log} is not allowed; {name} is always searched as log(1 - {name})"
            mistakes.append(mistake((*loc, "log"), text))
            log = None
    elif log is None:
        log = hyperparameter is not None and hyperparameter.log
    if len(ends) == 2 and ends["low"] >= ends["high"]:
        mistakes.append(mistake((*loc, "high"), not_allowed(document["high"], f"above low ({document['low']!r})")))
    if log and ends.get("low", 1.0) <= 0:
        allowed = "above 0 on a log scale (or write log: false)"
        mistakes.append(mistake((*loc, "low"), not_allowed(document["low"], allowed)))
    return Range(**ends, log=log) if len(mistakes) == before else None


def _read_number(name: str, value: object, loc: Loc, mistakes: list[InitErrorDetails]) -> float | None:
    hyperparameter = HYPERPARAMETERS.get(name)
    if hyperparameter is None:
        if is_number(value) and 1 <= value <= _LARGEST_BATCH and value == int(value):
            return int(value)
        mistakes.append(mistake(loc, not_allowed(value, _allowed(None))))
        return None
    infinite = value == "inf" and hyperparameter.allows(math.inf)
    if not (infinite or is_number(value)):
        mistakes.append(mistake(loc, not_allowed(value, _allowed(hyperparameter, a_number=True))))
        return None
    number = float(value) if is_number(value) else math.inf
    if not hyperparameter.allows(number):
        mistakes.append(mistake(loc, not_allowed(value, _allowed(hyperparameter))))
        return None
    return number + 0.0  # no -0.0


def _allowed(hyperparameter: Hyperparameter | None, *, a_number: bool = False) -> str:
    if hyperparameter is None:
        return "a whole number, 1 or more"
    bounds = f"in {hyperparameter.bounds}" + (" or inf" if hyperparameter.allows(math.inf) else "")
    return f"a number {bounds}" if a_number else bounds
