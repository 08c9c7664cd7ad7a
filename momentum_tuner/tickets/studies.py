"""Studies in the database: created once, joined by whoever comes later, grown, finished, deleted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from momentum_tuner.database import Database, Study, Ticket, database_now
from momentum_tuner.errors import StudyChangedError, StudyNotFoundError
from momentum_tuner.spec import StudySpec, differences, spec_hash

Design = Callable[[str], Sequence[Mapping[str, Any]] | None]
"""For an optimizer: the Optuna parameters of its trials in order, set in advance, or None to ask the sampler."""


OTHER_DATA = "others"
"""In what is noted of a study's data: the digests of data that other workers found instead."""


@dataclass(frozen=True)
class StudyRecord:
    """A study as the database holds it."""

    id: int
    name: str
    spec: StudySpec
    folder: str | None
    phase: str
    created_at: float

    @property
    def checkpoint_folder(self) -> str:
        """Where below the root of checkpoints its trials' files lie."""
        return f"{self.name}-{self.id}"


def submit_study(database: Database, spec: StudySpec, folder: str | None, design: Design) -> StudyRecord:
    """Put a study and its tickets into the database, or join the one that is there.

    A budget of more trials, or a confirmation on more seeds, than the database holds opens the study again.

    Args:
        database: where to.
        spec: the study file.
        folder: where the study file lies, for a task file beside it.
        design: trials set in advance.

    Raises:
        StudyChangedError: a study of that name is there and differs in more than a larger budget.
    """
    points = {o: design(o) for o in _short_of_tickets(database, spec)}  # may take long: not while others wait
    with database.write() as session:
        session.execute(_insert_study(database, spec, folder))
        row = session.scalars(sa.select(Study).where(Study.name == spec.name).with_for_update()).one()
        held = StudySpec.from_canonical(row.spec)
        changed = differences(held, spec)
        if changed:
            raise StudyChangedError(
                f"study {spec.name!r} is in the database with other settings; give the changed study another name, "
                f"or `momentum-tuner delete {spec.name}`:\n" + "\n".join(f"  {line}" for line in changed)
            )
        more_seeds = spec.confirm.seeds > held.confirm.seeds
        if spec.budget.trials > held.budget.trials or more_seeds:
            row.spec, row.spec_hash = spec.canonical(), spec_hash(spec)
        added = _add_tickets(session, row, spec, lambda o: points[o] if o in points else design(o))
        if added or more_seeds:
            row.phase, row.finished_at, row.parent_published = "search", None, None
        return _record(row)


def find_study(database: Database, name: str) -> StudyRecord:
    """The study of that name.

    Raises:
        StudyNotFoundError: there is none; the message lists those there are.
    """
    with database.read() as session:
        row = session.scalars(sa.select(Study).where(Study.name == name)).one_or_none()
        if row is not None:
            return _record(row)
        names = session.scalars(sa.select(Study.name).order_by(Study.id.desc()).limit(10)).all()
    there = (
        f"it holds {', '.join(names)}" if names else "it holds none yet; start one with `momentum-tuner run STUDY.yaml`"
    )
    raise StudyNotFoundError(f"no study {name!r} in {database.shown}: {there}")


def list_studies(database: Database) -> list[StudyRecord]:
    """All studies, oldest first."""
    with database.read() as session:
        return [_record(row) for row in session.scalars(sa.select(Study).order_by(Study.id))]


def finish_study(database: Database, study_id: int) -> bool:
    """Move a study on to `done` if none of its tickets is left; whichever worker looks first does it.

    Returns:
        Whether it is done, or was deleted.
    """
    with database.write() as session:
        row = lock_study(session, study_id)
        if row is None or row.phase == "done":
            return True
        if tickets_left(session, study_id):
            return False
        row.phase = "done"
        row.finished_at = session.scalar(sa.select(database_now()))
        return True


def lock_study(session: Session, study_id: int) -> Study | None:
    """The study's row, locked until the transaction ends; None if it was deleted."""
    return session.scalars(sa.select(Study).where(Study.id == study_id).with_for_update()).one_or_none()


def tickets_left(session: Session, study_id: int) -> int:
    """How many tickets of a study are not done."""
    left = sa.select(sa.func.count()).select_from(Ticket).where(Ticket.study_id == study_id, Ticket.state != "done")
    return session.scalar(left) or 0


def note_data(database: Database, study_id: int, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Note what a study's trials learn from, and the digests of others' that are not the first; returns what is noted.

    Args:
        database: the study.
        study_id: which.
        data: as `tasks.describe_data` tells it.
    """
    with database.write() as session:
        row = lock_study(session, study_id)
        if row is None:
            return data
        if row.data is None:
            row.data = dict(data)
        known = [row.data["digest"], *row.data.get(OTHER_DATA, ())]
        if data["digest"] not in known:
            row.data = {**row.data, OTHER_DATA: [*known[1:], data["digest"]]}
        return row.data


def delete_study(database: Database, study_id: int) -> None:
    """Remove a study with its tickets and records (Optuna's studies and MLflow's runs are not ours to touch here)."""
    with database.write() as session:
        session.execute(sa.delete(Study).where(Study.id == study_id))


def _record(row: Study) -> StudyRecord:
    return StudyRecord(row.id, row.name, StudySpec.from_canonical(row.spec), row.folder, row.phase, row.created_at)


def _insert_study(database: Database, spec: StudySpec, folder: str | None) -> Any:
    from momentum_tuner.database import insert_new

    return insert_new(database.dialect, Study).values(
        name=spec.name,
        spec=spec.canonical(),
        spec_hash=spec_hash(spec),
        folder=folder,
        phase="search",
        created_at=database_now(),
    )


def search_kind(spec: StudySpec, optimizer: str) -> str:
    """The kind of the tickets that search a contestant's setting: `reference` for one that the file does not name."""
    return "search" if optimizer in spec.optimizers else "reference"


def _count_tickets(session: Session, spec: StudySpec, optimizer: str) -> int:
    counted = (
        sa.select(sa.func.count())
        .select_from(Ticket)
        .join(Study, Ticket.study_id == Study.id)
        .where(Study.name == spec.name, Ticket.optimizer == optimizer, Ticket.kind == search_kind(spec, optimizer))
    )
    return session.scalar(counted) or 0


def _short_of_tickets(database: Database, spec: StudySpec) -> list[str]:
    """The contestants that have fewer tickets than the budget."""
    with database.read() as session:
        return [o for o in spec.contestants if _count_tickets(session, spec, o) < spec.budget.trials]


def _add_tickets(session: Session, row: Study, spec: StudySpec, design: Design) -> int:
    """Add the tickets of the search that the budget has and the database has not; returns how many.

    The study's optimizers take turns; the reference comes last, in slots that they leave free.
    """
    added = 0
    for number, optimizer in enumerate(spec.contestants):
        kind = search_kind(spec, optimizer)
        positions = range(_count_tickets(session, spec, optimizer), spec.budget.trials)
        fixed = design(optimizer) if positions else None
        turns = len(spec.optimizers)
        session.add_all(
            Ticket(
                study_id=row.id,
                optimizer=optimizer,
                kind=kind,
                position=position,
                queue_order=position * turns + number if kind == "search" else spec.budget.trials * turns + position,
                seed=spec.seed,
                fixed=None if fixed is None else dict(fixed[position]),
            )
            for position in positions
        )
        added += len(positions)
    return added
