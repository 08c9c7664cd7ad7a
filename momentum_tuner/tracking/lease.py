"""The lease on a study: one publisher at a time works on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy.orm import Session

from momentum_tuner.database import Database, Study, database_now
from momentum_tuner.errors import StorageError

LEASE_SECONDS = 30.0
RENEW_SECONDS = 10.0
"""How old a lease may be when MLflow is asked for something, which may take as long again."""


class LeaseLostError(Exception):
    """Another publisher works on this study now."""


class Lease:
    """One publisher's lease on one study.

    Args:
        database: where the study is.
        study_id: the study.
        name: who holds the lease, unique.
    """

    def __init__(self, database: Database, study_id: int, name: str) -> None:
        self._database = database
        self._study_id = study_id
        self._name = name
        self._taken = -float("inf")

    def take(self) -> None:
        """Take it, or renew it.

        Raises:
            LeaseLostError: another one holds it.
        """
        asked = time.monotonic()
        with self._database.write() as session:
            taken = session.scalar(
                sa.update(Study)
                .where(
                    Study.id == self._study_id,
                    sa.or_(
                        Study.publisher.is_(None),
                        Study.publisher == self._name,
                        Study.publisher_until < database_now(),
                    ),
                )
                .values(publisher=self._name, publisher_until=database_now() + LEASE_SECONDS)
                .returning(Study.id)
            )
        if taken is None:
            raise LeaseLostError
        self._taken = asked

    def keep(self) -> None:
        """Renew it if it is old.

        Raises:
            LeaseLostError: another one holds it.
        """
        if time.monotonic() - self._taken > RENEW_SECONDS:
            self.take()

    def held(self, session: Session) -> Study:
        """The study's row, locked, while the lease is held: nothing is noted without it.

        Raises:
            LeaseLostError: it is not held, or the study was deleted.
        """
        row = session.scalars(sa.select(Study).where(Study.id == self._study_id).with_for_update()).one_or_none()
        if row is None or row.publisher != self._name:
            raise LeaseLostError
        return row

    def give_back(self) -> None:
        """Let the next one have it at once."""
        with self._database.write() as session:
            session.execute(
                sa.update(Study)
                .where(Study.id == self._study_id, Study.publisher == self._name)
                .values(publisher=None, publisher_until=None)
            )

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew it in a thread, while something goes on that takes its time.

        Raises:
            LeaseLostError: it is not held any longer when that has ended.
        """
        over = threading.Event()

        def renew() -> None:
            while not over.wait(RENEW_SECONDS):
                try:
                    self.take()
                except LeaseLostError:
                    return
                except StorageError:  # the next time may go better; if not, whoever waits finds out
                    continue

        self.keep()
        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        self.keep()
