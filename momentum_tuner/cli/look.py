"""Commands that look at studies: status, list, best, delete."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from momentum_tuner.cli.completion import complete_study
from momentum_tuner.cli.options import (
    checkpoints_option,
    json_option,
    name_argument,
    open_database,
    parse_checkpoints,
    storage_again,
    storage_option,
)
from momentum_tuner.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from momentum_tuner.database import Database
    from momentum_tuner.spec import StudySpec
    from momentum_tuner.tickets import BestSetting, StudyRecord

WATCH_SECONDS = 1.0


@click.command(epilog="Example: momentum-tuner status digits-mlp --watch")
@click.argument("name", required=False, shell_complete=complete_study)
@storage_option
@json_option
@click.option("--watch", is_flag=True, help="Go on showing it until the study is done.")
def status(name: str | None, storage: str, as_json: bool, watch: bool) -> None:
    """How far a study is, who works on it, the best so far. Without NAME: the newest study."""
    from momentum_tuner.errors import StudyNotFoundError
    from momentum_tuner.tickets import find_study, list_studies, recent_rate, study_progress

    database = open_database(storage)
    if name is None:
        studies = list_studies(database)
        if not studies:
            raise StudyNotFoundError(
                f"{database.shown} holds no study yet; start one with `momentum-tuner run STUDY.yaml{storage_again()}`"
            )
        name = studies[-1].name
    study = find_study(database, name)
    if watch:
        _watch(database, study, as_json)
    elif as_json:
        click.echo(json.dumps(study_progress(database, study).flat()))
    else:
        from momentum_tuner.cli.progress import progress_view
        from momentum_tuner.cli.tables import console

        progress, rate = study_progress(database, study), recent_rate(database, study.id)
        console().print(progress_view(study, progress, rate, with_workers=True))


def _watch(database: Database, study: StudyRecord, as_json: bool) -> None:
    """Show a study until it is done."""
    import time

    from momentum_tuner.cli.progress import ProgressPage, progress_view
    from momentum_tuner.cli.tables import console
    from momentum_tuner.tickets import study_progress

    if as_json:
        while True:
            found = study_progress(database, study)
            click.echo(json.dumps(found.flat()))
            if found.phase == "done":
                return
            time.sleep(WATCH_SECONDS)
    with ProgressPage(database, study.name, with_workers=True) as page:
        while page.progress is None or page.progress.phase != "done":
            page.update(study)
            time.sleep(WATCH_SECONDS / 4)
    console().print(progress_view(study, page.progress, 0.0, with_workers=True))


@click.command("list", epilog="Example: momentum-tuner list")
@storage_option
@json_option
def list_command(storage: str, as_json: bool) -> None:
    """All studies of the database."""
    from momentum_tuner.tickets import list_studies, study_progress

    database = open_database(storage)
    rows = [(study, study_progress(database, study)) for study in list_studies(database)]
    if as_json:
        found = [
            {
                "study": study.name,
                "phase": progress.phase,
                "tickets": progress.tickets,
                "done": progress.done,
                "optimizers": list(study.spec.optimizers),
                "task": study.spec.task.factory,
            }
            for study, progress in rows
        ]
        click.echo(json.dumps(found))
        return
    from momentum_tuner.cli.tables import console, studies_table

    console().print(studies_table(rows))


@click.command(epilog="Example: momentum-tuner best digits-mlp --format torch")
@name_argument
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "yaml", "torch"]),
    default="table",
    show_default=True,
    help="`torch` prints lines to paste into a training script.",
)
@storage_option
def best(name: str, form: str, storage: str) -> None:
    """The winning setting of each optimizer, best first."""
    from momentum_tuner.errors import StudyFailedError
    from momentum_tuner.tickets import best_settings, find_study, study_progress

    database = open_database(storage)
    study = find_study(database, name)
    found = best_settings(database, study)
    if not found and form != "json":
        raise StudyFailedError(
            f"study {name!r} has no completed trial yet; see `momentum-tuner status {name}{storage_again()}`"
        )
    if form == "json":
        click.echo(json.dumps([b.flat() for b in found], indent=2))
    elif form == "yaml":
        import yaml

        click.echo(yaml.safe_dump([b.flat() for b in found], sort_keys=False).rstrip())
    elif form == "torch":
        for line in torch_lines(study.spec, found):
            click.echo(line)
    else:
        from momentum_tuner.cli.tables import best_table, console

        out = console()
        out.print(best_table(study_progress(database, study), found, out.width))


def torch_lines(spec: StudySpec, found: Sequence[BestSetting]) -> list[str]:
    """Lines to paste, best first, with comments; an optimizer that torch has not is named in one."""
    from momentum_tuner.space import torch_line, torch_notes

    lines = []
    for b in found:
        line = torch_line(b.optimizer, b.settings)
        lines.append(line or f"# {b.optimizer} is not in torch.optim: {_plain(b.settings)}")
        lines += torch_notes(spec, b.optimizer, b.settings if line else {})
    return lines


@click.command(epilog="Example: momentum-tuner delete digits-mlp")
@name_argument
@storage_option
@checkpoints_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(name: str, storage: str, checkpoints: str | None, yes: bool) -> None:
    """Remove a study, its trials, their checkpoints and its Optuna studies, after asking. Runs in MLflow stay."""
    from momentum_tuner.checkpoints import CheckpointStore
    from momentum_tuner.search import delete_optuna_studies
    from momentum_tuner.tickets import delete_study, find_study, study_progress

    database = open_database(storage)
    study = find_study(database, name)
    place = parse_checkpoints(checkpoints, database)
    progress = study_progress(database, study)
    alive = [w.id for w in progress.workers if w.state == "running"]
    if alive:
        raise InputError(f"{len(alive)} worker(s) still work on {name!r} ({', '.join(alive)}); stop them first")
    if not yes and not _confirmed(name, progress.done):
        click.echo(f"{name} is not removed.", err=True)
        click.get_current_context().exit(1)
    delete_optuna_studies(database, study.spec)
    delete_study(database, study.id)
    if place is not None:
        CheckpointStore(place).remove_folder(study.checkpoint_folder)
    click.echo(f"Removed {name}. Its runs in MLflow stay there.")


def _confirmed(name: str, done: int) -> bool:
    """Whether the user wants that study removed."""
    try:
        return click.confirm(f"Remove study {name!r} with {done} finished trials?")
    except click.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise
        click.echo()
        raise InputError(
            f"{name} is not removed, as nobody answers; use --yes to remove it without being asked"
        ) from None


def _plain(settings: Any) -> str:
    return ", ".join(f"{name}={value:.6g}" for name, value in settings.items())
