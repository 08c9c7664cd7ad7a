"""The first step: init."""

from __future__ import annotations

import re
import shlex
from importlib.resources import files
from pathlib import Path

import click

FILES = ("study.yaml", "task.py")


@click.command(epilog="Example: momentum-tuner init demo")
@click.argument("folder", metavar="[DIR]", default=".", type=click.Path(file_okay=False, path_type=Path))
def init(folder: Path) -> None:
    """Write a study file and a task file to start from, which run as they are. DIR is made if it is not there."""
    from momentum_tuner.errors import InputError

    there = [name for name in FILES if (folder / name).exists()]
    if there:
        raise InputError(f"{folder / there[0]} is there already, and is not overwritten; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            text = files("momentum_tuner").joinpath("templates", name).read_text(encoding="utf-8")
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(text.replace("name: my-study ", f"name: {_study_name(folder)} ", 1))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; name another folder") from None
    click.echo(f"Wrote {folder / FILES[0]} and {folder / FILES[1]}. Next:")
    if folder.resolve() != Path.cwd():
        click.echo(f"  cd {shlex.quote(str(folder))}")
    click.echo("  momentum-tuner run study.yaml")


def _study_name(folder: Path) -> str:
    """The folder's name, as far as it can name a study: two first studies in one database are two."""
    from momentum_tuner.spec.document import read_document

    name = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-_")[:63] or "my-study"
    as_text = read_document(f"name: {name}", "name")[0]["name"] == name
    return name if as_text else f'"{name}"'
