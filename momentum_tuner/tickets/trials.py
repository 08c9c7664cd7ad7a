"""One trial as the database remembers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from momentum_tuner.database import Database, Study, Ticket, Worker
from momentum_tuner.errors import TrialNotFoundError
from momentum_tuner.spec import unknown
from momentum_tuner.tickets.studies import StudyRecord, search_kind


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        ticket_id: its ticket.
        optimizer: whose trial it is.
        kind: `search`, `reference` or `confirm`.
        number: in Optuna's study.
        seed: of its initial weights and data order.
        settings: all hyperparameters.
        outcome: what became of it, if it has ended.
        device: what it was trained on last.
        node: the machine that it was trained on last.
        environment: that machine, and the versions there.
        data: what the study's trials learned from, by digest.
        run_id: of its run in MLflow, once it is shown there.
    """

    ticket_id: int
    optimizer: str
    kind: str
    number: int
    seed: int
    settings: Mapping[str, Any]
    outcome: str | None
    device: str | None
    node: str | None
    environment: Mapping[str, Any] | None
    data: Mapping[str, Any] | None
    run_id: str | None


def find_trial(
    database: Database, study: StudyRecord, optimizer: str, number: int, confirmation: bool = False
) -> TrialRecord:
    """The trial of that number.

    Args:
        database: the tickets.
        study: whose.
        optimizer: one of its contestants.
        number: in Optuna's study.
        confirmation: whether it is one of the confirmation, whose numbers begin at 0 again.

    Raises:
        TrialNotFoundError: the study does not train that optimizer, or it has no trial of that number.
    """
    if optimizer not in study.spec.contestants:
        raise TrialNotFoundError(f"study {study.name!r}: {unknown(optimizer, study.spec.contestants)}")
    kind = "confirm" if confirmation else search_kind(study.spec, optimizer)
    asked = (
        Ticket.study_id == study.id,
        Ticket.optimizer == optimizer,
        Ticket.kind == kind,
        Ticket.trial_number.is_not(None),
        Ticket.settings.is_not(None),
    )
    with database.read() as session:
        row = session.scalars(sa.select(Ticket).where(*asked, Ticket.trial_number == number)).one_or_none()
        if row is None:
            last = session.scalar(sa.select(sa.func.max(Ticket.trial_number)).where(*asked))
            there = "it has none yet" if last is None else f"they are numbered 0 to {last}"
            which = "confirmation" if confirmation else "search"
            raise TrialNotFoundError(f"no trial {number} of {optimizer} in the {which} of {study.name!r}; {there}")
        worker = session.get(Worker, row.worker_id) if row.worker_id is not None else None
        return TrialRecord(
            ticket_id=row.id,
            optimizer=optimizer,
            kind=kind,
            number=number,
            seed=row.seed,
            settings=row.settings or {},
            outcome=row.outcome,
            device=worker.device if worker is not None else None,
            node=worker.node if worker is not None else None,
            environment=worker.environment if worker is not None else None,
            data=session.scalar(sa.select(Study.data).where(Study.id == study.id)),
            run_id=row.run_id,
        )
