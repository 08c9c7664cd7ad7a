"""A study's trials as one table, for a report, a CSV file or a Parquet file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from momentum_tuner.database import Database, Epoch, Ticket
from momentum_tuner.errors import redact
from momentum_tuner.report.files import check_ending, write_whole
from momentum_tuner.tickets import StudyRecord

TABLE_ENDINGS = (".csv", ".parquet")
"""What the name of a table's file can end in."""

KINDS = {"search": 0, "reference": 1, "confirm": 2}
"""Kinds of trials, in the order in which they are shown."""


@dataclass(frozen=True)
class TrialRow:
    """One trial, ended or not.

    Attributes:
        kind: `search`, `reference` or `confirm`.
        optimizer: whose trial.
        number: its number in Optuna's study of that optimizer and kind; None until it has begun.
        seed: fixes initial weights and data order.
        outcome: `complete`, `pruned`, `diverged` or `failed`; until then `open` or `running`.
        objective: the objective's value.
        second_objective: that of the second aim.
        settings: all hyperparameters.
        measures: final measures.
        epochs: how many it has trained.
        reason: why it failed, without secrets.
        worker: who trained it last.
        slot: in which slot.
        attempts: how often it was begun without getting further.
        started_at: seconds since 1970, of the first attempt.
        finished_at: seconds since 1970.
        ticket: its ticket.
    """

    kind: str
    optimizer: str
    number: int | None
    seed: int
    outcome: str
    objective: float | None
    second_objective: float | None
    settings: Mapping[str, Any]
    measures: Mapping[str, Any]
    epochs: int
    reason: str | None
    worker: str | None
    slot: int | None
    attempts: int
    started_at: float | None
    finished_at: float | None
    ticket: int


def read_trials(database: Database, study: StudyRecord) -> list[TrialRow]:
    """All trials of a study: the search by optimizer and number, then the reference's, then the confirmation."""
    reached = (
        sa.select(Epoch.ticket_id, sa.func.max(Epoch.epoch).label("epochs"))
        .join(Ticket, Ticket.id == Epoch.ticket_id)
        .where(Ticket.study_id == study.id)
        .group_by(Epoch.ticket_id)
        .subquery()
    )
    with database.read() as session:
        found = session.execute(
            sa.select(Ticket, reached.c.epochs)
            .outerjoin(reached, reached.c.ticket_id == Ticket.id)
            .where(Ticket.study_id == study.id)
            .order_by(Ticket.position, Ticket.id)
        ).all()
    place = {optimizer: number for number, optimizer in enumerate(study.spec.contestants)}
    rows = [_row(ticket, epochs or 0) for ticket, epochs in found]
    return sorted(rows, key=lambda r: (KINDS.get(r.kind, len(KINDS)), place.get(r.optimizer, len(place)), _order(r)))


def _order(row: TrialRow) -> tuple[bool, int]:
    return row.number is None, row.number or 0


def _row(ticket: Ticket, epochs: int) -> TrialRow:
    return TrialRow(
        kind=ticket.kind,
        optimizer=ticket.optimizer,
        number=ticket.trial_number,
        seed=ticket.seed,
        outcome=ticket.outcome if ticket.state == "done" and ticket.outcome else _running(ticket.state),
        objective=ticket.value,
        second_objective=ticket.second_value,
        settings=ticket.settings or {},
        measures=ticket.measures or {},
        epochs=epochs,
        reason=None if ticket.reason is None else redact(ticket.reason),
        worker=ticket.worker_id,
        slot=ticket.slot,
        attempts=ticket.attempts,
        started_at=ticket.started_at,
        finished_at=ticket.finished_at if ticket.state == "done" else None,
        ticket=ticket.id,
    )


def _running(state: str) -> str:
    return "open" if state == "open" else "running"


def trials_columns(rows: Sequence[TrialRow]) -> dict[str, list[Any]]:
    """The table by columns: who and what, hyperparameters, measures, and where and when it ran.

    A measure that has a hyperparameter's name is called `measured_<name>`. Times are in UTC.
    """
    settings = list(dict.fromkeys(name for row in rows for name in row.settings))
    measures = list(dict.fromkeys(name for row in rows for name in row.measures))
    columns: dict[str, list[Any]] = {
        "kind": [r.kind for r in rows],
        "optimizer": [r.optimizer for r in rows],
        "number": [r.number for r in rows],
        "seed": [r.seed for r in rows],
        "outcome": [r.outcome for r in rows],
        "objective": [r.objective for r in rows],
    }
    if any(r.second_objective is not None for r in rows):
        columns["second_objective"] = [r.second_objective for r in rows]
    columns |= {name: [_value(r.settings.get(name)) for r in rows] for name in settings}
    taken = {*columns, "epochs", "worker", "slot", "attempts", "started_at", "finished_at", "reason"}
    for name in measures:
        if name != "epochs":
            shown = f"measured_{name}" if name in taken else name
            columns[shown] = [_value(r.measures.get(name)) for r in rows]
    return columns | {
        "epochs": [r.epochs for r in rows],
        "worker": [r.worker for r in rows],
        "slot": [r.slot for r in rows],
        "attempts": [r.attempts for r in rows],
        "started_at": [_time(r.started_at) for r in rows],
        "finished_at": [_time(r.finished_at) for r in rows],
        "reason": [r.reason for r in rows],
    }


def _value(value: Any) -> Any:
    """Whole numbers of a hyperparameter as floats, so that a column is of one type."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def trials_csv(database: Database, study: StudyRecord) -> str:
    """The trials as CSV: one line for each, after a line of names; what is missing is empty."""
    columns = trials_columns(read_trials(database, study))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow([value.isoformat() if isinstance(value, datetime) else value for value in row])
    return text.getvalue()


def write_trials(database: Database, study: StudyRecord, path: Path) -> Path:
    """Write the trials to a file whose name ends in `.csv` or `.parquet`.

    Raises:
        InputError: it ends in something else, or cannot be written.
    """
    check_ending(path, TABLE_ENDINGS)
    if path.suffix.lower() == ".csv":
        return write_whole(path, trials_csv(database, study).encode())
    import pyarrow
    from pyarrow import parquet

    columns = trials_columns(read_trials(database, study))
    whole = pyarrow.int64()
    types = dict.fromkeys(("number", "seed", "epochs", "slot", "attempts"), whole)
    types |= dict.fromkeys(("started_at", "finished_at"), pyarrow.timestamp("us", tz="UTC"))
    types |= dict.fromkeys(("kind", "optimizer", "outcome", "worker", "reason"), pyarrow.string())
    types["diverged"] = pyarrow.bool_()
    table = pyarrow.table(
        {name: pyarrow.array(values, types.get(name, pyarrow.float64())) for name, values in columns.items()}
    )
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return write_whole(path, buffer.getvalue())
