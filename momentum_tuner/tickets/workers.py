"""Workers in the database, and the heartbeat that says that one is alive."""

from __future__ import annotations

import logging
import math
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from momentum_tuner.database import Database, Load, Worker, database_now
from momentum_tuner.errors import describe_failure

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 3.0
LOAD_SECONDS = 15.0
"""How often a worker notes how busy it is."""


@dataclass(frozen=True)
class WorkerIdentity:
    """Who a worker is: a name that no other process ever has, and where it runs."""

    id: str
    host: str
    pid: int

    @classmethod
    def of_this_process(cls) -> WorkerIdentity:
        """A new identity for this process."""
        host = platform.node() or "localhost"
        return cls(f"{re.sub('[^A-Za-z0-9.]', '_', host[:40])}-{os.getpid()}-{uuid.uuid4().hex[:6]}", host, os.getpid())


@dataclass(frozen=True)
class LoadSample:
    """How busy a worker's process is: CPU in percent of one core, memory in MB, of the GPU what it holds there."""

    cpu_percent: float
    memory_mb: float
    gpu_memory_mb: float | None = None


def register_worker(
    database: Database,
    identity: WorkerIdentity,
    device: str,
    node: str = "",
    environment: Mapping[str, Any] | None = None,
) -> None:
    """Enter a worker into the table, alive from now on.

    Args:
        database: the workers.
        identity: who it is.
        device: what it trains on.
        node: the machine that people see it on; empty for the host's name.
        environment: the machine and the versions it works with.
    """
    with database.write() as session:
        session.add(
            Worker(
                id=identity.id,
                host=identity.host,
                node=node or identity.host,
                pid=identity.pid,
                device=device,
                slots=0,
                state="running",
                started_at=database_now(),
                heartbeat=database_now(),
                environment=None if environment is None else dict(environment),
            )
        )


def assign_worker(database: Database, worker_id: str, study_id: int | None, slots: int) -> None:
    """Note which study a worker serves, with how many slots."""
    with database.write() as session:
        session.execute(sa.update(Worker).where(Worker.id == worker_id).values(study_id=study_id, slots=slots))


def stop_worker(database: Database, worker_id: str) -> None:
    """Note that a worker has ended: whatever it may still hold is free at once."""
    with database.write() as session:
        session.execute(
            sa.update(Worker).where(Worker.id == worker_id).values(state="stopped", heartbeat=database_now())
        )


def alive_workers(database: Database, grace_seconds: float) -> set[str]:
    """Ids of the workers that are heard of."""
    with database.read() as session:
        now = session.scalar(sa.select(database_now())) or 0.0
        return set(
            session.scalars(
                sa.select(Worker.id).where(Worker.state != "stopped", Worker.heartbeat >= now - grace_seconds)
            )
        )


class Outage:
    """When this process last failed to reach the database, as far as it noticed; shared with the heartbeat's thread."""

    def __init__(self) -> None:
        self._last = -math.inf

    def notice(self) -> None:
        """The database did not answer."""
        self._last = time.monotonic()

    def over_for(self, seconds: float) -> bool:
        """Whether it has answered all the while."""
        return time.monotonic() - self._last >= seconds


class Heartbeat:
    """A thread that says every few seconds, by the database's clock, that a worker is alive; it survives errors.

    Args:
        database: the workers.
        worker_id: who is alive.
        every: how often, in seconds.
        outage: is told of each beat that failed.
        measure: says how busy the worker is, which is noted with a beat every `LOAD_SECONDS`.
    """

    def __init__(
        self,
        database: Database,
        worker_id: str,
        every: float = HEARTBEAT_SECONDS,
        outage: Outage | None = None,
        measure: Callable[[], LoadSample] | None = None,
    ) -> None:
        self._database = database
        self._worker_id = worker_id
        self._every = every
        self._outage = outage or Outage()
        self._measure = measure
        self._measured = -math.inf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _beat(self) -> None:
        failing = False
        while not self._stop.wait(self._every):
            try:
                with self._database.write() as session:
                    session.execute(
                        sa.update(Worker)
                        .where(Worker.id == self._worker_id)
                        .values(heartbeat=database_now(), state="running")
                    )
                self._note_load()
                failing = False
            except Exception as error:
                self._outage.notice()
                if not failing:  # say it once, not every few seconds
                    logger.warning("heartbeat: %s; trying again", describe_failure(error))
                failing = True

    def _note_load(self) -> None:
        """Note how busy the worker is, if it is time and it serves a study."""
        if self._measure is None or time.monotonic() - self._measured < LOAD_SECONDS:
            return
        sample = self._measure()
        with self._database.write() as session:
            study_id = session.scalar(sa.select(Worker.study_id).where(Worker.id == self._worker_id))
            if study_id is None:
                return
            now = session.scalar(sa.select(database_now()))
            session.add(Load(worker_id=self._worker_id, study_id=study_id, sampled_at=now, **asdict(sample)))
        self._measured = time.monotonic()
