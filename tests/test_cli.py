import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress

import click
import pytest

from momentum_tuner.cli import COMMANDS
from momentum_tuner.cli.options import work_again
from momentum_tuner.cli.run import resume, worker

from .workbench import wait_for

STUDY = """
name: small
task: {factory: "momentum_tuner.tasks:quadratic", params: {dim: 4, kappa: 10}}
optimizers: [sgd, momentum]
space: {learning_rate: {low: 0.01, high: 0.1}, momentum: {low: 0.0, high: 0.9}}
budget: {trials: 3, epochs: 2}
confirm: {seeds: 0}
pruner: {name: none}
"""


@pytest.fixture
def start(tmp_path):
    """Starts the command line in a process of its own."""

    def start(*arguments, environment=None):
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("MOMENTUM_TUNER_", "MLFLOW_"))}
        return subprocess.Popen(
            [sys.executable, "-m", "momentum_tuner", *arguments],
            cwd=tmp_path,
            env={**mine, "PYTHONPATH": os.getcwd(), "COLUMNS": "120", **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run(start):
    """Runs the command line to its end."""

    def run(*arguments, environment=None, answers=""):
        process = start(*arguments, environment=environment)
        try:
            out, error = process.communicate(answers, timeout=120)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    return run


def test_help_lists_every_command_without_loading_what_is_slow(run):
    script = (
        "import sys; sys.argv = ['momentum-tuner', '--help']\n"
        "from momentum_tuner.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'optuna', 'mlflow', 'sqlalchemy', 'pydantic', 'rich', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for command in COMMANDS:
        assert f"  {command} " in found.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(run, command):
    found = run(command, "--help")
    assert found.returncode == 0
    assert f"Example: momentum-tuner {command}" in found.stdout


OWN = """
import time
from pathlib import Path

import torch
from momentum_tuner import Task

class Batches:
    taken = 0
    def __len__(self): return 5
    def __iter__(self):
        for _ in range(5):
            self.taken += 1
            if not Path(__file__).with_name("quick").exists(): time.sleep(0.2)
            yield torch.ones(2, 1)

def build():
    def loss(model, batch): return model(batch).square().mean()
    return Task(model=lambda: torch.nn.Linear(1, 1), loss=loss, train=Batches(), valid=[torch.ones(2, 1)])
"""


def own_study():
    return broken(broken(STUDY, "momentum_tuner.tasks:quadratic", "mine.py:build"), ", params: {dim: 4, kappa: 10}", "")


def test_what_an_interrupted_run_says_to_type_goes_on_as_it_is_printed(run, start, tmp_path):
    folder = tmp_path / "my studies"
    folder.mkdir()
    (folder / "mine.py").write_text(OWN)
    (folder / "study.yaml").write_text(own_study())
    options = ["--storage", "sqlite:///my tuner.db", "--tracking-uri", "sqlite:///my mlflow.db"]
    started = ["run", "my studies/study.yaml", *options, "--checkpoints", "my states", "--workers", "1"]
    process = start(*started)
    database = tmp_path / "my tuner.db"

    def is_training():
        assert process.poll() is None, process.communicate()
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT count(*) FROM tickets WHERE state = 'running'").fetchone() != (0,)
        return False

    wait_for(is_training)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, out + error
    (line,) = [line for line in out.splitlines() if "Go on with: momentum-tuner resume" in line]
    (folder / "quick").touch()
    found = run(*shlex.split(line.partition("Go on with: momentum-tuner ")[2]))
    assert found.returncode == 0, found.stderr
    there = {p.name for p in tmp_path.iterdir() if not p.name.endswith(("-wal", "-shm"))}
    assert there == {"my studies", "my tuner.db", "my mlflow.db", "my states", "mlruns"}


def test_a_command_to_go_on_with_has_the_options_given_here_quoted_and_without_secrets():
    given = [
        "small",
        "--storage",
        "postgresql://anna:hunter2@h/d",
        "--device",
        "cpu",
        "--slots",
        "4",
        "--compile",
        "off",
    ]
    with resume.make_context("resume", given):
        assert work_again(["/a b/mine.py", "pack", "pack"]) == (
            " --storage 'postgresql://***@h/d' --device cpu --compile off --slots 4 --trust '/a b/mine.py' --trust pack"
        )
    with worker.make_context("worker", []):
        assert work_again([]) == ""


def test_every_option_of_work_is_given_again():
    options = {parameter.opts[0]: parameter.type for parameter in resume.params if isinstance(parameter, click.Option)}
    del options["-v"], options["--trust"]  # only what is said; what is imported is known better
    for option, kind in options.items():
        value = kind.choices[0] if isinstance(kind, click.Choice) else "1"
        with resume.make_context("resume", ["small", option, value]):
            assert work_again([]).startswith(f" {option} {value}")


def broken(text, old, new):
    assert old in text
    return text.replace(old, new)


MISTAKES = {
    "no such file": (["run", "nothing.yaml"], None, "nothing.yaml"),
    "a directory": (["run", "."], None, "directory"),
    "misspelt command": (["rnu", "study.yaml"], STUDY, "Did you mean 'run'?"),
    "no argument": (["run"], None, "Missing argument 'STUDY.yaml'"),
    "misspelt key": (["run", "study.yaml"], broken(STUDY, "budget:", "bugdet:"), "did you mean 'budget'"),
    "low above high": (["run", "study.yaml"], broken(STUDY, "low: 0.01", "low: 0.5"), "space.learning_rate"),
    "momentum of one": (["run", "study.yaml"], broken(STUDY, "high: 0.9}", "high: 1.0}"), "[0, 1)"),
    "unknown optimizer": (["run", "study.yaml"], broken(STUDY, "[sgd, momentum]", "[sgd, momentun]"), "'momentum'"),
    "unknown sampler": (["run", "study.yaml"], STUDY + "sampler: {name: tep}\n", "'tpe'"),
    "hostile tag": (["run", "study.yaml"], STUDY + "seed: !!python/object/apply:os.getcwd []\n", "!!python/object"),
    "hostile name": (["run", "study.yaml"], broken(STUDY, "name: small", "name: ../x"), "name"),
    "hostile factory": (["submit", "study.yaml"], broken(STUDY, "momentum_tuner.tasks:quadratic", "os:system"), "os"),
    "unknown task": (["run", "study.yaml"], broken(STUDY, "tasks:quadratic", "tasks:quadratix"), "'quadratic'"),
    "unknown parameter": (["run", "study.yaml"], broken(STUDY, "kappa", "kapa"), "'kappa'"),
    "missing task file": (["run", "study.yaml"], broken(STUDY, "momentum_tuner.tasks:", "mine.py:"), "mine.py"),
    "objective not measured": (
        ["run", "study.yaml"],
        STUDY + "objective: {metric: valid_accuracy, direction: maximize}\n",
        "valid_accuracy",
    ),
    "wrong database": (["run", "study.yaml", "--storage", "mysql://u:secret@h/d"], STUDY, "mysql"),
    "not a URL": (["run", "study.yaml", "--storage", "my file"], STUDY, "not a database URL"),
    "no such folder": (["run", "study.yaml", "--storage", "sqlite:///no/where/x.db"], STUDY, "does not exist"),
    "no server": (["run", "study.yaml", "--storage", "postgresql://u:secret@127.0.0.1:1/d"], STUDY, "does not answer"),
    "no GPU": (["run", "study.yaml", "--device", "cuda:7"], STUDY, "--device"),
    "unknown device": (["run", "study.yaml", "--device", "tpu"], STUDY, "write auto, cpu, cuda"),
    "no worker": (["run", "study.yaml", "--workers", "0"], STUDY, "--workers"),
    "no slots": (["run", "study.yaml", "--slots", "many"], STUDY, "--slots"),
    "half compiled": (["run", "study.yaml", "--compile", "half"], STUDY, "--compile"),
    "file store": (["run", "study.yaml", "--tracking-uri", "./mlruns"], STUDY, "--tracking-uri"),
    "no database yet": (["status"], None, "there is no database"),
    "nothing to resume": (["resume", "small"], None, "there is no database"),
    "nothing to show": (["ui"], None, "there is no MLflow store"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_clear_line_exit_code_2_and_changes_nothing(run, tmp_path, mistake):
    arguments, study, message = MISTAKES[mistake]
    if study is not None:
        (tmp_path / "study.yaml").write_text(study)
    before = sorted(p.name for p in tmp_path.iterdir())
    found = run(*arguments)
    assert found.returncode == 2, found.stdout + found.stderr
    assert message in found.stderr
    assert "Traceback" not in found.stderr + found.stdout
    assert "secret" not in found.stderr + found.stdout
    assert len(found.stderr.strip().splitlines()) <= 4
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_commands_on_a_study_that_is_not_there_list_those_that_are(run, tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    assert run("submit", "study.yaml").returncode == 0
    for command in ("status", "best", "compare", "resume", "delete", "publish"):
        found = run(command, "big")
        assert found.returncode == 2
        assert "no study 'big'" in found.stderr
        assert "small" in found.stderr


def test_delete_asks_and_removes_the_study_from_our_tables_and_optunas(run, tmp_path):
    import optuna

    (tmp_path / "study.yaml").write_text(STUDY)
    found = run("run", "study.yaml", "--tracking-uri", "none", "--workers", "1")
    assert found.returncode == 0, found.stderr
    storage = f"sqlite:///{tmp_path / 'momentum_tuner.db'}"
    assert len(optuna.get_all_study_names(storage)) == 2
    found = run("delete", "small")  # no answer on standard input
    assert found.returncode == 2
    assert found.stderr == (
        "Error: small is not removed, as nobody answers; use --yes to remove it without being asked\n"
    )
    found = run("delete", "small", answers="n\n")
    assert (found.returncode, found.stderr) == (1, "small is not removed.\n")
    assert len(optuna.get_all_study_names(storage)) == 2
    assert run("delete", "small", answers="y\n").returncode == 0
    assert optuna.get_all_study_names(storage) == []
    assert run("status", "small").returncode == 2


def test_submit_counts_the_trials_that_status_counts(run, tmp_path):
    (tmp_path / "study.yaml").write_text(broken(STUDY, "confirm: {seeds: 0}", "confirm: {seeds: 2}"))
    said = run("submit", "study.yaml").stdout.splitlines()[0]
    assert said.startswith("Submitted small: 9 trials (sgd, momentum, momentum_0.9) in sqlite:///")
    status = json.loads(run("status", "small", "--json").stdout)
    assert sum(o["tickets"] for o in status["optimizers"]) + status["reference"]["tickets"] == 9


@pytest.mark.parametrize("arguments", [["status", "small"], ["status", "small", "--json"], ["compare", "small"]])
def test_a_reader_who_has_seen_enough_is_no_failure(start, run, tmp_path, arguments):
    (tmp_path / "study.yaml").write_text(STUDY)
    assert run("submit", "study.yaml").returncode == 0
    with start(*arguments) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, "")


def test_a_run_that_nobody_reads_on_is_not_said_to_be_done(start, run, tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    with start("run", "study.yaml", "--tracking-uri", "none", "--workers", "1") as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (
        1,
        "Error: nobody reads what is printed any more, so the workers ended; go on with: "
        "momentum-tuner resume small --tracking-uri none --workers 1\n",
    )
    assert run(*shlex.split(said)[-6:]).returncode == 0


def test_secrets_of_urls_are_never_shown(run, tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    environment = {"MOMENTUM_TUNER_STORAGE": "postgresql://anna:hunter2@127.0.0.1:1/d"}
    for command in (["run", "study.yaml", "-v"], ["status"], ["list", "--json"]):
        found = run(*command, environment=environment)
        assert found.returncode == 2
        assert "hunter2" not in found.stdout + found.stderr


def test_a_search_whose_trials_all_failed_is_work_that_failed_and_there_is_nothing_to_paste(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        broken(
            OWN,
            'if not Path(__file__).with_name("quick").exists(): time.sleep(0.2)',
            'if self.taken > 8: raise ValueError("the data ran out")',
        )
    )
    (tmp_path / "study.yaml").write_text(f"{own_study()}max_attempts: 1\n")
    options = ["--tracking-uri", "none", "--workers", "1"]
    for command in (["run", "study.yaml"], ["resume", "small"]):
        found = run(*command, *options)
        assert found.returncode == 1, found.stdout + found.stderr
        error = "Error: all 6 trials of the search failed; the first one: ValueError: the data ran out (mine.py:14)"
        assert found.stderr.splitlines()[-1] == error
        assert "Paste into" not in found.stdout
        assert "momentum-tuner report small" in found.stdout
        assert "Traceback" not in found.stdout + found.stderr


def test_a_search_whose_trials_all_diverged_is_done_and_there_is_nothing_to_paste(run, tmp_path):
    (tmp_path / "study.yaml").write_text(broken(STUDY, "{low: 0.01, high: 0.1}", "{low: 1000.0, high: 2000.0}"))
    found = run("run", "study.yaml", "--tracking-uri", "none", "--workers", "1")
    assert found.returncode == 0, found.stderr
    assert "Paste into" not in found.stdout
    assert "momentum-tuner report small" in found.stdout
