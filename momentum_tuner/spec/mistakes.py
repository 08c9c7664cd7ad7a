"""Mistakes in a study file: collected by pydantic, told in the words of the study file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

Loc = tuple[int | str, ...]
"""Where a mistake is: the keys and list positions from the top of the file."""

Model = TypeVar("Model", bound=BaseModel)

_LONGEST_VALUE = 60
_MOST_LINES = 50

_SHORT_FORMS = {"lr": "learning_rate", "wd": "weight_decay", "bs": "batch_size", "beta": "momentum"}


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value from the file is a number; `true` is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: object) -> str:
    """The repr of a value from the file, in at most 60 characters, with control characters escaped."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def not_allowed(value: object, allowed: str) -> str:
    """The text of the commonest mistake: a value, and what it must be."""
    return f"{shown(value)} is not allowed; it must be {allowed}"


def unknown(name: object, allowed: Iterable[str]) -> str:
    """The text for a name that is not known: the nearest one that is, and all that are."""
    allowed = list(allowed)
    text = f"{shown(name)} is not known"
    if isinstance(name, str):
        lowered = name.lower()
        near = difflib.get_close_matches(lowered, allowed, n=1)
        near = near or [full for full in [_SHORT_FORMS.get(lowered)] if full in allowed]
        if near:
            text += f"; did you mean {near[0]!r}?"
    return f"{text} (allowed: {', '.join(allowed)})"


def mistake(loc: Loc, text: str) -> InitErrorDetails:
    """A mistake at `loc`, relative to the field whose validator found it."""
    return InitErrorDetails(type=PydanticCustomError("mistake", "{text}", {"text": text}), loc=loc, input=None)


def refuse(mistakes: Sequence[InitErrorDetails]) -> None:
    """Raise pydantic's ValidationError with all of these mistakes, if there are any."""
    if mistakes:
        raise ValidationError.from_exception_data("study", list(mistakes))


def one_of(names: Iterable[str]) -> Callable[[object], object]:
    """A validator that lets only these names through."""
    allowed = tuple(names)

    def check(value: object) -> object:
        if not (isinstance(value, str) and value in allowed):
            refuse([mistake((), unknown(value, allowed))])
        return value

    return check


def check_all(handler: Callable[[object], Model], document: object, mistakes: Sequence[InitErrorDetails]) -> Model:
    """What `handler` makes of `document`, its complaints and `mistakes` being raised together."""
    try:
        model = handler(document)
    except ValidationError as error:
        refuse([_again(details) for details in error.errors(include_url=False)] + list(mistakes))
        raise
    refuse(mistakes)
    return model


def lines(error: ValidationError, model: type[BaseModel], source: str) -> list[str]:
    """One line for each mistake: file, field, value, and what is allowed.

    What is allowed is the description of the field, so that no words of pydantic reach the user.
    """
    found: dict[str, None] = {}
    for details in error.errors(include_url=False):
        loc = details["loc"]
        owner, info = _field(model, loc)
        allowed = (info.description if info else None) or "a mapping that begins with 'name: ...'"
        if details["type"] == "mistake":
            text = details["msg"]
        elif details["type"] == "missing":
            text = f"is missing; it must be {allowed}"
        elif details["type"] == "extra_forbidden":
            text = unknown(loc[-1], owner.model_fields)
        else:
            text = not_allowed(details["input"], allowed)
        path = field_path(loc)
        found[f"{source}: {path}: {text}" if path else f"{source}: {text}"] = None
    return list(found)


def field_path(loc: Loc) -> str:
    """`space.momentum.high`, `optimizers[1]`; a key that is no plain name is shown by its repr."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            name = part if part.isidentifier() and len(part) <= _LONGEST_VALUE else shown(part)
            path += f".{name}" if path else name
    return path


def report(found: Sequence[str]) -> str:
    """The lines as one message; beyond 50 only their number."""
    kept = list(found[:_MOST_LINES])
    if len(found) > _MOST_LINES:
        kept.append(f"... and {len(found) - _MOST_LINES} more mistakes")
    return "\n".join(kept)


def _again(details: Mapping[str, Any]) -> InitErrorDetails:
    same = PydanticCustomError(details["type"], "{text}", {"text": details["msg"]})
    return InitErrorDetails(type=same, loc=details["loc"], input=details["input"])


def _field(model: type[BaseModel], loc: Loc) -> tuple[type[BaseModel], FieldInfo | None]:
    """The innermost model and field that `loc` leads to."""
    info = None
    for part in loc:
        found = model.model_fields.get(part) if isinstance(part, str) else None
        if found is None:
            break
        info = found
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            model = info.annotation
    return model, info
