"""MLflow's own tables, where this process reaches them: many runs are read or written in one transaction.

MLflow's client takes four calls for a trial, each with several transactions and an object for each value, which is ten
times what the rows themselves cost. What is written here is what the client would have written, to the row; tests
compare the two. An MLflow whose tables are others is asked through its client, and so is a server.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from momentum_tuner.tracking.runs import Point, Run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.orm import Session

COLUMNS: Mapping[str, str] = {
    "runs": "run_uuid name source_type source_name entry_point_name user_id status start_time end_time deleted_time "
    "source_version lifecycle_stage artifact_uri experiment_id",
    "tags": "key value run_uuid",
    "params": "key value run_uuid",
    "metrics": "key value timestamp step is_nan run_uuid",
    "latest_metrics": "key value timestamp step is_nan run_uuid",
    "datasets": "dataset_uuid experiment_id name digest dataset_source_type dataset_source dataset_schema "
    "dataset_profile",
    "inputs": "input_uuid source_type source_id destination_type destination_id step",
    "input_tags": "input_uuid name value",
}
"""The tables that are written to, as MLflow 3.17 has them; a release that has others is asked through its client."""
DIALECTS = ("sqlite", "postgresql")
_CACHE_KIBIBYTES = 128 * 1024
"""At most; SQLite takes what it needs of it, and by itself 2 MiB."""


@dataclass(frozen=True)
class RunChange:
    """What is to be written of one run.

    Attributes:
        id: MLflow's id of the run.
        new: whether the run is to be made.
        name: of a new run.
        start: of a new run, in milliseconds since 1970.
        status: its status from now on; None if that is not to change.
        end: when it ended, likewise; None if it has not, or that is not to change.
        params: those that MLflow has not got.
        tags: those that MLflow has not got, or has otherwise.
        points: of its metrics; those that MLflow has already stay single.
        data: whether to say what it learns from.
    """

    id: str
    new: bool
    name: str
    start: int
    status: str | None
    end: int | None
    params: Mapping[str, str]
    tags: Mapping[str, str]
    points: Sequence[Point]
    data: bool


class UnusualError(Exception):
    """MLflow may refuse this, or its tables are not as they were left: its client is to say what is wrong."""


def open_tables(client: MlflowClient) -> RunTables | None:
    """The tables behind a client; None where they are out of reach or not known."""
    from mlflow.store.tracking.dbmodels.models import Base
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = client._tracking_client.store
    tables = Base.metadata.tables
    known = all(name in tables and set(tables[name].columns.keys()) == set(c.split()) for name, c in COLUMNS.items())
    if not known or type(store) is not SqlAlchemyStore or store.engine.dialect.name not in DIALECTS:
        return None
    return RunTables(store)


class RunTables:
    """The tables of MLflow that hold runs.

    Args:
        store: MLflow's own store, whose sessions are used.
    """

    def __init__(self, store: SqlAlchemyStore) -> None:
        from mlflow.store.tracking.dbmodels import models

        self._session = store.ManagedSessionMaker
        self._experiments: sa.Table = models.SqlExperiment.__table__
        self._runs: sa.Table = models.SqlRun.__table__
        self._tags: sa.Table = models.SqlTag.__table__
        self._params: sa.Table = models.SqlParam.__table__
        self._metrics: sa.Table = models.SqlMetric.__table__
        self._latest: sa.Table = models.SqlLatestMetric.__table__
        self._datasets: sa.Table = models.SqlDataset.__table__
        self._inputs: sa.Table = models.SqlInput.__table__
        self._input_tags: sa.Table = models.SqlInputTag.__table__
        if store.engine.dialect.name == "sqlite":
            from sqlalchemy.dialects.sqlite import insert

            if not sa.event.contains(store.engine, "connect", _keep_pages):
                sa.event.listen(store.engine, "connect", _keep_pages)
                store.engine.dispose()  # connections that do not know it yet
        else:
            from sqlalchemy.dialects.postgresql import insert  # type: ignore[assignment]
        self._add_metric = insert(self._metrics).on_conflict_do_nothing()
        tag, latest = insert(self._tags), insert(self._latest)
        self._set_tag = tag.on_conflict_do_update(
            index_elements=["key", "run_uuid"], set_={"value": tag.excluded.value}
        )
        age, values = ("step", "timestamp", "value"), ("step", "timestamp", "value", "is_nan")
        self._set_latest = latest.on_conflict_do_update(
            index_elements=["key", "run_uuid"],
            set_={name: latest.excluded[name] for name in values},
            where=sa.tuple_(*(latest.excluded[n] for n in age)) > sa.tuple_(*(self._latest.c[n] for n in age)),
        )

    def find(self, experiment_id: str, tag: str, value: str) -> list[Run]:
        """The runs of an experiment that have a tag and were not deleted, the newest first."""
        runs, tags = self._runs.c, self._tags.c
        ours = (
            sa.select(runs.run_uuid)
            .join(self._tags, tags.run_uuid == runs.run_uuid)
            .where(runs.experiment_id == int(experiment_id), runs.lifecycle_stage == "active")
            .where(tags.key == tag, tags.value == value)
        )
        order = (runs.start_time.desc(), runs.run_uuid)
        with self._session() as session:
            rows = session.execute(
                sa.select(runs.run_uuid, runs.status).where(runs.run_uuid.in_(ours)).order_by(*order)
            )
            found = {run_id: Run(run_id, status) for run_id, status in rows}
            for table in (self._params, self._tags):
                columns = (table.c.run_uuid, table.c.key, table.c.value)
                for run_id, key, text in session.execute(sa.select(*columns).where(table.c.run_uuid.in_(ours))):
                    run = found.get(run_id)
                    if run is not None:
                        (run.params if table is self._params else run.tags)[key] = text
            inputs = self._inputs.c
            for run_id in session.scalars(
                sa.select(inputs.destination_id).where(
                    inputs.source_type == "DATASET",
                    inputs.destination_type == "RUN",
                    inputs.destination_id.in_(ours),
                )
            ):
                if run_id in found:
                    found[run_id].has_data = True
        return list(found.values())

    def write(self, experiment_id: str, changes: Sequence[RunChange], data: DatasetInput | None) -> None:
        """Write all of this or none of it.

        Args:
            experiment_id: where new runs belong.
            changes: one for each run.
            data: what runs learn from.

        Raises:
            UnusualError: nothing is written, as MLflow may not take it.
            MlflowException: the database did not answer.
        """
        from mlflow.exceptions import MlflowException

        rows = _Rows.of(changes)
        try:
            with self._session(read_only=False) as session:
                self._check_runs(session, [c.id for c in changes if not c.new])
                self._write_runs(session, experiment_id, changes)
                for statement, values in (
                    (self._set_tag, rows.tags),
                    (sa.insert(self._params), rows.params),
                    (self._add_metric, rows.metrics),
                    (self._set_latest, rows.latest),
                ):
                    if values:
                        session.connection().execute(statement, values)
                if data is not None:
                    self._write_inputs(session, experiment_id, [c.id for c in changes if c.data], data)
        except MlflowException as error:
            if isinstance(error.__cause__, sa.exc.IntegrityError | sa.exc.DataError | UnusualError):
                raise UnusualError from error
            raise

    def _check_runs(self, session: Session, ids: Sequence[str]) -> None:
        """Make sure that nobody has deleted one of these runs."""
        active = (self._runs.c.run_uuid.in_(ids), self._runs.c.lifecycle_stage == "active")
        if ids and session.scalar(sa.select(sa.func.count()).select_from(self._runs).where(*active)) != len(ids):
            raise UnusualError

    def _write_runs(self, session: Session, experiment_id: str, changes: Sequence[RunChange]) -> None:
        from mlflow.utils.uri import append_to_uri_path

        new = [c for c in changes if c.new]
        if new:
            place = session.scalar(
                sa.select(self._experiments.c.artifact_location).where(
                    self._experiments.c.experiment_id == int(experiment_id),
                    self._experiments.c.lifecycle_stage == "active",
                )
            )
            if place is None:
                raise UnusualError
            rows = [
                {
                    "run_uuid": c.id,
                    "name": c.name,
                    "source_type": "UNKNOWN",
                    "source_name": "",
                    "entry_point_name": "",
                    "user_id": "unknown",
                    "status": c.status,
                    "start_time": c.start,
                    "end_time": c.end,
                    "deleted_time": None,
                    "source_version": "",
                    "lifecycle_stage": "active",
                    "artifact_uri": append_to_uri_path(place, c.id, "artifacts"),
                    "experiment_id": int(experiment_id),
                }
                for c in new
            ]
            session.connection().execute(sa.insert(self._runs), rows)
        for c in changes:
            values = {"status": c.status, "end_time": c.end}
            values = {name: value for name, value in values.items() if value is not None}
            if not c.new and values:
                session.connection().execute(sa.update(self._runs).where(self._runs.c.run_uuid == c.id).values(values))

    def _write_inputs(self, session: Session, experiment_id: str, ids: Sequence[str], data: DatasetInput) -> None:
        dataset, sets, inputs = data.dataset, self._datasets.c, self._inputs.c
        place = {"experiment_id": int(experiment_id), "name": dataset.name, "digest": dataset.digest}
        known = session.scalar(sa.select(sets.dataset_uuid).where(*(sets[k] == v for k, v in place.items())))
        if known is None:
            known = uuid.uuid4().hex
            more = {
                "dataset_uuid": known,
                "dataset_source_type": dataset.source_type,
                "dataset_source": dataset.source,
                "dataset_schema": dataset.schema,
                "dataset_profile": dataset.profile,
            }
            session.connection().execute(sa.insert(self._datasets), [{**place, **more}])
        edge = {"source_type": "DATASET", "source_id": known, "destination_type": "RUN"}
        have = set(
            session.scalars(
                sa.select(inputs.destination_id).where(
                    *(inputs[k] == v for k, v in edge.items()), inputs.destination_id.in_(ids)
                )
            )
        )
        made = {run_id: uuid.uuid4().hex for run_id in ids if run_id not in have}
        if made:
            edges = [{**edge, "input_uuid": key, "destination_id": run_id} for run_id, key in made.items()]
            tags = [{"input_uuid": key, "name": t.key, "value": t.value} for key in made.values() for t in data.tags]
            session.connection().execute(sa.insert(self._inputs), edges)
            session.connection().execute(sa.insert(self._input_tags), tags)


def _keep_pages(connection: Any, _: Any) -> None:
    """Give a connection memory for the pages of a large study, whose rows come to lie all over its indexes."""
    connection.execute(f"PRAGMA cache_size = {-_CACHE_KIBIBYTES}").close()


@dataclass(frozen=True)
class _Rows:
    """Rows of tables, of many runs."""

    tags: list[dict[str, Any]]
    params: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    latest: list[dict[str, Any]]

    @classmethod
    def of(cls, changes: Sequence[RunChange]) -> _Rows:
        """The rows of these runs.

        Raises:
            UnusualError: MLflow has rules that some of this breaks.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.utils.validation import _validate_metric, _validate_param, _validate_tag

        rows = cls([], [], [], [])
        names: set[str] = set()
        try:
            for c in changes:
                own = {"mlflow.runName": c.name} if c.new else {}
                for key, value in {**c.tags, **own}.items():
                    tag = _validate_tag(key, value)
                    rows.tags.append({"run_uuid": c.id, "key": tag.key, "value": tag.value})
                for key, value in c.params.items():
                    param = _validate_param(key, value)
                    rows.params.append({"run_uuid": c.id, "key": param.key, "value": param.value})
                latest: dict[str, Point] = {}
                for p in c.points:
                    if p.key not in names or p.timestamp < 0:
                        _validate_metric(p.key, p.value, p.timestamp, p.step)
                        names.add(p.key)
                    last = latest.get(p.key)
                    if last is None or (p.step, p.timestamp, p.value) > (last.step, last.timestamp, last.value):
                        latest[p.key] = p
                rows.metrics.extend(_metric(c.id, p) for p in c.points)
                rows.latest.extend(_metric(c.id, p) for p in latest.values())
        except MlflowException as error:
            raise UnusualError from error
        return rows


def _metric(run_id: str, point: Point) -> dict[str, Any]:
    """A row of either table of metrics; a point is never NaN or infinite."""
    return {
        "run_uuid": run_id,
        "key": point.key,
        "value": point.value,
        "timestamp": point.timestamp,
        "step": point.step,
        "is_nan": False,
    }
