"""Bookkeeping per trial, part by part, in studies of growing size: what it costs besides training.

Run by hand; nothing is asserted, as times are the machine's:

    python tests/benchmarks/overhead.py
    python tests/benchmarks/overhead.py --database sqlite --trials 100 1000
    python tests/benchmarks/overhead.py --json > rows.json

Before each measurement the study is filled with so many finished trials, by the same calls but for the sampler, whose
part is drawn at random. Then `--slots` trials of 20 epochs with 6 measures each go all the way that a worker takes
them, in batches as it does, and are published to an MLflow on SQLite. `without publish` is the sum of the other parts.
What is measured is the time on the wall of one worker alone with its database.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import sqlalchemy as sa
from output import Output, at_least, command_line
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from servers import postgresql

from momentum_tuner.database import Database, Ticket, migrate
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.search import TICKET, Search, design
from momentum_tuner.space import settings
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import (
    Claim,
    Result,
    StudyRecord,
    WorkerIdentity,
    begin_finish,
    claim,
    end_finish,
    record_epochs,
    register_worker,
    set_trials,
    submit_study,
    with_trial,
)
from momentum_tuner.tracking import Publisher, quiet_mlflow

DATABASES = ("sqlite", "postgresql")
EPOCHS = 20
PLACE = "momentum"
FILLED_AT_ONCE = 250
PARTS = ("claim", "ask", "report", "record", "tell", "publish")


@dataclass(frozen=True)
class Row:
    """Milliseconds per trial of one part, in a study of so many trials."""

    database: str
    trials: int
    part: str
    milliseconds: float


def make_spec(trials: int) -> StudySpec:
    """A study of one optimizer with pruning, as `init` writes it, with room for so many trials."""
    return StudySpec.model_validate(
        {
            "name": "overhead",
            "task": {"factory": "momentum_tuner.tasks:digits_mlp"},
            "optimizers": [PLACE],
            "space": {
                "learning_rate": {"low": 1e-4, "high": 1.0, "log": True},
                "momentum": {"low": 0.0, "high": 0.999},
            },
            "budget": {"trials": trials, "epochs": EPOCHS},
        }
    )


class Bench:
    """A worker's bookkeeping on a database of its own.

    Args:
        url: of the database.
        folder: for MLflow.
        trials: that the study has in all.
    """

    def __init__(self, url: str, folder: Path, trials: int) -> None:
        self.database = Database(url)
        migrate(self.database)
        self.spec = make_spec(trials)
        self.study: StudyRecord = submit_study(self.database, self.spec, ".", lambda name: design(self.spec, name))
        self.worker = WorkerIdentity.of_this_process()
        register_worker(self.database, self.worker, "cpu")
        self.search = Search(self.database, self.spec)
        self.publisher = Publisher(self.database, self.study, f"sqlite:///{folder / 'mlflow.db'}", "overhead")
        self.rungs = sorted(self.spec.rungs())
        self.generator = np.random.default_rng(0)
        self.done = 0
        self.seconds: dict[str, float] = {}

    def close(self) -> None:
        """Give the connections back."""
        self.publisher.close()
        self.search.close()
        self.database.close()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add what is done meanwhile to a part."""
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def fill(self, trials: int) -> None:
        """Bring the study to so many finished and published trials."""
        while self.done < trials:
            held = self._claim(min(FILLED_AT_ONCE, trials - self.done))
            held = [self._drawn(one) for one in held]
            self._settle(held)
            with self.database.write() as session:
                shown = {"published_epoch": EPOCHS, "published_outcome": "complete"}
                session.execute(sa.update(Ticket).where(Ticket.state == "done").values(shown))

    def measure(self, slots: int) -> dict[str, float]:
        """Seconds per trial of each part, for so many trials at once."""
        self.publisher.publish()  # the parent run, and what MLflow has
        self.seconds = {}
        with self.timed("claim"):
            held = self._claim(slots)
        with self.timed("ask"):
            asked = self.search.ask_all([(PLACE, one.ticket_id, one.fixed) for one in held])
            for i, (one, trial) in enumerate(zip(held, asked, strict=True)):
                assert trial is not None
                held[i] = with_trial(one, trial.trial_id, trial.number, trial.settings)
            set_trials(self.database, held, list(range(slots)))
        self._settle(held)
        with self.timed("publish"):
            shown = self.publisher.publish()
        if shown.trials != slots:
            raise RuntimeError(f"{shown.trials} of {slots} trials were published")
        return {part: self.seconds[part] / slots for part in PARTS}

    def _claim(self, count: int) -> list[Claim]:
        held = claim(self.database, self.study.id, self.worker.id, count, max_attempts=self.spec.max_attempts)
        if len(held) != count:
            raise RuntimeError(f"{len(held)} of {count} tickets were claimed")
        self.done += count
        return held

    def _drawn(self, one: Claim) -> Claim:
        """A trial with parameters drawn at random, as the sampler would have entered it."""
        space = self.search._distributions[PLACE]
        sampled = {}
        for name, distribution in space.items():
            assert isinstance(distribution, optuna.distributions.FloatDistribution)
            sampled[name] = float(np.exp(self.generator.uniform(np.log(distribution.low), np.log(distribution.high))))
        template = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params=sampled,
            distributions=space,
            user_attrs={TICKET: one.ticket_id},
        )
        (made,) = self.search._storage.create_trials([(self.search._study(PLACE)._study_id, template)])
        return with_trial(one, made._trial_id, made.number, settings(self.spec, PLACE, sampled))

    def _settle(self, held: Sequence[Claim]) -> None:
        """From the first record to the end of the tickets."""
        set_trials(self.database, held, list(range(len(held))))
        offsets = {one.ticket_id: float(self.generator.uniform(0.1, 1.0)) for one in held}
        for epoch in range(EPOCHS + 1):
            records = [(one, record_of(epoch, offsets[one.ticket_id])) for one in held]
            with self.timed("record"):
                record_epochs(self.database, records)
            if epoch in self.rungs:
                with self.timed("report"), self.search.batch():
                    for one, record in records:
                        assert one.trial_id is not None and record.valid_loss is not None
                        self.search.report(one.place, one.trial_id, epoch, record.valid_loss)
                        self.search.should_prune(one.place, one.trial_id)
        results = [(one, Result("complete", offsets[one.ticket_id], {"final_valid_loss": 0.1})) for one in held]
        with self.timed("tell"):
            begin_finish(self.database, results)
            with self.search.batch():
                for one, result in results:
                    assert one.trial_id is not None
                    self.search.tell(one.place, one.trial_id, result.outcome, result.value)
            end_finish(self.database, held)


def record_of(epoch: int, offset: float) -> EpochRecord:
    """A record with six measures."""
    loss = offset + 1.0 / (1 + epoch)
    return EpochRecord(
        epoch, 22 * epoch, loss, loss, grad_norm=loss, update_norm=0.1, oscillation=0.5, metrics={"accuracy": 0.9}
    )


@contextmanager
def database_url(kind: str, folder: Path) -> Iterator[str]:
    """A new database; PostgreSQL's server is started for it, with all of its safety on."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'study.db'}"
        return
    with postgresql() as url:
        yield url


def measure(kind: str, sizes: Sequence[int], slots: int, rounds: int, console: Console) -> list[Row]:
    """The rows of one database; of each part the median over the rounds."""
    rows = []
    # MLflow puts files beside: so into the folder.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), database_url(kind, Path(folder)) as url:
        bench = Bench(url, Path(folder), max(sizes) + rounds * slots * len(sizes))
        try:
            for size in sizes:
                with console.status(f"{kind}: {size} trials"):
                    bench.fill(size)
                    found = [bench.measure(slots) for _ in range(rounds)]
                parts = {part: 1000.0 * statistics.median(one[part] for one in found) for part in PARTS}
                parts["without publish"] = sum(value for part, value in parts.items() if part != "publish")
                rows += [Row(kind, size, part, value) for part, value in parts.items()]
        finally:
            bench.close()
    return rows


def table_of(kind: str, rows: Sequence[Row]) -> Table:
    """Parts by the size of the study."""
    table = Table(title=f"{kind}, ms per trial", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("trials in the study", justify="right")
    for part in dict.fromkeys(row.part for row in rows):
        table.add_column(part, justify="right")
    for size in dict.fromkeys(row.trials for row in rows):
        table.add_row(f"{size:,}", *(f"{row.milliseconds:.1f}" for row in rows if row.trials == size))
    return table


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    count = at_least(int, 1)
    parser.add_argument("--database", nargs="+", choices=DATABASES, default=DATABASES)
    parser.add_argument("--trials", nargs="+", type=count, default=[100, 1_000, 10_000], help="in the study")
    parser.add_argument("--slots", type=count, default=64, help="trials at once")
    parser.add_argument("--rounds", type=count, default=3, help="batches at each size")
    return parser.parse_args()


def main() -> None:
    """Measure, print."""
    asked = arguments()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    quiet_mlflow()
    out = Output(asked.json)
    rows = []
    for kind in asked.database:
        found = measure(kind, sorted(set(asked.trials)), asked.slots, asked.rounds, out.aside)
        rows += found
        out.table(table_of(kind, found))
    out.end(rows)


if __name__ == "__main__":
    main()
