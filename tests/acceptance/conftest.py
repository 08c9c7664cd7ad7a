"""The real command line, in a process of its own, in a directory of its own."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Shell:
    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("MOMENTUM_TUNER_", "MLFLOW_"))}
        return {**mine, "PYTHONPATH": str(ROOT), "COLUMNS": "140", **self.variables}

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "momentum_tuner", *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, *arguments: str, code: int = 0, timeout: float = 280) -> str:
        process = self.start(*arguments)
        out, error = process.communicate(timeout=timeout)
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{error}"
        assert "Traceback" not in out + error
        return out if code == 0 else error

    @property
    def storage(self) -> str:
        return f"sqlite:///{self.folder / 'momentum_tuner.db'}"

    @property
    def tracking(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"


@pytest.fixture
def shell(tmp_path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture(scope="session")
def studies() -> Path:
    return ROOT / "studies"


@pytest.fixture(scope="session")
def finished(tmp_path_factory, studies) -> tuple[Shell, str]:
    """A folder in which the README's first command has run studies/digits-mlp.yaml, and what it printed.

    It is run once: each process of pytest-xdist that needs it has a copy of the folder.
    """
    mine = tmp_path_factory.getbasetemp()
    once = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "finished"
    printed = once / "printed"
    once.mkdir(exist_ok=True)
    with (once / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            shell = Shell(once / "folder")
            shutil.rmtree(shell.folder, ignore_errors=True)  # of a process that failed
            shutil.copytree(studies, shell.folder / "studies")
            said = shell.run("run", "studies/digits-mlp.yaml")
            shell.folder.rename(once / "left")  # what MLflow adds to its old place comes into no copy
            printed.write_text(said)
    folder = tmp_path_factory.mktemp("copy") / "folder"
    shutil.copytree(once / "left", folder)
    return Shell(folder), printed.read_text()
