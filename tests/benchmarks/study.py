"""Seconds for a whole study of digits_mlp, with its database and MLflow, from the command to the end.

Run by hand; nothing is asserted, as times are the machine's:

    python tests/benchmarks/study.py
    python tests/benchmarks/study.py --trials 16 --way momentum-tuner optuna-median
    python tests/benchmarks/study.py --json > rows.json

All ways have the same task, space, budget of trials and epochs, and one process per core with one thread each.

- momentum-tuner: `momentum-tuner run` on SQLite and an MLflow on SQLite, without a confirmation.
- optuna-median, optuna-hyperband: a loop as the documentations of Optuna and MLflow teach it. The processes share a
  study in one SQLite file, `MaxTrialsCallback` holds the budget, each epoch is reported, and logged to a run in an
  MLflow on SQLite. Training is the plain loop of `loops.py`, data in memory.
- ray-asha: Ray Tune with ASHA and random search, the same loop as its trainable, one CPU per trial. No MLflow.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from throughput import at_least, machine

from momentum_tuner.launcher.devices import available_cores

WAYS = ("momentum-tuner", "optuna-median", "optuna-hyperband", "ray-asha")
EPOCHS = 20
LOWEST, HIGHEST = 1e-4, 1.0
LEAST_REST, MOST_REST = 1e-3, 1.0
"""Bounds of the learning rate, and of 1 - momentum."""
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """What one way took; `ratio` is to momentum-tuner, where that was measured."""

    way: str
    trials: int
    seconds: float
    seconds_per_trial: float
    ratio: float | None
    best_loss: float


def validation_losses(learning_rate: float, momentum: float) -> Iterator[float]:
    """Train epoch by epoch with the plain loop; the validation loss after each."""
    import torch
    from loops import minibatches

    from momentum_tuner.tasks import digits_mlp

    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = digits_mlp()
    model = task.model()
    nesterov = momentum > 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum, nesterov=nesterov, fused=True)
    for _ in range(EPOCHS):
        model.train()
        for batch in minibatches(task):
            optimizer.zero_grad(set_to_none=True)
            task.loss(model, batch).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            loss = task.loss(model, task.valid.tensors).item()
        yield loss if math.isfinite(loss) else 1e6


def tune_with_optuna(pruner: str, folder: str, trials: int) -> None:
    """One of the processes of the Optuna and MLflow loop."""
    import mlflow
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment("study")

    def objective(trial: optuna.Trial) -> float:
        learning_rate = trial.suggest_float("learning_rate", LOWEST, HIGHEST, log=True)
        rest = trial.suggest_float("one_minus_momentum", LEAST_REST, MOST_REST, log=True)
        with mlflow.start_run(run_name=f"trial-{trial.number}"):
            mlflow.log_params(trial.params)
            for epoch, loss in enumerate(validation_losses(learning_rate, 1.0 - rest), start=1):
                mlflow.log_metric("valid_loss", loss, step=epoch)
                trial.report(loss, epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
        return loss

    study = optuna.create_study(
        study_name="study",
        storage=f"sqlite:///{folder}/optuna.db",
        pruner=optuna.pruners.MedianPruner() if pruner == "median" else optuna.pruners.HyperbandPruner(),
        load_if_exists=True,
    )
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    study.optimize(objective, callbacks=[optuna.study.MaxTrialsCallback(trials, states=states)])


def run_optuna(pruner: str, folder: Path, trials: int) -> float:
    """The processes of the Optuna and MLflow loop; returns the best loss."""
    import mlflow
    import optuna

    optuna.storages.RDBStorage(f"sqlite:///{folder}/optuna.db")  # so that the processes do not create them at once
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment("study")
    context = multiprocessing.get_context("spawn")
    arguments = (pruner, str(folder), trials)
    processes = [context.Process(target=tune_with_optuna, args=arguments) for _ in range(available_cores())]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process of the Optuna loop ended with {process.exitcode}")
    return float(optuna.load_study(study_name="study", storage=f"sqlite:///{folder}/optuna.db").best_value)


def run_ray(folder: Path, trials: int) -> float:
    """Ray Tune with ASHA; returns the best loss."""
    import ray
    from ray import tune

    def trainable(config: Mapping[str, Any]) -> None:
        sys.path.insert(0, str(HERE))
        from study import validation_losses

        for loss in validation_losses(config["learning_rate"], 1.0 - config["one_minus_momentum"]):
            tune.report({"valid_loss": loss})

    ray.init(num_cpus=available_cores(), include_dashboard=False, log_to_driver=False)
    try:
        scheduler = tune.schedulers.ASHAScheduler(metric="valid_loss", mode="min", max_t=EPOCHS, reduction_factor=3)
        space = {
            "learning_rate": tune.loguniform(LOWEST, HIGHEST),
            "one_minus_momentum": tune.loguniform(LEAST_REST, MOST_REST),
        }
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(num_samples=trials, scheduler=scheduler),
            run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
        )
        found = tuner.fit().get_best_result(metric="valid_loss", mode="min", scope="all")
        return float(found.metrics_dataframe["valid_loss"].min())
    finally:
        ray.shutdown()


def run_ours(folder: Path, trials: int) -> float:
    """`momentum-tuner run`; returns the best loss."""
    study = {
        "name": "study",
        "task": {"factory": "momentum_tuner.tasks:digits_mlp"},
        "optimizers": ["nesterov"],
        "space": {
            "learning_rate": {"low": LOWEST, "high": HIGHEST, "log": True},
            "momentum": {"low": 1.0 - MOST_REST, "high": 1.0 - LEAST_REST},
        },
        "budget": {"trials": trials, "epochs": EPOCHS},
        "confirm": {"seeds": 0},
    }
    file = folder / "study.yaml"
    file.write_text(json.dumps(study))  # JSON is YAML
    storage = ["--storage", f"sqlite:///{folder}/study.db"]
    tuner = [sys.executable, "-m", "momentum_tuner"]
    tracking = ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    done = subprocess.run([*tuner, "run", str(file), *storage, *tracking], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return best_of(folder / "study.db")


def best_of(file: Path) -> float:
    """The least validation loss that a trial's record has."""
    import sqlite3

    with sqlite3.connect(file) as connection:
        (loss,) = connection.execute("SELECT MIN(valid_loss) FROM epochs").fetchone()
    return float(loss)


def measure(way: str, trials: int) -> tuple[float, float]:
    """Seconds that a study takes, and its best loss."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        if way == "momentum-tuner":
            best = run_ours(Path(folder), trials)
        elif way == "ray-asha":
            best = run_ray(Path(folder), trials)
        else:
            best = run_optuna(way.removeprefix("optuna-"), Path(folder), trials)
        return time.perf_counter() - started, best


def table_of(rows: list[Row]) -> Table:
    """The rows as a person reads them."""
    table = Table(title="digits_mlp", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("way")
    for name in ("trials", "seconds", "seconds per trial", "times ours", "best loss"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.1f}"
        table.add_row(
            row.way,
            str(row.trials),
            f"{row.seconds:.1f}",
            f"{row.seconds_per_trial:.2f}",
            ratio,
            f"{row.best_loss:.4f}",
        )
    return table


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="rows as JSON on stdout, the rest on stderr")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--trials", type=at_least(int, 1), default=192)
    return parser.parse_args()


def main() -> None:
    """Measure, print."""
    asked = arguments()
    os.environ.update({"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"})
    before = machine()
    aside = Console(stderr=True)
    out = aside if asked.json else Console()
    found = {}
    for way in dict.fromkeys(asked.way):
        with aside.status(way):
            found[way] = measure(way, asked.trials)
    ours = found.get("momentum-tuner", (None, None))[0]
    rows = [
        Row(way, asked.trials, seconds, seconds / asked.trials, None if ours is None else seconds / ours, best)
        for way, (seconds, best) in found.items()
    ]
    out.print(table_of(rows))
    for line in before:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    if asked.json:
        json.dump([asdict(row) for row in rows], sys.stdout, indent=2)
        print()


if __name__ == "__main__":
    main()
