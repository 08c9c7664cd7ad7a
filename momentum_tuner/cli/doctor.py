"""Is this machine fit for it: doctor."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from momentum_tuner.cli.options import checkpoints_option, json_option, storage_option, tracking_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from momentum_tuner.doctor import Finding

COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@click.command(epilog="Example: momentum-tuner doctor")
@storage_option
@tracking_option
@checkpoints_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, storage: str, tracking_uri: str, checkpoints: str | None, as_json: bool) -> None:
    """What this machine has: versions, devices, database, MLflow; what is wrong, and how to mend it.

    Nothing is changed. The exit code is 0 if nothing fails, else 1.
    """
    from momentum_tuner.doctor import examine

    findings = examine(storage, tracking_uri, checkpoints)
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        click.echo(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print(findings)
    ctx.exit(1 if failed else 0)


def _print(findings: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from momentum_tuner.cli.tables import console

    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        word = "FAIL" if finding.status == "fail" else finding.status
        table.add_row(Text(word, style=COLOURS[finding.status]), finding.check, Text(finding.found))
        if finding.mend is not None:
            table.add_row("", "", Text(f"-> {finding.mend}"))
    out = console()
    out.print(table)
    counts = {status: sum(f.status == status for f in findings) for status in ("fail", "warn")}
    faults = "1 fault" if counts["fail"] == 1 else f"{counts['fail']} faults"
    warnings = "1 warning" if counts["warn"] == 1 else f"{counts['warn']} warnings"
    out.print("Nothing is wrong." if not any(counts.values()) else f"{faults}, {warnings}.")
