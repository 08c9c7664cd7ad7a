"""A study brought to its end by workers of this process: the way of the command line and of the Python API."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from momentum_tuner.database import Database
from momentum_tuner.errors import InputError, StudyFailedError, WorkersEndedError
from momentum_tuner.fork_server import ForkServer
from momentum_tuner.launcher.devices import plan_workers
from momentum_tuner.launcher.local import LocalWorkers
from momentum_tuner.launcher.submitting import TaskCheck, known_study, load_checked_task
from momentum_tuner.tickets import StudyProgress, StudyRecord, study_progress
from momentum_tuner.tracking import is_shown
from momentum_tuner.worker_options import WorkerOptions

if TYPE_CHECKING:
    from momentum_tuner.launcher.ray import RayWorkers

POLL_SECONDS = 0.1
PUBLISH_SECONDS = 60.0
"""How long a run waits at its end for MLflow."""


class Page(Protocol):
    """Shows how far a study is, from `__enter__` to `__exit__`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def say(self, line: str) -> None:
        """Show a line for good."""

    def update(self, study: StudyRecord, last: bool = False) -> None:
        """Show how far the study is now; `last` for the last time."""


@dataclass(frozen=True)
class Workplace:
    """Where and how workers run, as `--workers`, `--device`, ... say.

    Attributes:
        tracking_uri: the MLflow that shows the runs; None shows them nowhere.
        checkpoints: where the states of running trials are kept; None: nowhere.
        workers: `auto` or a number above 0.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `cuda:0,2`.
        slots: trials that one worker trains at once; None for its choice.
        compiles: whether the training step is compiled: `on`, `off`, or `auto`, once that repays.
        trust: packages, and task files by their absolute paths, that may be imported.
        engine: `local` or `ray`.
        ray_address: of the Ray cluster; None for a Ray of our own.
        gpus_per_worker: with Ray, the part of a GPU that each worker takes.
        log_level: of the workers.
    """

    tracking_uri: str | None
    checkpoints: str | None
    workers: str = "auto"
    device: str = "auto"
    slots: int | None = None
    compiles: str = "auto"
    trust: tuple[str, ...] = ()
    engine: str = "local"
    ray_address: str | None = None
    gpus_per_worker: float | None = None
    log_level: int = logging.WARNING


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Attributes:
        study: the study.
        progress: how far it is.
        was_complete: whether there was nothing to do.
        interrupted: whether a signal ended it.
        published: whether MLflow shows everything.
    """

    study: StudyRecord
    progress: StudyProgress
    was_complete: bool
    interrupted: bool
    published: bool


def run_study(
    database: Database,
    name: str,
    place: Workplace,
    submit: Callable[[TaskCheck], StudyRecord],
    page: Page,
    server: ForkServer | None = None,
) -> RunOutcome:
    """Bring a study to its end with workers of this process, or to where a signal stops it.

    Args:
        database: where it is, or will be.
        name: the study's name.
        place: where and how workers run.
        submit: puts the study into the database, or joins the one there, with what is to check its task; called while
            the workers load what they need.
        page: shows how far it is.
        server: a fork server that has begun to import.

    Raises:
        InputError: the study, its task or an option cannot be used; nothing has changed.
        StudyFailedError: the workers ended before the study.
    """
    known = known_study(database, name)
    if known is not None and known.phase == "done":
        study = submit(load_checked_task)
        if study.phase == "done":
            published = place.tracking_uri is None or _publish_again(database, study, place, page.say)
            return RunOutcome(study, study_progress(database, study), True, False, published)
    workers = make_workers(database, (name,), place, page.say, server=server)
    with interrupts(workers) as signals, page:
        workers.prepare(publish=place.tracking_uri is not None)
        try:
            study = submit(workers.check_task)
        except BaseException:
            workers.kill()
            workers.finish_publishing(0.0)
            raise
        workers.start((name,), place.tracking_uri)
        while workers.watch():
            signals.tell(page.say)
            page.update(study)
            workers.rest(POLL_SECONDS)
        page.update(study, last=True)
        progress = study_progress(database, study)
        if place.tracking_uri is not None and progress.phase == "done":
            page.say("Bringing MLflow up to date ...")
        published = workers.finish_publishing(PUBLISH_SECONDS)
    if progress.phase != "done" and not signals.came:
        raise_failures(workers)
        raise WorkersEndedError(f"the workers ended at {progress.done} of {progress.tickets} trials")
    return RunOutcome(study, progress, False, signals.came > 0, published)


def _publish_again(database: Database, study: StudyRecord, place: Workplace, say: Callable[[str], None]) -> bool:
    """Show what MLflow has not got of a study that is done, as after an outage; returns whether it shows everything."""
    assert place.tracking_uri is not None
    if is_shown(database, study.id, place.tracking_uri):
        return True
    say("Bringing MLflow up to date ...")
    publisher = LocalWorkers(database, WorkerOptions(studies=(study.name,)), [], say, place.log_level)
    with interrupts(publisher):
        publisher.prepare(publish=True)
        publisher.start((study.name,), place.tracking_uri)
        return publisher.finish_publishing(PUBLISH_SECONDS)


def serve_studies(
    database: Database,
    names: Sequence[str],
    place: Workplace,
    say: Callable[[str], None],
    *,
    forever: bool,
    ordinal: int,
    server: ForkServer | None = None,
) -> None:
    """Serve studies of the database until they are done, or a signal comes.

    Args:
        database: where they are.
        names: of the studies; empty for all.
        place: where and how workers run.
        say: gets what workers say.
        forever: wait for new studies where there is nothing left to do.
        ordinal: makes the samplers of these workers draw other points than those of other commands.
        server: a fork server that has begun to import.
    """
    workers = make_workers(database, names, place, say, forever=forever, ordinal=ordinal, server=server)
    with interrupts(workers) as signals:
        workers.prepare(publish=place.tracking_uri is not None)
        workers.start(names, place.tracking_uri)
        while workers.watch():
            signals.tell(say)
            workers.rest(POLL_SECONDS)
        workers.finish_publishing(PUBLISH_SECONDS)
    raise_failures(workers)


def make_workers(
    database: Database,
    names: Sequence[str],
    place: Workplace,
    say: Callable[[str], None],
    *,
    forever: bool = False,
    ordinal: int = 0,
    server: ForkServer | None = None,
) -> LocalWorkers | RayWorkers:
    """The workers of a place, none of them started yet.

    Raises:
        InputError: an option has no possible value.
    """
    options = WorkerOptions(
        studies=tuple(names),
        slots=place.slots,
        compiles=place.compiles,
        trust=place.trust,
        forever=forever,
        ordinal=ordinal,
        checkpoints=place.checkpoints,
    )
    if place.engine == "ray":
        from momentum_tuner.launcher.ray import RayOptions, RayWorkers

        placing = RayOptions(place.ray_address, place.workers, place.device, place.gpus_per_worker)
        return RayWorkers(database, options, placing, say, place.log_level)
    return LocalWorkers(database, options, plan_workers(place.workers, place.device), say, place.log_level, server)


@dataclass
class Interrupts:
    """The signals that came, and whether people were told; a signal's handler itself must not print."""

    came: int = 0
    told: bool = False

    def tell(self, say: Callable[[str], None]) -> None:
        """Say once that the workers are stopping, if they are."""
        if self.came and not self.told:
            self.told = True
            say("Stopping: giving trials back (again to stop at once) ...")


@contextmanager
def interrupts(workers: LocalWorkers | RayWorkers) -> Iterator[Interrupts]:
    """The first Ctrl-C or SIGTERM drains the workers, the second ends them at once.

    Signals reach the main thread only: from any other, workers run until they are done.
    """
    signals = Interrupts()

    def handle(*_: object) -> None:
        signals.came += 1
        if signals.came == 1:
            workers.drain()
        else:
            workers.kill()

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = [(number, signal.signal(number, handle)) for number in numbers]
    try:
        yield signals
    finally:
        workers.stop()
        for number, handler in before:
            signal.signal(number, handler)


def raise_failures(workers: LocalWorkers | RayWorkers) -> None:
    """Turn what ended the workers into an error of this process."""
    if not workers.failures:
        return
    worst = max(workers.failures, key=lambda failure: failure.exit_code)
    raise InputError(worst.message) if worst.exit_code == 2 else StudyFailedError(worst.message)
