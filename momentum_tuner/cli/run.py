"""Commands that do the work: run, resume, submit, worker."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from momentum_tuner.cli.options import (
    open_database,
    parse_checkpoints,
    parse_slots,
    parse_tracking_uri,
    storage_option,
    worker_options,
)

if TYPE_CHECKING:
    from momentum_tuner.database import Database
    from momentum_tuner.launcher import LocalWorkers
    from momentum_tuner.launcher.ray import RayWorkers
    from momentum_tuner.spec import StudySpec
    from momentum_tuner.tickets import StudyRecord

POLL_SECONDS = 0.25
PUBLISH_SECONDS = 60.0
"""How long `run` waits at its end for MLflow."""


@dataclass(frozen=True)
class WorkerArguments:
    """The options of `worker_options` as they were given."""

    storage: str
    tracking_uri: str
    checkpoints: str | None
    workers: str
    device: str
    engine: str
    ray_address: str | None
    gpus_per_worker: float | None
    slots: str
    compiles: str
    trust: tuple[str, ...]
    verbose: bool


@click.command(epilog="Example: momentum-tuner run studies/digits-mlp.yaml")
@click.argument("study_file", metavar="STUDY.yaml", type=click.Path(path_type=Path))
@worker_options
def run(study_file: Path, **options: object) -> None:
    """Tune: submit the study, start workers here, show progress, print the best settings.

    The same file again goes on where it stopped, or says that the study is complete.
    """
    from momentum_tuner.database import Database

    arguments = WorkerArguments(**options)  # type: ignore[arg-type]
    spec, folder, mine = _read_study(study_file)
    trusted = (*arguments.trust, *mine)
    database = Database(arguments.storage)
    _work(arguments, database, spec.name, trusted, lambda: put_study(database, spec, folder, trusted))


@click.command(epilog="Example: momentum-tuner resume digits-mlp")
@click.argument("name")
@worker_options
def resume(name: str, **options: object) -> None:
    """Go on with a study from what the database holds, as `run` does."""
    from momentum_tuner.tickets import find_study

    arguments = WorkerArguments(**options)  # type: ignore[arg-type]
    database = open_database(arguments.storage)
    study = find_study(database, name)
    _work(arguments, database, name, arguments.trust, lambda: study)


@click.command(epilog="Example: momentum-tuner submit studies/digits-mlp.yaml")
@click.argument("study_file", metavar="STUDY.yaml", type=click.Path(path_type=Path))
@storage_option
def submit(study_file: Path, storage: str) -> None:
    """Put the study into the database and return; workers anywhere take it from there."""
    from momentum_tuner.database import Database

    spec, folder, mine = _read_study(study_file)
    database = Database(storage)
    study = put_study(database, spec, folder, mine)
    trials = spec.budget.trials * len(spec.optimizers)
    click.echo(f"Submitted {study.name}: {trials} trials ({', '.join(spec.optimizers)}) in {database.shown}.")
    trust = "".join(f" --trust {entry}" for entry in mine)
    click.echo(f"Serve it with: momentum-tuner worker {study.name}{trust}")


@click.command(epilog="Example: momentum-tuner worker --forever")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--forever", is_flag=True, help="Wait for new studies when there is nothing left to do.")
@worker_options
def worker(names: tuple[str, ...], forever: bool, **options: object) -> None:
    """Serve open studies from the database, oldest first, on any machine."""
    import random

    from momentum_tuner.database import Database, migrate
    from momentum_tuner.tickets import find_study

    arguments = WorkerArguments(**options)  # type: ignore[arg-type]
    uri = parse_tracking_uri(arguments.tracking_uri)
    if forever:
        database = Database(arguments.storage)
        migrate(database)
    else:
        database = open_database(arguments.storage)
    for name in names:
        find_study(database, name)
    workers = _workers(arguments, database, names, arguments.trust, forever, random.randrange(1, 1_000_000), _say)
    with _interrupts(workers):
        workers.prepare(publish=uri is not None)
        workers.start(names, uri)
        while workers.watch():
            time.sleep(POLL_SECONDS)
        workers.finish_publishing(PUBLISH_SECONDS)
    _raise_failures(workers)


def _read_study(study_file: Path) -> tuple[StudySpec, Path, list[str]]:
    """A study file, its folder, and what its user trusts by naming it: its own task, if it is not built in."""
    from momentum_tuner.spec import load_study
    from momentum_tuner.tasks import trust_of

    spec = load_study(study_file)
    folder = study_file.absolute().parent
    mine = trust_of(spec.task.factory, folder)
    return spec, folder, [mine] if mine else []


def put_study(database: Database, spec: StudySpec, folder: Path, trusted: Sequence[str]) -> StudyRecord:
    """Put a study into the database, or join the one there.

    A new one's task is loaded and checked before the database is touched.
    """
    from momentum_tuner.database import migrate
    from momentum_tuner.search import design
    from momentum_tuner.tickets import submit_study

    if _known(database, spec.name) is None:
        from momentum_tuner.tasks import check_objective, check_task, load_task

        task = load_task(spec.task.factory, spec.task.params, base=folder, trusted=trusted)
        check_task(task)
        for aim in spec.objective.aims:
            check_objective(aim.metric, task)
    migrate(database)
    return submit_study(database, spec, str(folder), lambda optimizer: design(spec, optimizer))


def _known(database: Database, name: str) -> StudyRecord | None:
    """The study of that name, if the database exists and holds it."""
    from momentum_tuner.database import migrate
    from momentum_tuner.errors import StudyNotFoundError
    from momentum_tuner.tickets import find_study

    if not database.exists():
        return None
    migrate(database)
    try:
        return find_study(database, name)
    except StudyNotFoundError:
        return None


def _work(
    arguments: WorkerArguments,
    database: Database,
    name: str,
    trusted: Sequence[str],
    submit_it: Callable[[], StudyRecord],
) -> None:
    """Bring a study to its end with workers of this command, and show it."""
    from momentum_tuner.cli.progress import ProgressPage
    from momentum_tuner.cli.tables import best_table, console
    from momentum_tuner.errors import StudyFailedError
    from momentum_tuner.tickets import best_settings, study_progress

    uri = parse_tracking_uri(arguments.tracking_uri)
    out = console()
    known = _known(database, name)
    if known is not None and known.phase == "done":
        study = submit_it()
        if study.phase == "done":
            out.print(f"Study {name} is complete.")
            out.print(best_table(study_progress(database, study), best_settings(database, study)))
            _say_where(database, name, uri)
            return
    page = ProgressPage(database, name)
    workers = _workers(arguments, database, (name,), trusted, False, 0, page.say)
    with _interrupts(workers) as interrupted:
        workers.prepare(publish=uri is not None)
        try:
            study = submit_it()
        except BaseException:
            workers.kill()
            workers.finish_publishing(0.0)
            raise
        workers.start((name,), uri)
        with page:
            while workers.watch():
                page.update(study)
                time.sleep(POLL_SECONDS)
            page.update(study, last=True)
        progress = study_progress(database, study)
        if uri is not None and progress.phase == "done":
            out.print("Bringing MLflow up to date ...")
        whole = workers.finish_publishing(PUBLISH_SECONDS)
    if progress.phase == "done" or not interrupted():
        out.print(best_table(progress, best_settings(database, study)))
    if not whole:
        out.print(f"MLflow does not show everything yet; bring it up to date with: momentum-tuner publish {name}")
    if progress.phase == "done":
        _say_where(database, name, uri)
        return
    if interrupted():
        click.echo(f"Stopped at {progress.done} of {progress.tickets} trials. Go on with: momentum-tuner resume {name}")
        raise click.exceptions.Exit(130)
    _raise_failures(workers)
    raise StudyFailedError(
        f"the workers ended at {progress.done} of {progress.tickets} trials; try: momentum-tuner resume {name}"
    )


def _workers(
    arguments: WorkerArguments,
    database: Database,
    names: Sequence[str],
    trusted: Sequence[str],
    forever: bool,
    ordinal: int,
    say: Callable[[str], None],
) -> LocalWorkers | RayWorkers:
    from momentum_tuner.worker_options import WorkerOptions

    options = WorkerOptions(
        studies=tuple(names),
        slots=parse_slots(arguments.slots),
        compiles=arguments.compiles,
        trust=tuple(trusted),
        forever=forever,
        ordinal=ordinal,
        checkpoints=parse_checkpoints(arguments.checkpoints, database),
    )
    level = logging.INFO if arguments.verbose else logging.WARNING
    if arguments.engine == "ray":
        from momentum_tuner.launcher.ray import RayOptions, RayWorkers

        placing = RayOptions(arguments.ray_address, arguments.workers, arguments.device, arguments.gpus_per_worker)
        return RayWorkers(database, options, placing, say, level)
    from momentum_tuner.launcher import LocalWorkers, plan_workers

    if arguments.ray_address is not None or arguments.gpus_per_worker is not None:
        raise click.UsageError("--ray-address and --gpus-per-worker need --engine ray")
    return LocalWorkers(database, options, plan_workers(arguments.workers, arguments.device), say, level)


@contextmanager
def _interrupts(workers: LocalWorkers | RayWorkers) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM drains the workers, the second ends them at once; yields whether one came."""
    came = 0

    def handle(*_: object) -> None:
        nonlocal came
        came += 1
        if came == 1:
            click.echo("\nStopping: giving trials back (again to stop at once) ...", err=True)
            workers.drain()
        else:
            workers.kill()

    before = [(number, signal.signal(number, handle)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield lambda: came > 0
    finally:
        workers.stop()
        for number, handler in before:
            signal.signal(number, handler)


def _raise_failures(workers: LocalWorkers | RayWorkers) -> None:
    """Turn what ended the workers into this command's own error."""
    from momentum_tuner.errors import InputError, StudyFailedError

    if not workers.failures:
        return
    worst = max(workers.failures, key=lambda failure: failure.exit_code)
    raise InputError(worst.message) if worst.exit_code == 2 else StudyFailedError(worst.message)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _say_where(database: Database, name: str, uri: str | None) -> None:
    click.echo(f"Paste into your script:  momentum-tuner best {name} --format torch")
    if uri is not None:
        click.echo("Browse every run:        momentum-tuner ui")
    click.echo(f"Everything is in:        {database.shown}")
