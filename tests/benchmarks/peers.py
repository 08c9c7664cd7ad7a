"""What `study.py` and `time_to_best.py` compare: momentum-tuner's command, and the loops of its peers.

A setting's learning curve is the same function for all ways: the plain loop here has the initial weights and the order
of the minibatches of a trial with the study's seed (`tests/test_trainer_parity.py` holds the trainer to that).
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EPOCHS = 20
BATCH_SIZE = 64
SEED = 0
"""Of the initial weights and the order of the data, for all trials."""
LOWEST, HIGHEST = 1e-4, 1.0
LEAST_REST, MOST_REST = 1e-3, 1.0
"""Bounds of the learning rate, and of 1 - momentum."""
HERE = Path(__file__).parent
MANY = 30_000
"""A budget that no run here comes to the end of."""


@dataclass(frozen=True)
class Subject:
    """A built-in task with its parameters."""

    task: str
    params: Mapping[str, Any] = field(default_factory=dict)


SUBJECTS = {
    "digits_mlp": Subject("digits_mlp", {"hidden": 64}),
    "digits_rnn": Subject("digits_rnn", {"cell": "rnn", "hidden": 32}),
    "digits_cnn": Subject("digits_cnn", {"channels": 16}),
}


def validation_losses(
    subject: Subject, learning_rate: float, momentum: float, as_example: bool = False
) -> Iterator[float]:
    """Train epoch by epoch with the plain loop; the validation loss after each.

    Args:
        subject: what to train.
        learning_rate: of SGD.
        momentum: of Nesterov's kind.
        as_example: with data loaders and the optimizer's default kernel, as Optuna's example for PyTorch has them. Else
            from memory and with the fused kernel, which is the fastest.
    """
    import torch
    from loops import loaded_minibatches, loaded_validation, minibatches

    from momentum_tuner import tasks
    from momentum_tuner.trainer.randomness import mix_seed

    torch.set_num_threads(1)
    task = getattr(tasks, subject.task)(**subject.params)
    torch.manual_seed(SEED)
    model = task.model()
    batches = loaded_minibatches if as_example else minibatches
    nesterov, fused = momentum > 0.0, None if as_example else True
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum, nesterov=nesterov, fused=fused)
    for epoch in range(1, EPOCHS + 1):
        model.train()
        generator = torch.Generator().manual_seed(mix_seed(SEED, epoch))
        for batch in batches(task, generator):
            optimizer.zero_grad(set_to_none=True)
            task.loss(model, batch).backward()
            optimizer.step()
        model.eval()
        valid = loaded_validation(task) if as_example else task.valid.tensors
        with torch.no_grad():
            loss = task.loss(model, valid).item()
        yield loss if math.isfinite(loss) else 1e6


def tune_with_optuna(subject: Subject, loop: str, folder: str, trials: int, seed: int) -> None:
    """One of the processes of the Optuna and MLflow loop; `loop` is its pruner, or `example`."""
    import mlflow
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment("study")

    def objective(trial: optuna.Trial) -> float:
        learning_rate = trial.suggest_float("learning_rate", LOWEST, HIGHEST, log=True)
        rest = trial.suggest_float("one_minus_momentum", LEAST_REST, MOST_REST, log=True)
        best = math.inf
        with mlflow.start_run(run_name=f"trial-{trial.number}"):
            mlflow.log_params(trial.params)
            losses = validation_losses(subject, learning_rate, 1.0 - rest, as_example=loop == "example")
            for epoch, loss in enumerate(losses, start=1):
                best = min(best, loss)
                mlflow.log_metric("valid_loss", loss, step=epoch)
                trial.report(loss, epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
        return best

    pruners = {
        "median": optuna.pruners.MedianPruner(),
        "example": optuna.pruners.MedianPruner(),
        "hyperband": optuna.pruners.HyperbandPruner(),
        "whole": optuna.pruners.NopPruner(),
    }
    study = optuna.create_study(
        study_name="study",
        storage=f"sqlite:///{folder}/optuna.db",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=pruners[loop],
        load_if_exists=True,
    )
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    study.optimize(objective, callbacks=[optuna.study.MaxTrialsCallback(trials, states=states)])


def run_optuna(subject: Subject, loop: str, folder: Path, trials: int, seed: int) -> None:
    """The processes of the Optuna and MLflow loop, one per core, which share a study in one SQLite file."""
    import mlflow
    import optuna

    from momentum_tuner.launcher.devices import available_cores

    optuna.storages.RDBStorage(f"sqlite:///{folder}/optuna.db")  # so that the processes do not create them at once
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment("study")
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=tune_with_optuna, args=(subject, loop, str(folder), trials, 1000 * seed + i))
        for i in range(available_cores())
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process of the Optuna loop ended with {process.exitcode}")


def run_ray(subject: Subject, folder: Path, trials: int, seed: int) -> None:
    """Ray Tune with ASHA and random search, one CPU per trial."""
    import ray
    from ray import tune

    from momentum_tuner.launcher.devices import available_cores

    def trainable(config: Mapping[str, Any]) -> None:
        sys.path.insert(0, str(HERE))
        from peers import validation_losses

        for loss in validation_losses(subject, config["learning_rate"], 1.0 - config["one_minus_momentum"]):
            tune.report({"valid_loss": loss})

    ray.init(num_cpus=available_cores(), include_dashboard=False, log_to_driver=False)
    try:
        scheduler = tune.schedulers.ASHAScheduler(metric="valid_loss", mode="min", max_t=EPOCHS, reduction_factor=3)
        space = {
            "learning_rate": tune.loguniform(LOWEST, HIGHEST),
            "one_minus_momentum": tune.loguniform(LEAST_REST, MOST_REST),
        }
        search = tune.search.basic_variant.BasicVariantGenerator(random_state=seed)
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(num_samples=trials, scheduler=scheduler, search_alg=search),
            run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
        ).fit()
    finally:
        ray.shutdown()


def run_ours(subject: Subject, folder: Path, trials: int, seed: int, pruner: str) -> None:
    """`momentum-tuner run` on SQLite and an MLflow on SQLite, without a confirmation.

    The seed is the samplers' alone, as workers of several commands have each their own.
    """
    from momentum_tuner.cli import main as command

    study = {
        "name": "study",
        "task": {"factory": f"momentum_tuner.tasks:{subject.task}", "params": dict(subject.params)},
        "optimizers": ["nesterov"],
        "space": {
            "learning_rate": {"low": LOWEST, "high": HIGHEST, "log": True},
            "momentum": {"low": 1.0 - MOST_REST, "high": 1.0 - LEAST_REST},
        },
        "fixed": {"batch_size": BATCH_SIZE},
        "budget": {"trials": trials, "epochs": EPOCHS},
        "pruner": {"name": pruner},
        "confirm": {"seeds": 0},
        "seed": SEED,
    }
    file = folder / "study.yaml"
    file.write_text(json.dumps(study))  # JSON is YAML
    storage = ["--storage", f"sqlite:///{folder}/study.db"]
    tracking = ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    if seed:
        import functools

        from momentum_tuner.launcher import running

        running.make_workers = functools.partial(running.make_workers, ordinal=1000 * seed)
    sys.argv = ["momentum-tuner", "run", str(file), *storage, *tracking]
    command()


def main() -> None:
    """Run one way, in a process of its own: way, subject, folder, trials, seed."""
    way, name, folder, trials, seed = sys.argv[1:]
    subject = SUBJECTS[name]
    if way == "momentum-tuner":
        run_ours(subject, Path(folder), int(trials), int(seed), "successive_halving")
    elif way == "momentum-tuner-whole":
        run_ours(subject, Path(folder), int(trials), int(seed), "none")
    elif way == "ray-asha":
        run_ray(subject, Path(folder), int(trials), int(seed))
    else:
        run_optuna(subject, way.removeprefix("optuna-"), Path(folder), int(trials), int(seed))


if __name__ == "__main__":
    main()
