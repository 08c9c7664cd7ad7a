"""The sections of a study file, apart from `space` and `fixed`.

The description of a field is what a user is told that it must be.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails

from momentum_tuner.catalog import DESIGNS, PRUNERS, SAMPLERS, SCHEDULE_OPTIONS, SCHEDULES
from momentum_tuner.spec.mistakes import check_all, is_number, mistake, not_allowed, one_of, refuse, shown, unknown

Param: TypeAlias = bool | int | float | str | Sequence["Param"] | None
"""A value that a study file may give to the task's factory."""

OBJECTIVES = (
    "valid_loss",
    "best_valid_loss",
    "final_valid_loss",
    "mean_valid_loss",
    "train_loss",
    "contraction",
    "steps_to_target",
    "oscillation",
    "spikes",
    "layer_grad_ratio",
    "sharpness",
    "stability_margin",
)
"""What a study may aim at, beside `valid_<metric>` for each metric of its task."""

OF_WHOLE_TRIALS = frozenset(OBJECTIVES[OBJECTIVES.index("steps_to_target") :])
"""Those that say nothing of a trial that still runs."""

_MOST = 1_000_000
_MOST_POINTS = 1_000

_FILE = re.compile(r"(?!/)[^\\:]+\.py")


def count(least: int, most: int = _MOST) -> Any:
    """A pydantic field for a whole number from `least` to `most`."""
    return Field(strict=True, ge=least, le=most, description=f"a whole number in [{least}, {most}]")


class Section(BaseModel):
    """A mapping in a study file: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskSpec(Section):
    """Where the task comes from, and what its factory is called with."""

    factory: str = Field(
        max_length=200,
        description="'package.module:callable', or 'file.py:callable' for a file beside the study file or below it",
    )
    params: Mapping[str, Any] = Field(default={}, description="a mapping such as {hidden: 64}")

    @field_validator("factory")
    @classmethod
    def _names_a_callable(cls, factory: str) -> str:
        place, _, name = factory.partition(":")
        is_file = _FILE.fullmatch(place) is not None and ".." not in place.split("/") and place.isprintable()
        words = [name] if is_file else [*place.split("."), name]
        if not all(word.isidentifier() and not keyword.iskeyword(word) for word in words):
            raise ValueError("not an import path")
        return factory

    @field_validator("params")
    @classmethod
    def _plain_values(cls, params: Mapping[str, object]) -> dict[str, Param]:
        mistakes: list[InitErrorDetails] = []
        read: dict[str, Param] = {}
        for name, value in params.items():
            if not name.isidentifier() or keyword.iskeyword(name):
                mistakes.append(mistake((name,), f"{shown(name)} cannot be the name of a Python argument"))
            try:
                read[name] = _param(value)
            except ValueError as error:
                mistakes.append(mistake((name,), not_allowed(value, str(error))))
        refuse(mistakes)
        return read

    def __hash__(self) -> int:
        return hash((self.factory, repr(self.params)))


def _param(value: object) -> Param:
    if isinstance(value, list | tuple):
        return [_param(item) for item in value]
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("text without null characters and surrogates")
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("finite")
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ValueError("true, false, a number, text, null, or a list of these")


class ScheduleSpec(Section):
    """How the learning rate changes over the epochs; the schedule's own options are further keys."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    name: Annotated[str, BeforeValidator(one_of(SCHEDULES))] = "constant"
    warmup_epochs: float = Field(default=0.0, strict=True, ge=0, le=_MOST, description="a number, 0 or more")
    warmup_start: float = Field(default=0.1, strict=True, gt=0, le=1, description="a number in (0, 1]")

    @property
    def options(self) -> dict[str, float]:
        """The options of this schedule, defaults filled in."""
        return dict(self.__pydantic_extra__)

    @model_validator(mode="wrap")
    @classmethod
    def _with_options(cls, document: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(document, Mapping):
            return handler(document)
        name = document.get("name", "constant")
        defaults = SCHEDULES.get(name) if isinstance(name, str) else None
        if defaults is None:  # the name is reported, and the options cannot be judged
            return handler({key: value for key, value in document.items() if key in cls.model_fields})
        mistakes: list[InitErrorDetails] = []
        options = {key: float(value) for key, value in defaults.items()}
        for key, value in document.items():
            if key in defaults:
                options[key] = _read_option(key, value, mistakes)
            elif key not in cls.model_fields:
                mistakes.append(mistake((key,), unknown(key, [*cls.model_fields, *defaults])))
        warmup = document.get("warmup_epochs")
        if name == "one_cycle" and is_number(warmup) and warmup > 0:
            mistakes.append(mistake(("warmup_epochs",), "one_cycle has a warmup of its own; leave this out"))
        fields = {key: value for key, value in document.items() if key in cls.model_fields}
        return check_all(handler, fields | options, mistakes)


def _read_option(key: str, value: object, mistakes: list[InitErrorDetails]) -> float:
    option = SCHEDULE_OPTIONS[key]
    if is_number(value) and option.allows(value):
        return float(value)
    mistakes.append(mistake((key,), not_allowed(value, f"a number in {option.bounds}")))
    return option.default


class Aim(Section):
    """One measure, and whether less or more of it is better; `valid_loss` means its best value over the epochs.

    Less, where nothing is said, of all but a metric of the task's own.
    """

    metric: str = Field(
        default="valid_loss",
        pattern=rf"^(?:{'|'.join(OBJECTIVES)}|valid_[A-Za-z0-9_]{{1,60}})$",
        description=f"one of {', '.join(OBJECTIVES)}, or valid_<name of a metric of the task>",
    )
    direction: Annotated[Literal["minimize", "maximize"], BeforeValidator(one_of(("minimize", "maximize")))] = (
        "minimize"
    )

    @model_validator(mode="after")
    def _direction_of_an_own_metric(self) -> Self:
        """Of a loss less is better; of a task's own metric nobody knows: accuracy is not to be minimized unasked."""
        if self.metric not in OBJECTIVES and "direction" not in self.model_fields_set:
            text = f"is missing; write {{metric: {self.metric}, direction: maximize}}, or minimize if less is better"
            refuse([mistake(("direction",), text)])
        return self

    @property
    def maximize(self) -> bool:
        """Whether more is better."""
        return self.direction == "maximize"


class ObjectiveSpec(Aim):
    """What the search aims at; a list of two names a second aim, less important than the first."""

    second: Aim | None = Field(default=None, description="as the first aim: {metric: ..., direction: ...}")

    @property
    def aims(self) -> tuple[Aim, ...]:
        """The one or two measures that the search is told."""
        return (self,) if self.second is None else (self, self.second)

    @property
    def at_rungs(self) -> Aim:
        """What trials report at rungs: the aim, or the validation loss where there are two or it has no value yet."""
        return self if self.second is None and self.metric not in OF_WHOLE_TRIALS else Aim()

    @model_validator(mode="wrap")
    @classmethod
    def _one_or_two(cls, document: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(document, list | tuple):
            aims = [{"metric": aim} if isinstance(aim, str) else aim for aim in document]
            if len(aims) != 2 or not all(isinstance(aim, Mapping) and "second" not in aim for aim in aims):
                refuse([mistake((), not_allowed(document, "one aim {metric: ..., direction: ...}, or a list of two"))])
            document = {**aims[0], "second": aims[1]}
        objective = handler(document)
        if objective.second is not None and objective.second.metric == objective.metric:
            refuse(
                [mistake(("second", "metric"), f"{objective.metric} is the first aim already; name another measure")]
            )
        return objective

    @model_serializer(mode="wrap")
    def _without_second(self, handler: Any) -> dict[str, object]:
        return {key: value for key, value in handler(self).items() if value is not None}


class BudgetSpec(Section):
    """What each optimizer may spend; equal for all, so that the comparison is fair."""

    trials: Annotated[int, count(1)]
    epochs: Annotated[int, count(1)]


class SamplerSpec(Section):
    """Who proposes the settings.

    `points`, the values per range, is for the grid only; `refine` is how many trials of each contestant, the last ones,
    close in on the best before them, one after the other.
    """

    name: Annotated[str, BeforeValidator(one_of(SAMPLERS))] = "tpe"
    points: Annotated[int | None, count(2, _MOST_POINTS)] = None
    refine: Annotated[int | None, count(1)] = None

    @model_validator(mode="wrap")
    @classmethod
    def _options_of_each(cls, document: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(document, Mapping):
            return handler(document)
        mistakes = []
        if document.get("refine") is not None and document.get("name") in DESIGNS:
            mistakes.append(
                mistake(("refine",), f"the points of {document['name']} are fixed in advance; leave it out")
            )
        if document.get("name") == "grid":
            document = {**document, "points": 8} if document.get("points") is None else document
        elif document.get("points") is not None and document.get("name", "tpe") in list(SAMPLERS):
            mistakes.append(mistake(("points",), "only the grid sampler has points; leave it out"))
        return check_all(handler, document, mistakes)

    @model_serializer(mode="wrap")
    def _without_none(self, handler: Any) -> dict[str, object]:
        return {key: value for key, value in handler(self).items() if value is not None}


class PrunerSpec(Section):
    """Who stops hopeless trials, and at which epochs."""

    name: Annotated[str, BeforeValidator(one_of(PRUNERS))] = "successive_halving"
    reduction_factor: Annotated[int, count(2, 1_000)] = 3
    min_epochs: Annotated[int, count(1)] = 1


class ConfirmSpec(Section):
    """How many fresh seeds each optimizer's best setting is retrained on; 0 leaves the confirmation out."""

    seeds: Annotated[int, count(0, 10_000)] = 10
