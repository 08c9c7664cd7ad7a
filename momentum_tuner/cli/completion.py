"""What a shell completes beyond click's own: names of studies and of optimizers. Free of heavy imports."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import click
from click.shell_completion import CompletionItem

PATIENCE_SECONDS = 0.2
"""How long a keystroke may wait for a database."""


def complete_study(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Studies of an SQLite database, newest first; a server is not asked, as that takes too long for a keystroke."""
    given = set(ctx.params.get("names") or ())
    return [
        CompletionItem(n) for n in _names(str(ctx.params.get("storage"))) if n.startswith(incomplete) and n not in given
    ]


def complete_optimizer(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """All optimizers."""
    from momentum_tuner.catalog import OPTIMIZERS

    return [CompletionItem(name) for name in OPTIMIZERS if name.startswith(incomplete)]


def _names(storage: str) -> list[str]:
    path = storage.removeprefix("sqlite:///")
    if path == storage:
        return []
    try:
        # The file is neither made nor changed.
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=PATIENCE_SECONDS)) as connection:
            return [name for (name,) in connection.execute("SELECT name FROM tuner_studies ORDER BY id DESC LIMIT 100")]
    except sqlite3.Error:
        return []
