"""The page that `run` and `status --watch` share, and the lines where no page can be drawn."""

import io
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from rich.console import Console

from momentum_tuner.cli import progress as module
from momentum_tuner.cli.progress import ProgressPage, clock, progress_view
from momentum_tuner.database import Study, Ticket, Worker, database_now
from momentum_tuner.tickets import (
    KindProgress,
    OptimizerProgress,
    StudyProgress,
    WorkerProgress,
    recent_rate,
    submit_study,
)

SETTING = {"trial": 999, "learning_rate": 3.14159e-05, "momentum": 0.9995}


@pytest.fixture
def study(sqlite_database, make_spec):
    return submit_study(sqlite_database, make_spec(), None, lambda _: None)


def finish(database, study, position, value, outcome="complete", optimizer="momentum", seconds_ago=1.0):
    with database.write() as session:
        now = session.scalar(sa.select(database_now()))
        ticket = session.scalars(
            sa.select(Ticket).where(
                Ticket.study_id == study.id, Ticket.optimizer == optimizer, Ticket.position == position
            )
        ).first()
        ticket.state, ticket.outcome, ticket.value, ticket.trial_number = "done", outcome, value, position
        ticket.settings = {"learning_rate": 0.1 * (position + 1), "momentum": 0.9}
        ticket.finished_at = now - seconds_ago


def add_worker(database, study, name, seconds_ago, state="running"):
    with database.write() as session:
        now = session.scalar(sa.select(database_now()))
        session.add(
            Worker(
                id=name,
                study_id=study.id,
                host="h",
                node="h",
                pid=1,
                device="cpu",
                slots=32,
                state=state,
                started_at=now - seconds_ago,
                heartbeat=now,
            )
        )


def set_phase(database, study, phase):
    with database.write() as session:
        session.execute(sa.update(Study).where(Study.id == study.id).values(phase=phase))


@pytest.fixture
def page(sqlite_database, study, monkeypatch, capsys):
    """A page on standard output that is no terminal, and the time as it sees it."""
    watch = SimpleNamespace(now=1000.0, page=None)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: watch.now))

    def after(seconds, of=study):
        watch.now += seconds
        watch.page = watch.page or ProgressPage(sqlite_database, of.name)
        watch.page.update(of)
        return capsys.readouterr().out.splitlines()

    watch.after = after
    return watch


# The view


@pytest.mark.parametrize("phase", ["search", "confirm", "done"])
def test_the_page_fits_80_columns_with_long_names_and_large_numbers(study, phase):
    names = ("momentum_classic", "nesterov_lookahead", "sgd")
    optimizers = tuple(
        OptimizerProgress(name, 1000, 1000, 128, 100, 800, 100, 0, 0.00012345, SETTING) for name in names
    )
    workers = tuple(
        WorkerProgress(f"machine-{i}-abc", "machine", "machine", "cuda:0", 64, "running", 1.5) for i in (1, 2)
    )
    found = StudyProgress("s", phase, optimizers, KindProgress(1000, 999, 1), KindProgress(40, 12, 28), workers)
    out = io.StringIO()
    Console(file=out, width=80).print(progress_view(study, found, 123.4, with_workers=True))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = out.getvalue()
    assert "…" not in text
    for whole in (*names, "1000/1000", "128", "800", "0.0001234", "lr=3.14e-05", "beta=0.9995", "999/1000", "12/40"):
        assert re.search(rf"(?<!\S){re.escape(whole)}(?!\S)", text), whole
    shown = {
        "search": "search 3999/4000 trials, 123.4/s, about 0:00 left",
        "confirm": "confirm 12/40 trials, 123.4/s, about 0:00 left",
    }
    assert ("2 workers, 128 slots" in text) == (phase != "done")
    assert phase == "done" or shown[phase] in text


def test_times_read_as_clocks_do():
    assert [clock(s) for s in (0, 8.6, 75, 3600, 3661)] == ["0:00", "0:09", "1:15", "1:00:00", "1:01:01"]


# How fast it goes


def test_the_rate_is_over_the_last_minute_or_since_the_first_worker_came(sqlite_database, study):
    for position, seconds_ago in enumerate((5, 15, 50, 90)):
        finish(sqlite_database, study, position, 1.0, seconds_ago=seconds_ago)
    assert recent_rate(sqlite_database, study.id) == pytest.approx(3 / 60)
    add_worker(sqlite_database, study, "a", 20)
    add_worker(sqlite_database, study, "b", 10)
    add_worker(sqlite_database, study, "ended", 1000, state="stopped")
    assert recent_rate(sqlite_database, study.id) == pytest.approx(2 / 20, rel=0.05)


# Lines


def test_lines_come_at_growing_intervals_and_only_when_something_changed(sqlite_database, study, page):
    assert page.after(0) == ["digits-mlp: search 0/12 trials, no worker yet"]
    add_worker(sqlite_database, study, "a", 4)
    assert page.after(1) == []
    (line,) = page.after(4)
    assert line == "digits-mlp: search 0/12 trials, 1 worker, 32 slots"
    assert page.after(5) == []
    finish(sqlite_database, study, 0, 0.5, outcome="pruned")
    (line,) = page.after(5)
    assert re.fullmatch(r"digits-mlp: search 1/12 trials, 0\.2/s, about \d:\d\d left, 1 worker, 32 slots", line)
    page.after(585)  # ten minutes in, a line comes every 50 s
    finish(sqlite_database, study, 1, 0.5, outcome="pruned")
    assert page.after(45) == []
    assert len(page.after(6)) == 1


def test_each_new_best_gets_a_line_but_not_those_from_before_the_page(sqlite_database, study, page):
    finish(sqlite_database, study, 0, 0.5)
    assert not any("new best" in line for line in page.after(0))
    finish(sqlite_database, study, 1, 0.25)
    assert "momentum: new best 0.25 at lr=0.2 beta=0.9 (trial 1)" in page.after(1)
    finish(sqlite_database, study, 2, 0.75)
    assert page.after(1) == []
    finish(sqlite_database, study, 0, 0.125, optimizer="sgd")
    assert any(line.startswith("sgd: new best 0.125") for line in page.after(1))


def test_more_is_better_where_the_study_maximizes(sqlite_database, make_spec, page):
    spec = make_spec(name="up", objective={"metric": "valid_accuracy", "direction": "maximize"})
    up = submit_study(sqlite_database, spec, None, lambda _: None)
    page.after(0, up)
    finish(sqlite_database, up, 0, 0.5)
    assert any("new best 0.5 " in line for line in page.after(1, up))
    finish(sqlite_database, up, 1, 0.25)
    assert page.after(1, up) == []
    finish(sqlite_database, up, 1, 0.75)
    assert page.after(1, up) == ["momentum: new best 0.75 at lr=0.2 beta=0.9 (trial 1)"]


def test_a_new_phase_gets_a_line_at_once(sqlite_database, study, page):
    page.after(0)
    set_phase(sqlite_database, study, "done")
    assert page.after(1) == ["digits-mlp: done 0/12 trials"]


def test_an_outage_is_said_once_and_the_page_goes_on(sqlite_database, study, page, tmp_path):
    page.after(0)
    sqlite_database.close()
    shutil.move(tmp_path / "momentum_tuner.db", tmp_path / "away.db")
    (tmp_path / "momentum_tuner.db").mkdir()  # a database that cannot be opened
    (said,) = page.after(10)
    assert "does not answer" in said
    assert page.after(10) == []
    (tmp_path / "momentum_tuner.db").rmdir()
    shutil.move(tmp_path / "away.db", tmp_path / "momentum_tuner.db")
    finish(sqlite_database, study, 0, 0.5)
    assert any("1/12" in line for line in page.after(10))


# On a terminal


class Terminal:
    """`status --watch` of a study on a terminal of 80 columns."""

    def __init__(self, database, environment):
        self.ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "momentum_tuner", "status", "--watch", "--storage", database.text]
        mine = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
        mine |= {"COLUMNS": "80", "LINES": "30", **environment}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=mine)
        os.close(theirs)
        self.text = ""

    def read_until(self, wanted, seconds=30):
        deadline = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self.ours], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.ours, 10_000).decode()
                except OSError:  # it has ended
                    break
        assert wanted in self.text

    def end(self):
        self.process.wait(30)
        while select.select([self.ours], [], [], 0)[0]:
            try:
                self.text += os.read(self.ours, 10_000).decode()
            except OSError:
                break
        os.close(self.ours)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)


@pytest.fixture
def terminals():
    started = []

    def start(*arguments):
        started.append(Terminal(*arguments))
        return started[-1]

    yield start
    for terminal in started:
        terminal.process.kill()
        terminal.process.wait()


@pytest.mark.parametrize(
    ("environment", "moves", "colours"),
    [
        ({"TERM": "xterm-256color"}, True, True),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
    ],
    ids=["colours", "NO_COLOR", "dumb"],
)
def test_watch_draws_a_page_where_the_terminal_can_and_ends_with_the_study(
    sqlite_database, study, terminals, environment, moves, colours
):
    terminal = terminals(sqlite_database, environment)
    terminal.read_until("search 0/12 trials")
    finish(sqlite_database, study, 3, 0.25)
    terminal.read_until("momentum: new best 0.25 at lr=0.4 beta=0.9 (trial 3)")
    set_phase(sqlite_database, study, "done")
    terminal.read_until("digits-mlp: done")
    plain = terminal.end()
    assert terminal.process.returncode == 0
    assert ("\x1b[?25l" in terminal.text) == moves  # the cursor is hidden while a page is drawn
    assert bool(re.search(r"\x1b\[[0-9;]*(3[0-7]|38;5;\d+)m", terminal.text)) == colours
    assert moves or "\x1b" not in terminal.text
    assert max(len(line.rstrip()) for line in plain.replace("\r", "\n").splitlines()) <= 80
