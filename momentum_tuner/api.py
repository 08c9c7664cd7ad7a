"""The Python API: what the command line does, for a script or a notebook.

    from momentum_tuner import Study, run

    if __name__ == "__main__":
        result = run(Study.from_yaml("study.yaml"))
        print(result)

Workers are child processes that start from nothing and load the task by its import path or file, so that a notebook can
use all of it. Everything is in a database, as with the command line: either goes on with what the other began.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from momentum_tuner.cli import options
from momentum_tuner.database import Database
from momentum_tuner.errors import InputError, TaskError
from momentum_tuner.launcher import (
    Page,
    RunOutcome,
    TaskCheck,
    Workplace,
    check_placing,
    join_study,
    own_trust,
    put_study,
    run_study,
)
from momentum_tuner.spec import StudySpec, check_study, load_study
from momentum_tuner.tasks import is_loading
from momentum_tuner.tickets import BestSetting, StudyProgress, StudyRecord, best_settings, find_study

if TYPE_CHECKING:
    from momentum_tuner.comparison.outcome import Comparison

logger = logging.getLogger(__name__)


@dataclass(frozen=True, init=False)
class Study:
    """A study: what a study file says, checked, with every default filled in.

    Attributes:
        spec: all of it.
        folder: where a task file of it lies.
    """

    spec: StudySpec
    folder: Path

    def __init__(
        self,
        *,
        name: str,
        task: Mapping[str, Any],
        optimizers: Sequence[str],
        budget: Mapping[str, int],
        space: Mapping[str, Any] | None = None,
        fixed: Mapping[str, float] | None = None,
        objective: Mapping[str, Any] | Sequence[Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        sampler: Mapping[str, Any] | None = None,
        pruner: Mapping[str, Any] | None = None,
        confirm: Mapping[str, int] | None = None,
        target: float | Literal["auto"] | None = None,
        seed: int | None = None,
        precision: str | None = None,
        max_attempts: int | None = None,
        folder: str | os.PathLike[str] = ".",
    ) -> None:
        """A study of its sections, as a study file has them; one that is None has its default.

        Args:
            name: in the database.
            task: `{"factory": "my_task.py:build", "params": {...}}`.
            optimizers: what is compared, such as `["sgd", "momentum", "nesterov"]`.
            budget: `{"trials": 64, "epochs": 20}`, of each optimizer.
            space: what is searched.
            fixed: numbers.
            objective: `{"metric": "valid_loss", "direction": "minimize"}`, or a list of two.
            schedule: of the learning rate.
            sampler: who proposes settings.
            pruner: who stops hopeless trials.
            confirm: `{"seeds": 10}`.
            target: the value to reach, or `"auto"`.
            seed: of all trials of the search.
            precision: `auto`, `float32`, `float64`, `tfloat32` or `bfloat16`.
            max_attempts: after how many attempts without progress a trial fails.
            folder: where the task file lies.

        Raises:
            StudyFileError: with one line for each mistake.
        """
        given = {key: value for key, value in locals().items() if key not in ("self", "folder") and value is not None}
        self._set(check_study(given, "study"), Path(folder))

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """The study in a study file; its task file lies beside it.

        Raises:
            StudyFileError: with one line for each mistake.
        """
        return cls._of(load_study(Path(path)), Path(path).parent)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], folder: str | os.PathLike[str] = ".") -> Self:
        """The study in a mapping that is built as a study file is.

        Args:
            document: the sections.
            folder: where the task file lies.

        Raises:
            StudyFileError: with one line for each mistake.
        """
        return cls._of(check_study(document, "study"), Path(folder))

    @property
    def name(self) -> str:
        """Its name in the database."""
        return self.spec.name

    def to_yaml(self) -> str:
        """A study file that reads back to this study."""
        return self.spec.to_yaml()

    @classmethod
    def _of(cls, spec: StudySpec, folder: Path) -> Self:
        study = cls.__new__(cls)
        study._set(spec, folder)
        return study

    def _set(self, spec: StudySpec, folder: Path) -> None:
        object.__setattr__(self, "spec", spec)
        object.__setattr__(self, "folder", folder.absolute())


@dataclass(frozen=True)
class StudyResult:
    """What came of a study; printed, it is a table of the best settings.

    Attributes:
        name: the study's name.
        best: the best setting of each optimizer, best first.
        progress: how many trials ended in what.
        published: whether MLflow shows everything.
        storage: the URL of the database that holds it.
        spec: what the study file says.
    """

    name: str
    best: tuple[BestSetting, ...]
    progress: StudyProgress
    published: bool
    storage: str = field(repr=False)
    spec: StudySpec = field(repr=False)

    def torch_lines(self) -> list[str]:
        """Lines to paste into a training script, best first, with comments on what else they were tuned with."""
        from momentum_tuner.cli.look import torch_lines

        return torch_lines(self.spec, self.best)

    def compare(self) -> Comparison:
        """Which optimizer is faster, how stable, how sure."""
        return compare(self.name, storage=self.storage)

    def __str__(self) -> str:
        from rich.console import Console

        from momentum_tuner.cli.tables import WIDE, best_table

        text = io.StringIO()
        Console(file=text, width=WIDE, force_jupyter=False).print(best_table(self.progress, self.best, WIDE))
        return text.getvalue().rstrip()


def run(
    study: Study | str | os.PathLike[str],
    *,
    storage: str | None = None,
    tracking_uri: str | None = None,
    checkpoints: str | None = None,
    workers: int | Literal["auto"] = "auto",
    device: str = "auto",
    slots: int | Literal["auto"] = "auto",
    compiles: Literal["auto", "on", "off"] = "auto",
    trust: Sequence[str] = (),
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    gpus_per_worker: float | None = None,
    progress: bool = True,
) -> StudyResult:
    """Tune: put the study into the database, work on it here, and return what came of it.

    The same study again goes on where it stopped. A script whose own file defines the task calls it under
    `if __name__ == "__main__":`, as workers import that file.

    Args:
        study: the study, or the path of a study file.
        storage: URL of the database; None for `MOMENTUM_TUNER_STORAGE`, or `sqlite:///momentum_tuner.db`.
        tracking_uri: the MLflow that shows the runs, or `"none"`; None for `MLFLOW_TRACKING_URI`, or
            `sqlite:///mlflow.db`.
        checkpoints: folder or URL for the states of running trials, or `"none"`; None for
            `MOMENTUM_TUNER_CHECKPOINTS`, or a folder beside the database.
        workers: how many.
        device: `auto`, `cpu`, `cuda` or `cuda:0,1`.
        slots: trials that one worker trains at once.
        compiles: whether workers compile the training step; `auto`: once that repays.
        trust: further packages and task files that workers may import; the study's own task is trusted.
        engine: workers are processes of this machine, or actors on a Ray cluster.
        ray_address: the cluster to join.
        gpus_per_worker: with Ray, the part of a GPU that each worker takes.
        progress: whether to print how far it is.

    Raises:
        InputError: the study, its task or an argument cannot be used.
        StudyFailedError: the workers ended before the study.
        KeyboardInterrupt: a signal stopped it; its trials were given back, and `resume` goes on.
    """
    _not_while_loading("run")
    found = study if isinstance(study, Study) else Study.from_yaml(study)
    spec, folder = found.spec, found.folder
    database = Database(_storage(storage))
    trusted = (*trust, *own_trust(spec, folder))
    place = _workplace(
        database,
        tracking_uri,
        checkpoints,
        workers,
        device,
        slots,
        compiles,
        trusted,
        engine,
        ray_address,
        gpus_per_worker,
    )
    return _work(
        database, spec.name, place, lambda check: put_study(database, spec, folder, place.trust, check), progress
    )


def resume(
    name: str,
    *,
    storage: str | None = None,
    tracking_uri: str | None = None,
    checkpoints: str | None = None,
    workers: int | Literal["auto"] = "auto",
    device: str = "auto",
    slots: int | Literal["auto"] = "auto",
    compiles: Literal["auto", "on", "off"] = "auto",
    trust: Sequence[str] = (),
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    gpus_per_worker: float | None = None,
    progress: bool = True,
) -> StudyResult:
    """Go on with a study from what the database holds; arguments and errors are those of `run`.

    Args:
        name: the study's name.
        storage: URL of the database.
        tracking_uri: the MLflow that shows the runs, or `"none"`.
        checkpoints: folder or URL for the states of running trials, or `"none"`.
        workers: how many.
        device: `auto`, `cpu`, `cuda` or `cuda:0,1`.
        slots: trials that one worker trains at once.
        compiles: whether workers compile the training step; `auto`: once that repays.
        trust: packages and task files that workers may import: the study's task, if it is not built in.
        engine: workers are processes of this machine, or actors on a Ray cluster.
        ray_address: the cluster to join.
        gpus_per_worker: with Ray, the part of a GPU that each worker takes.
        progress: whether to print how far it is.
    """
    _not_while_loading("resume")
    database = options.open_database(_storage(storage))
    place = _workplace(
        database,
        tracking_uri,
        checkpoints,
        workers,
        device,
        slots,
        compiles,
        trust,
        engine,
        ray_address,
        gpus_per_worker,
    )
    study = join_study(database, name, place.trust)
    return _work(database, name, place, lambda _: study, progress)


def best(name: str, *, storage: str | None = None) -> list[BestSetting]:
    """The best setting of each optimizer so far, best first; empty before a trial has completed.

    Args:
        name: the study's name.
        storage: URL of the database; None as for `run`.

    Raises:
        StudyNotFoundError: there is no such study.
    """
    database = options.open_database(_storage(storage))
    try:
        return best_settings(database, find_study(database, name))
    finally:
        database.close()


def compare(name: str, *, storage: str | None = None) -> Comparison:
    """Which optimizer of a study is faster, how stable, how sure.

    Args:
        name: the study's name.
        storage: URL of the database; None as for `run`.

    Raises:
        StudyNotFoundError: there is no such study.
    """
    from momentum_tuner.comparison import compare_study

    database = options.open_database(_storage(storage))
    try:
        return compare_study(database, find_study(database, name))
    finally:
        database.close()


class QuietPage:
    """A `launcher.Page` that shows nothing; what workers say is logged."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def say(self, line: str) -> None:
        """Log a line."""
        logger.warning("%s", line)

    def update(self, study: StudyRecord, last: bool = False) -> None:
        """Show nothing."""


def _work(
    database: Database, name: str, place: Workplace, submit: Callable[[TaskCheck], StudyRecord], progress: bool
) -> StudyResult:
    page: Page = QuietPage()
    if progress:
        from momentum_tuner.cli.progress import ProgressPage

        page = ProgressPage(database, name)
    try:
        outcome: RunOutcome = run_study(database, name, place, submit, page)
        if outcome.progress.phase != "done":
            raise KeyboardInterrupt
        found = tuple(best_settings(database, outcome.study))
        return StudyResult(name, found, outcome.progress, outcome.published, database.text, outcome.study.spec)
    finally:
        database.close()


def _workplace(
    database: Database,
    tracking_uri: str | None,
    checkpoints: str | None,
    workers: int | str,
    device: str,
    slots: int | str,
    compiles: str,
    trust: Sequence[str],
    engine: str,
    ray_address: str | None,
    gpus_per_worker: float | None,
) -> Workplace:
    if engine not in ("local", "ray"):
        raise InputError(f"engine {engine!r}: write local or ray")
    uri = tracking_uri or os.environ.get(options.TRACKING_VARIABLE) or options.DEFAULT_TRACKING
    check_placing(str(workers), device, engine, ray_address, gpus_per_worker)
    url = checkpoints or os.environ.get(options.CHECKPOINTS_VARIABLE)
    return Workplace(
        tracking_uri=options.parse_tracking_uri(uri),
        checkpoints=options.parse_checkpoints(url, database),
        workers=str(workers),
        device=device,
        slots=options.parse_slots(str(slots)),
        compiles=options.parse_compiles(compiles),
        trust=options.parse_trust(trust),
        engine=engine,
        ray_address=ray_address,
        gpus_per_worker=gpus_per_worker,
    )


def _storage(storage: str | None) -> str:
    return storage or os.environ.get(options.STORAGE_VARIABLE) or options.DEFAULT_STORAGE


def _not_while_loading(name: str) -> None:
    """A script that defines a task is imported by whoever loads that, and must not start a run by it."""
    if is_loading():
        raise TaskError(f'{name}() is called as the file is imported: put it under `if __name__ == "__main__":`')
