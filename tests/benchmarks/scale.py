"""Trials per second, and how far MLflow lags behind, for more and more workers on one PostgreSQL.

Run by hand; nothing is asserted, as times are the machine's:

    python tests/benchmarks/scale.py
    python tests/benchmarks/scale.py --workers 1 8 64 --slots 4
    python tests/benchmarks/scale.py --json > rows.json

Workers are processes, as the launcher's are, forked by the nursery of the tests, which keeps 64 of them small. Their
steps wait and compute next to nothing (`sleepy_task.py`), as if each had a GPU: what is measured is the database and
the bookkeeping, not two cores that 64 workers share. One publisher shows the trials in an MLflow on SQLite, as `run`
has it. The server keeps all of its safety on. `ideal` is the rate at which slots would end trials if nothing but their
steps took time; the lag is from the end of a trial to when it is noted as shown, as it is seen five times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from output import Output, at_least, command_line
from rich.box import SIMPLE_HEAD
from rich.table import Table
from servers import postgresql

from momentum_tuner.database import Database, Ticket, migrate
from momentum_tuner.search import design
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import StudyRecord, find_study, submit_study
from momentum_tuner.worker_options import WorkerOptions

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.chaos.processes import Nursery  # noqa: E402

CONNECTIONS = 3
"""Most that a worker holds."""
EPOCHS, STEPS, STEP_SECONDS = 5, 4, 0.1
ROUNDS = 5
"""Trials of a slot."""
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Row:
    """What so many workers did; `share` is trials per second over what the waiting steps alone would allow."""

    workers: int
    trials: int
    trials_per_second: float
    share: float
    lag_median: float
    lag_95: float
    connections: int
    lost: int
    doubled: int


def make_spec(name: str, trials: int) -> StudySpec:
    """A study whose trials all run to their end."""
    return StudySpec.model_validate(
        {
            "name": name,
            "task": {
                "factory": "sleepy_task.py:build",
                "params": {"step_seconds": STEP_SECONDS, "steps": STEPS},
            },
            "optimizers": ["momentum"],
            "space": {
                "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
                "momentum": {"low": 0.0, "high": 0.99},
            },
            "pruner": {"name": "none"},
            "confirm": {"seeds": 0},
            "budget": {"trials": trials, "epochs": EPOCHS},
        }
    )


@contextmanager
def publisher(url: str, study: str, folder: Path) -> Iterator[None]:
    """A publisher's process, as the launcher starts it."""
    command = [sys.executable, "-m", "momentum_tuner.launcher.process", "publisher"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, cwd=folder)
    assert process.stdin is not None
    order = {"studies": [study], "tracking_uri": f"sqlite:///{folder / 'mlflow.db'}"}
    process.stdin.write(json.dumps({**order, "storage": url, "log_level": 30}) + "\n")
    process.stdin.flush()
    try:
        yield
    finally:
        process.stdin.close()
        process.wait()


def measure(url: str, workers: int, slots: int, folder: Path) -> Row:
    """One study by so many workers."""
    database = Database(url)
    spec = make_spec(f"scale-{workers}", workers * slots * ROUNDS)
    study = submit_study(database, spec, str(HERE), lambda optimizer: design(spec, optimizer))
    options = WorkerOptions(studies=(spec.name,), slots=slots, threads=1, trust=(str(HERE / "sleepy_task.py"),))
    nursery = Nursery(folder)
    try:
        with publisher(url, spec.name, folder):
            started = [nursery.start_worker(url, options) for _ in range(workers)]
            lags, connections = watch(database, study)
        for process in started:
            if nursery.ended(process, 120):
                raise RuntimeError(process.said())
    finally:
        nursery.close()
    row = row_of(database, study, workers, slots, lags, connections)
    database.close()
    return row


def watch(database: Database, study: StudyRecord) -> tuple[list[float], int]:
    """Until all is done and shown: the lag of each trial, and the most connections that were seen."""
    seen: dict[int, float] = {}
    most = 0
    mine = sa.select(Ticket.id, Ticket.finished_at).where(
        Ticket.study_id == study.id, Ticket.published_outcome.is_not(None)
    )
    while True:
        time.sleep(LOOK_SECONDS)
        with database.read() as session:
            now = time.time()  # the server's clock is this machine's
            for ticket, finished_at in session.execute(mine):
                seen.setdefault(ticket, now - (finished_at or now))
            most = max(
                most, session.scalar(sa.text("SELECT count(*) FROM pg_stat_activity WHERE usename = 'postgres'"))
            )
        if find_study(database, study.name).phase == "done" and len(seen) >= study.spec.budget.trials:
            return list(seen.values()), most


def row_of(
    database: Database, study: StudyRecord, workers: int, slots: int, lags: list[float], connections: int
) -> Row:
    """What the database says of a study that is done."""
    with database.read() as session:
        times = session.execute(
            sa.select(sa.func.min(Ticket.started_at), sa.func.max(Ticket.finished_at), sa.func.count()).where(
                Ticket.study_id == study.id, Ticket.outcome == "complete"
            )
        ).one()
        told = session.scalar(
            sa.text(
                "SELECT count(*) FROM trials JOIN studies USING (study_id) "
                "WHERE study_name = :name AND state = 'COMPLETE'"
            ),
            {"name": f"{study.name}/momentum"},
        )
        records = session.scalar(
            sa.text(
                "SELECT count(*) FROM epochs JOIN tickets ON tickets.id = epochs.ticket_id WHERE tickets.study_id = :id"
            ),
            {"id": study.id},
        )
    trials = study.spec.budget.trials
    rate = trials / (times[1] - times[0])
    return Row(
        workers=workers,
        trials=trials,
        trials_per_second=rate,
        share=rate / (workers * slots / (EPOCHS * STEPS * STEP_SECONDS)),
        lag_median=statistics.median(lags),
        lag_95=statistics.quantiles(lags, n=20)[-1],
        connections=connections,
        lost=trials - times[2] + trials * (EPOCHS + 1) - records,
        doubled=told - trials,
    )


def table_of(rows: list[Row], slots: int) -> Table:
    """The rows as a person reads them."""
    table = Table(title=f"{slots} slots each, PostgreSQL", title_justify="left", box=SIMPLE_HEAD)
    for name in ("workers", "trials", "per s", "ideal", "lag", "95%", "links", "lost", "double"):
        table.add_column(name, justify="right")
    for row in rows:
        lags = (f"{lag:.1f} s" for lag in (row.lag_median, row.lag_95))
        counts = (str(n) for n in (row.connections, row.lost, row.doubled))
        rate = f"{row.trials_per_second:.1f}"
        table.add_row(str(row.workers), str(row.trials), rate, f"{row.share:.0%}", *lags, *counts)
    return table


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    count = at_least(int, 1)
    parser.add_argument("--workers", nargs="+", type=count, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--slots", type=count, default=4, help="of each worker")
    return parser.parse_args()


def main() -> None:
    """Measure, print."""
    asked = arguments()
    os.environ.update({"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"})
    out = Output(asked.json)
    rows = []
    with postgresql(max(asked.workers) * CONNECTIONS + 30) as url:
        database = Database(url)
        migrate(database)
        database.close()
        for workers in dict.fromkeys(asked.workers):
            with tempfile.TemporaryDirectory() as folder, out.aside.status(f"{workers} workers"):
                rows.append(measure(url, workers, asked.slots, Path(folder)))
    out.table(table_of(rows, asked.slots))
    out.end(rows)


if __name__ == "__main__":
    main()
