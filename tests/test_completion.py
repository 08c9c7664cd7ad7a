"""What a shell completes: commands, options, and names of studies from the database, without waiting for it."""

import os
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete

from momentum_tuner.catalog import OPTIMIZERS
from momentum_tuner.cli import COMMANDS, cli
from momentum_tuner.tickets import submit_study


@pytest.fixture
def complete(tmp_path, monkeypatch):
    for name in ("MOMENTUM_TUNER_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def complete(*words):
        shell = ShellComplete(cli, {}, "momentum-tuner", "_MOMENTUM_TUNER_COMPLETE")
        return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]

    return complete


@pytest.fixture
def studies(sqlite_database, make_spec):
    for name in ("digits-mlp", "digits-cnn", "rosenbrock"):
        submit_study(sqlite_database, make_spec(name=name), None, lambda _: None)
    return sqlite_database


def test_commands_and_options_are_completed(complete):
    assert complete("") == list(COMMANDS)
    assert complete("st") == ["status"]
    assert complete("run", "--work") == ["--workers"]
    assert complete("best", "x", "--format", "t") == ["table", "torch"]
    assert complete("replay", "x", "nes") == [name for name in OPTIMIZERS if name.startswith("nes")]


@pytest.mark.parametrize("command", ["status", "resume", "best", "publish", "replay", "delete", "worker"])
def test_names_of_studies_come_from_the_database_in_its_default_place(complete, studies, command):
    assert complete(command, "di") == ["digits-cnn", "digits-mlp"]


def test_names_come_from_the_database_that_is_named_before_or_in_the_environment(
    complete, studies, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert complete("status", "") == []
    assert complete("status", "--storage", studies.text, "r") == ["rosenbrock"]
    monkeypatch.setenv("MOMENTUM_TUNER_STORAGE", studies.text)
    assert complete("status", "r") == ["rosenbrock"]


def test_a_name_that_is_there_already_is_not_completed_again(complete, studies):
    assert complete("worker", "digits-mlp", "") == ["rosenbrock", "digits-cnn"]


def test_nothing_is_completed_or_made_where_there_is_no_database(complete, tmp_path):
    assert complete("status", "") == []
    (tmp_path / "momentum_tuner.db").write_text("no database")
    assert complete("status", "") == []
    assert [p.name for p in tmp_path.iterdir()] == ["momentum_tuner.db"]
    assert complete("status", "--storage", "postgresql://host/d", "") == []


def test_bash_gets_the_names_without_anything_heavy_loaded(studies, tmp_path):
    script = (
        "import sys, atexit\n"
        "from momentum_tuner.cli import main\n"
        "heavy = {'torch', 'optuna', 'mlflow', 'sqlalchemy', 'pydantic', 'rich', 'numpy'}\n"
        "atexit.register(lambda: print('heavy', heavy & set(sys.modules)))\n"
        "main()\n"
    )
    words = {"_MOMENTUM_TUNER_COMPLETE": "bash_complete", "COMP_WORDS": "momentum-tuner status dig", "COMP_CWORD": "2"}
    mine = {k: v for k, v in os.environ.items() if not k.startswith("MOMENTUM_TUNER_")}
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, cwd=tmp_path, env={**mine, **words}, capture_output=True, text=True)
    assert found.stdout.splitlines() == ["plain,digits-cnn", "plain,digits-mlp", "heavy set()"], found.stderr
