"""The publisher: database -> MLflow, exactly once.

MLflow is a view. What it was shown is noted on each ticket (`published_epoch`, `published_outcome`), and only then
counts as shown; whatever is shown again after a crash is the same to the bit (a run is found again by its ticket's
tag, a point has the time at which it was recorded), so that nothing appears twice.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from momentum_tuner.database import Database, Epoch, Study, Ticket, database_now
from momentum_tuner.errors import TrackingError, redact
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import (
    StudyRecord,
    best_settings,
    epoch_record,
    find_study,
    list_studies,
    study_progress,
)
from momentum_tuner.tracking.runs import (
    PARENT_TAG,
    STATUS,
    STUDY_TAG,
    TICKET_TAG,
    Point,
    epoch_points,
    final_points,
    run_name,
    study_params,
    trial_params,
    trial_tags,
)

logger = logging.getLogger(__name__)

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
LEASE_SECONDS = 30.0
FLUSH_TICKETS = 32
LIVE_SECONDS = 5.0
"""How often the curve of a trial that still runs is brought up to date."""
_POINTS_PER_CALL = 1000  # MLflow's limit for log_batch


def check_tracking_uri(uri: str) -> str:
    """A tracking URI that MLflow 3 can use, unchanged.

    Raises:
        TrackingError: it has no scheme or one that MLflow has given up.
    """
    scheme = uri.split(":", 1)[0] if ":" in uri else ""
    if scheme in {"sqlite", "postgresql", "mysql", "http", "https", "databricks"} or "+" in scheme:
        return uri
    raise TrackingError(
        f"--tracking-uri {redact(uri)!r} is not supported; write sqlite:///mlflow.db or http://host:5000 "
        "(MLflow 3 has no file store)"
    )


def quiet_mlflow() -> None:
    """Settings of MLflow for this process, where the user has made none: no telemetry, no long silent retries."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Attributes:
        trials: how many were brought up to date.
        complete: whether the study is done and all of it is shown.
        busy: whether another publisher holds the lease, so that nothing was done.
    """

    trials: int = 0
    complete: bool = False
    busy: bool = False


class Publisher:
    """Brings MLflow up to date with one study. One publisher at a time works on a study: it holds a lease.

    Args:
        database: what is to be shown.
        study: the study.
        tracking_uri: where MLflow is.
        name: who holds the lease, unique.
    """

    def __init__(self, database: Database, study: StudyRecord, tracking_uri: str, name: str) -> None:
        quiet_mlflow()
        from mlflow import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        self.database = database
        self.study = study
        self.name = name
        self._client = MlflowClient(tracking_uri=check_tracking_uri(tracking_uri))
        self._identity = f"{study.name}:{study.created_at:.3f}"
        self._experiment_id: str | None = None
        self._parent_id: str | None = None
        self._runs: dict[str, str] = {}  # ticket -> run, as far as MLflow had them when the lease was taken
        self._live: dict[int, float] = {}  # ticket -> when its curve was last shown

    def publish(self) -> PassResult:
        """One pass: the parent run, trials that have ended, curves of those that run."""
        if not self._take_lease():
            return PassResult(busy=True)
        if self._parent_id is None:
            self._open_experiment()
        shown = 0
        while tickets := self._pending():
            for ticket in tickets:
                self._publish_ticket(ticket)
            shown += len(tickets)
            self._take_lease()
        return PassResult(shown, self._publish_parent())

    def close(self) -> None:
        """Give the lease back; a study that is not done is shown as waiting, not as running."""
        with self.database.write() as session:
            session.execute(
                sa.update(Study)
                .where(Study.id == self.study.id, Study.publisher == self.name)
                .values(publisher=None, publisher_until=None)
            )

    def show_waiting(self) -> None:
        """Show the parent and the trials that were given back as scheduled: nobody works on them now."""
        with self.database.read() as session:
            phase = session.scalar(sa.select(Study.phase).where(Study.id == self.study.id))
            waiting = session.scalars(
                sa.select(Ticket.run_id).where(
                    Ticket.study_id == self.study.id, Ticket.state == "open", Ticket.run_id.is_not(None)
                )
            ).all()
        if phase != "done" and self._parent_id is not None:
            for run_id in (*waiting, self._parent_id):
                self._client.update_run(run_id, status="SCHEDULED")

    def _take_lease(self) -> bool:
        with self.database.write() as session:
            taken = session.execute(
                sa.update(Study)
                .where(
                    Study.id == self.study.id,
                    sa.or_(
                        Study.publisher.is_(None),
                        Study.publisher == self.name,
                        Study.publisher_until < database_now(),
                    ),
                )
                .values(publisher=self.name, publisher_until=database_now() + LEASE_SECONDS)
            )
            return bool(taken.rowcount)  # type: ignore[attr-defined]

    def _open_experiment(self) -> None:
        """Find or make the experiment and the parent run, and learn which runs are there already."""
        from mlflow.entities import LifecycleStage

        experiment = self._client.get_experiment_by_name(self.study.name)
        if experiment is None:
            experiment_id = self._client.create_experiment(self.study.name)
        else:
            experiment_id = experiment.experiment_id
            if experiment.lifecycle_stage == LifecycleStage.DELETED:
                self._client.restore_experiment(experiment_id)
        self._experiment_id = experiment_id
        self._runs = {}
        parent = None
        for run in self._search(experiment_id):
            if PARENT_TAG not in run.data.tags:
                parent = parent or run.info.run_id
            elif TICKET_TAG in run.data.tags:
                self._runs[run.data.tags[TICKET_TAG]] = run.info.run_id
        if parent is None:
            parent = self._create_parent(experiment_id)
        else:
            self._client.update_run(parent, status="RUNNING")
        self._parent_id = parent
        with self.database.write() as session:
            row = session.get_one(Study, self.study.id)
            row.experiment_id, row.parent_run_id, row.parent_published = experiment_id, parent, None
            self._forget_what_is_gone(session, experiment_id)

    def _search(self, experiment_id: str) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self._client.search_runs(
                [experiment_id], f"tags.`{STUDY_TAG}` = '{self._identity}'", max_results=1000, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found

    def _create_parent(self, experiment_id: str) -> str:
        from mlflow.entities import Param

        spec: StudySpec = self.study.spec
        run = self._client.create_run(
            experiment_id,
            start_time=int(self.study.created_at * 1000),
            tags={STUDY_TAG: self._identity},
            run_name=self.study.name,
        )
        self._client.log_batch(run.info.run_id, params=[Param(k, v) for k, v in study_params(spec).items()])
        self._client.log_text(run.info.run_id, spec.to_yaml(), "study.yaml")
        run_id: str = run.info.run_id
        return run_id

    def _forget_what_is_gone(self, session: Any, experiment_id: str) -> None:
        """Runs that MLflow no longer has (its database was deleted) are to be shown anew, from the start."""
        known = set(self._runs.values())
        rows = session.scalars(sa.select(Ticket).where(Ticket.study_id == self.study.id, Ticket.run_id.is_not(None)))
        for row in rows:
            if row.run_id not in known:
                row.run_id, row.published_epoch, row.published_outcome = None, -1, None

    def _pending(self) -> list[Ticket]:
        """Tickets with something to show: ended ones first, then running ones whose curve is due."""
        with self.database.read() as session:
            ended = session.scalars(
                sa.select(Ticket)
                .where(
                    Ticket.study_id == self.study.id,
                    Ticket.state == "done",
                    Ticket.trial_number.is_not(None),
                    Ticket.published_outcome.is_(None),
                )
                .order_by(Ticket.finished_at, Ticket.id)
                .limit(FLUSH_TICKETS)
            ).all()
            if ended:
                return list(ended)
            now = session.scalar(sa.select(database_now())) or 0.0
            running = session.scalars(
                sa.select(Ticket).where(
                    Ticket.study_id == self.study.id,
                    Ticket.state == "running",
                    Ticket.trial_number.is_not(None),
                    Ticket.started_at < now - LIVE_SECONDS,
                )
            ).all()
        due = time.monotonic() - LIVE_SECONDS
        return [t for t in running if self._live.get(t.id, 0.0) < due][:FLUSH_TICKETS]

    def _publish_ticket(self, ticket: Ticket) -> None:
        with self.database.read() as session:
            rows = session.scalars(
                sa.select(Epoch)
                .where(Epoch.ticket_id == ticket.id, Epoch.epoch > ticket.published_epoch)
                .order_by(Epoch.epoch)
            ).all()
        run_id = ticket.run_id or self._runs.get(str(ticket.id)) or self._create_run(ticket)
        done = ticket.state == "done"
        points = epoch_points([(epoch_record(row), row.recorded_at) for row in rows])
        if done:
            points += final_points(ticket)
        self._log(run_id, points, trial_params(ticket), trial_tags(ticket))
        if done:
            end = int((ticket.finished_at or 0.0) * 1000)
            self._client.set_terminated(run_id, STATUS[ticket.outcome or "failed"], end)
            self._live.pop(ticket.id, None)
        else:
            self._live[ticket.id] = time.monotonic()
        with self.database.write() as session:
            session.execute(
                sa.update(Ticket)
                .where(Ticket.id == ticket.id)
                .values(
                    run_id=run_id,
                    published_epoch=rows[-1].epoch if rows else ticket.published_epoch,
                    published_outcome=ticket.outcome if done else None,
                )
            )

    def _create_run(self, ticket: Ticket) -> str:
        run = self._client.create_run(
            self._experiment_id,
            start_time=int((ticket.started_at or 0.0) * 1000),
            tags={
                STUDY_TAG: self._identity,
                TICKET_TAG: str(ticket.id),
                PARENT_TAG: self._parent_id,
            },
            run_name=run_name(ticket.optimizer, ticket.trial_number or 0, ticket.settings or {}),
        )
        run_id: str = run.info.run_id
        self._runs[str(ticket.id)] = run_id
        return run_id

    def _log(self, run_id: str, points: Sequence[Point], params: dict[str, str], tags: dict[str, str]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(p.key, p.value, p.timestamp, p.step) for p in points]
        self._client.log_batch(
            run_id,
            metrics=metrics[: _POINTS_PER_CALL - 100],
            params=[Param(k, v) for k, v in params.items()],
            tags=[RunTag(k, v) for k, v in tags.items()],
        )
        for start in range(_POINTS_PER_CALL - 100, len(metrics), _POINTS_PER_CALL):
            self._client.log_batch(run_id, metrics=metrics[start : start + _POINTS_PER_CALL])

    def _publish_parent(self) -> bool:
        """Show the study's counts and best values; True once it is done and all is shown."""
        from mlflow.entities import Metric, Param

        progress = study_progress(self.database, self.study)
        with self.database.read() as session:
            row = session.get_one(Study, self.study.id)
            unshown = session.scalar(
                sa.select(sa.func.count())
                .select_from(Ticket)
                .where(
                    Ticket.study_id == self.study.id,
                    Ticket.trial_number.is_not(None),
                    Ticket.published_outcome.is_(None),
                )
            )
        if row.phase != "done" or unshown:
            return False
        if row.parent_published == "done":
            return True
        assert self._parent_id is not None
        finished = int((row.finished_at or 0.0) * 1000)
        counts = {
            name: sum(getattr(o, name) for o in progress.optimizers)
            for name in ("complete", "pruned", "diverged", "failed")
        }
        metrics = [Metric(name, float(value), finished, 0) for name, value in counts.items()]
        best = best_settings(self.database, self.study)
        if best:
            metrics.append(Metric("objective", best[0].objective, finished, 0))
        params = [Param("best_optimizer", best[0].optimizer)] if best else []
        params += [
            Param(f"best_{b.optimizer}_{name}", f"{value:.8g}") for b in best for name, value in b.settings.items()
        ]
        self._client.log_batch(self._parent_id, metrics=metrics, params=params)
        self._client.set_terminated(self._parent_id, "FINISHED", finished)
        with self.database.write() as session:
            session.execute(sa.update(Study).where(Study.id == self.study.id).values(parent_published="done"))
        return True


class PublisherLoop:
    """Publishes several studies again and again, each by its own `Publisher`.

    MLflow that does not answer is tried again with growing pauses; training knows nothing of it.

    Args:
        database: what is to be shown.
        studies: names, or empty for every study of the database.
        tracking_uri: where MLflow is.
        name: who holds the leases, unique.
    """

    def __init__(self, database: Database, studies: Sequence[str], tracking_uri: str, name: str) -> None:
        self.database = database
        self.studies = tuple(studies)
        self.tracking_uri = check_tracking_uri(tracking_uri)
        self.name = name
        self._publishers: dict[int, Publisher] = {}
        self._whole: set[int] = set()
        self._warned = False

    def run(self, finishing: Callable[[], bool], every: float = 1.0) -> bool:
        """Publish until `finishing()`, then once more.

        Returns:
            Whether MLflow shows all finished trials of these studies.
        """
        pause = every
        while True:
            last = finishing()
            try:
                self._pass()
                pause = every
                if last:
                    self._leave()
                    return True
            except TrackingError:
                raise
            except Exception as error:
                if not self._warned:
                    logger.warning("MLflow does not answer (%s); training goes on", short_reason(error))
                    self._warned = True
                self._publishers.clear()
                pause = min(pause * 2, 30.0)
                if last:
                    return False
            deadline = time.monotonic() + pause
            while time.monotonic() < deadline and not finishing():
                time.sleep(0.1)

    def _pass(self) -> None:
        names = self.studies
        studies = [find_study(self.database, name) for name in names] if names else list_studies(self.database)
        for study in studies:
            if study.id in self._whole and study.phase == "done":
                continue
            publisher = self._publishers.get(study.id)
            if publisher is None:
                publisher = Publisher(self.database, study, self.tracking_uri, self.name)
                self._publishers[study.id] = publisher
            if publisher.publish().complete:
                self._whole.add(study.id)
            else:
                self._whole.discard(study.id)

    def _leave(self) -> None:
        for publisher in self._publishers.values():
            publisher.show_waiting()
            publisher.close()


def short_reason(error: BaseException) -> str:
    """The first line of an error, without secrets."""
    text = str(error).strip().splitlines()
    return redact(text[0] if text else type(error).__name__)[:200]
