"""The tables. Times are seconds since 1970 by the database's clock, as floats.

Optuna has a table `studies` of its own beside them, so ours is `tuner_studies`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeDecorator

Identifier = BigInteger().with_variant(Integer, "sqlite")


class Numbers(TypeDecorator[dict[str, Any]]):
    """A mapping of names to numbers as JSON, where infinity (a `clip_norm` that never clips) is text.

    JSON has no infinity, and PostgreSQL refuses it.
    """

    impl = JSON(none_as_null=True)
    cache_ok = True

    def process_bind_param(self, value: Mapping[str, Any] | None, dialect: Any) -> dict[str, Any] | None:
        """What is stored."""
        return None if value is None else {name: plain_number(number) for name, number in value.items()}

    def process_result_value(self, value: Mapping[str, Any] | None, dialect: Any) -> dict[str, Any] | None:
        """What was stored."""
        if value is None:
            return None
        return {name: float(number) if number in _NOT_FINITE else number for name, number in value.items()}


def plain_number(value: Any) -> Any:
    """The value, or its name if it is a number that JSON has not: `inf`, `-inf`, `nan`."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


_NOT_FINITE = ("inf", "-inf", "nan")


class Base(DeclarativeBase):
    """Root of the mapped tables."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[Any] = {dict[str, Any]: Numbers(), float: Float(53)}


class Study(Base):
    """One study: its file as canonical JSON, how far it is, and its place in MLflow."""

    __tablename__ = "tuner_studies"

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    spec: Mapped[str] = mapped_column(Text)
    spec_hash: Mapped[str] = mapped_column(String(64))
    folder: Mapped[str | None] = mapped_column(Text)
    """Where the study file lay, for a task file beside it."""
    phase: Mapped[str] = mapped_column(String(16), default="search")
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    experiment_id: Mapped[str | None] = mapped_column(String(64))
    parent_run_id: Mapped[str | None] = mapped_column(String(64))
    parent_published: Mapped[str | None] = mapped_column(String(16))
    """The phase that the parent run shows."""
    parent_trials: Mapped[int] = mapped_column(default=0, server_default="0")
    """How many ended trials the curves of the parent run show."""
    data: Mapped[dict[str, Any] | None]
    """What the trials learn from: name, digest and sizes, as the first worker found them."""
    publisher: Mapped[str | None] = mapped_column(String(64))
    publisher_until: Mapped[float | None]
    """The publisher's lease on this study, and until when it holds."""


class Worker(Base):
    """A process that holds tickets and trains their trials."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    study_id: Mapped[int | None] = mapped_column(ForeignKey("tuner_studies.id", ondelete="SET NULL"))
    host: Mapped[str] = mapped_column(String(255))
    node: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int]
    device: Mapped[str] = mapped_column(String(64))
    slots: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    started_at: Mapped[float]
    heartbeat: Mapped[float]
    environment: Mapped[dict[str, Any] | None]
    """The machine and the versions it works with."""


class Load(Base):
    """How busy a worker was at one time."""

    __tablename__ = "loads"
    __table_args__ = (Index(None, "study_id", "published"),)

    worker_id: Mapped[str] = mapped_column(ForeignKey("workers.id", ondelete="CASCADE"), primary_key=True)
    sampled_at: Mapped[float] = mapped_column(primary_key=True)
    study_id: Mapped[int | None] = mapped_column(ForeignKey("tuner_studies.id", ondelete="SET NULL"))
    """The study that it served then."""
    cpu_percent: Mapped[float]
    """Of the process; 100 is one core."""
    memory_mb: Mapped[float]
    gpu_memory_mb: Mapped[float | None]
    published: Mapped[bool] = mapped_column(default=False)


class Ticket(Base):
    """The right to run one trial, and what became of it."""

    __tablename__ = "tickets"
    __table_args__ = (
        UniqueConstraint("study_id", "optimizer", "kind", "position"),
        Index(None, "study_id", "state", "queue_order"),
        Index(None, "worker_id"),
    )

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("tuner_studies.id", ondelete="CASCADE"))
    optimizer: Mapped[str] = mapped_column(String(32))
    kind: Mapped[str] = mapped_column(String(16))
    """`search`; `reference`, the search of the textbook setting that the file does not name; or `confirm`."""
    position: Mapped[int]
    queue_order: Mapped[int]
    """The order of claiming: the optimizers take turns."""
    seed: Mapped[int] = mapped_column(BigInteger)
    fixed: Mapped[dict[str, Any] | None]
    """Optuna parameters set in advance (grids, confirmation), else None: the sampler is asked."""
    settings: Mapped[dict[str, Any] | None]
    """All hyperparameters the trial trains with, once asked; those of a confirmation are known before."""
    trial_id: Mapped[int | None] = mapped_column(BigInteger)
    trial_number: Mapped[int | None]
    state: Mapped[str] = mapped_column(String(16), default="open")
    worker_id: Mapped[str | None] = mapped_column(String(64))
    slot: Mapped[int | None]
    generation: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    checkpoint: Mapped[str | None] = mapped_column(Text)
    outcome: Mapped[str | None] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(Text)
    traceback: Mapped[str | None] = mapped_column(Text)
    """Of the error that it failed with, without secrets."""
    value: Mapped[float | None]
    second_value: Mapped[float | None]
    """The value of the second aim, where the objective has two."""
    measures: Mapped[dict[str, Any] | None]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    run_id: Mapped[str | None] = mapped_column(String(64))
    published_epoch: Mapped[int] = mapped_column(default=-1)
    published_outcome: Mapped[str | None] = mapped_column(String(16))


class Epoch(Base):
    """One trial's measures after one epoch (METRICS.md); epoch 0 is the untrained model."""

    __tablename__ = "epochs"

    ticket_id: Mapped[int] = mapped_column(ForeignKey("tickets.id", ondelete="CASCADE"), primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    step: Mapped[int]
    recorded_at: Mapped[float]
    train_loss: Mapped[float | None]
    valid_loss: Mapped[float | None]
    grad_norm: Mapped[float | None]
    grad_norm_max: Mapped[float | None]
    layer_grad_ratio: Mapped[float | None]
    update_norm: Mapped[float | None]
    oscillation: Mapped[float | None]
    spikes: Mapped[int | None]
    seconds: Mapped[float | None]
    distance: Mapped[float | None]
    diverged_at_step: Mapped[int | None]
    metrics: Mapped[dict[str, Any]]


class Calibration(Base):
    """The measured step time of a task on a device at one width."""

    __tablename__ = "calibrations"
    __table_args__ = (UniqueConstraint("task", "device", "version", "mode", "width"),)

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    task: Mapped[str] = mapped_column(String(64))
    device: Mapped[str] = mapped_column(String(128))
    version: Mapped[str] = mapped_column(String(64))
    mode: Mapped[str] = mapped_column(String(16))
    width: Mapped[int]
    step_seconds: Mapped[float]
    measured_at: Mapped[float]


class database_now(FunctionElement[float]):  # an SQL function's name
    """The database's clock, in seconds since 1970."""

    type = Float(53)
    inherit_cache = True


@compiles(database_now, "sqlite")
def _sqlite_now(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(database_now, "postgresql")
def _postgresql_now(*_: Any, **__: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"
