"""`StudySpec`: a study file, checked, with every default filled in."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from momentum_tuner.catalog import OPTIMIZERS, TEXTBOOK
from momentum_tuner.errors import InputError, StudyFileError
from momentum_tuner.spec.document import read_document, read_text, write_document
from momentum_tuner.spec.mistakes import (
    check_all,
    is_number,
    lines,
    mistake,
    not_allowed,
    one_of,
    refuse,
    report,
    unknown,
)
from momentum_tuner.spec.reading import is_override, read_fixed, read_space
from momentum_tuner.spec.sections import (
    Aim,
    BudgetSpec,
    ConfirmSpec,
    ObjectiveSpec,
    PrunerSpec,
    SamplerSpec,
    ScheduleSpec,
    Section,
    TaskSpec,
    count,
)
from momentum_tuner.spec.settings import Setting, Space, grid_axis, names_of, normal_form, plain, settings_of

PRECISIONS = ("auto", "float32", "float64", "tfloat32", "bfloat16")

_LARGEST_GRID = 100_000
_STORED = "stored"
"""The context in which a study is read that an earlier version may have taken."""


class StudySpec(Section):
    """One study: a task, the optimizers to compare, a search space, a budget.

    `space` holds what is searched and `fixed` every number, defaults of the catalog included, whatever the file says
    where; `hyperparameters` tells what holds for one optimizer.
    """

    # The order matters: a validator sees the fields above its own.
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$",
        description="1 to 63 letters, digits, '-' and '_', beginning with a letter or a digit",
    )
    task: TaskSpec = Field(description="a mapping such as {factory: 'momentum_tuner.tasks:digits_mlp'}")
    optimizers: tuple[str, ...] = Field(description="a list such as [sgd, momentum, nesterov]")
    space: Space = Field(default={}, validate_default=True)
    fixed: Mapping[str, float] = Field(default={}, validate_default=True)
    objective: ObjectiveSpec = Field(
        default=ObjectiveSpec(),
        description="a mapping such as {metric: valid_loss, direction: minimize}, or a list of two",
    )
    budget: BudgetSpec = Field(description="a mapping such as {trials: 64, epochs: 20}")
    schedule: ScheduleSpec = Field(default=ScheduleSpec(), description="a mapping such as {name: constant}")
    sampler: SamplerSpec = Field(default=SamplerSpec(), description="a mapping such as {name: tpe}")
    pruner: PrunerSpec = Field(default=PrunerSpec(), description="a mapping such as {name: successive_halving}")
    confirm: ConfirmSpec = Field(default=ConfirmSpec(), description="a mapping such as {seeds: 10}")
    target: Literal["auto"] | float = Field(default="auto", description="auto, or a finite number")
    seed: Annotated[int, count(0, 2**32 - 1)] = 0
    precision: Annotated[
        Literal["auto", "float32", "float64", "tfloat32", "bfloat16"], BeforeValidator(one_of(PRECISIONS))
    ] = "auto"
    max_attempts: Annotated[int, count(1, 1_000)] = 3

    def __hash__(self) -> int:
        return hash(self.canonical())

    @field_validator("optimizers")
    @classmethod
    def _known_optimizers(cls, optimizers: tuple[str, ...]) -> tuple[str, ...]:
        if not optimizers:
            refuse([mistake((), not_allowed([], f"a list of at least one of {', '.join(OPTIMIZERS)}"))])
        mistakes = []
        for index, optimizer in enumerate(optimizers):
            if optimizer not in OPTIMIZERS:
                mistakes.append(mistake((index,), unknown(optimizer, OPTIMIZERS)))
            elif optimizer in optimizers[:index]:
                mistakes.append(mistake((index,), f"{optimizer} is in the list twice"))
        refuse(mistakes)
        return optimizers

    @field_validator("space", mode="plain")
    @classmethod
    def _read_space(cls, space: object, info: ValidationInfo) -> Space:
        return read_space(space, info.data.get("optimizers"))

    @field_validator("fixed", mode="plain")
    @classmethod
    def _read_fixed(cls, fixed: object, info: ValidationInfo) -> Mapping[str, float]:
        return read_fixed(fixed, info.data.get("optimizers"))

    @field_validator("schedule")
    @classmethod
    def _warmup_within_budget(cls, schedule: ScheduleSpec, info: ValidationInfo) -> ScheduleSpec:
        budget = info.data.get("budget")
        if isinstance(budget, BudgetSpec) and schedule.warmup_epochs >= budget.epochs:
            text = not_allowed(schedule.warmup_epochs, f"below budget.epochs ({budget.epochs})")
            refuse([mistake(("warmup_epochs",), text)])
        return schedule

    @field_validator("sampler")
    @classmethod
    def _grid_holds_budget(cls, sampler: SamplerSpec, info: ValidationInfo) -> SamplerSpec:
        if sampler.points is None or not {"optimizers", "space", "fixed", "budget"} <= info.data.keys():
            return sampler
        optimizers, trials = info.data["optimizers"], info.data["budget"].trials
        space, fixed = normal_form(optimizers, info.data["space"], info.data["fixed"])
        mistakes = []
        for optimizer in optimizers:
            settings = settings_of(optimizer, space, fixed)
            axes = [len(grid_axis(name, setting, sampler.points)) for name, setting in settings.items()]
            size = math.prod(axes)
            if trials > size:
                text = f"the grid of {optimizer} has {size} points, fewer than budget.trials ({trials})"
                mistakes.append(mistake((), f"{text}; lower budget.trials or raise sampler.points"))
            elif size > _LARGEST_GRID:
                text = f"the grid of {optimizer} has {size} points, more than {_LARGEST_GRID}"
                mistakes.append(mistake((), f"{text}; lower sampler.points"))
        refuse(mistakes)
        return sampler

    @field_validator("sampler")
    @classmethod
    def _refines_a_search(cls, sampler: SamplerSpec, info: ValidationInfo) -> SamplerSpec:
        budget, objective = info.data.get("budget"), info.data.get("objective")
        mistakes = []
        if sampler.refine is not None and isinstance(budget, BudgetSpec) and sampler.refine >= budget.trials:
            text = not_allowed(sampler.refine, f"below budget.trials ({budget.trials})")
            mistakes.append(mistake(("refine",), text))
        if sampler.refine is not None and isinstance(objective, ObjectiveSpec) and objective.second is not None:
            mistakes.append(mistake(("refine",), "two aims have no single best trial to refine; leave it out"))
        refuse(mistakes)
        return sampler

    @field_validator("sampler")
    @classmethod
    def _takes_two_aims(cls, sampler: SamplerSpec, info: ValidationInfo) -> SamplerSpec:
        """Optuna's CMA-ES refuses two aims as it draws; a stored study is still to be shown and deleted."""
        objective = info.data.get("objective")
        two_aims = isinstance(objective, ObjectiveSpec) and objective.second is not None
        if sampler.name == "cmaes" and two_aims and info.context != _STORED:
            refuse([mistake(("name",), "cmaes searches for one aim, and objective has two; write tpe or gp")])
        return sampler

    @field_validator("target", mode="before")
    @classmethod
    def _auto_or_number(cls, target: object) -> object:
        if target == "auto":
            return target
        if is_number(target) and abs(target) < 1e300:
            return float(target)
        refuse([mistake((), not_allowed(target, "auto, or a finite number"))])
        return target

    @model_validator(mode="wrap")
    @classmethod
    def _settings_named_once(cls, document: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        mistakes = []
        if isinstance(document, Mapping):
            space, fixed = document.get("space"), document.get("fixed")
            if isinstance(space, Mapping) and isinstance(fixed, Mapping):
                twice = [name for name in fixed if name in space and not is_override(name, space[name])]
                text = "is in space too; keep it in one of the two"
                mistakes = [mistake(("fixed", name), text) for name in twice]
        return check_all(handler, document, mistakes)

    @model_validator(mode="after")
    def _target_to_aim_at(self) -> Self:
        if self.target == "auto" and any(aim.metric == "steps_to_target" for aim in self.objective.aims):
            text = "'auto' is known only after the search, and objective aims at it; write a number"
            refuse([mistake(("target",), text)])
        return self

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        space, fixed = normal_form(self.optimizers, self.space, self.fixed)
        object.__setattr__(self, "space", space)  # frozen for everyone else
        object.__setattr__(self, "fixed", fixed)
        return self

    @field_serializer("space", "fixed")
    def _plain(self, settings: Space) -> dict[str, object]:
        return plain(settings)

    @property
    def reference(self) -> str | None:
        """The optimizer that the others are compared with: momentum at 0.9, with a learning rate of its own.

        It is `momentum` itself where the study fixes that to 0.9; None if the study confirms nothing.
        """
        if self.confirm.seeds == 0:
            return None
        if TEXTBOOK not in self.optimizers and "momentum" in self.optimizers:
            momentum = settings_of("momentum", self.space, self.fixed)["momentum"]
            if momentum == OPTIMIZERS[TEXTBOOK].constants["momentum"]:
                return "momentum"
        return TEXTBOOK

    @property
    def target_aim(self) -> Aim:
        """The measure that has to reach the target: the first aim if it is on the validation set, else its loss."""
        aim = self.objective
        on_validation = aim.metric.startswith("valid_") and aim.metric != "valid_loss"
        return Aim(metric=aim.metric, direction=aim.direction) if on_validation else Aim()

    @property
    def contestants(self) -> tuple[str, ...]:
        """What is compared: the study's optimizers, and the reference if it is not one of them."""
        others = () if self.reference in (None, *self.optimizers) else (self.reference,)
        return (*self.optimizers, *others)

    def hyperparameters(self, optimizer: str) -> dict[str, Setting]:
        """What holds for one contestant: each of its hyperparameters in the catalog's order, then `batch_size`.

        A reference that the study does not name has what `momentum` has, where that is one of its optimizers.

        Raises:
            InputError: the optimizer is not in this study.
        """
        if optimizer in self.optimizers:
            return settings_of(optimizer, self.space, self.fixed)
        if optimizer not in self.contestants:
            raise InputError(f"study {self.name}: {unknown(optimizer, self.optimizers)}")
        model = "momentum" if "momentum" in self.optimizers else optimizer
        space, fixed = normal_form((*self.optimizers, optimizer), self.space, self.fixed)
        settings = settings_of(model, space, fixed)
        return {name: settings[name] for name in names_of(optimizer)}

    def rungs(self) -> tuple[int, ...]:
        """The epochs before the last at which trials report and may be pruned, ascending."""
        epochs, least = self.budget.epochs, self.pruner.min_epochs
        if self.pruner.name == "none":
            return ()
        if self.pruner.name == "median":
            step = max(least, math.ceil(epochs / 10))
            return tuple(range(step, epochs, step))
        rungs = []
        while least < epochs:
            rungs.append(least)
            least *= self.pruner.reduction_factor
        return tuple(rungs)

    def canonical(self) -> str:
        """JSON with every default filled in, sorted keys and no spaces: equal specs give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_canonical(cls, text: str) -> Self:
        """The spec whose `canonical` is `text`.

        Raises:
            StudyFileError: the text is not that of a study.
        """
        try:
            document = json.loads(text)
        except ValueError:
            raise StudyFileError("stored study: is not valid JSON") from None
        try:
            return cls.model_validate(document, context=_STORED)
        except ValidationError as error:
            raise StudyFileError(report(lines(error, cls, "stored study"))) from None

    def to_yaml(self) -> str:
        """A study file that reads back to this spec."""
        return write_document(self.model_dump(mode="json"))


def spec_hash(spec: StudySpec) -> str:
    """The SHA-256 of the canonical JSON, in hex."""
    return hashlib.sha256(spec.canonical().encode()).hexdigest()


def load_study(path: Path) -> StudySpec:
    """The study in a file.

    Raises:
        StudyFileError: with one line for each mistake: file, field, value, and what is allowed.
    """
    try:
        if path.is_dir():
            raise StudyFileError(f"{path}: is a directory; name the study file in it")
        if path.exists() and not path.is_file():
            raise StudyFileError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            content = file.read(1_000_001)
    except FileNotFoundError:
        raise StudyFileError(f"{path}: there is no such file; {_instead(path)}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StudyFileError(f"{path}: cannot be read: {reason}") from None
    return parse_study(read_text(str(path), content), str(path))


def _instead(path: Path) -> str:
    """What to do where there is no such study file."""
    try:
        there = [file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml")]
    except OSError:
        there = []
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
    return f"did you mean {str(path.with_name(near[0]))!r}?" if near else "`momentum-tuner init` writes one"


def parse_study(text: str, source: str = "study") -> StudySpec:
    """The study in the text of a study file; `source` begins each line of the report.

    Raises:
        StudyFileError: as `load_study` does.
    """
    document, mistakes = read_document(text, source)
    return check_study(document, source, mistakes)


def check_study(document: Mapping[str, object], source: str, mistakes: Sequence[str] = ()) -> StudySpec:
    """The study in a mapping of a study file's sections.

    Args:
        document: the sections.
        source: begins each line of the report.
        mistakes: lines that are reported too.

    Raises:
        StudyFileError: as `load_study` does.
    """
    found = list(mistakes)
    try:
        spec = StudySpec.model_validate(document)
    except ValidationError as error:
        found += lines(error, StudySpec, source)
    if found:
        raise StudyFileError(report(found))
    return spec


def differences(old: StudySpec, new: StudySpec) -> list[str]:
    """The fields in which two specs differ, as `space.momentum.high: 0.99 -> 0.999`.

    A budget of more trials and a confirmation on more seeds are left out: a study may be resumed with them.
    """
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for section, name in (("budget", "trials"), ("confirm", "seeds")):
        if after[section][name] > before[section][name]:
            after[section][name] = before[section][name]
    return _differences((), before, after)


_ABSENT = object()


def _differences(path: Sequence[str], old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        found = [_differences((*path, key), old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys]
        return [line for part in found for line in part]
    before, after = _written(old), _written(new)
    return [] if before == after else [f"{'.'.join(path)}: {before} -> {after}"]


def _written(value: object) -> str:
    return "not set" if value is _ABSENT else json.dumps(value, sort_keys=True)
