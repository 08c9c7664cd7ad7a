"""Workers in the database, and the heartbeat that says that one is alive."""

from __future__ import annotations

import logging
import os
import platform
import threading
import uuid
from dataclasses import dataclass

import sqlalchemy as sa

from momentum_tuner.database import Database, Worker, database_now
from momentum_tuner.errors import describe_failure

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 3.0


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
        return cls(f"{host[:40]}-{os.getpid()}-{uuid.uuid4().hex[:6]}", host, os.getpid())


def register_worker(database: Database, identity: WorkerIdentity, device: str, node: str = "") -> None:
    """Enter a worker into the table, alive from now on.

    Args:
        database: the workers.
        identity: who it is.
        device: what it trains on.
        node: the machine that people see it on; empty for the host's name.
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


class Heartbeat:
    """A thread that says every few seconds, by the database's clock, that a worker is alive; it survives errors."""

    def __init__(self, database: Database, worker_id: str, every: float = HEARTBEAT_SECONDS) -> None:
        self._database = database
        self._worker_id = worker_id
        self._every = every
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
                        sa.update(Worker).where(Worker.id == self._worker_id).values(heartbeat=database_now())
                    )
                failing = False
            except Exception as error:
                if not failing:  # say it once, not every few seconds
                    logger.warning("heartbeat: %s; trying again", describe_failure(error))
                failing = True
