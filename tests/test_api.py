"""The Python API: the same studies, database and workers as those of the command line."""

import inspect
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import momentum_tuner
from momentum_tuner import Study, StudyResult, api, best, resume, run
from momentum_tuner.cli import cli
from momentum_tuner.errors import InputError, StudyFileError, StudyNotFoundError
from momentum_tuner.spec import StudySpec

SECTIONS = {
    "name": "small",
    "task": {"factory": "momentum_tuner.tasks:quadratic", "params": {"dim": 4, "kappa": 10.0}},
    "optimizers": ["sgd", "momentum"],
    "budget": {"trials": 3, "epochs": 2},
    "space": {"learning_rate": {"low": 0.01, "high": 0.1}, "momentum": {"low": 0.0, "high": 0.9}},
    "pruner": {"name": "none"},
    "confirm": {"seeds": 0},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for name in ("MOMENTUM_TUNER_STORAGE", "MOMENTUM_TUNER_CHECKPOINTS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Names


def test_the_public_names_are_these():
    public = {"Study", "StudyResult", "Task", "__version__", "best", "compare", "resume", "run"}
    public |= {"Loop", "LoopContext", "from_huggingface", "from_lightning"}
    assert set(momentum_tuner.__all__) == public
    assert public <= set(dir(momentum_tuner))
    assert all(getattr(momentum_tuner, name).__doc__ for name in public)


def test_importing_the_package_loads_nothing_heavy():
    script = (
        "import sys, momentum_tuner; dir(momentum_tuner)\n"
        "heavy = {'torch', 'optuna', 'mlflow', 'sqlalchemy', 'pydantic', 'rich', 'numpy', 'click'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_every_argument_of_run_is_one_of_resume_and_an_option_of_the_command():
    arguments = list(inspect.signature(run).parameters)[1:]
    assert arguments == list(inspect.signature(resume).parameters)[1:]
    options = {parameter.name for parameter in cli.get_command(None, "run").params} - {"study_file", "verbose"}
    assert options | {"progress"} == set(arguments)


# Studies


def test_a_study_takes_every_section_of_a_study_file_as_a_keyword():
    parameters = set(inspect.signature(Study).parameters)
    assert parameters == set(StudySpec.model_fields) | {"folder"}


def test_keywords_a_mapping_and_a_file_make_the_same_study(folder):
    (folder / "study.yaml").write_text(yaml.safe_dump(SECTIONS))
    by_keywords = Study(**SECTIONS)
    assert by_keywords == Study.from_dict(SECTIONS) == Study.from_yaml("study.yaml")
    assert (by_keywords.name, by_keywords.folder) == ("small", folder)
    (folder / "again.yaml").write_text(by_keywords.to_yaml())
    assert Study.from_yaml(folder / "again.yaml") == by_keywords


def test_every_mistake_in_a_study_is_told_in_one_line_each():
    with pytest.raises(StudyFileError) as error:
        Study(**{**SECTIONS, "optimizers": ["sgd", "momentun"], "budget": {"trials": 0, "epochs": 2}})
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("study: optimizers[1]: 'momentun' is not known; did you mean 'momentum'?")
    assert lines[1].startswith("study: budget.trials: 0 is not allowed")


# Runs


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A study that `run` brought to its end, in a thread as some notebooks have it, with what it printed."""
    place = tmp_path_factory.mktemp("ran")
    storage = f"sqlite:///{place / 'own.db'}"
    results = []

    def work():
        study = Study(**SECTIONS, folder=place)
        results.append(run(study, storage=storage, tracking_uri="none", workers=1, slots=4, progress=False))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    return results[0]


def test_run_returns_the_best_settings_and_how_the_trials_ended(ran):
    assert isinstance(ran, StudyResult)
    assert (ran.name, ran.progress.phase, ran.published) == ("small", "done", True)
    assert [(o.optimizer, o.complete) for o in ran.progress.optimizers] == [("sgd", 3), ("momentum", 3)]
    assert {b.optimizer for b in ran.best} == {"sgd", "momentum"}
    assert ran.best[0].objective <= ran.best[1].objective
    assert all(0.01 <= b.settings["learning_rate"] <= 0.1 for b in ran.best)
    assert len(ran.torch_lines()) == 2
    assert all(line.startswith("torch.optim.SGD(model.parameters(), lr=0.0") for line in ran.torch_lines())
    assert list(best("small", storage=ran.storage)) == list(ran.best)


def test_a_result_prints_as_the_table_of_the_command_line(ran):
    found = CliRunner().invoke(cli, ["best", "small", "--storage", ran.storage])
    assert found.exit_code == 0

    def words(text):
        return [line.split() for line in text.splitlines() if line.strip()]

    assert words(str(ran)) == words(found.output)
    assert ran.storage not in repr(ran)


def test_the_command_line_finds_that_study_complete_and_so_does_run(ran, folder, capsys):
    (folder / "study.yaml").write_text(yaml.safe_dump(SECTIONS))
    found = CliRunner().invoke(cli, ["run", "study.yaml", "--storage", ran.storage, "--tracking-uri", "none"])
    assert found.exit_code == 0, found.output
    assert "Study small is complete." in found.output
    again = run("study.yaml", storage=ran.storage, tracking_uri="none")
    assert again == resume("small", storage=ran.storage, tracking_uri="none")
    assert (again.best, again.progress.optimizers) == (ran.best, ran.progress.optimizers)
    assert capsys.readouterr().out == ""


SCRIPT = """
import contextlib, os, signal, sys, threading, time
import torch
from torch import nn
from momentum_tuner import Study, Task, best, resume, run
from momentum_tuner.errors import InputError

def build():
    def loss(model, batch):
        time.sleep(0.08)
        return model.weight.square().sum()
    return Task(model=lambda: nn.Linear(1, 1), loss=loss, steps_per_epoch=5)

study = Study(name="own", task={"factory": "script.py:build"}, optimizers=["sgd"], budget={"trials": 6, "epochs": 5},
              pruner={"name": "none"}, confirm={"seeds": 0})

def interrupt_after_a_trial():
    found = []
    while not found:
        time.sleep(0.05)
        if os.path.exists("momentum_tuner.db"):
            with contextlib.suppress(InputError):  # it is being made
                found = best("own")
    os.kill(os.getpid(), signal.SIGINT)

GUARD
    threading.Thread(target=interrupt_after_a_trial, daemon=True).start()
    try:
        run(study, tracking_uri="none", workers=1, slots=1)
    except KeyboardInterrupt:
        print("interrupted")
    print(resume("own", tracking_uri="none", workers=1, trust=["script.py"]).progress.optimizers[0].complete)
"""


def run_script(folder: Path, guard: str) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(SCRIPT.replace("GUARD", guard))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MOMENTUM_TUNER_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_script_runs_a_task_of_its_own_file_is_interrupted_and_goes_on(folder):
    found = run_script(folder, 'if __name__ == "__main__":')
    assert found.returncode == 0, found.stdout + found.stderr
    lines = found.stdout.splitlines()
    assert "Stopping: giving trials back (again to stop at once) ..." in lines
    assert "interrupted" in lines
    assert lines[-1] == "6"
    assert re.search(r"own: done 6/6 trials", found.stdout)


def test_a_script_without_a_guard_is_told_to_have_one_and_nothing_has_changed(folder):
    found = run_script(folder, "if True:")
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "momentum_tuner.errors.TaskError: task.factory 'script.py:build': run() is called as the file"
    )
    assert 'put it under `if __name__ == "__main__":`' in last
    assert sorted(p.name for p in folder.iterdir()) == ["script.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "--workers '0': write a number above 0, or auto"),
        ({"compiles": "fast"}, "--compile 'fast': write auto, on or off"),
        ({"slots": "many"}, "--slots 'many': write a number above 0, or auto"),
        ({"engine": "dask"}, "engine 'dask': write local or ray"),
        ({"device": "tpu"}, "write auto, cpu, cuda"),
        ({"storage": "mysql://host/d"}, "'mysql' is not supported"),
        ({"tracking_uri": "./mlruns"}, "MLflow 3 has no file store"),
        ({"ray_address": "auto"}, "need --engine ray"),
    ],
)
def test_an_argument_that_cannot_be_used_is_told_and_nothing_has_changed(folder, arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        run(Study(**SECTIONS), **arguments)
    assert list(folder.iterdir()) == []


def test_a_study_that_is_not_there_is_told(ran):
    for look in (best, resume, api.compare):
        with pytest.raises(StudyNotFoundError, match="no study 'big'"):
            look("big", storage=ran.storage)
