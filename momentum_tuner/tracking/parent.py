"""The parent run of a study in MLflow: what the study file says, curves over its trials, and in the end its result.

All of it follows from the database, so that a parent can be deleted and made anew at any time; that is what happens
where its params would have to change, as of a study that has grown.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.orm import Session

from momentum_tuner.database import Database, Load, Study, Ticket, database_now
from momentum_tuner.errors import StorageError, describe_failure, redact
from momentum_tuner.spec import spec_hash
from momentum_tuner.tickets import BestSetting, StudyRecord, best_settings, search_kind
from momentum_tuner.tracking.lease import Lease, LeaseLostError
from momentum_tuner.tracking.runs import CHAMPION_TAG, DESCRIPTION_TAG, Point, Run
from momentum_tuner.tracking.store import PARENT, RunStore, is_refusal
from momentum_tuner.tracking.studies import (
    FILES_TAG,
    SPEC_TAG,
    EndedTrial,
    StudyCurves,
    beginning,
    best_params,
    load_points,
    study_params,
)

if TYPE_CHECKING:
    from momentum_tuner.report import Publication

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 10.0
"""How long ago a trial must have ended to be on the curves of a study that goes on.

PostgreSQL may show a trial that ended earlier later than one that ended after it, and the order on a curve is for good.
"""
FLUSH_LOADS = 500


class RunsChangedError(Exception):
    """MLflow has not the runs that it had; what is there has to be learned again."""


class ParentRun:
    """The parent run of one study.

    Args:
        database: where the study is.
        study: the study.
        store: its runs in MLflow.
        lease: of the publisher.
    """

    def __init__(self, database: Database, study: StudyRecord, store: RunStore, lease: Lease) -> None:
        self._database = database
        self._study = study
        self._store = store
        self._lease = lease
        self._curves = StudyCurves(study.spec)
        self._said = False

    def show(self) -> None:
        """Find or make the run, with what the study file says."""
        spec = self._study.spec
        params = study_params(spec)
        self._lease.keep()
        parent = self._store.runs.get(PARENT)
        if parent is not None and _conflict(parent, params):
            self._store.delete(PARENT)
            parent = None
        if parent is None:
            parent = self._store.create(PARENT, self._study.name, self._study.created_at, {})
        with self._lease.renewed():
            self._store.link(parent)
        digest = spec_hash(spec)
        self._store.show(parent, params=params)
        if parent.tags.get(SPEC_TAG) != digest and self._show_files(parent, {"study.yaml": redact(spec.to_yaml())}):
            self._store.show(parent, tags={SPEC_TAG: digest})
        with self._database.write() as session:
            row = self._lease.held(session)
            done = row.phase == "done"
            if row.parent_run_id != parent.id:
                row.parent_trials = 0
                session.execute(sa.update(Load).where(Load.study_id == row.id).values(published=False))
            shown = parent.status == "FINISHED" and parent.tags.get(FILES_TAG) == digest
            if not done or not shown or row.parent_run_id != parent.id:
                row.parent_published = None
            row.experiment_id, row.parent_run_id = self._store.experiment_id, parent.id
        if not done:
            self._store.set_status(parent, "RUNNING")
            self._store.mark(CHAMPION_TAG, ())

    def show_progress(self) -> None:
        """Bring its curves up to date: of the trials that have ended, and of the load of the workers.

        Raises:
            RunsChangedError: somebody has deleted the run.
        """
        more = True
        while more:
            with self._database.read() as session:
                row = session.get(Study, self._study.id)
                if row is None:
                    raise LeaseLostError
                points = self._new_points(session, row)
                loads = session.scalars(
                    sa.select(Load)
                    .where(Load.study_id == row.id, Load.published.is_(False))
                    .order_by(Load.sampled_at, Load.worker_id)
                    .limit(FLUSH_LOADS)
                ).all()
            more = len(loads) == FLUSH_LOADS
            points += load_points(loads, self._study.created_at)
            tags = {} if row.phase == "done" else {DESCRIPTION_TAG: beginning(self._study.name, row.phase)}
            parent = self._parent()
            if not points and not loads and tags.items() <= parent.tags.items():
                return
            self._lease.keep()
            try:
                self._store.show(parent, points, tags=tags)
            except Exception as error:
                if not is_refusal(error):
                    raise
                raise RunsChangedError from error
            with self._database.write() as session:
                held = self._lease.held(session)
                held.parent_trials = max(held.parent_trials, self._curves.trials)
                for load in loads:
                    session.execute(
                        sa.update(Load)
                        .where(Load.worker_id == load.worker_id, Load.sampled_at == load.sampled_at)
                        .values(published=True)
                    )

    def _new_points(self, session: Session, row: Study) -> list[Point]:
        """Points of the curves over trials that have ended and whose order is sure, as far as MLflow has not got them.

        All trials are read once, and then those that have ended since.
        """
        if self._curves.trials != row.parent_trials:  # it is another run, or was not noted as the last points were
            self._curves = StudyCurves(self._study.spec)
        curves = self._curves
        sure = [Ticket.study_id == row.id, Ticket.state == "done", Ticket.trial_number.is_not(None)]
        if row.phase != "done":
            sure.append(Ticket.finished_at < database_now() - SETTLE_SECONDS)
        place = (Ticket.finished_at, Ticket.id)
        if curves.last is not None:
            sure.append(sa.tuple_(*place) > sa.tuple_(curves.last.finished_at, curves.last.ticket))
        columns = (Ticket.id, Ticket.kind, Ticket.outcome, Ticket.value, Ticket.measures, Ticket.started_at)
        points: list[Point] = []
        for ticket, kind, outcome, value, measures, started_at, finished_at in session.execute(
            sa.select(*columns, Ticket.finished_at).where(*sure).order_by(*place)
        ):
            trial = EndedTrial(
                ticket=ticket,
                kind=kind,
                outcome=outcome or "failed",
                value=value,
                best_valid_loss=(measures or {}).get("best_valid_loss"),
                started_at=started_at or finished_at or 0.0,
                finished_at=finished_at or 0.0,
            )
            found = curves.add(trial)
            if curves.trials > row.parent_trials:
                points += found
        return points

    def show_result(self, row: Study) -> None:
        """Show the result of a study that is done and whose curves are whole, and end the run.

        Raises:
            RunsChangedError: MLflow has not what it was shown.
        """
        parent = self._parent()
        self._check_curves(parent)
        best = best_settings(self._database, self._study)
        params = best_params(best)
        if _conflict(parent, params):
            self._store.delete(PARENT)
            raise RunsChangedError
        tags: dict[str, str] = {}
        with self._lease.renewed():
            made = self._result()
            if made is not None:
                tags = {**made.verdicts, DESCRIPTION_TAG: made.description}
                if self._show_files(parent, made.files):
                    tags[FILES_TAG] = spec_hash(self._study.spec)
            self._store.mark(CHAMPION_TAG, self._champions(best))
        self._store.show(parent, params=params, tags=tags)
        self._store.end(parent, "FINISHED", row.finished_at or 0.0)
        with self._database.write() as session:
            self._lease.held(session).parent_published = "done"

    def _parent(self) -> Run:
        parent = self._store.runs.get(PARENT)
        if parent is None:
            raise RunsChangedError
        return parent

    def _check_curves(self, parent: Run) -> None:
        """Delete a run whose curves are not those of the trials in the order in which they ended."""
        with self._database.read() as session:
            times = session.scalars(
                sa.select(Ticket.finished_at)
                .where(Ticket.study_id == self._study.id, Ticket.state == "done", Ticket.trial_number.is_not(None))
                .order_by(Ticket.finished_at, Ticket.id)
            ).all()
        expected = [(step, int((time or 0.0) * 1000)) for step, time in enumerate(times, 1)]
        if self._store.curve(parent, "trials") != expected:
            self._store.delete(PARENT)
            raise RunsChangedError

    def _result(self) -> Publication | None:
        """The result for people; None if that cannot be made, which is no reason to keep the runs from MLflow."""
        from momentum_tuner.report import publication

        try:
            return publication(self._database, self._study)
        except StorageError:
            raise
        except Exception:
            logger.warning("the report of %s could not be made for MLflow", self._study.name, exc_info=True)
            return None

    def _show_files(self, parent: Run, files: Mapping[str, str]) -> bool:
        """Add files; returns whether MLflow has taken them: it may keep them where this machine cannot write.

        That is said once: runs are shown without their files, and nobody else would tell.
        """
        for name, text in files.items():
            self._lease.keep()
            try:
                self._store.show_file(parent, text, name)
            except Exception as error:
                if not self._said:
                    self._said = True
                    reason = describe_failure(error)
                    logger.warning(
                        "MLflow cannot keep %s, so %s has no files there: %s", name, self._study.name, reason
                    )
                return False
        return True

    def _champions(self, best: Sequence[BestSetting]) -> set[str]:
        """The keys of the runs of the best search trial of each optimizer."""
        first = {b.optimizer: b for b in reversed(best)}
        with self._database.read() as session:
            found = [
                session.scalar(
                    sa.select(Ticket.id).where(
                        Ticket.study_id == self._study.id,
                        Ticket.optimizer == optimizer,
                        Ticket.kind == search_kind(self._study.spec, optimizer),
                        Ticket.trial_number == b.trial,
                    )
                )
                for optimizer, b in first.items()
            ]
        return {str(ticket_id) for ticket_id in found}


def _conflict(run: Run, params: Mapping[str, str]) -> bool:
    """Whether a run has other params than these: they never change."""
    return any(run.params.get(name, value) != value for name, value in params.items())
