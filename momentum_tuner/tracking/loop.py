"""Publishing several studies again and again, beside the workers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import sqlalchemy as sa

from momentum_tuner.database import Database, Study
from momentum_tuner.errors import StorageError
from momentum_tuner.tickets import StudyRecord, find_study, list_studies
from momentum_tuner.tracking.lease import LEASE_SECONDS
from momentum_tuner.tracking.publisher import Publisher, short_reason
from momentum_tuner.tracking.store import check_tracking_uri

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 30.0


class PublisherLoop:
    """Publishes several studies again and again, each by its own `Publisher`.

    MLflow that does not answer is tried again with growing pauses; training knows nothing of it.

    Args:
        database: what is to be shown.
        studies: names, or empty for every study of the database.
        tracking_uri: where MLflow is.
        name: who holds the leases, unique.

    Raises:
        TrackingError: the tracking URI cannot be used.
    """

    def __init__(self, database: Database, studies: Sequence[str], tracking_uri: str, name: str) -> None:
        self.database = database
        self.studies = tuple(studies)
        self.tracking_uri = check_tracking_uri(tracking_uri)
        self.name = name
        self._publishers: dict[int, Publisher] = {}
        self._whole: dict[int, StudyRecord] = {}  # as they were when all of them was shown
        self._failing = False

    def run(self, finishing: threading.Event, every: float = 1.0) -> bool:
        """Publish until `finishing` is set, then once more.

        Where another publisher works on one of the studies, wait until that has ended, or has lost its lease.

        Returns:
            Whether MLflow shows all finished trials of these studies.
        """
        pause = every
        patience = LEASE_SECONDS + every
        while True:
            last = finishing.is_set()
            whole = self._try_pass()
            pause = every if whole is not None else min(max(pause, every) * 2, LONGEST_PAUSE)
            if last and (whole is not False or patience <= 0.0):
                break
            if last:
                patience -= every
                time.sleep(every)
                continue
            finishing.wait(pause)
        return self._leave(whole is True)

    def _try_pass(self) -> bool | None:
        """One pass: True if it showed all there is to show, False if another publisher works, None if it failed."""
        try:
            whole = self._pass()
        except Exception as error:
            if not self._failing:
                if isinstance(error, StorageError):
                    logger.warning("publishing: %s", short_reason(error))
                else:
                    logger.warning("MLflow does not answer (%s); training goes on", short_reason(error))
            self._failing = True
            self._publishers.clear()
            return None
        if self._failing:
            logger.warning("MLflow answers again")
        self._failing = False
        return whole

    def _pass(self) -> bool:
        whole = True
        for study in self._studies():
            if study.phase == "done" and self._whole.get(study.id) == study:
                continue
            result = self._publisher(study).publish()
            whole = whole and not result.busy and not result.refused
            if result.complete:
                self._whole[study.id] = study
        return whole

    def _studies(self) -> list[StudyRecord]:
        if self.studies:
            return [find_study(self.database, name) for name in self.studies]
        return list_studies(self.database)

    def _publisher(self, study: StudyRecord) -> Publisher:
        found = self._publishers.get(study.id)
        # It may have grown, or another one may have taken the place of one that was deleted.
        if found is None or (found.study.spec, found.study.created_at) != (study.spec, study.created_at):
            found = self._publishers[study.id] = Publisher(self.database, study, self.tracking_uri, self.name)
        return found

    def _leave(self, whole: bool) -> bool:
        """Give the leases back; what waits for a worker is shown as waiting."""
        try:
            if not self._failing:
                for publisher in self._publishers.values():
                    publisher.show_waiting()
        except Exception as error:
            logger.info("MLflow does not answer (%s)", short_reason(error))
            whole = False
        try:
            with self.database.write() as session:
                session.execute(
                    sa.update(Study).where(Study.publisher == self.name).values(publisher=None, publisher_until=None)
                )
        except StorageError as error:  # they run out by themselves
            logger.info("publishing: %s", short_reason(error))
        return whole
