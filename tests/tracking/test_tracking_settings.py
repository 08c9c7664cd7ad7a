"""Addresses of MLflow, telemetry, names of runs, and the empty store that is kept."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys

import pytest

from momentum_tuner.errors import TrackingError
from momentum_tuner.tracking import Publisher, check_tracking_uri, quiet_mlflow, run_name, short_momentum
from momentum_tuner.tracking import store as store_module
from momentum_tuner.tracking.store import RunStore

from .published import (
    finished_study,
    submit,
)


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///mlflow.db",
        "http://host:5000",
        "https://user:secret@host/path",
        "postgresql://u:p@host/mlflow",
        "postgresql+psycopg2://u:p@host/mlflow",
        "mysql+pymysql://u:p@host/mlflow",
        "databricks",
        "databricks://profile",
    ],
)
def test_uris_that_mlflow_takes_are_taken_unchanged(uri):
    assert check_tracking_uri(uri) == uri


@pytest.mark.parametrize(
    "uri",
    [
        "mlruns",
        "./mlruns",
        "file:///tmp/mlruns",
        "",
        "http://",
        "sqlite:mlflow.db",
        "sqlite://",
        "ftp://host",
        "a+b://c",
    ],
)
def test_uris_that_mlflow_does_not_take_are_refused_in_one_line(uri):
    with pytest.raises(TrackingError) as refused:
        check_tracking_uri(uri)
    text = str(refused.value)
    assert text.startswith(f"--tracking-uri {uri!r} is not supported; write sqlite:///mlflow.db or http://host:5000")
    assert "\n" not in text


def test_a_wrong_uri_is_refused_without_its_password():
    with pytest.raises(TrackingError) as refused:
        check_tracking_uri("ftp://user:hunter2@host")
    assert "hunter2" not in str(refused.value)


def test_a_store_in_a_folder_that_is_not_there_is_refused(database, make_spec, tmp_path):
    study = submit(database, make_spec)
    with pytest.raises(TrackingError, match="the folder /no/such does not exist; make it first"):
        Publisher(database, study, "sqlite:////no/such/mlflow.db", "p")


def test_telemetry_is_off_unless_the_user_wants_it(monkeypatch):
    names = ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    quiet_mlflow()
    assert [os.environ[name] for name in names] == ["true", "0", "10"]
    for name, value in zip(names, ("false", "5", "60"), strict=True):
        monkeypatch.setenv(name, value)
    quiet_mlflow()
    assert [os.environ[name] for name in names] == ["false", "5", "60"]


def test_a_process_that_publishes_starts_no_telemetry_and_writes_nothing(database, make_spec, uri):
    finished_study(database, make_spec)
    code = (
        "import sys\n"
        "from momentum_tuner.database import Database\n"
        "from momentum_tuner.tickets import find_study\n"
        "from momentum_tuner.tracking import Publisher\n"
        "assert not any(name.partition('.')[0] in {'mlflow', 'torch'} for name in sys.modules), 'heavy'\n"
        "database = Database(sys.argv[1])\n"
        "assert Publisher(database, find_study(database, 'digits-mlp'), sys.argv[2], 'p').publish().complete\n"
        "from mlflow.telemetry import get_telemetry_client\n"
        "assert get_telemetry_client() is None\n"
    )
    mine = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    done = subprocess.run([sys.executable, "-c", code, database.text, uri], env=mine, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"learning_rate": 0.031, "momentum": 0.95}, "nesterov 0042 lr=0.031 beta=0.95"),
        ({"learning_rate": 0.0312345, "momentum": 0.9}, "nesterov 0042 lr=0.031 beta=0.9"),
        ({"learning_rate": 1.0, "momentum": 0.0}, "nesterov 0042 lr=1 beta=0"),
        ({"learning_rate": 1.234e-5, "momentum": 0.9973}, "nesterov 0042 lr=1.2e-05 beta=0.9973"),
        ({"learning_rate": 0.5}, "nesterov 0042 lr=0.5"),
        ({}, "nesterov 0042"),
    ],
)
def test_the_name_of_a_run_says_its_settings(settings, name):
    assert run_name("nesterov", 42, settings) == name


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.25, 0.5, 0.9, 0.95, 0.99, 0.995, 0.9973, 0.999, 0.99987])
def test_a_short_momentum_keeps_its_distance_to_one(momentum):
    short = float(short_momentum(momentum))
    assert abs(short - momentum) <= 0.05 * (1.0 - momentum)
    assert len(short_momentum(momentum)) <= 8


@pytest.fixture
def nothing_kept(tmp_path_factory, monkeypatch):
    """As on a machine where MLflow has made no file yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))


def test_a_store_that_could_not_be_made_whole_is_not_there_at_all(folder, monkeypatch, nothing_kept):
    import mlflow.store.db.utils as made_by_mlflow

    def half(engine):
        made_by_mlflow.InitialBase.metadata.create_all(engine)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(made_by_mlflow, "_initialize_tables", half)
        with pytest.raises(KeyboardInterrupt):
            RunStore(f"sqlite:///{folder / 'mlflow.db'}", "study", "identity")
    assert list(folder.iterdir()) == []
    store = RunStore(f"sqlite:///{folder / 'mlflow.db'}", "study", "identity")
    store.learn({})
    assert store.experiment_id
    assert [path.name for path in folder.iterdir()] == ["mlflow.db"]


def test_the_empty_file_that_mlflow_made_is_kept_for_the_next_store(tmp_path, monkeypatch, nothing_kept):
    import mlflow.store.db.utils as made_by_mlflow

    def schema(name):
        with sqlite3.connect(tmp_path / name) as connection:
            revision = connection.execute("SELECT version_num FROM alembic_version").fetchall()
            return revision, connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2").fetchall()

    store_module.make_sqlite_store(f"sqlite:///{tmp_path / 'first.db'}")
    kept = store_module.kept_store()
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    monkeypatch.setattr(made_by_mlflow, "_initialize_tables", None)
    store_module.make_sqlite_store(f"sqlite:///{tmp_path / 'second.db'}")
    assert schema("second.db") == schema("first.db")
    RunStore(f"sqlite:///{tmp_path / 'second.db'}", "study", "identity").learn({})
    with sqlite3.connect(kept) as connection:
        assert connection.execute("SELECT COUNT(*) FROM experiments").fetchone() == (0,)


def test_a_home_that_cannot_be_written_to_keeps_no_store(tmp_path, monkeypatch):
    (tmp_path / "caches").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for name in ("first", "second"):
        store = RunStore(f"sqlite:///{tmp_path / name}.db", "study", "identity")
        store.learn({})
        assert store.experiment_id
