"""The publisher: database -> MLflow, exactly once.

MLflow is a view. What it was shown is noted on each ticket (`published_epoch`, `published_outcome`), and only then
counts as shown; whatever is shown again after a crash is the same to the bit (a run is found again by its ticket's
tag, a point has the time at which it was recorded), so that nothing appears twice.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from momentum_tuner.database import Database, Epoch, Study, Ticket, database_now
from momentum_tuner.errors import redact
from momentum_tuner.tickets import StudyRecord, epoch_record
from momentum_tuner.tracking.lease import Lease, LeaseLostError
from momentum_tuner.tracking.parent import ParentRun, RunsChangedError
from momentum_tuner.tracking.runs import (
    PARENT_TAG,
    STATUS,
    TrialRun,
    epoch_points,
    final_points,
    run_name,
    trial_params,
    trial_tags,
)
from momentum_tuner.tracking.shown import count_unshown
from momentum_tuner.tracking.store import PARENT, RunStore, is_refusal
from momentum_tuner.tracking.studies import data_input

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

logger = logging.getLogger(__name__)

FLUSH_TICKETS = 32
FLUSH_POINTS = 50_000
MOST_CHANGES = 3
LIVE_SECONDS = 5.0
"""How often the curves of trials that still run are brought up to date, if that is quick."""
LIVE_SHARE = 0.1
"""The largest share of its time that the publisher spends on them."""


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Attributes:
        trials: how many were brought up to date.
        complete: whether the study is done and all of it is shown.
        busy: whether another publisher holds the lease, so that nothing was done.
        refused: how many trials MLflow does not take.
    """

    trials: int = 0
    complete: bool = False
    busy: bool = False
    refused: int = 0


class Publisher:
    """Brings MLflow up to date with one study. One publisher at a time works on a study: it holds a lease.

    Args:
        database: what is to be shown.
        study: the study.
        tracking_uri: where MLflow is.
        name: who holds the lease, unique.

    Raises:
        TrackingError: the tracking URI cannot be used.
    """

    def __init__(self, database: Database, study: StudyRecord, tracking_uri: str, name: str) -> None:
        self.database = database
        self.study = study
        self.name = name
        self._lease = Lease(database, study.id, name)
        self._store = RunStore(tracking_uri, study.name, f"{study.name}:{study.created_at:.3f}")
        self._parent = ParentRun(database, study, self._store, self._lease)
        self._data: DatasetInput | None = None
        self._learned = False
        self._live_due = 0.0
        self._doubted: set[int] = set()
        self._refused: set[int] = set()

    def publish(self) -> PassResult:
        """One pass: the parent run, trials that have ended, curves of those that run."""
        changes = shown = 0
        while True:
            try:
                self._lease.take()
                if not self._learned:
                    self._learn()
                    self._parent.show()
                self._show_data()
                for tickets in self._batches():
                    shown += self._publish_tickets(tickets)
                return PassResult(shown, self._publish_result(), refused=len(self._refused))
            except LeaseLostError:
                self._learned = False  # who holds the lease now makes runs that are not known here
                return PassResult(busy=True)
            except RunsChangedError:
                self._learned = False
                changes += 1
                if changes > MOST_CHANGES + len(self._doubted):  # somebody takes away what is shown, again and again
                    return PassResult(refused=len(self._refused))

    def show_waiting(self) -> None:
        """Show the parent and the trials that were given back as scheduled: nobody works on them now."""
        with self.database.read() as session:
            row = session.get(Study, self.study.id)
            waiting = session.scalars(
                sa.select(Ticket.id).where(Ticket.study_id == self.study.id, Ticket.state == "open")
            ).all()
        if row is None or row.phase == "done" or row.publisher != self.name or not self._learned:
            return
        for key in (*map(str, waiting), PARENT):
            if key in self._store.runs:
                self._store.set_status(self._store.runs[key], "SCHEDULED")

    def close(self) -> None:
        """Give the lease back."""
        self._lease.give_back()

    # What MLflow has

    def _learn(self) -> bool:
        """Learn which runs MLflow has; returns whether it has all it was shown: what it lost is to be shown anew."""
        with self.database.read() as session:
            noted = session.execute(
                sa.select(Ticket.id, Ticket.run_id).where(Ticket.study_id == self.study.id, Ticket.run_id.is_not(None))
            )
            keep = {str(ticket_id): run_id or "" for ticket_id, run_id in noted}
            parent_id = session.scalar(sa.select(Study.parent_run_id).where(Study.id == self.study.id))
        self._store.learn(keep | {PARENT: parent_id or ""})
        whole = True
        with self.database.write() as session:
            study = self._lease.held(session)
            shown = session.scalars(
                sa.select(Ticket)
                .where(Ticket.study_id == self.study.id, Ticket.run_id.is_not(None))
                .order_by(Ticket.id)
            )
            for row in shown:
                run = self._store.runs.get(str(row.id))
                ended = None if row.published_outcome is None else STATUS[row.published_outcome]
                if run is None or run.id != row.run_id or ended not in (None, run.status):
                    row.run_id, row.published_epoch, row.published_outcome = None, -1, None
                    whole = False
            if not whole:
                study.parent_published = None  # the result marks runs that are made anew
        self._learned = True
        return whole

    def _show_data(self) -> None:
        """Learn what the trials learn from, which the first worker finds out, and say so on the parent."""
        if self._data is None:
            with self.database.read() as session:
                data = session.scalar(sa.select(Study.data).where(Study.id == self.study.id))
            self._data = None if data is None else data_input(data)
        if self._data is not None and PARENT in self._store.runs:
            self._store.show_data(self._store.runs[PARENT], self._data)

    # Trials

    def _batches(self) -> Iterator[Sequence[Ticket]]:
        """Tickets with something to show: ended ones first, then running ones if their curves are due."""
        while ended := self._ended():
            yield ended
            if len(ended) < FLUSH_TICKETS:  # whatever has ended since can wait
                break
        start = time.monotonic()
        if start < self._live_due:
            return
        running = self._running()
        for first in range(0, len(running), FLUSH_TICKETS):
            yield running[first : first + FLUSH_TICKETS]
        end = time.monotonic()
        self._live_due = end + max(LIVE_SECONDS, (end - start) / LIVE_SHARE)

    def _ended(self) -> Sequence[Ticket]:
        with self.database.read() as session:
            return session.scalars(
                self._tickets()
                .where(Ticket.state == "done", Ticket.published_outcome.is_(None))
                .order_by(Ticket.finished_at, Ticket.id)
                .limit(FLUSH_TICKETS)
            ).all()

    def _running(self) -> Sequence[Ticket]:
        news = sa.exists().where(Epoch.ticket_id == Ticket.id, Epoch.epoch > Ticket.published_epoch)
        with self.database.read() as session:
            return session.scalars(
                self._tickets()
                .where(Ticket.state == "running", Ticket.started_at < database_now() - LIVE_SECONDS, news)
                .order_by(Ticket.id)
            ).all()

    def _tickets(self) -> sa.Select[Ticket]:
        return sa.select(Ticket).where(
            Ticket.study_id == self.study.id,
            Ticket.trial_number.is_not(None),
            Ticket.id.not_in(self._refused),
        )

    def _publish_tickets(self, tickets: Sequence[Ticket]) -> int:
        """Show some tickets and note it; returns how many."""
        curves = self._curves(tickets)
        trials = {t.id: self._trial_run(t, curves[t.id]) for t in tickets}
        shown: list[Ticket] = []
        try:
            for some in _portions(tickets, trials):
                self._lease.keep()
                if self._store.show_together([trials[t.id] for t in some], self._data):
                    shown += some
                else:
                    for ticket in some:
                        if self._show_one(ticket, trials[ticket.id]):
                            shown.append(ticket)
        finally:
            if shown:
                notes = [self._note(ticket, curves[ticket.id]) for ticket in sorted(shown, key=lambda t: t.id)]
                with self.database.write() as session:
                    self._lease.held(session)
                    session.execute(sa.update(Ticket), notes)
        return len(shown)

    def _show_one(self, ticket: Ticket, trial: TrialRun) -> bool:
        """Show one trial; returns whether MLflow takes it."""
        try:
            self._lease.keep()
            run = self._store.runs.get(trial.key)
            if run is None:
                run = self._store.create(trial.key, trial.name, trial.start, trial.tags)
            self._lease.keep()
            self._store.show(run, trial.points, trial.params, trial.tags)
            if self._data is not None:
                self._store.show_data(run, self._data)
            self._lease.keep()
            if trial.end is None:
                self._store.set_status(run, trial.status)
            else:
                self._store.end(run, trial.status, trial.end)
        except Exception as error:
            if not is_refusal(error):
                raise
            self._doubt(ticket, error)
            return False
        return True

    def _doubt(self, ticket: Ticket, error: Exception) -> None:
        """A run that somebody has deleted is made again; a trial that MLflow does not take is left out."""
        if ticket.id not in self._doubted:
            self._doubted.add(ticket.id)
            raise RunsChangedError from error
        self._refused.add(ticket.id)
        logger.warning(
            "MLflow does not take trial %s %s: %s", ticket.optimizer, ticket.trial_number, short_reason(error)
        )

    def _curves(self, tickets: Sequence[Ticket]) -> dict[int, list[sa.Row[Any]]]:
        """The epochs of these tickets that were not shown yet, in order."""
        curves: dict[int, list[sa.Row[Any]]] = defaultdict(list)
        with self.database.read() as session:
            for row in session.execute(  # rows and not objects, which take several times as long
                sa.select(*Epoch.__table__.columns)
                .join(Ticket, Ticket.id == Epoch.ticket_id)
                .where(Ticket.id.in_([t.id for t in tickets]), Epoch.epoch > Ticket.published_epoch)
                .order_by(Epoch.ticket_id, Epoch.epoch)
            ):
                curves[row.ticket_id].append(row)
        return curves

    def _trial_run(self, ticket: Ticket, curve: Sequence[sa.Row[Any]]) -> TrialRun:
        """A trial as it is now."""
        points = epoch_points([(epoch_record(row), row.recorded_at) for row in curve])
        done = ticket.state == "done"
        return TrialRun(
            key=str(ticket.id),
            name=run_name(ticket.optimizer, ticket.trial_number or 0, ticket.settings or {}, ticket.kind),
            start=ticket.started_at or 0.0,
            params=trial_params(ticket),
            tags=trial_tags(ticket) | {PARENT_TAG: self._store.runs[PARENT].id},
            points=points + final_points(ticket) if done else points,
            status=STATUS[ticket.outcome or "failed"] if done else "RUNNING",
            end=ticket.finished_at or 0.0 if done else None,
        )

    def _note(self, ticket: Ticket, curve: Sequence[sa.Row[Any]]) -> dict[str, Any]:
        """What to note of a trial that was shown."""
        return {
            "id": ticket.id,
            "run_id": self._store.runs[str(ticket.id)].id,
            "published_epoch": curve[-1].epoch if curve else ticket.published_epoch,
            "published_outcome": ticket.outcome if ticket.state == "done" else None,
        }

    # The result

    def _publish_result(self) -> bool:
        """Show the study's curves, and its result; True once it is done and all is shown."""
        self._parent.show_progress()
        with self.database.read() as session:
            row = session.get(Study, self.study.id)
            if row is None:
                raise LeaseLostError
            if row.phase != "done":
                return False
            unshown = count_unshown(session, self.study.id)
        if unshown:
            return False
        if row.parent_published == "done":
            return True
        if not self._learn():  # once more at the end: nothing is missing, nothing is there twice
            raise RunsChangedError
        self._parent.show_result(row)
        return True


def _portions(tickets: Sequence[Ticket], trials: Mapping[int, TrialRun]) -> Iterator[list[Ticket]]:
    """The same tickets, with no more points at a time than are shown well within the time of a lease."""
    some: list[Ticket] = []
    points = 0
    for ticket in tickets:
        more = len(trials[ticket.id].points)
        if some and points + more > FLUSH_POINTS:
            yield some
            some, points = [], 0
        some.append(ticket)
        points += more
    if some:
        yield some


def short_reason(error: BaseException) -> str:
    """The first line of an error, without secrets."""
    text = str(error).strip().splitlines()
    return redact(text[0] if text else type(error).__name__)[:200]
