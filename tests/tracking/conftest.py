"""Stores of MLflow of a test's own, and a database."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from momentum_tuner.database import Database
from momentum_tuner.tracking import store as store_module


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)  # MLflow puts files beside
    return tmp_path


@pytest.fixture
def uri(folder, empty_mlflow) -> str:
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture
def control_uri(folder, empty_mlflow) -> str:
    """A second MLflow store, to compare with."""
    shutil.copy(empty_mlflow, folder / "control.db")
    return f"sqlite:///{folder / 'control.db'}"


@pytest.fixture
def database(sqlite_database) -> Database:
    return sqlite_database


@pytest.fixture
def one_by_one(monkeypatch) -> None:
    """Trials are shown through MLflow's client, as where its tables are out of reach."""
    monkeypatch.setattr(store_module, "open_tables", lambda _: None)
