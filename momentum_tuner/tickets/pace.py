"""How fast a study goes."""

from __future__ import annotations

import sqlalchemy as sa

from momentum_tuner.database import Database, Ticket, Worker, database_now

WINDOW_SECONDS = 60.0


def recent_rate(database: Database, study_id: int) -> float:
    """Trials of a study that end per second: over the last minute, or since the first worker now at work came.

    All by the database's clock, so that everybody who looks sees the same.
    """
    with database.read() as session:
        now = session.scalar(sa.select(database_now())) or 0.0
        came = session.scalar(
            sa.select(sa.func.min(Worker.started_at)).where(Worker.study_id == study_id, Worker.state != "stopped")
        )
        seconds = WINDOW_SECONDS if came is None else min(WINDOW_SECONDS, max(1.0, now - came))
        ended = session.scalar(
            sa.select(sa.func.count())
            .select_from(Ticket)
            .where(Ticket.study_id == study_id, Ticket.state == "done", Ticket.finished_at > now - seconds)
        )
    return (ended or 0) / seconds
