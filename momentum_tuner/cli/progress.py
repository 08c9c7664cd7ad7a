"""How far a study is: one live page for `run` and `status --watch`, and plain lines where no page can be drawn."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from momentum_tuner.cli.tables import console, progress_table, setting_text, workers_table
from momentum_tuner.database import Database
from momentum_tuner.errors import StorageError
from momentum_tuner.tickets import StudyProgress, StudyRecord, recent_rate, study_progress

LOOK_SECONDS = 0.5
"""How often the database is asked, if it answers quickly."""
LOOK_SHARE = 0.02
"""The largest share of the time that this takes: workers want the processor and the database."""
LINE_SECONDS = 5.0
"""How often a plain line is written in the first minute; later once in a twelfth of the time, at least every minute."""
LONGEST_LINE_SECONDS = 60.0


class ProgressPage:
    """Shows a study's progress until it is left: `launcher.Page`.

    Args:
        database: where progress is read.
        name: the study's name.
        with_workers: whether each worker has a line.
    """

    def __init__(self, database: Database, name: str, *, with_workers: bool = False) -> None:
        self._database = database
        self._name = name
        self._with_workers = with_workers
        self._console = console()
        self._live: Live | None = None
        if sys.stdout.isatty() and not self._console.is_dumb_terminal:
            self._live = Live(f"{name}: starting ...", console=self._console, transient=True, refresh_per_second=4)
        self._started = time.monotonic()
        self._best: dict[str, float] | None = None
        self._phase = ""
        self._look_at = 0.0
        self._line_at = 0.0
        self._line = ""
        self._failing = False
        self.progress: StudyProgress | None = None
        """What was seen last."""

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line above the page; `line` is text, not markup."""
        self._console.print(line, markup=False, soft_wrap=True)

    def update(self, study: StudyRecord, last: bool = False) -> None:
        """Read the database, if it is time to, and show how far the study is; each new best gets a line.

        While the database does not answer, the page stays as it is: workers go on, or end and say why.
        """
        now = time.monotonic()
        if now < self._look_at and not last:
            return
        self._look_at = now + LOOK_SECONDS
        try:
            progress = study_progress(self._database, study)
            rate = recent_rate(self._database, study.id)
            self._look_at = max(self._look_at, now + (time.monotonic() - now) / LOOK_SHARE)
        except StorageError as error:
            if not self._failing:
                self.say(str(error))
            self._failing = True
            return
        self._failing = False
        self.progress = progress
        self._say_best(study, progress)
        if self._live is not None:
            self._live.update(progress_view(study, progress, rate, self._with_workers))
        elif last or now >= self._line_at or progress.phase != self._phase:
            self._phase = progress.phase
            self._say_line(progress, rate, now)

    def _say_best(self, study: StudyRecord, progress: StudyProgress) -> None:
        """A line on each new best since the page began."""
        first, self._best = self._best is None, self._best or {}
        sign = -1.0 if study.spec.objective.maximize else 1.0
        for o in progress.optimizers:
            if o.best is None or sign * o.best >= sign * self._best.get(o.optimizer, sign * math.inf):
                continue
            self._best[o.optimizer] = o.best
            if not first:
                setting = o.best_setting or {}
                self.say(f"{o.optimizer}: new best {o.best:.4g} at {setting_text(setting)} (trial {setting['trial']})")

    def _say_line(self, progress: StudyProgress, rate: float, now: float) -> None:
        pause = max(LINE_SECONDS, (now - self._started) / 12)
        self._line_at = now + min(pause, LONGEST_LINE_SECONDS)
        line = f"{self._name}: {', '.join([*_pace(progress, rate), *_crew(progress)])}"
        if line != self._line:
            self._line = line
            self.say(line)


def progress_view(study: StudyRecord, progress: StudyProgress, rate: float, with_workers: bool) -> RenderableType:
    """The whole page: what each optimizer has come to, how fast it goes, who works; it fits 80 columns.

    Args:
        study: the study.
        progress: how far it is.
        rate: trials that end per second.
        with_workers: whether each worker has a line.
    """
    parts: list[RenderableType] = [progress_table(progress, study.spec.reference)]
    if progress.phase != "done":
        done, tickets = _of_phase(progress)
        row = Table.grid(padding=(0, 2, 0, 0), expand=False)
        row.add_row(ProgressBar(total=tickets, completed=done, width=24), ", ".join(_pace(progress, rate)))
        parts += [row, ", ".join(_crew(progress))]
    if with_workers and progress.workers:
        parts += ["", workers_table(progress)]
    return Group(*parts)


def _of_phase(progress: StudyProgress) -> tuple[int, int]:
    """Trials done, and all there are, of the phase that the study is in; of the whole study once it is done."""
    confirm = progress.confirm
    match progress.phase:
        case "search":
            return progress.done - confirm.done, progress.tickets - confirm.tickets
        case "confirm":
            return confirm.done, confirm.tickets
    return progress.done, progress.tickets


def _pace(progress: StudyProgress, rate: float) -> list[str]:
    """Such as `search 12/64 trials`, `1.5/s`, `about 0:35 left`: of this phase, as each goes at a speed of its own."""
    done, tickets = _of_phase(progress)
    parts = [f"{progress.phase} {done}/{tickets} trials"]
    if progress.phase != "done" and rate > 0:
        parts.append(f"{rate:.1f}/s" if rate >= 0.1 else f"{60 * rate:.1f}/min")
        parts.append(f"about {clock((tickets - done) / rate)} left")
    return parts


def _crew(progress: StudyProgress) -> list[str]:
    """Such as `2 workers`, `64 slots`."""
    at_work = [w for w in progress.workers if w.state == "running"]
    if progress.phase == "done":
        return []
    workers = "1 worker" if len(at_work) == 1 else f"{len(at_work)} workers" if at_work else "no worker yet"
    slots = sum(w.slots for w in at_work)
    return [workers, *([f"{slots} slots"] if slots else [])]


def clock(seconds: float) -> str:
    """Such as `0:35` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
