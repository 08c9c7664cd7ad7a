"""From a study file, or a name, to a study in the database: checked in full before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from momentum_tuner.database import Database, migrate, prepare_migration
from momentum_tuner.errors import StudyNotFoundError
from momentum_tuner.spec import StudySpec, load_study
from momentum_tuner.tasks import check_trust, trust_of
from momentum_tuner.tickets import StudyRecord, find_study, submit_study

if TYPE_CHECKING:
    from momentum_tuner.tasks import Loop, Task

TaskCheck: TypeAlias = Callable[[StudySpec, Path, Sequence[str]], object]
"""As `load_checked_task`, but what it returns is of no use."""


def read_study(study_file: Path) -> tuple[StudySpec, Path, tuple[str, ...]]:
    """A study file, its folder, and what its user trusts by naming it: its own task, if it is not built in."""
    spec = load_study(study_file)
    folder = study_file.absolute().parent
    return spec, folder, own_trust(spec, folder)


def own_trust(spec: StudySpec, folder: Path) -> tuple[str, ...]:
    """What the user who names a study trusts by that: the task of that study, if it is not built in."""
    mine = trust_of(spec.task.factory, folder)
    return () if mine is None else (mine,)


def put_study(
    database: Database, spec: StudySpec, folder: Path, trusted: Sequence[str], check: TaskCheck | None = None
) -> StudyRecord:
    """Put a study into the database, or join the one there.

    A new one's task is loaded and checked before the database is touched.

    Args:
        database: where to.
        spec: the study.
        folder: where its task file lies, if it has one.
        trusted: what may be imported.
        check: what loads and checks the task; None: this process.
    """
    from momentum_tuner.search import check_optuna, design

    if known_study(database, spec.name) is None:
        prepare_migration()  # whoever checks the task is not there at once
        (check or load_checked_task)(spec, folder, trusted)
    migrate(database)
    check_optuna(database)
    return submit_study(database, spec, str(folder), lambda optimizer: design(spec, optimizer))


def join_study(database: Database, name: str, trusted: Sequence[str]) -> StudyRecord:
    """A study that the database holds, with everything that is needed to go on with it.

    Raises:
        StudyNotFoundError: there is none of that name.
        TaskError: its task is not trusted, and it is not done.
        StorageError: Optuna's tables are of another version.
    """
    from momentum_tuner.search import check_optuna

    study = find_study(database, name)
    if study.phase != "done":
        check_trust(study.spec.task.factory, Path(study.folder) if study.folder else None, trusted)
        check_optuna(database)
    return study


def known_study(database: Database, name: str) -> StudyRecord | None:
    """The study of that name, if the database exists and holds it."""
    if not database.exists():
        return None
    migrate(database)
    try:
        return find_study(database, name)
    except StudyNotFoundError:
        return None


def load_checked_task(spec: StudySpec, folder: Path | None, trusted: Sequence[str]) -> Task | Loop:
    """A study's task, once it has shown that it can be trained and measures what the search aims at.

    Raises:
        TaskError: it cannot be loaded, or trained.
    """
    from momentum_tuner.tasks import load_usable_task

    metrics = [aim.metric for aim in spec.objective.aims]
    return load_usable_task(spec.task.factory, spec.task.params, metrics, base=folder, trusted=trusted)
