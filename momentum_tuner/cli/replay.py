"""Train one trial again: replay."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import click

from momentum_tuner.cli.completion import complete_optimizer
from momentum_tuner.cli.options import json_option, name_argument, open_database, parse_trust, storage_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from momentum_tuner.replay import EpochPair, Replay

MOST_ROWS = 25


def _finite(_: click.Context, __: click.Parameter, tolerance: float) -> float:
    """A tolerance that some difference is beyond."""
    if not math.isfinite(tolerance):
        raise click.BadParameter(f"{tolerance} allows any difference; write a number such as 1e-3.")
    return tolerance


@click.command(epilog="Example: momentum-tuner replay digits-mlp momentum 12")
@name_argument
@click.argument("optimizer", shell_complete=complete_optimizer)
@click.argument("number", type=click.IntRange(min=0))
@click.option(
    "--kind",
    type=click.Choice(["search", "confirm"]),
    default="search",
    show_default=True,
    help="Which trial of that number: the search's, or the confirmation's.",
)
@click.option("--device", metavar="auto|cpu|cuda:0", default="auto", show_default=True, help="What to train on.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0.0, min_open=True),
    callback=_finite,
    default=1e-3,
    show_default=True,
    help="The largest relative difference of a loss that rounding explains.",
)
@click.option("--trust", metavar="PACKAGE", multiple=True, help="A package, or a task file, that may be imported.")
@storage_option
@json_option
@click.pass_context
def replay(
    ctx: click.Context,
    name: str,
    optimizer: str,
    number: int,
    kind: str,
    device: str,
    tolerance: float,
    trust: tuple[str, ...],
    storage: str,
    as_json: bool,
) -> None:
    """Train one trial again, and compare its curve with what was recorded.

    NUMBER is the trial's number, as `best` shows it. The exit code is 0 if the losses of all epochs agree within the
    tolerance, else 1.
    """
    from momentum_tuner.launcher import resolve_devices
    from momentum_tuner.tickets import find_study, find_trial

    database = open_database(storage)
    study = find_study(database, name)
    trial = find_trial(database, study, optimizer, number, kind == "confirm")
    chosen = resolve_devices(device)[0]
    from momentum_tuner.cli.tables import console
    from momentum_tuner.replay import replay_trial

    with console(stderr=True).status(f"loading {study.spec.task.factory} ...") as status:
        found = replay_trial(
            database,
            study,
            trial,
            device=chosen,
            trusted=parse_trust(trust),
            tolerance=tolerance,
            after_epoch=lambda epoch, last: status.update(f"epoch {epoch} of {last}"),
        )
    if as_json:
        click.echo(json.dumps(found.flat(), indent=2))
    else:
        _print(found)
    ctx.exit(1 if found.verdict == "not equal" else 0)


def _print(found: Replay) -> None:
    from momentum_tuner.cli.tables import console, replay_table, setting_text

    out = console()
    trial = f"{found.study}: {found.optimizer} {found.trial}"
    title = f"{trial} ({found.kind}, {setting_text(found.settings)}, seed {found.seed}) on {found.device}"
    out.print(replay_table(title, _rows(found), found.tolerance))
    out.print(verdict_line(found), soft_wrap=True, markup=False)
    if found.reasons:
        out.print("What may explain the difference:")
        for reason in found.reasons:
            out.print(f"  - {reason}", soft_wrap=True, markup=False)


def verdict_line(found: Replay) -> str:
    """The verdict in one line."""
    count = len(found.epochs)
    if found.verdict == "equal":
        return f"Equal: the losses of all {count} epochs are the same to the last bit."
    if found.verdict == "within tolerance":
        agree = f"the losses of all {count} epochs agree to {found.largest:.1e} (tolerance {found.tolerance:g})"
        return f"Within tolerance: {agree}."
    by = "one of the two ended there" if math.isinf(found.largest) else f"by up to {found.largest:.1e}"
    return f"Not equal: the losses part in epoch {found.apart_from}, {by} (tolerance {found.tolerance:g})."


def _rows(found: Replay) -> Sequence[EpochPair]:
    """The epochs to show: of a long trial some, the first, the last and where the curves part among them."""
    pairs = found.epochs
    if len(pairs) <= MOST_ROWS:
        return pairs
    step = (len(pairs) - 1) / (MOST_ROWS - 1)
    shown = {round(i * step) for i in range(MOST_ROWS)}
    return [pair for i, pair in enumerate(pairs) if i in shown or pair.epoch == found.apart_from]
