"""What a worker does about a database that does not answer: it trains on from memory, and tries again."""

from __future__ import annotations

import logging
import time

from momentum_tuner.errors import StorageError, describe_failure
from momentum_tuner.tickets import Outage

logger = logging.getLogger(__name__)

SHORTEST_PAUSE = 0.5
LONGEST_PAUSE = 10.0


class Link:
    """Whether the database answers, and when to try it again."""

    def __init__(self) -> None:
        self.outage = Outage()
        self._failing = False
        self._pause = SHORTEST_PAUSE
        self._again = 0.0

    @property
    def may_try(self) -> bool:
        """Whether it is time to try."""
        return time.monotonic() >= self._again

    @property
    def failing(self) -> bool:
        """Whether the last attempt failed."""
        return self._failing

    def failed(self, error: StorageError, seconds: float = 0.0) -> None:
        """Note a failed attempt.

        Args:
            error: what came.
            seconds: how long it took to fail; the next attempt is at least twice as far away, so that attempts that
                wait for a silent server leave most of the time to training.
        """
        self.outage.notice()
        if not self._failing:
            logger.warning("%s; training goes on from memory", describe_failure(error))
        self._failing = True
        pause = max(self._pause, 2 * seconds)
        self._again = time.monotonic() + pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def worked(self) -> None:
        """Note an attempt that came through."""
        if self._failing:
            logger.warning("the database answers again")
        self._failing, self._pause, self._again = False, SHORTEST_PAUSE, 0.0
