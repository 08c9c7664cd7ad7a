"""Options that several commands share."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from momentum_tuner.cli.completion import complete_study
from momentum_tuner.errors import InputError, redact

if TYPE_CHECKING:
    from momentum_tuner.database import Database

Command = Callable[..., Any]

STORAGE_VARIABLE, DEFAULT_STORAGE = "MOMENTUM_TUNER_STORAGE", "sqlite:///momentum_tuner.db"
TRACKING_VARIABLE, DEFAULT_TRACKING = "MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"
CHECKPOINTS_VARIABLE = "MOMENTUM_TUNER_CHECKPOINTS"
COMPILES = ("auto", "on", "off")

name_argument = click.argument("name", shell_complete=complete_study)
names_argument = click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete_study)
storage_option = click.option(
    "--storage",
    metavar="URL",
    envvar=STORAGE_VARIABLE,
    default=DEFAULT_STORAGE,
    show_default=True,
    show_envvar=True,
    help="Database of studies and trials: SQLite, or postgresql://user:password@host/name.",
)
tracking_option = click.option(
    "--tracking-uri",
    metavar="URI",
    envvar=TRACKING_VARIABLE,
    default=DEFAULT_TRACKING,
    show_default=True,
    show_envvar=True,
    help="Where MLflow keeps its runs: sqlite:///file.db or http://host:5000; `none` shows nothing there.",
)
checkpoints_option = click.option(
    "--checkpoints",
    metavar="URL",
    envvar=CHECKPOINTS_VARIABLE,
    show_envvar=True,
    help="Where states of running trials are kept: a folder or URL (s3://bucket/path) that all workers reach; "
    "`none` keeps none. By default a folder beside the database.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _absolute(_: click.Context, __: click.Parameter, entries: tuple[str, ...]) -> tuple[str, ...]:
    """Entries of `--trust` that mean the same in every working directory."""
    return tuple(str(Path(entry).absolute()) if entry.endswith(".py") else entry for entry in entries)


def worker_options(command: Command) -> Command:
    """Options of the commands that start workers."""
    for option in (
        click.option(
            "--trust",
            metavar="PACKAGE",
            multiple=True,
            callback=_absolute,
            help="A package, or the path of a task file, that workers may import. Repeatable.",
        ),
        click.option(
            "--slots",
            metavar="N|auto",
            default="auto",
            show_default=True,
            help="Trials that one worker trains at once.",
        ),
        click.option(
            "--compile",
            "compiles",
            type=click.Choice(COMPILES),
            default="auto",
            show_default=True,
            help="Whether workers compile the training step; auto does so once what is left to train repays the minute "
            "or so that it takes.",
        ),
        click.option(
            "--device",
            metavar="auto|cpu|cuda|cuda:0,1",
            default="auto",
            show_default=True,
            help="Where workers train.",
        ),
        click.option(
            "--gpus-per-worker",
            metavar="F",
            type=float,
            help="With --engine ray: the part of a GPU that each worker takes, such as 0.5.  [default: 1]",
        ),
        click.option(
            "--ray-address",
            metavar="ADDRESS",
            help="With --engine ray: the cluster to join, auto or host:port.  [default: RAY_ADDRESS, or a Ray of its "
            "own on this machine]",
        ),
        click.option(
            "--engine",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="Workers are processes on this machine, or actors on a Ray cluster, where the package and a task of "
            "your own must be installed on each node, at the same path.",
        ),
        click.option(
            "--workers",
            metavar="N|auto",
            default="auto",
            show_default=True,
            help="How many workers; auto is one per GPU, or one per CPU core up to 8. With --engine ray, as many as "
            "the cluster has room for while nodes join and leave.",
        ),
        click.option("-v", "--verbose", is_flag=True, help="Say more about what workers do."),
        checkpoints_option,
        tracking_option,
        storage_option,
    ):
        command = option(command)
    return command


def open_database(storage: str) -> Database:
    """An existing database, with its tables up to date.

    Raises:
        StorageError: it is not reachable, or an SQLite file that is not there.
    """
    from momentum_tuner.database import Database, migrate
    from momentum_tuner.errors import StorageError

    database = Database(storage)
    if not database.exists():
        raise StorageError(
            f"there is no database {database.shown} yet; start a study with `momentum-tuner run STUDY.yaml`, "
            "or name another one with --storage"
        )
    migrate(database)
    return database


def parse_slots(slots: str) -> int | None:
    """`--slots`: a number above 0, None for auto.

    Raises:
        InputError: it is neither.
    """
    if slots == "auto":
        return None
    if slots.isdecimal() and int(slots) > 0:
        return int(slots)
    raise InputError(f"--slots {slots!r}: write a number above 0, or auto")


def parse_compiles(compiles: str) -> str:
    """`--compile`: auto, on or off.

    Raises:
        InputError: it is none of them.
    """
    if compiles not in COMPILES:
        raise InputError(f"--compile {compiles!r}: write auto, on or off")
    return compiles


def parse_trust(trust: Sequence[str]) -> tuple[str, ...]:
    """`--trust`: packages, and task files by their absolute paths."""
    return tuple(str(Path(entry).absolute()) if entry.endswith(".py") else entry for entry in trust)


def parse_tracking_uri(uri: str) -> str | None:
    """`--tracking-uri`, checked; None for `none`."""
    from momentum_tuner.tracking import check_tracking_uri

    return None if uri == "none" else check_tracking_uri(uri)


def parse_checkpoints(url: str | None, database: Database) -> str | None:
    """`--checkpoints`: where they are kept, checked if the user named it; None for `none`.

    Raises:
        CheckpointError: nothing can be written there.
    """
    from momentum_tuner.checkpoints import CheckpointStore, default_checkpoints

    if url is None:
        return default_checkpoints(database.dialect, database.url.database)
    if url == "none":
        return None
    CheckpointStore(url).prepare()
    return url


def storage_again() -> str:
    """` --storage URL` for a command to type next, where this one was given it; nothing where it was not."""
    return _again("storage")


def tracking_again() -> str:
    """` --tracking-uri URI` for a command to type next, as `storage_again`."""
    return _again("tracking_uri")


def work_again(trusted: Sequence[str]) -> str:
    """All options of `worker_options` for a command that goes on with this one's work, as `storage_again`.

    Args:
        trusted: what workers may import: more than `--trust` says, where this command's study file was named.
    """
    names = (
        "storage",
        "tracking_uri",
        "checkpoints",
        "workers",
        "engine",
        "ray_address",
        "gpus_per_worker",
        "device",
        "compiles",
        "slots",
    )
    return "".join(_again(name) for name in names) + trust_again(trusted)


def trust_again(trusted: Sequence[str]) -> str:
    """` --trust PACKAGE` for each of these."""
    return "".join(f" --trust {shlex.quote(entry)}" for entry in dict.fromkeys(trusted))


def _again(name: str) -> str:
    context = click.get_current_context()
    if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
        return ""
    option = next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)
    return f" {option} {shlex.quote(redact(str(context.params[name])))}"
