"""What `run` shows while it works: a live page on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from momentum_tuner.cli.tables import console, progress_table, setting_text
from momentum_tuner.database import Database
from momentum_tuner.errors import StorageError
from momentum_tuner.tickets import StudyProgress, StudyRecord, study_progress

LINE_SECONDS = 5.0
"""How often a plain line is written."""


class ProgressPage:
    """Shows a study's progress until it is left.

    Args:
        database: where progress is read.
        name: the study's name.
    """

    def __init__(self, database: Database, name: str) -> None:
        self._database = database
        self._name = name
        self._console = console()
        self._best: dict[str, float] = {}
        self._last_line = 0.0
        self._started = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._row = self._bar.add_task(name, total=None, rate="")
        self._live = Live(self._bar, console=self._console, transient=True, refresh_per_second=4)
        self._seen_first: int | None = None
        self._failing = False

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        else:
            self.say(f"{self._name}: starting workers")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line above the page; `line` is text, not markup."""
        self._console.print(line, markup=False, soft_wrap=True)

    def update(self, study: StudyRecord, last: bool = False) -> None:
        """Read the database and show how far the study is; each new best gets a line.

        While the database does not answer, the page stays as it is: workers go on, or end and say why.
        """
        try:
            progress = study_progress(self._database, study)
        except StorageError as error:
            if not self._failing:
                self.say(str(error))
            self._failing = True
            return
        self._failing = False
        maximize = study.spec.objective.direction == "maximize"
        for o in progress.optimizers:
            if o.best is None:
                continue
            before = self._best.get(o.optimizer)
            if before is None or (o.best > before if maximize else o.best < before):
                self._best[o.optimizer] = o.best
                if self._console.is_terminal:
                    self.say(f"{o.optimizer}: new best {o.best:.5g} at {setting_text(o.best_setting or {})}")
        if self._seen_first is None:
            self._seen_first = progress.done
        seconds = time.monotonic() - self._started
        rate = (progress.done - self._seen_first) / seconds if seconds > 0 else 0.0
        if self._console.is_terminal:
            self._bar.update(self._row, total=progress.tickets, completed=progress.done, rate=f"{rate:.1f} trials/s")
            self._live.update(Group(progress_table(progress), self._bar))
        elif last or time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(self._line(progress, rate))

    def _line(self, progress: StudyProgress, rate: float) -> str:
        parts = [f"{progress.study}: {progress.done}/{progress.tickets} trials, {rate:.1f}/s"]
        parts += [
            f"{o.optimizer} best {o.best:.4g} ({setting_text(o.best_setting or {})})"
            for o in progress.optimizers
            if o.best is not None
        ]
        return "; ".join(parts)
