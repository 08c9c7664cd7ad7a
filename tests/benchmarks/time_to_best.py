"""Seconds from the command until a trial is within 1% of the best objective known for the task.

Run by hand; nothing is asserted, as times are the machine's:

    python tests/benchmarks/time_to_best.py
    python tests/benchmarks/time_to_best.py --task digits_mlp --way momentum-tuner optuna-median --seeds 3 --limit 60
    python tests/benchmarks/time_to_best.py --json > rows.json
    python tests/benchmarks/time_to_best.py --find digits_mlp --trials 1000

The ways are those of `study.py`, without a bound on the trials; each run has a sampler's seed of its own, and ends when
it is there, or at `--limit` seconds: then it counts as slower than that. Once more than half of a way's runs are
slower, its median is known to be, and the rest is left out. What counts is the time at which the way's own
store has the validation loss of an epoch that is near enough (the objective of a trial is its best epoch). The loss of
a setting is the same for all ways, as initial weights and order of the data are (`peers.py`).

`best_known.json` has the best objective of a long search without pruning, by another sampler's seed, which `--find`
makes anew. A run that finds a better one says so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from output import Output, at_least, command_line
from peers import HERE, MANY, SUBJECTS
from rich.box import SIMPLE_HEAD
from rich.table import Table
from study import KNOWN, NEAR, USUAL, WAYS, losses_of, store_of

LOOK_SECONDS = 0.25
STOP_SECONDS = 20.0
FIND_SEED = 999
"""Of the sampler that looks for the best; no run has it."""


@dataclass(frozen=True)
class Row:
    """Seconds of one way; infinite where it was not there within the limit.

    `median` and `ratio` are `at_least` that where a run of those in the middle was not there. `ratio` is over
    momentum-tuner's median, if that is known. `mean` is the time of all runs over how many were there, as of something
    that comes by chance; None if none was.
    """

    task: str
    way: str
    best_known: float
    limit: float
    seconds: list[float]
    median: float
    at_least: bool
    ratio: float | None
    mean: float | None


def seconds_to(way: str, task: str, seed: int, wanted: float, limit: float) -> tuple[float, float | None]:
    """Seconds until the way is there, or infinity; and the best loss that it came to."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        begun = time.time()
        command = [sys.executable, str(HERE / "peers.py"), way, task, folder, str(MANY), str(seed)]
        with Path(folder, "log").open("w") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        found = math.inf
        try:
            while found == math.inf and time.time() < begun + limit:
                time.sleep(LOOK_SECONDS)
                found = reached(way, Path(folder), wanted)
                if process.poll() is not None:
                    raise RuntimeError(Path(folder, "log").read_text())
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        finally:  # nothing of it may run beside the next
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        best = None
        with suppress(sqlite3.OperationalError, TypeError, ValueError):
            best = min(losses_of(way, Path(folder)))
    took = found - begun
    return (took if took <= limit else math.inf), best


def reached(way: str, folder: Path, wanted: float) -> float:
    """When the way's store had such a loss (seconds since 1970), or infinity."""
    if way == "ray-asha":
        lines = (line for file in folder.glob("**/result.json") for line in file.read_text().splitlines())
        results = [json.loads(line) for line in lines]
        return min((float(r["timestamp"]) for r in results if r["valid_loss"] <= wanted), default=math.inf)
    file, epochs = store_of(way)
    if not (folder / file).exists():
        return math.inf
    with suppress(sqlite3.OperationalError):  # its tables are not made yet, or it is being written
        connection = sqlite3.connect(f"file:{folder / file}?mode=ro", uri=True, timeout=1.0)
        try:
            (when,) = connection.execute(f"SELECT MIN(stored) FROM ({epochs}) WHERE loss <= ?", (wanted,)).fetchone()
        finally:
            connection.close()
        return math.inf if when is None else float(when)
    return math.inf


def find(task: str, trials: int) -> float:
    """The best objective of a long search without pruning."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, str(HERE / "peers.py"), "momentum-tuner-whole", task, folder]
        command += [str(trials), str(FIND_SEED)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return min(losses_of("momentum-tuner", Path(folder)))


def table_of(task: str, rows: list[Row]) -> Table:
    """The rows of a task as a person reads them."""
    title = f"{task}: within 1% of {rows[0].best_known:.5f}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("way", min_width=max(len(row.way) for row in rows))
    for name in ("median", "fastest", "slowest", "there", "mean", "times ours"):
        table.add_column(name, justify="right")
    for row in rows:
        there = sum(math.isfinite(s) for s in row.seconds)
        more = "> " if row.at_least else ""
        ends = [shown_seconds(s, row.limit) for s in (min(row.seconds), max(row.seconds))]
        mean = "-" if row.mean is None else f"{row.mean:.1f} s"
        ratio = "-" if row.ratio is None else f"{more}{row.ratio:.1f}"
        table.add_row(row.way, f"{more}{row.median:.1f} s", *ends, f"{there}/{len(row.seconds)}", mean, ratio)
    return table


def median_of(seconds: list[float], runs: int, limit: float) -> tuple[float, bool]:
    """The median over so many runs, and whether only that it is above is known; those left out are over the limit."""
    all_of_them = sorted(seconds + [math.inf] * (runs - len(seconds)))
    middle = all_of_them[(runs - 1) // 2 : runs // 2 + 1]
    return statistics.fmean(min(s, limit) for s in middle), math.inf in middle


def mean_of(seconds: list[float], limit: float) -> float | None:
    """Seconds of all runs, those that were not there too, over how many were there."""
    there = sum(map(math.isfinite, seconds))
    return sum(min(s, limit) for s in seconds) / there if there else None


def is_over(seconds: list[float], runs: int) -> bool:
    """Whether the median over so many runs is above the limit, whatever those take that are left."""
    return 2 * sum(map(math.isinf, seconds)) > runs


def shown_seconds(seconds: float, limit: float) -> str:
    """Such as `7.3 s`, or `> 60 s`."""
    return f"{seconds:.1f} s" if math.isfinite(seconds) else f"> {limit:.0f} s"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--task", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--way", nargs="+", choices=WAYS, default=USUAL[:-1])
    parser.add_argument("--seeds", type=at_least(int, 1), default=10, help="runs of each way")
    parser.add_argument("--limit", type=at_least(float, 1.0), default=120.0, help="seconds of a run")
    parser.add_argument("--find", choices=SUBJECTS, help="look for the best objective of this task, and note it")
    parser.add_argument("--trials", type=at_least(int, 1), default=1000, help="of --find")
    return parser.parse_args()


def main() -> None:
    """Measure, print."""
    asked = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.update({"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"})
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    out = Output(asked.json)
    if asked.find:
        known[asked.find] = {"best": find(asked.find, asked.trials), "trials": asked.trials}
        KNOWN.write_text(json.dumps(known, indent=2) + "\n")
        out.aside.print(known[asked.find])
        return
    rows: list[Row] = []
    for task in dict.fromkeys(asked.task):
        best = float(known[task]["best"])
        seconds: dict[str, list[float]] = {way: [] for way in dict.fromkeys(asked.way)}
        least = best
        for seed in range(asked.seeds):  # in turns, as the machine may change
            for way, found in seconds.items():
                if is_over(found, asked.seeds):
                    continue
                with out.aside.status(f"{task}, {way}, seed {seed}"):
                    took, came_to = seconds_to(way, task, seed, NEAR * best, asked.limit)
                found.append(took)
                least = min(least, came_to or math.inf)
                out.aside.print(f"{task}, {way}, seed {seed}: {shown_seconds(took, asked.limit)}, best {came_to}")
        medians = {way: median_of(found, asked.seeds, asked.limit) for way, found in seconds.items()}
        ours, unknown = medians.get("momentum-tuner", (math.inf, True))
        mine = [
            Row(
                task,
                way,
                best,
                asked.limit,
                found,
                *medians[way],
                None if unknown else medians[way][0] / ours,
                mean_of(found, asked.limit),
            )
            for way, found in seconds.items()
        ]
        out.table(table_of(task, mine))
        if least < best:
            out.line(f"a run came to {least:.5f}, below the best known: --find {task}")
        rows += mine
    out.end(rows)


if __name__ == "__main__":
    main()
