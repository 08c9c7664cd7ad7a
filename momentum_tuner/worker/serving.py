"""A worker serves studies one after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from pathlib import Path

import torch

from momentum_tuner.checkpoints import CheckpointStore
from momentum_tuner.database import Database
from momentum_tuner.errors import StorageError, StudyFailedError, TaskError
from momentum_tuner.tasks import Loop, Task, check_task, describe_data, load_task
from momentum_tuner.tickets import (
    HEARTBEAT_SECONDS,
    Heartbeat,
    StudyRecord,
    WorkerIdentity,
    find_study,
    list_studies,
    note_data,
    register_worker,
    stop_worker,
    studies_with_work,
)
from momentum_tuner.worker.link import Link
from momentum_tuner.worker.machine import LoadMeter, describe_machine
from momentum_tuner.worker.signals import StopSignal
from momentum_tuner.worker.study import POLL_SECONDS, StudyWorker
from momentum_tuner.worker_options import WorkerOptions

logger = logging.getLogger(__name__)


class Worker:
    """Serves open studies, the oldest that has work first.

    Args:
        database: studies and tickets.
        options: what to serve, and how.
        stop: the wish to drain.
    """

    def __init__(self, database: Database, options: WorkerOptions, stop: StopSignal | None = None) -> None:
        self.database = database
        self.options = options
        self.stop = stop or StopSignal()
        self.identity = WorkerIdentity.of_this_process()
        self.link = Link()
        self.store = CheckpointStore(options.checkpoints) if options.checkpoints is not None else None
        self._refused: dict[int, str] = {}

    def run(self) -> None:
        """Work until every study to serve is done, or the wish to drain comes.

        Raises:
            InputError: a named study's task cannot be loaded.
        """
        options = self.options
        register_worker(self.database, self.identity, options.device, options.node, describe_machine(options.device))
        try:
            every = min(HEARTBEAT_SECONDS, options.grace_seconds / 4)
            meter = LoadMeter(options.device)
            with Heartbeat(self.database, self.identity.id, every, self.link.outage, meter):
                while not self.stop.asked and self._serve_next():
                    pass
        finally:
            try:
                stop_worker(self.database, self.identity.id)
            except StorageError as error:
                logger.warning("%s; the worker ends unnoticed", error)

    def _serve_next(self) -> bool:
        """Serve a study, or wait for one; False if there is none left."""
        try:
            study = self._next_study()
        except StorageError as error:
            self.link.failed(error)
            time.sleep(POLL_SECONDS)
            return True
        self.link.worked()
        if study is not None:
            self._serve(study)
        elif self._finished():
            return False
        else:
            time.sleep(POLL_SECONDS)
        return True

    def _open_studies(self) -> list[StudyRecord]:
        names = self.options.studies
        studies = [find_study(self.database, name) for name in names] if names else list_studies(self.database)
        return [s for s in studies if s.phase != "done" and s.id not in self._refused]

    def _next_study(self) -> StudyRecord | None:
        studies = self._open_studies()
        with_work = self._with_work([s.id for s in studies])
        return next((s for s in studies if s.id in with_work), studies[0] if studies else None)

    def _with_work(self, study_ids: Collection[int]) -> set[int]:
        return studies_with_work(self.database, list(study_ids), self.identity.id, self.options.grace_seconds)

    def _finished(self) -> bool:
        """Whether to end where there is no study to serve."""
        if self.options.studies and self._refused:
            raise StudyFailedError("; ".join(self._refused.values()))
        return not self.options.forever

    def _serve(self, study: StudyRecord) -> None:
        try:
            task = self._load(study)
        except TaskError as error:
            if self.options.studies:
                raise
            self._refused[study.id] = str(error)
            logger.warning("study %s is not served: %s", study.name, error)
            return
        try:
            self._note_data(study, task)
            worker = StudyWorker(
                self.database, self.identity.id, study, task, self.options, self.stop, self.link, self.store
            )
        except StorageError as error:
            self.link.failed(error)
            time.sleep(POLL_SECONDS)
            return

        def elsewhere() -> bool:
            return bool(self._with_work({s.id for s in self._open_studies()} - {study.id}))

        worker.run(elsewhere)

    def _note_data(self, study: StudyRecord, task: Task | Loop) -> None:
        """Note what the study's trials learn from, or warn where other workers found something else."""
        mine = describe_data(task, study.spec.task.factory, study.spec.task.params)
        noted = note_data(self.database, study.id, mine)
        if noted["digest"] != mine["digest"]:
            logger.warning(
                "study %s: the data here is not what other workers train on (digest %s, not %s)",
                study.name,
                mine["digest"],
                noted["digest"],
            )

    def _load(self, study: StudyRecord) -> Task | Loop:
        folder = Path(study.folder) if study.folder else None
        task = load_task(study.spec.task.factory, study.spec.task.params, base=folder, trusted=self.options.trust)
        check_task(task)
        return task


def run_worker(storage: str, options: WorkerOptions, stop: StopSignal) -> None:
    """Run a worker in this process until it ends."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device.startswith("cuda"):
        torch.cuda.set_device(options.device)  # nothing of it shall touch another worker's GPU
    database = Database(storage)
    try:
        Worker(database, options, stop).run()
    finally:
        database.close()
