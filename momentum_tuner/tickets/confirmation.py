"""Confirmation: the best setting of each contestant is trained again, on seeds that the search has not seen."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from sqlalchemy.orm import Session

from momentum_tuner.database import Database, Study, Ticket
from momentum_tuner.space import params_of
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets.progress import BestSetting, best_of
from momentum_tuner.tickets.studies import lock_study, tickets_left


def confirmation_seeds(spec: StudySpec) -> list[int]:
    """The seeds on which every contestant is confirmed: distinct, none of them the search's.

    More of them leave the first ones as they are. Whoever has one of them in common has initial weights and data order
    in common: that is what pairs two contestants.
    """
    seeds: dict[int, None] = {}
    number = 0
    while len(seeds) < spec.confirm.seeds:
        digest = hashlib.sha256(f"{spec.seed}/confirm/{number}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        if seed != spec.seed:
            seeds[seed] = None
        number += 1
    return list(seeds)


def open_confirmation(database: Database, study_id: int) -> bool:
    """Add the confirmation's tickets that are missing once the search is complete; whether anything is left to do.

    Whichever worker looks first does it. After a search that was grown, a contestant whose best setting is another one
    than before is confirmed anew; the trials of its old setting stay.
    """
    with database.write() as session:
        row = lock_study(session, study_id)
        if row is None or row.phase == "done":
            return False
        if tickets_left(session, study_id):
            return True
        added = _missing(session, row)
        if added:
            session.add_all(added)
            row.phase = "confirm"
        return bool(added)


def is_confirmation_of(ticket: Ticket, best: BestSetting) -> bool:
    """Whether a ticket confirms this very setting."""
    return ticket.kind == "confirm" and ticket.optimizer == best.optimizer and ticket.settings == dict(best.settings)


def _missing(session: Session, row: Study) -> list[Ticket]:
    """Tickets of the best settings and seeds that have none yet, seed by seed."""
    spec = StudySpec.from_canonical(row.spec)
    seeds = confirmation_seeds(spec)
    if not seeds:
        return []
    winners = [best for optimizer in spec.contestants for best in best_of(session, row.id, spec, optimizer)[:1]]
    there = session.scalars(sa.select(Ticket).where(Ticket.study_id == row.id, Ticket.kind == "confirm")).all()
    confirmed = {
        best.optimizer: {ticket.seed for ticket in there if is_confirmation_of(ticket, best)} for best in winners
    }
    positions = {o: sum(ticket.optimizer == o for ticket in there) for o in spec.contestants}
    last = session.scalar(sa.select(sa.func.max(Ticket.queue_order)).where(Ticket.study_id == row.id)) or 0
    added: list[Ticket] = []
    for seed in seeds:
        for best in (b for b in winners if seed not in confirmed[b.optimizer]):
            added.append(
                Ticket(
                    study_id=row.id,
                    optimizer=best.optimizer,
                    kind="confirm",
                    position=positions[best.optimizer],
                    queue_order=last + 1 + len(added),
                    seed=seed,
                    fixed=params_of(spec, best.optimizer, best.settings),
                    settings=dict(best.settings),
                )
            )
            positions[best.optimizer] += 1
    return added
