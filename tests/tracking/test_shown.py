"""A study that is done and given to `run` or `resume` again: MLflow gets what it has not got, and is asked quickly."""

import subprocess
import sys

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from momentum_tuner.cli import cli
from momentum_tuner.launcher import LocalWorkers
from momentum_tuner.tracking import is_shown

from .published import contents, finished_study, publish, runs_of, start, submit


def resume(database, uri: str) -> str:
    found = CliRunner().invoke(cli, ["resume", "digits-mlp", "--storage", database.text, "--tracking-uri", uri])
    assert found.exit_code == 0, found.output
    assert "Study digits-mlp is complete." in found.output
    return found.output


@pytest.fixture
def no_process(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(LocalWorkers, "_start_process", refuse)


def test_a_study_that_was_not_shown_is_shown_by_resuming_it_though_it_is_complete(database, make_spec, uri):
    study = finished_study(database, make_spec)
    said = resume(database, uri)
    assert "Bringing MLflow up to date ..." in said
    assert "MLflow does not show everything" not in said
    (parent,), children = runs_of(uri)
    assert (parent.info.status, len(children)) == ("FINISHED", 4)
    assert is_shown(database, study.id, uri)


def test_of_a_study_that_is_shown_mlflow_is_not_even_started(database, make_spec, uri, no_process):
    publish(database, finished_study(database, make_spec), uri)
    before = contents(uri)
    assert "MLflow" not in resume(database, uri)
    assert contents(uri) == before


def test_an_mlflow_that_does_not_answer_is_said_with_what_mends_it(database, make_spec, folder):
    finished_study(database, make_spec)
    said = resume(database, "http://127.0.0.1:1")
    hint = "MLflow does not show everything yet; bring it up to date with: momentum-tuner publish digits-mlp"
    assert hint in said
    assert "MLflow does not answer" in said


def test_a_study_that_is_not_done_is_not_shown_whole(database, make_spec, uri):
    study = submit(database, make_spec)
    start(database, study)
    publish(database, study, uri)
    assert not is_shown(database, study.id, uri)


def test_a_study_is_shown_where_its_parent_is_and_in_no_other_mlflow(database, make_spec, uri, control_uri, folder):
    study = finished_study(database, make_spec)
    assert not is_shown(database, study.id, uri)
    publish(database, study, uri)
    assert is_shown(database, study.id, uri)
    assert not is_shown(database, study.id, control_uri)
    assert not is_shown(database, study.id, f"sqlite:///{folder}/none.db")
    assert not (folder / "none.db").exists()
    (parent,), _ = runs_of(uri)
    MlflowClient(tracking_uri=uri).delete_run(parent.info.run_id)
    assert not is_shown(database, study.id, uri)


def test_whether_a_study_is_shown_is_found_without_importing_mlflow(database, make_spec, uri):
    study = finished_study(database, make_spec)
    publish(database, study, uri)
    code = (
        "import sys\n"
        "from momentum_tuner.database import Database\n"
        "from momentum_tuner.tracking import is_shown\n"
        "assert is_shown(Database(sys.argv[1]), int(sys.argv[2]), sys.argv[3])\n"
        "assert not any(name.partition('.')[0] in {'mlflow', 'torch'} for name in sys.modules), 'heavy'\n"
    )
    subprocess.run([sys.executable, "-c", code, database.text, str(study.id), uri], check=True)
