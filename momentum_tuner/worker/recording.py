"""Epoch records on their way to the database: written in a thread, while the next epoch trains."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from momentum_tuner.database import Database
from momentum_tuner.tickets import record_epochs
from momentum_tuner.worker.held import Held

Written = Sequence[tuple[Held, int]]
"""Trials, each with how many of its records the database has now."""


class Recorder:
    """Writes the records of one worker's trials, one transaction at a time.

    Args:
        database: where they are kept.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="records")
        self._writing: tuple[Written, Future[set[int]]] | None = None

    def begin(self, held: Sequence[Held]) -> None:
        """Begin to write what the database has not of these trials; nothing else may be on its way."""
        assert self._writing is None
        new = [h for h in held if h.written < len(h.records)]
        if new:
            rows = [(h.claim, record) for h in new for record in h.records[h.written :]]
            written = [(h, len(h.records)) for h in new]
            self._writing = written, self._thread.submit(record_epochs, self._database, rows)

    def end(self) -> tuple[Written, set[int]]:
        """Wait for what is on its way; returns it, and the ids of the tickets that are still held.

        Raises:
            StorageError: it is not written; begin again.
        """
        if self._writing is None:
            return [], set()
        (written, kept), self._writing = self._writing, None
        return written, kept.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
