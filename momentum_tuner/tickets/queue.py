"""The queue of tickets: claim, adopt, fence, record, finish. Each function is one transaction.

A ticket goes `open -> running -> finishing -> done`. Whoever writes to a ticket shows its worker and generation: the
fence. A worker that lost its ticket (another one adopted it) is told so and discards what it computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from momentum_tuner.database import Database, Epoch, Ticket, Worker, database_now, insert_new
from momentum_tuner.metrics import EpochRecord, finite
from momentum_tuner.worker_options import GRACE_SECONDS

_Selected = TypeVar("_Selected", bound="sa.Select[*tuple[Any, ...]]")


@dataclass(frozen=True)
class Claim:
    """A ticket that a worker holds.

    Attributes:
        ticket_id: the ticket.
        worker_id: who holds it.
        generation: how often it has been claimed; with the worker, the fence.
        optimizer: whose trial it is.
        kind: `search`, `reference` or `confirm`.
        seed: the trial's seed.
        fixed: Optuna parameters set in advance, or None.
        trial_id: Optuna's id of the trial, None until it is asked for.
        trial_number: its number in Optuna's study.
        settings: all hyperparameters, once asked for; those of a confirmation are known before.
        outcome: set if a worker died between the decision and telling Optuna: only that is left to do.
        value: the value to tell then.
        second_value: that of the second aim, if there is one.
        checkpoint: where the trial can be continued from.
        attempts: how many attempts, this one among them, have not brought the trial further.
    """

    ticket_id: int
    worker_id: str
    generation: int
    optimizer: str
    kind: str
    seed: int
    fixed: Mapping[str, Any] | None
    trial_id: int | None
    trial_number: int | None
    settings: Mapping[str, Any] | None
    outcome: str | None
    value: float | None
    second_value: float | None
    checkpoint: str | None
    attempts: int

    @property
    def place(self) -> str:
        """Where in Optuna its trial is: a contestant, or `<contestant>/confirm`."""
        return f"{self.optimizer}/confirm" if self.kind == "confirm" else self.optimizer


@dataclass(frozen=True)
class Result:
    """What became of a trial.

    Attributes:
        outcome: `complete`, `pruned`, `diverged` or `failed`.
        value: the objective's value, None for failed trials.
        measures: final measures for people to see.
        reason: why it failed.
        second_value: the value of the second aim, if there is one.
        traceback: where it failed, without secrets.
    """

    outcome: str
    value: float | None = None
    measures: Mapping[str, Any] | None = None
    reason: str | None = None
    second_value: float | None = None
    traceback: str | None = None


def claim(
    database: Database,
    study_id: int,
    worker_id: str,
    limit: int,
    *,
    max_attempts: int,
    grace_seconds: float = GRACE_SECONDS,
    adopt: bool = True,
    holding: Sequence[int] = (),
    with_last_attempt: bool = True,
) -> list[Claim]:
    """Claim up to `limit` tickets: open ones in their order, and those of workers that stopped answering.

    A ticket that has used up its attempts comes back with the outcome `failed`, to be told to Optuna. One on its last
    attempt may have killed the workers before, with all that trained beside it: of those, a worker takes one at a time.

    Args:
        database: the tickets.
        study_id: whose.
        worker_id: who claims.
        limit: most tickets to claim.
        max_attempts: after how many attempts without progress a ticket fails.
        grace_seconds: after how long a silent worker is given up.
        adopt: whether to take tickets of silent workers. Not after an outage of the database: all were silent then.
        holding: the tickets that the worker knows it holds: any other of its own was claimed by a call whose answer
            was lost.
        with_last_attempt: whether one ticket on its last attempt may be among them.
    """
    if limit <= 0:
        return []
    with database.write() as session:
        now = session.scalar(sa.select(database_now()))
        assert now is not None
        # Who claims is alive, even if its heartbeat has not come through for a while: nobody shall adopt these at once.
        session.execute(sa.update(Worker).where(Worker.id == worker_id).values(heartbeat=now, state="running"))
        free = sa.or_(
            _claimable(worker_id, now - grace_seconds if adopt else 0.0),
            sa.and_(
                Ticket.state.in_(("running", "finishing")),
                Ticket.worker_id == worker_id,
                Ticket.id.not_in(list(holding)),
            ),
        )
        on_last_attempt = sa.and_(
            Ticket.state != "finishing",
            Ticket.attempts == max_attempts - 1 if max_attempts > 1 else sa.false(),
        )
        wanted = (
            sa.select(Ticket)
            .where(Ticket.study_id == study_id, free)
            .order_by(Ticket.queue_order)
            .with_for_update(skip_locked=True)
        )
        rows: list[Ticket] = []
        if with_last_attempt:
            rows += session.scalars(wanted.where(on_last_attempt).limit(1))
        rows += session.scalars(wanted.where(~on_last_attempt).limit(limit - len(rows)))
        for row in rows:
            again = row.state == "running" and row.worker_id == worker_id  # by the call whose answer was lost
            if row.state != "finishing" and row.attempts >= max_attempts and not again:
                row.state, row.outcome = "finishing", "failed"
                row.reason = f"gave up after {row.attempts} attempts: each worker that trained it died"
            elif row.state != "finishing" and not again:
                row.state = "running"
                row.attempts += 1
            row.worker_id, row.slot = worker_id, None
            row.generation += 1
            row.started_at = row.started_at or now
        return [_claim(row, worker_id) for row in rows]


def studies_with_work(database: Database, study_ids: Sequence[int], worker_id: str, grace_seconds: float) -> set[int]:
    """Which of these studies have a ticket that the worker could claim now."""
    with database.read() as session:
        now = session.scalar(sa.select(database_now())) or 0.0
        free = _claimable(worker_id, now - grace_seconds)
        found = session.scalars(sa.select(Ticket.study_id).where(Ticket.study_id.in_(study_ids), free).distinct())
        return set(found)


def set_trials(database: Database, claims: Sequence[Claim], slots: Sequence[int]) -> list[Claim]:
    """Note the Optuna trial, settings and slot of claimed tickets; returns those that are still held."""
    with database.write() as session:
        held = _held_ids(session, claims, ("running",))
        kept = [(c, slot) for c, slot in zip(claims, slots, strict=True) if c.ticket_id in held]
        _update(
            session,
            [
                {
                    "id": c.ticket_id,
                    "trial_id": c.trial_id,
                    "trial_number": c.trial_number,
                    "settings": dict(c.settings or {}),
                    "slot": slot,
                }
                for c, slot in kept
            ],
        )
    return [c for c, _ in kept]


def record_epochs(database: Database, records: Iterable[tuple[Claim, EpochRecord]]) -> set[int]:
    """Write epoch rows in bulk; returns the ids of the tickets that are still held.

    Rows that are there already (a trial that repeats what came after its last checkpoint) stay as they are.
    """
    pairs = list(records)
    if not pairs:
        return set()
    with database.write() as session:
        held = _held_ids(session, [c for c, _ in pairs], ("running",))
        now = session.scalar(sa.select(database_now()))
        rows = [
            {**vars(record), "metrics": dict(record.metrics), "ticket_id": c.ticket_id, "recorded_at": now}
            for c, record in pairs
            if c.ticket_id in held
        ]
        if rows:  # by the table and not the mapped class, which takes twice as long
            session.execute(insert_new(database.dialect, Epoch.__table__), rows)
        return held


def begin_finish(database: Database, results: Sequence[tuple[Claim, Result]]) -> list[tuple[Claim, Result]]:
    """`running -> finishing` with the result, before Optuna is told; returns those whose ticket was still held.

    Doing it again (the answer to the first was lost) changes nothing.
    """
    with database.write() as session:
        held = _held_ids(session, [c for c, _ in results], ("running", "finishing"))
        kept = [(c, result) for c, result in results if c.ticket_id in held]
        _update(
            session,
            [
                {
                    "id": c.ticket_id,
                    "state": "finishing",
                    "outcome": result.outcome,
                    "value": finite(result.value),
                    "second_value": finite(result.second_value),
                    "reason": _storable(result.reason),
                    "traceback": _storable(result.traceback),
                    "measures": dict(result.measures) if result.measures is not None else None,
                }
                for c, result in kept
            ],
        )
        return kept


def end_finish(database: Database, claims: Sequence[Claim]) -> None:
    """`finishing -> done`, after Optuna was told."""
    with database.write() as session:
        now = session.scalar(sa.select(database_now()))
        held = _held_ids(session, claims, ("finishing",))
        _update(session, [{"id": i, "state": "done", "finished_at": now, "checkpoint": None} for i in sorted(held)])


def give_back(database: Database, claims: Sequence[Claim]) -> None:
    """Return running tickets to the queue at a drain; that is not an attempt that failed."""
    with database.write() as session:
        for row in _held(session, claims, ("running",)).values():
            row.state, row.worker_id, row.slot = "open", None, None
            row.attempts = max(0, row.attempts - 1)


def note_checkpoints(database: Database, notes: Sequence[tuple[Claim, str, bool]]) -> set[int]:
    """Write where trials can be continued from; returns the ids of the tickets that are still held.

    Args:
        database: the tickets.
        notes: for each claim the text that its ticket holds from now on, and whether its trial has come further than
            the attempts before: then they do not count any more.
    """
    with database.write() as session:
        held = _held(session, [c for c, _, _ in notes], ("running",))
        for noted, text, further in notes:
            if noted.ticket_id in held:
                row = held[noted.ticket_id]
                row.checkpoint = text
                if further:
                    row.attempts = 1
        return set(held)


def noted_checkpoints(database: Database, study_id: int) -> list[str]:
    """What the tickets of a study that are not done hold of checkpoints."""
    with database.read() as session:
        found = session.scalars(
            sa.select(Ticket.checkpoint).where(
                Ticket.study_id == study_id, Ticket.state != "done", Ticket.checkpoint.is_not(None)
            )
        )
        return [text for text in found if text is not None]


def read_epochs(database: Database, ticket_ids: Sequence[int]) -> dict[int, list[EpochRecord]]:
    """The recorded epochs of trials, in order, by ticket."""
    found: dict[int, list[EpochRecord]] = {ticket_id: [] for ticket_id in ticket_ids}
    with database.read() as session:
        rows = session.scalars(sa.select(Epoch).where(Epoch.ticket_id.in_(list(ticket_ids))).order_by(Epoch.epoch))
        for row in rows:
            found[row.ticket_id].append(epoch_record(row))
    return found


def noted_trials(database: Database, study_id: int) -> dict[int, tuple[int | None, bool]]:
    """For each ticket of a study the Optuna trial that is noted on it, and whether it is done."""
    with database.read() as session:
        rows = session.execute(sa.select(Ticket.id, Ticket.trial_id, Ticket.state).where(Ticket.study_id == study_id))
        return {ticket_id: (trial_id, state == "done") for ticket_id, trial_id, state in rows}


def open_tickets_per_worker(database: Database, study_id: int) -> float:
    """A study's open tickets, divided by the workers that serve it."""
    with database.read() as session:
        tickets = sa.select(sa.func.count()).where(Ticket.study_id == study_id, Ticket.state == "open")
        workers = sa.select(sa.func.count()).where(Worker.study_id == study_id, Worker.state != "stopped")
        return (session.scalar(tickets) or 0) / max(1, session.scalar(workers) or 0)


def epoch_record(row: Epoch | sa.Row[Any]) -> EpochRecord:
    """A row of the table as the record it was made from."""
    return EpochRecord(**{name: getattr(row, name) for name in EpochRecord.__dataclass_fields__})


def _storable(text: str | None) -> str | None:
    """A text without null characters, which PostgreSQL refuses."""
    return None if text is None else text.replace("\0", "")


def _claimable(worker_id: str, silent_since: float) -> sa.ColumnElement[bool]:
    """Open tickets, and those held by others that have stopped or were last heard of before that time."""
    alive = sa.select(Worker.id).where(Worker.state != "stopped", Worker.heartbeat >= silent_since)
    return sa.or_(
        Ticket.state == "open",
        sa.and_(
            Ticket.state.in_(("running", "finishing")),
            Ticket.worker_id != worker_id,
            Ticket.worker_id.not_in(alive),
        ),
    )


def _held(session: Session, claims: Sequence[Claim], states: Sequence[str]) -> dict[int, Ticket]:
    """The fence: rows of these claims that are in one of the states under the same worker and generation."""
    generation = {c.ticket_id: c.generation for c in claims}
    rows = session.scalars(_fenced(sa.select(Ticket), claims, states)) if claims else ()
    return {row.id: row for row in rows if row.generation == generation[row.id]}


def _held_ids(session: Session, claims: Sequence[Claim], states: Sequence[str]) -> set[int]:
    """The ids of those rows, which are locked as well."""
    generation = {c.ticket_id: c.generation for c in claims}
    rows = session.execute(_fenced(sa.select(Ticket.id, Ticket.generation), claims, states)) if claims else ()
    return {ticket_id for ticket_id, found in rows if found == generation[ticket_id]}


def _update(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write to tickets by their `id` without loading them, which would take most of the time."""
    if rows:
        session.execute(sa.update(Ticket), rows)


def _fenced(what: _Selected, claims: Sequence[Claim], states: Sequence[str]) -> _Selected:
    """What is selected, of rows that these claims' workers have in one of the states."""
    return (
        what.where(
            Ticket.id.in_([c.ticket_id for c in claims]),
            Ticket.worker_id.in_({c.worker_id for c in claims}),
            Ticket.state.in_(states),
        )
        .order_by(Ticket.id)  # two who lock several rows in one order cannot wait for each other
        .with_for_update()
    )


def _claim(row: Ticket, worker_id: str) -> Claim:
    return Claim(
        ticket_id=row.id,
        worker_id=worker_id,
        generation=row.generation,
        optimizer=row.optimizer,
        kind=row.kind,
        seed=row.seed,
        fixed=row.fixed,
        trial_id=row.trial_id,
        trial_number=row.trial_number,
        settings=row.settings,
        outcome=row.outcome if row.state == "finishing" else None,
        value=row.value,
        second_value=row.second_value,
        checkpoint=row.checkpoint,
        attempts=row.attempts,
    )


def with_trial(held: Claim, trial_id: int, number: int, settings: Mapping[str, Any]) -> Claim:
    """The claim once its Optuna trial is known."""
    return replace(held, trial_id=trial_id, trial_number=number, settings=settings)
