"""Seconds for a whole study, with its database and MLflow, from the command to the end.

Run by hand; nothing is asserted, as times are the machine's:

    python tests/benchmarks/study.py
    python tests/benchmarks/study.py --trials 16 --way momentum-tuner optuna-median
    python tests/benchmarks/study.py --json > rows.json

All ways have the same task, space, budget of trials and epochs, initial weights and order of the data, and one process
per core with one thread each (`peers.py`).

- momentum-tuner: `momentum-tuner run` on SQLite and an MLflow on SQLite, without a confirmation.
- optuna-example: a loop as the documentations of Optuna and MLflow teach it. The processes share a study in one
  SQLite file, `MaxTrialsCallback` holds the budget, each epoch is reported to the MedianPruner, and logged to a run in
  an MLflow on SQLite. Training is as in Optuna's example for PyTorch, with a DataLoader and the optimizer as it comes.
- optuna-median, optuna-hyperband: the same with the fastest plain loop for training, data in memory, and by pruner.
- momentum-tuner-whole, optuna-whole: the same without pruning, if asked for.
- ray-asha: Ray Tune with ASHA and random search, the same loop as its trainable, one CPU per trial. No MLflow. It takes
  seconds for a trial: `--ray-trials` gives it fewer, and then seconds per trial are compared.

`--json` has too how many trials were within 1% of the best objective known, which `time_to_best.py` waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from output import Output, at_least, command_line
from peers import HERE, SUBJECTS
from rich.box import SIMPLE_HEAD
from rich.table import Table

USUAL = ("momentum-tuner", "optuna-example", "optuna-median", "optuna-hyperband", "ray-asha")
WAYS = (*USUAL, "momentum-tuner-whole", "optuna-whole")
KNOWN = HERE / "best_known.json"
NEAR = 1.01


@dataclass(frozen=True)
class Row:
    """What one way took; `ratio` is its seconds per trial over momentum-tuner's, where that was measured.

    `near_best` is how many trials were within 1% of the best objective known.
    """

    task: str
    way: str
    trials: int
    seconds: float
    seconds_per_trial: float
    ratio: float | None
    best_loss: float
    near_best: int


def measure(way: str, task: str, trials: int) -> tuple[float, list[float]]:
    """Seconds that a study takes, and the best validation loss of each trial that had one after an epoch."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        started = time.perf_counter()
        command = [sys.executable, str(HERE / "peers.py"), way, task, folder, str(trials), "0"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return seconds, losses_of(way, Path(folder))


def is_ours(way: str) -> bool:
    """Whether a way is momentum-tuner's."""
    return way.startswith("momentum-tuner")


def store_of(way: str) -> tuple[str, str]:
    """The SQLite file of a way, and a query of its epochs: trial, loss, and when it was stored, in s since 1970."""
    if is_ours(way):
        return "study.db", "SELECT ticket_id AS trial, valid_loss AS loss, recorded_at AS stored FROM epochs"
    epochs = "SELECT run_uuid AS trial, value AS loss, timestamp / 1000.0 AS stored FROM metrics"
    return "mlflow.db", f"{epochs} WHERE key = 'valid_loss'"


def losses_of(way: str, folder: Path) -> list[float]:
    """The least validation loss in the record of each trial."""
    if way == "ray-asha":
        records = [file.read_text().splitlines() for file in folder.glob("**/result.json")]
        return [min(float(json.loads(line)["valid_loss"]) for line in lines) for lines in records if lines]
    file, epochs = store_of(way)
    with sqlite3.connect(folder / file) as connection:
        found = connection.execute(f"SELECT MIN(loss) FROM ({epochs}) GROUP BY trial")
        return [float(loss) for (loss,) in found if loss is not None]


def table_of(rows: list[Row]) -> Table:
    """The rows as a person reads them."""
    table = Table(title=rows[0].task, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("way", min_width=max(len(row.way) for row in rows))
    for name in ("trials", "seconds", "seconds per trial", "times ours", "best loss"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.1f}"
        loss = f"{row.best_loss:.4f}"
        table.add_row(row.way, str(row.trials), f"{row.seconds:.1f}", f"{row.seconds_per_trial:.3f}", ratio, loss)
    return table


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--task", choices=SUBJECTS, default="digits_mlp")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=USUAL)
    parser.add_argument("--trials", type=at_least(int, 1), default=192)
    parser.add_argument("--ray-trials", type=at_least(int, 1), default=None, help="of Ray Tune, if not as many")
    return parser.parse_args()


def main() -> None:
    """Measure, print."""
    asked = arguments()
    os.environ.update({"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"})
    out = Output(asked.json)
    rows: list[Row] = []
    near = NEAR * float(json.loads(KNOWN.read_text())[asked.task]["best"])
    ours: float | None = None
    for way in dict.fromkeys(asked.way):
        trials = asked.ray_trials or asked.trials if way == "ray-asha" else asked.trials
        with out.aside.status(way):
            seconds, losses = measure(way, asked.task, trials)
        each = seconds / trials
        ours = each if way == "momentum-tuner" else ours
        ratio = None if ours is None else each / ours
        rows.append(
            Row(asked.task, way, trials, seconds, each, ratio, min(losses), sum(loss <= near for loss in losses))
        )
    out.table(table_of(rows))
    out.end(rows)


if __name__ == "__main__":
    main()
