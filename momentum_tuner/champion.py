"""The best trial's model in MLflow's registry: trained again, exported without pickle, under the alias `champion`."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from momentum_tuner.database import Database
from momentum_tuner.errors import StudyFailedError, TaskError, TrackingError, TrialNotFoundError, describe_failure
from momentum_tuner.replay import replay_trial
from momentum_tuner.spec import unknown
from momentum_tuner.tasks import Loop, Task
from momentum_tuner.tickets import BestSetting, StudyRecord, best_settings, find_trial
from momentum_tuner.tracking import check_tracking_uri, is_refusal, quiet_mlflow, short_reason
from momentum_tuner.trainer import SlotState, fill_model
from momentum_tuner.trainer.randomness import RandomStream

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import RunInfo

ALIAS = "champion"
_EXAMPLES = 2  # torch.export takes a batch of one for a batch that is always one


@dataclass(frozen=True)
class Registered:
    """A version of a registered model.

    Attributes:
        name: of the registered model, the study's.
        version: of it.
        optimizer: whose best trial it is.
        trial: the trial's number.
        verdict: how its training now agrees with what was recorded.
    """

    name: str
    version: str
    optimizer: str
    trial: int
    verdict: str

    @property
    def uri(self) -> str:
        """What `mlflow.pytorch.load_model` takes."""
        return f"models:/{self.name}@{ALIAS}"


def register_champion(
    database: Database,
    study: StudyRecord,
    tracking_uri: str,
    *,
    optimizer: str | None = None,
    device: str = "cpu",
    trusted: Sequence[str] = (),
    after_epoch: Callable[[int, int], None] = lambda epoch, last: None,
) -> Registered:
    """Train the best trial again to the end of its budget, and register its model.

    No weights are kept of trials that end: so the model is that of `replay_trial`, and it is registered only if its
    curve is the one that was recorded. It is a program of `torch.export` (`model.pt2`), which is loaded without pickle
    and without the study's code.

    Args:
        database: where the study is.
        study: which.
        tracking_uri: where MLflow is.
        optimizer: whose best trial; of all optimizers if not given.
        device: what to train on.
        trusted: what may be imported.
        after_epoch: told of each epoch, and of the last one there will be.

    Raises:
        TrialNotFoundError: the study does not train that optimizer, or no trial has run its whole budget.
        TrackingError: MLflow does not answer, or has no run of the trial.
        TaskError: the task has no model that can be exported.
        StudyFailedError: what is trained now is not what was recorded.
    """
    uri = check_tracking_uri(tracking_uri)
    best = _best(database, study, optimizer)
    trial = find_trial(database, study, best.optimizer, best.trial)
    client, run = _find_run(uri, study.name, trial.run_id)
    ends: list[tuple[nn.Module, Tensor]] = []

    def keep(task: Task | Loop, state: SlotState) -> None:
        ends.append(_model(task, state))

    replay = replay_trial(
        database,
        study,
        trial,
        device=device,
        trusted=trusted,
        at_start=_check,
        after_epoch=after_epoch,
        at_end=keep,
    )
    if replay.verdict == "not equal" or not ends:
        raise StudyFailedError(
            f"trial {trial.number} of {trial.optimizer} does not train again as it was recorded, so nothing is "
            f"registered; see: momentum-tuner replay {study.name} {trial.optimizer} {trial.number}"
        )
    params = {name: str(value) for name, value in trial.settings.items()}
    tags = {"optimizer": trial.optimizer, "trial": str(trial.number), "replay": replay.verdict}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        _export(*ends[0], path)
        try:
            version = _upload(client, run, study.name, path, params, tags)
        except Exception as error:
            raise TrackingError(f"MLflow does not take the model: {short_reason(error)}") from error
    return Registered(study.name, version, trial.optimizer, trial.number, replay.verdict)


def _best(database: Database, study: StudyRecord, optimizer: str | None) -> BestSetting:
    if optimizer is not None and optimizer not in study.spec.contestants:
        raise TrialNotFoundError(f"study {study.name!r}: {unknown(optimizer, study.spec.contestants)}")
    found = best_settings(database, study, contestants=optimizer is not None)
    if optimizer is not None:
        found = [best for best in found if best.optimizer == optimizer]
    if not found:
        of = "" if optimizer is None else f" of {optimizer}"
        raise TrialNotFoundError(f"no trial{of} of {study.name!r} has run its whole budget yet")
    return found[0]


def _check(task: Task | Loop) -> None:
    """See before it is trained that a model can be registered.

    Raises:
        TaskError: what it takes or returns is not one tensor that MLflow can describe.
    """
    with RandomStream(0), torch.no_grad():
        model, example = _untrained(task)
        try:
            out = model(example)
        except Exception as error:
            raise TaskError(f"the model cannot be registered: of the input alone {describe_failure(error)}") from error
    for what, value in (("input", example), ("output", out)):
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TaskError(f"the model cannot be registered: its {what} is a {kind}, where MLflow takes a tensor")
        try:
            value.numpy()
        except TypeError as error:
            raise TaskError(
                f"the model cannot be registered: its {what} is of {value.dtype}, which NumPy and so MLflow do not know"
            ) from error


def _model(task: Task | Loop, state: SlotState) -> tuple[nn.Module, Tensor]:
    """The trained model on the CPU, and two examples of what it takes."""
    model, example = _untrained(task)
    return fill_model(model, state.tensors), example


def _untrained(task: Task | Loop) -> tuple[nn.Module, Tensor]:
    if isinstance(task, Loop) or not isinstance(task.train, TensorDataset):
        raise TaskError("only the model of a task with in-memory tensors can be registered: its first one is the input")
    return task.model().cpu().eval(), task.train.tensors[0][:_EXAMPLES].cpu()


def _export(model: nn.Module, example: Tensor, path: Path) -> None:
    quiet_mlflow()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # MLflow's, of what it makes itself
            import mlflow.pytorch
            from mlflow.models import infer_signature

            mlflow.pytorch.save_model(
                model,
                path,
                signature=infer_signature(example.numpy(), model(example).numpy()),
                input_example=example.numpy(),
                serialization_format="pt2",
                pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],  # else it runs the model to guess
            )
    except Exception as error:
        raise TaskError(f"the model cannot be exported: {describe_failure(error)}") from error


def _find_run(uri: str, study: str, run_id: str | None) -> tuple[MlflowClient, RunInfo]:
    """A client of MLflow, and what that knows of the trial's run."""
    missing = TrackingError(f"MLflow has no run of that trial; type: momentum-tuner publish {study}")
    if run_id is None:
        raise missing
    quiet_mlflow()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        return client, client.get_run(run_id).info
    except Exception as error:
        if is_refusal(error):  # it was shown in another MLflow since
            raise missing from error
        raise TrackingError(f"MLflow does not answer: {short_reason(error)}") from error


def _upload(
    client: MlflowClient, run: RunInfo, name: str, path: Path, params: dict[str, str], tags: dict[str, str]
) -> str:
    from mlflow.exceptions import MlflowException

    logged = client.create_logged_model(run.experiment_id, name, source_run_id=run.run_id, tags=tags, params=params)
    client.log_model_artifacts(logged.model_id, str(path))
    client.finalize_logged_model(logged.model_id, "READY")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        name, f"models:/{logged.model_id}", run.run_id, tags=tags, model_id=logged.model_id
    )
    client.set_registered_model_alias(name, ALIAS, made.version)
    return str(made.version)
