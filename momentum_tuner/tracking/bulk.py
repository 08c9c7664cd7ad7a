"""Whole runs written to MLflow's own tables, many in one transaction, where MLflow is a database.

By MLflow's client a run takes some thirty statements in five transactions, 20 to 60 ms. A server is spoken to by the
client only, as is a database whose tables are not those that this was written for.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from momentum_tuner.tracking.runs import Point

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput
    from sqlalchemy.orm import Session

_COLUMNS: Mapping[str, set[str]] = {
    "runs": {
        *("run_uuid", "name", "source_type", "source_name", "entry_point_name", "user_id", "status", "start_time"),
        *("end_time", "deleted_time", "source_version", "lifecycle_stage", "artifact_uri", "experiment_id"),
    },
    "tags": {"key", "value", "run_uuid"},
    "params": {"key", "value", "run_uuid"},
    "metrics": {"key", "value", "timestamp", "step", "is_nan", "run_uuid"},
    "latest_metrics": {"key", "value", "timestamp", "step", "is_nan", "run_uuid"},
    "datasets": {
        *("dataset_uuid", "experiment_id", "name", "digest", "dataset_source_type", "dataset_source"),
        *("dataset_schema", "dataset_profile"),
    },
    "inputs": {"input_uuid", "source_type", "source_id", "destination_type", "destination_id", "step"},
    "input_tags": {"input_uuid", "name", "value"},
}


@dataclass(frozen=True)
class EndedRun:
    """A run that has ended, with all that it has.

    Attributes:
        name: shown in MLflow.
        status: `FINISHED`, `KILLED` or `FAILED`.
        start: in milliseconds since 1970.
        end: in milliseconds since 1970.
        params: its params.
        tags: its tags.
        points: its metrics.
    """

    name: str
    status: str
    start: int
    end: int
    params: Mapping[str, str]
    tags: Mapping[str, str]
    points: Sequence[Point]


class BulkRuns:
    """Adds whole runs to the database that a client uses.

    Args:
        store: of the client.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    @classmethod
    def of(cls, client: MlflowClient) -> BulkRuns | None:
        """For the database of a client; None if it uses a server, or tables that are not known here."""
        from mlflow.store.tracking.dbmodels.models import Base
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        store = client._tracking_client.store
        tables = Base.metadata.tables
        known = all(name in tables and set(tables[name].columns.keys()) == c for name, c in _COLUMNS.items())
        return cls(store) if known and type(store) is SqlAlchemyStore else None

    def add(self, experiment_id: str, runs: Sequence[EndedRun], data: DatasetInput | None) -> list[str]:
        """Add runs in one transaction; returns their ids, in order.

        Args:
            experiment_id: where to.
            runs: what; MLflow takes all of it (`takes`).
            data: what each of them learned from.
        """
        from mlflow.entities import LifecycleStage
        from mlflow.store.tracking.dbmodels.models import Base

        place = self._store.get_experiment(experiment_id).artifact_location
        ids = [uuid.uuid4().hex for _ in runs]
        experiment = int(experiment_id)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in _COLUMNS}
        for run_id, run in zip(ids, runs, strict=True):
            rows["runs"].append(
                {
                    "run_uuid": run_id,
                    "name": run.name,
                    "source_type": "UNKNOWN",
                    "source_name": "",
                    "entry_point_name": "",
                    "user_id": "unknown",
                    "status": run.status,
                    "start_time": run.start,
                    "end_time": run.end,
                    "deleted_time": None,
                    "source_version": "",
                    "lifecycle_stage": LifecycleStage.ACTIVE,
                    "artifact_uri": _artifacts(place, run_id),
                    "experiment_id": experiment,
                }
            )
            tags = {"mlflow.runName": run.name, **run.tags}
            rows["tags"] += [{"key": k, "value": v, "run_uuid": run_id} for k, v in tags.items()]
            rows["params"] += [{"key": k, "value": v, "run_uuid": run_id} for k, v in run.params.items()]
            metrics, latest = _metrics(run_id, run.points)
            rows["metrics"] += metrics
            rows["latest_metrics"] += latest
        with self._store.ManagedSessionMaker(read_only=False) as session:
            if data is not None:
                self._add_data(session, rows, experiment, ids, data)
            for name, these in rows.items():  # in an order in which what is referred to comes first
                if these:
                    session.connection().execute(sa.insert(Base.metadata.tables[name]), these)
        return ids

    def _add_data(
        self, session: Session, rows: dict[str, list[dict[str, Any]]], experiment: int, ids: Sequence[str], data: Any
    ) -> None:
        from mlflow.store.tracking.dbmodels.models import SqlDataset

        dataset = data.dataset
        found = session.scalar(
            sa.select(SqlDataset.dataset_uuid).where(
                SqlDataset.experiment_id == experiment,
                SqlDataset.name == dataset.name,
                SqlDataset.digest == dataset.digest,
            )
        )
        if found is None:
            found = uuid.uuid4().hex
            rows["datasets"].append(
                {
                    "dataset_uuid": found,
                    "experiment_id": experiment,
                    "name": dataset.name,
                    "digest": dataset.digest,
                    "dataset_source_type": dataset.source_type,
                    "dataset_source": dataset.source,
                    "dataset_schema": dataset.schema,
                    "dataset_profile": dataset.profile,
                }
            )
        for run_id in ids:
            input_id = uuid.uuid4().hex
            rows["inputs"].append(
                {
                    "input_uuid": input_id,
                    "source_type": "DATASET",
                    "source_id": found,
                    "destination_type": "RUN",
                    "destination_id": run_id,
                    "step": 0,
                }
            )
            rows["input_tags"] += [{"input_uuid": input_id, "name": t.key, "value": t.value} for t in data.tags]


def takes(run: EndedRun) -> bool:
    """Whether MLflow takes this run as it is: its names and lengths."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils import validation

    try:
        whole = len(run.name) <= validation.MAX_ENTITY_KEY_LENGTH
        for key in {point.key for point in run.points}:
            validation._validate_metric_name(key)
            whole = whole and len(key) <= validation.MAX_ENTITY_KEY_LENGTH
        for key, value in run.params.items():
            whole = whole and validation._validate_param(key, value).value == value
        for key, value in run.tags.items():
            whole = whole and validation._validate_tag(key, value).value == value
    except MlflowException:
        return False
    return bool(whole)


def _metrics(run_id: str, points: Sequence[Point]) -> Iterator[list[dict[str, Any]]]:
    """Rows of all points, each once, and of the latest of each metric."""
    rows: dict[Point, dict[str, Any]] = {}
    latest: dict[str, dict[str, Any]] = {}
    for p in points:
        row = {"key": p.key, "value": p.value, "timestamp": p.timestamp, "step": p.step, "is_nan": False}
        rows[p] = row | {"run_uuid": run_id}
        known = latest.get(p.key)
        if known is None or (p.step, p.timestamp, p.value) > (known["step"], known["timestamp"], known["value"]):
            latest[p.key] = rows[p]
    yield list(rows.values())
    yield list(latest.values())


def _artifacts(place: str, run_id: str) -> str:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.utils.uri import append_to_uri_path

    return str(append_to_uri_path(place, run_id, SqlAlchemyStore.ARTIFACTS_FOLDER_NAME))
