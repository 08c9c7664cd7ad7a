"""The report: report."""

from __future__ import annotations

from pathlib import Path

import click

from momentum_tuner.cli.options import open_database, storage_option


@click.command(epilog="Example: momentum-tuner report digits-mlp")
@click.argument("name")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write, FILE.html.  [default: NAME-report.html]",
)
@click.option(
    "--trials",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write one row per trial too, as FILE.csv or FILE.parquet.",
)
@click.option(
    "--trust",
    metavar="PACKAGE",
    multiple=True,
    help="A package, or the path of a task file, that may be imported to draw paths over a landscape. Repeatable.",
)
@storage_option
def report(name: str, output: Path | None, trials: Path | None, trust: tuple[str, ...], storage: str) -> None:
    """The whole study in one HTML file, which needs nothing but a browser."""
    from momentum_tuner.report import PAGE_ENDINGS, TABLE_ENDINGS, check_ending, write_report, write_trials
    from momentum_tuner.tickets import find_study

    database = open_database(storage)
    study = find_study(database, name)
    place = output or Path(f"{study.name}-report.html")
    check_ending(place, PAGE_ENDINGS)
    if trials is not None:
        check_ending(trials, TABLE_ENDINGS)
        click.echo(f"Trials: {write_trials(database, study, trials)}")
    click.echo(f"Report: {write_report(database, study, place, trust)}")
