"""`register`: the best trial's model in MLflow's registry is the one that was trained, without pickle."""

from __future__ import annotations

import warnings
from pathlib import Path

import mlflow
import pytest
import sqlalchemy as sa
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from torch import nn
from torch.utils.data import TensorDataset

from momentum_tuner import Task
from momentum_tuner.champion import register_champion
from momentum_tuner.cli import cli
from momentum_tuner.database import Epoch, Ticket
from momentum_tuner.errors import StudyFailedError, TaskError, TrackingError, TrialNotFoundError
from momentum_tuner.tasks import digits_cnn, quadratic
from momentum_tuner.tickets import best_settings, find_study, submit_study
from momentum_tuner.tracking import Publisher
from momentum_tuner.worker import StopSignal, run_worker
from momentum_tuner.worker_options import WorkerOptions

CNN = {"factory": "momentum_tuner.tasks:digits_cnn", "params": {"batch_norm": True}}
QUADRATIC = {"factory": "momentum_tuner.tasks:quadratic", "params": {"dim": 2, "kappa": 2.0}}


@pytest.fixture
def trained(sqlite_database, make_spec, tmp_path):
    """A function that trains two trials of a task, and shows them in an MLflow store if asked to."""

    def train(task, publish=True):
        spec = make_spec(
            task=task,
            optimizers=["momentum"],
            space={"learning_rate": [0.01, 0.02], "momentum": 0.9},
            budget={"trials": 2, "epochs": 2},
            sampler={"name": "random"},
            pruner={"name": "none"},
            confirm={"seeds": 0},
        )
        submit_study(sqlite_database, spec, None, lambda optimizer: None)
        run_worker(sqlite_database.text, WorkerOptions(studies=(spec.name,), slots=2), StopSignal())
        study = find_study(sqlite_database, spec.name)
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
        if publish:
            publisher = Publisher(sqlite_database, study, uri, "test")
            publisher.publish()
            publisher.close()
        return study, uri

    return train


def test_the_registered_model_is_the_one_that_was_trained(sqlite_database, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts
    study, uri = trained(CNN)
    best = best_settings(sqlite_database, study)[0]
    options = ["register", study.name, "--storage", sqlite_database.text, "--tracking-uri", uri, "--device", "cpu"]
    result = CliRunner().invoke(cli, options)
    assert result.exit_code == 0, result.output
    assert f"Registered digits-mlp version 1: trial {best.trial} of momentum." in result.output
    assert 'load_model("models:/digits-mlp@champion")' in result.output

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.get_model_version_by_alias("digits-mlp", "champion")
    assert str(found.version) == "1"
    assert (found.tags["optimizer"], found.tags["trial"]) == ("momentum", str(best.trial))
    assert client.get_run(found.run_id).data.tags["champion"] == "true"
    files = {path.name for path in Path(tmp_path).rglob("models/*/**/*") if path.is_file()}
    assert "model.pt2" in files
    assert not {name for name in files if name.endswith((".pkl", ".pth", ".pickle"))}

    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = mlflow.pytorch.load_model("models:/digits-mlp@champion")
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])
    task = digits_cnn(batch_norm=True)
    with torch.no_grad():
        loss = task.loss(model, task.valid.tensors)
    assert float(loss) == pytest.approx(best.measures["final_valid_loss"], rel=1e-4)


def test_what_does_not_train_again_as_it_was_recorded_is_not_registered(
    sqlite_database, trained, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    study, uri = trained(CNN)
    with sqlite_database.write() as session:
        session.execute(sa.update(Epoch).where(Epoch.epoch == 2).values(valid_loss=Epoch.valid_loss * 1.1))
    with pytest.raises(StudyFailedError, match="nothing is registered; see: momentum-tuner replay digits-mlp momentum"):
        register_champion(sqlite_database, study, uri)
    assert not MlflowClient(tracking_uri=uri, registry_uri=uri).search_registered_models()


def test_what_cannot_be_registered_says_why(sqlite_database, trained):
    study, uri = trained(QUADRATIC, publish=False)
    with pytest.raises(TrackingError, match="no run of that trial; type: momentum-tuner publish digits-mlp"):
        register_champion(sqlite_database, study, uri)
    with pytest.raises(TrialNotFoundError, match=r"study 'digits-mlp': 'adam' is not known \(allowed: momentum\)"):
        register_champion(sqlite_database, study, uri, optimizer="adam")
    with sqlite_database.write() as session:
        session.execute(sa.update(Ticket).values(run_id="r"))  # as of another MLflow
    with pytest.raises(TrackingError, match="no run of that trial; type: momentum-tuner publish digits-mlp"):
        register_champion(sqlite_database, study, uri)
    with sqlite_database.write() as session:
        session.execute(sa.update(Ticket).values(outcome="pruned"))
    with pytest.raises(TrialNotFoundError, match="no trial of momentum of 'digits-mlp' has run its whole budget yet"):
        register_champion(sqlite_database, study, uri, optimizer="momentum")


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Positions(nn.Linear):
    def forward(self, x, positions):
        return super().forward(x + positions)


class Narrowed(nn.Linear):
    def forward(self, x):
        return super().forward(x).bfloat16()


def on_lines(model, dtype=torch.float32):
    data = TensorDataset(torch.zeros(4, 3, dtype=dtype))
    return Task(model=model, loss=lambda model, batch: model(batch[0]).sum(), train=data, valid=data)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (
            quadratic(dim=2, kappa=2.0),
            "only the model of a task with in-memory tensors can be registered: its first one is the input",
        ),
        (
            on_lines(lambda: Pair(3, 1)),
            "the model cannot be registered: its output is a tuple, where MLflow takes a tensor",
        ),
        (
            on_lines(lambda: Narrowed(3, 1)),
            "the model cannot be registered: its output is of torch.bfloat16, which NumPy and so MLflow do not know",
        ),
        (
            on_lines(lambda: nn.Linear(3, 1).bfloat16(), torch.bfloat16),
            "the model cannot be registered: its input is of torch.bfloat16, which NumPy and so MLflow do not know",
        ),
        (
            on_lines(lambda: Positions(3, 1)),
            "the model cannot be registered: of the input alone TypeError: Positions.forward() missing 1 required "
            "positional argument: 'positions' (",
        ),
    ],
)
def test_what_cannot_be_registered_says_so_before_it_is_trained(sqlite_database, trained, monkeypatch, task, reason):
    study, uri = trained(QUADRATIC)
    monkeypatch.setattr("momentum_tuner.replay.load_checked_task", lambda *_: task)
    shown = []
    with pytest.raises(TaskError) as refused:
        register_champion(sqlite_database, study, uri, after_epoch=lambda *epoch: shown.append(epoch))
    assert str(refused.value).startswith(reason) and "\n" not in str(refused.value)
    assert shown == []
