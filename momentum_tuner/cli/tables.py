"""Tables for people."""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from momentum_tuner.tickets import BestSetting, StudyProgress, StudyRecord
from momentum_tuner.tracking.runs import short_momentum

if TYPE_CHECKING:
    from momentum_tuner.replay import EpochPair

WIDE = 100
"""Columns of a terminal that has room for everything."""


class _Console(Console):
    """Rich's, but whoever runs the command decides what it means that nobody reads on."""

    def on_broken_pipe(self) -> None:
        """Rich makes this console and standard output silent, and would exit with 1."""
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise BrokenPipeError(errno.EPIPE, "nobody reads what is printed") from None


def console(stderr: bool = False) -> Console:
    """A console that keeps its lines whole where its output goes to a file or a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    return _Console(file=stream, highlight=False, width=None if stream.isatty() else 120)


def setting_text(settings: Mapping[str, Any]) -> str:
    """Such as `lr=0.031 beta=0.95`, with what else is set to something."""
    parts = []
    for name, value in settings.items():
        if name == "learning_rate":
            parts.append(f"lr={value:.3g}")
        elif name == "momentum":
            parts.append(f"beta={short_momentum(value)}")
    return " ".join(parts)


def best_table(progress: StudyProgress, best: Sequence[BestSetting], width: int) -> Table:
    """The best setting of each optimizer, best first, with how its trials ended; it fits 80 columns.

    With two aims it has a line for each setting on the front of an optimizer.

    Args:
        progress: the study's.
        best: its best settings.
        width: of the terminal; in a narrow one, how trials ended is left to `status`.
    """
    counts = {o.optimizer: o for o in progress.optimizers}
    metrics = sorted({m for b in best for m in b.measures if m.startswith("valid_")})
    outcomes = _outcomes(progress) if width >= WIDE else []
    two_aims = any(b.second_objective is not None for b in best)
    title = "settings that none is better than in both aims" if two_aims else "best setting of each optimizer"
    table = plain_table(f"{progress.study}: {title}")
    table.add_column("optimizer", no_wrap=True)
    aims = ("first aim", "second aim") if two_aims else ()
    for name in ("learning rate", "momentum", *aims, "valid loss", *(m.replace("_", " ") for m in metrics), "trial"):
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for name in outcomes:
        table.add_column(name, justify="right", no_wrap=True)
    shown: set[str] = set()
    for b in best:
        momentum = b.settings.get("momentum")
        row = [
            b.optimizer,
            f"{b.settings['learning_rate']:.4g}",
            "-" if momentum is None else short_momentum(momentum),
            *([number(b.objective), number(b.second_objective)] if two_aims else []),
            number(b.measures.get("best_valid_loss")),
            *(number(b.measures.get(m)) for m in metrics),
            str(b.trial),
        ]
        again = b.optimizer in shown
        row += ["" if again else str(getattr(counts[b.optimizer], name)) for name in outcomes]
        shown.add(b.optimizer)
        table.add_row(*row)
    for optimizer in (o for o in counts if o not in shown):
        row = [optimizer, *["-"] * (4 + len(metrics) + len(aims))]
        table.add_row(*row, *(str(getattr(counts[optimizer], name)) for name in outcomes))
    return table


def progress_table(progress: StudyProgress, reference: str | None) -> Table:
    """How far each optimizer is, and what else the study trains; it fits 80 columns.

    Args:
        progress: the study's.
        reference: the optimizer that the others are compared with.
    """
    names = ["running", "pruned", "diverged", *(["failed"] if any(o.failed for o in progress.optimizers) else [])]
    table = plain_table(f"{progress.study}: {progress.phase}")
    table.add_column("optimizer", no_wrap=True)
    for name in ("done", "run", *names[1:]):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("best", justify="right", no_wrap=True)
    table.add_column("at")
    for o in progress.optimizers:
        table.add_row(
            o.optimizer,
            f"{o.done}/{o.tickets}",
            *(str(getattr(o, name)) for name in names),
            number(o.best),
            setting_text(o.best_setting or {}),
        )
    for what, kind in ((reference or "reference", progress.reference), ("confirmation", progress.confirm)):
        if kind.tickets:
            table.add_row(what, f"{kind.done}/{kind.tickets}", str(kind.running))
    return table


def workers_table(progress: StudyProgress) -> Table:
    """Who works on the study."""
    table = plain_table("workers")
    for name in ("worker", "node", "device", "slots", "state", "heartbeat"):
        table.add_column(name, justify="right" if name == "slots" else "left")
    for w in progress.workers:
        table.add_row(w.id, w.node, w.device, str(w.slots), w.state, f"{w.heartbeat_age_s:.0f} s ago")
    return table


def replay_table(title: str, pairs: Sequence[EpochPair], tolerance: float) -> Table:
    """The losses of a trial as they were recorded and as they are now; what is beyond the tolerance stands out."""
    table = plain_table(title)
    for name in ("epoch", "train loss", "now", "valid loss", "now", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in pairs:
        losses = [number(of[name]) for name in ("train_loss", "valid_loss") for of in (pair.recorded, pair.replayed)]
        apart = "equal" if pair.difference == 0.0 else f"{pair.difference:.1e}"
        style = "bold red" if pair.difference > tolerance else ""
        table.add_row(str(pair.epoch), *losses, apart, style=style)
    return table


def studies_table(rows: Sequence[tuple[StudyRecord, StudyProgress]]) -> Table:
    """All studies of a database."""
    table = plain_table("studies")
    table.add_column("study")
    table.add_column("phase")
    table.add_column("done", justify="right")
    table.add_column("optimizers")
    table.add_column("task")
    for study, progress in rows:
        table.add_row(
            study.name,
            progress.phase,
            f"{progress.done}/{progress.tickets}",
            ", ".join(study.spec.optimizers),
            study.spec.task.factory,
        )
    return table


def _outcomes(progress: StudyProgress) -> list[str]:
    """How trials can end; `failed` is shown only where some did."""
    names = ["complete", "pruned", "diverged"]
    return [*names, "failed"] if any(o.failed for o in progress.optimizers) else names


def plain_table(title: str) -> Table:
    """A table without frame, narrow enough for 80 columns."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def number(value: float | None) -> str:
    """To 4 significant digits; `-` if it is missing."""
    return "-" if value is None else f"{value:.4g}"
