"""Commands that do the work: run, resume, submit, worker."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from momentum_tuner.cli.options import (
    name_argument,
    names_argument,
    open_database,
    parse_checkpoints,
    parse_slots,
    parse_tracking_uri,
    parse_trust,
    storage_again,
    storage_option,
    trust_again,
    work_again,
    worker_options,
)
from momentum_tuner.errors import StudyFailedError, WorkersEndedError
from momentum_tuner.fork_server import early_server

if TYPE_CHECKING:
    from momentum_tuner.database import Database
    from momentum_tuner.fork_server import ForkServer
    from momentum_tuner.launcher import TaskCheck, Workplace
    from momentum_tuner.tickets import StudyRecord


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

    def fork_server(self) -> AbstractContextManager[ForkServer | None]:
        """What workers are forked from, if they can be, which begins to import before anything else is done."""
        return (early_server(self.device) if self.engine == "local" else None) or nullcontext()

    def workplace(self, database: Database, *trusted: str) -> Workplace:
        """Where and how workers run, which may import `trusted` too."""
        from momentum_tuner.launcher import Workplace, check_placing

        check_placing(self.workers, self.device, self.engine, self.ray_address, self.gpus_per_worker)
        return Workplace(
            tracking_uri=parse_tracking_uri(self.tracking_uri),
            checkpoints=parse_checkpoints(self.checkpoints, database),
            workers=self.workers,
            device=self.device,
            slots=parse_slots(self.slots),
            compiles=self.compiles,
            trust=(*parse_trust(self.trust), *trusted),
            engine=self.engine,
            ray_address=self.ray_address,
            gpus_per_worker=self.gpus_per_worker,
            log_level=logging.INFO if self.verbose else logging.WARNING,
        )


@click.command(epilog="Example: momentum-tuner run studies/digits-mlp.yaml")
@click.argument("study_file", metavar="STUDY.yaml", type=click.Path(path_type=Path))
@worker_options
def run(study_file: Path, **options: object) -> None:
    """Tune: submit the study, start workers here, show progress, print the best settings.

    The same file again goes on where it stopped, or says that the study is complete.
    """
    arguments = WorkerArguments(**options)  # type: ignore[arg-type]
    with arguments.fork_server() as server:
        from momentum_tuner.database import Database
        from momentum_tuner.launcher import put_study, read_study

        spec, folder, mine = read_study(study_file)
        database = Database(arguments.storage)
        place = arguments.workplace(database, *mine)
        _work(database, spec.name, place, lambda check: put_study(database, spec, folder, place.trust, check), server)


@click.command(epilog="Example: momentum-tuner resume digits-mlp")
@name_argument
@worker_options
def resume(name: str, **options: object) -> None:
    """Go on with a study from what the database holds, as `run` does."""
    arguments = WorkerArguments(**options)  # type: ignore[arg-type]
    with arguments.fork_server() as server:
        from momentum_tuner.launcher import join_study

        database = open_database(arguments.storage)
        place = arguments.workplace(database)
        study = join_study(database, name, place.trust)
        _work(database, name, place, lambda _: study, server)


@click.command(epilog="Example: momentum-tuner submit studies/digits-mlp.yaml")
@click.argument("study_file", metavar="STUDY.yaml", type=click.Path(path_type=Path))
@storage_option
def submit(study_file: Path, storage: str) -> None:
    """Put the study into the database and return; workers anywhere take it from there."""
    from momentum_tuner.database import Database
    from momentum_tuner.launcher import put_study, read_study
    from momentum_tuner.tickets import study_progress

    spec, folder, mine = read_study(study_file)
    database = Database(storage)
    study = put_study(database, spec, folder, mine)
    progress = study_progress(database, study)
    trials = progress.tickets - progress.confirm.tickets
    click.echo(f"Submitted {study.name}: {trials} trials ({', '.join(spec.contestants)}) in {database.shown}.")
    click.echo(f"Serve it with: momentum-tuner worker {study.name}{storage_again()}{trust_again(mine)}")


@click.command(epilog="Example: momentum-tuner worker --forever")
@names_argument
@click.option("--forever", is_flag=True, help="Wait for new studies when there is nothing left to do.")
@worker_options
def worker(names: tuple[str, ...], forever: bool, **options: object) -> None:
    """Serve open studies from the database, oldest first, on any machine."""
    arguments = WorkerArguments(**options)  # type: ignore[arg-type]
    with arguments.fork_server() as server:
        import random

        from momentum_tuner.database import Database, migrate
        from momentum_tuner.launcher import serve_studies
        from momentum_tuner.tickets import find_study

        if forever:
            database = Database(arguments.storage)
            migrate(database)
        else:
            database = open_database(arguments.storage)
        place = arguments.workplace(database)
        for name in names:
            find_study(database, name)
        ordinal = random.randrange(1, 1_000_000)
        serve_studies(database, names, place, _say, forever=forever, ordinal=ordinal, server=server)


def _work(
    database: Database,
    name: str,
    place: Workplace,
    submit_it: Callable[[TaskCheck], StudyRecord],
    server: ForkServer | None,
) -> None:
    """Bring a study to its end, and show it."""
    from momentum_tuner.cli.progress import ProgressPage
    from momentum_tuner.cli.summary import check_not_all_failed, print_summary
    from momentum_tuner.launcher import run_study

    again = f"go on with: momentum-tuner resume {name}{work_again(place.trust)}"
    try:
        outcome = run_study(database, name, place, submit_it, ProgressPage(database, name), server)
    except BrokenPipeError:
        raise StudyFailedError(f"nobody reads what is printed any more, so the workers ended; {again}") from None
    except WorkersEndedError as error:
        raise StudyFailedError(f"{error}; {again}") from None
    print_summary(database, outcome, place.tracking_uri, place.trust)
    if outcome.progress.phase != "done":
        raise click.exceptions.Exit(130)
    check_not_all_failed(database, outcome)


def _say(line: str) -> None:
    click.echo(line, err=True)
