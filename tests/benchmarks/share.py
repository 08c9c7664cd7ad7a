"""How much of its rate training keeps with database, search and MLflow, against the bare trainer.

Run by hand; nothing is asserted, as times are the machine's:

    python tests/benchmarks/share.py
    python tests/benchmarks/share.py --hidden 64 --epochs 20 --trials 256
    python tests/benchmarks/share.py --json > rows.json

Both ways train the same number of trials of digits_mlp to their end, with one process per core and as many slots each,
eager, refilled as trials end, and measure the sharpness of each. `bare` is the trainer in a loop, in memory;
`momentum-tuner` is `momentum-tuner run` with an SQLite file and an MLflow on SQLite, which is written meanwhile. The
rate is trial-steps per second from the first trial's start to the last one's end; starting and ending processes is not
in it. The ways take turns; `share` is the median of the ratios of the rounds. A trial's cost is seconds of the
whole machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from output import Output, at_least, command_line
from rich.box import SIMPLE_HEAD
from rich.table import Table

from momentum_tuner.launcher.devices import available_cores

BATCH_SIZE = 64
LOWEST, HIGHEST = 1e-4, 1e-2


@dataclass(frozen=True)
class Row:
    """Rates in trial-steps per second, and seconds of the machine for a trial."""

    hidden: int
    epochs: int
    trials: int
    bare: float
    momentum_tuner: float
    share: float
    seconds_per_trial: float


def train_bare(hidden: int, epochs: int, trials: int, slots: int) -> tuple[float, float, int]:
    """Train trials in a trainer's slots; when that began and ended (seconds since 1970), and the steps of a trial."""
    import numpy as np
    import torch

    from momentum_tuner.tasks import digits_mlp
    from momentum_tuner.trainer import Trainer, TrialSettings

    torch.set_num_threads(1)
    trainer = Trainer(digits_mlp(hidden=hidden), epochs=epochs, slots=slots, mode="fused", batch_size=BATCH_SIZE)
    rates = iter(np.geomspace(LOWEST, HIGHEST, trials).tolist())
    begun = time.time()
    ended, admitted = 0, 0
    while ended < trials:
        while trainer.free and admitted < trials:
            settings = TrialSettings("nesterov", {"learning_rate": next(rates), "momentum": 0.9}, BATCH_SIZE, 0)
            trainer.admit(admitted, settings)
            admitted += 1
        through = [key for key, record in trainer.train_epoch() if record.epoch == epochs]
        trainer.sharpness(through)
        for key in through:
            trainer.release(key)
        ended += len(through)
    return begun, time.time(), epochs * trainer.steps_per_epoch(BATCH_SIZE)


def rate_bare(hidden: int, epochs: int, trials: int, slots: int) -> tuple[float, float]:
    """Trial-steps per second of one process per core, and seconds of the machine for a trial."""
    cores = available_cores()
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        done = pool.starmap(train_bare, [(hidden, epochs, trials // cores, slots)] * cores)
    begun, ended, steps = zip(*done, strict=True)
    each = (max(ended) - min(begun)) / (trials // cores * cores)
    return steps[0] / each, each


def rate_ours(hidden: int, epochs: int, trials: int, slots: int) -> float:
    """Trial-steps per second of `momentum-tuner run`."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        study = {
            "name": "study",
            "task": {"factory": "momentum_tuner.tasks:digits_mlp", "params": {"hidden": hidden}},
            "optimizers": ["nesterov"],
            "space": {"learning_rate": {"low": LOWEST, "high": HIGHEST, "log": True}},
            "fixed": {"batch_size": BATCH_SIZE, "momentum": 0.9},
            "budget": {"trials": trials, "epochs": epochs},
            "pruner": {"name": "none"},
            "confirm": {"seeds": 0},
        }
        Path(folder, "study.yaml").write_text(json.dumps(study))  # JSON is YAML
        command = [sys.executable, "-m", "momentum_tuner", "run", "study.yaml", "--compile", "off"]
        done = subprocess.run([*command, "--slots", str(slots)], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        (file,) = Path(folder).glob("momentum*.db")
        with sqlite3.connect(file) as connection:
            query = "SELECT MAX(finished_at) - MIN(started_at) FROM tickets"
            (seconds,) = connection.execute(query).fetchone()
            (steps,) = connection.execute(
                "SELECT SUM(last) FROM (SELECT MAX(step) AS last FROM epochs GROUP BY ticket_id)"
            ).fetchone()
        return float(steps / seconds)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    count = at_least(int, 1)
    parser.add_argument("--hidden", type=count, default=256, help="units of each layer")
    parser.add_argument("--epochs", type=count, default=100)
    parser.add_argument("--trials", type=count, default=32)
    parser.add_argument("--slots", type=count, default=16, help="of each process")
    parser.add_argument("--rounds", type=count, default=3)
    return parser.parse_args()


def main() -> None:
    """Measure, print."""
    asked = arguments()
    os.environ.update({"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"})
    out = Output(asked.json)
    study = (asked.hidden, asked.epochs, asked.trials, asked.slots)
    bare, each, ours = [], [], []
    for number in range(asked.rounds):
        with out.aside.status(f"round {number + 1} of {asked.rounds}"):
            rate, seconds = rate_bare(*study)
            bare.append(rate)
            each.append(seconds)
            ours.append(rate_ours(*study))
    share = statistics.median(one / other for one, other in zip(ours, bare, strict=True))
    row = Row(*study[:3], *(statistics.median(found) for found in (bare, ours)), share, statistics.median(each))
    table = Table(title="digits_mlp, trial-steps per second", title_justify="left", box=SIMPLE_HEAD)
    for name in ("hidden", "epochs", "trials", "s per trial", "bare", "momentum-tuner", "share"):
        table.add_column(name, justify="right")
    counts = (str(n) for n in study[:3])
    table.add_row(
        *counts, f"{row.seconds_per_trial:.2f}", f"{row.bare:,.0f}", f"{row.momentum_tuner:,.0f}", f"{share:.1%}"
    )
    out.table(table)
    out.end([row])


if __name__ == "__main__":
    main()
