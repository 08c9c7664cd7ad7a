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

    A budget of more trials than the database holds adds tickets and opens the study again.

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
        if spec.budget.trials > held.budget.trials:
            row.spec, row.spec_hash = spec.canonical(), spec_hash(spec)
        grown = _add_tickets(session, row, spec, lambda o: points[o] if o in points else design(o))
        if grown:
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
    """Move a study on to `done` if none of its tickets is left; whichever worker looks first does it."""
    with database.write() as session:
        row = session.scalars(sa.select(Study).where(Study.id == study_id).with_for_update()).one_or_none()
        if row is None or row.phase == "done":
            return row is not None
        left = session.scalar(
            sa.select(sa.func.count()).select_from(Ticket).where(Ticket.study_id == study_id, Ticket.state != "done")
        )
        if left:
            return False
        row.phase = "done"
        row.finished_at = session.scalar(sa.select(database_now()))
        return True


def note_data(database: Database, study_id: int, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Note what a study's trials learn from, unless it is noted; returns what is noted."""
    with database.write() as session:
        row = session.scalars(sa.select(Study).where(Study.id == study_id).with_for_update()).one_or_none()
        if row is None:
            return data
        if row.data is None:
            row.data = dict(data)
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


def _count_tickets(session: Session, study: str, optimizer: str) -> int:
    counted = (
        sa.select(sa.func.count())
        .select_from(Ticket)
        .join(Study, Ticket.study_id == Study.id)
        .where(Study.name == study, Ticket.optimizer == optimizer, Ticket.kind == "search")
    )
    return session.scalar(counted) or 0


def _short_of_tickets(database: Database, spec: StudySpec) -> list[str]:
    """The optimizers that have fewer tickets than the budget."""
    with database.read() as session:
        return [o for o in spec.optimizers if _count_tickets(session, spec.name, o) < spec.budget.trials]


def _add_tickets(session: Session, row: Study, spec: StudySpec, design: Design) -> int:
    """Add the search tickets that the budget has and the database has not; returns how many."""
    added = 0
    for number, optimizer in enumerate(spec.optimizers):
        positions = range(_count_tickets(session, spec.name, optimizer), spec.budget.trials)
        fixed = design(optimizer) if positions else None
        session.add_all(
            Ticket(
                study_id=row.id,
                optimizer=optimizer,
                kind="search",
                position=position,
                queue_order=position * len(spec.optimizers) + number,
                seed=spec.seed,
                fixed=None if fixed is None else dict(fixed[position]),
            )
            for position in positions
        )
        added += len(positions)
    return added
