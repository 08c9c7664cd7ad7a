"""Typical mistakes: each gives one to three lines that say what to change, exit code 2, and changes nothing."""

import re
import shutil
import socket
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from momentum_tuner.cli import cli
from momentum_tuner.database import Database
from momentum_tuner.launcher import put_study
from momentum_tuner.spec import parse_study

STUDY = """
name: small
task: {factory: "momentum_tuner.tasks:quadratic", params: {dim: 4, kappa: 10}}
optimizers: [sgd, momentum]
space: {learning_rate: {low: 0.01, high: 0.1}, momentum: {low: 0.0, high: 0.9}}
budget: {trials: 3, epochs: 2}
pruner: {name: none}
confirm: {seeds: 0}
"""
OWN = STUDY.replace("momentum_tuner.tasks:quadratic", "mine.py:build").replace(", params: {dim: 4, kappa: 10}", "")
TASK = """
import torch
from momentum_tuner import Task

def build():
    return Task(model=lambda: torch.nn.Linear(1, 1), loss=lambda model, batch: model.weight.square().sum(),
                steps_per_epoch=5)
"""
RUN = ("run", "study.yaml", "--workers", "1", "--tracking-uri", "none")


def study(old: str, new: str, text: str = STUDY) -> dict[str, str]:
    assert old in text
    return {"study.yaml": text.replace(old, new)}


def task(old: str, new: str) -> dict[str, str]:
    assert old in TASK
    return {"study.yaml": OWN, "mine.py": TASK.replace(old, new)}


PLAIN = {"study.yaml": STUDY}
FILES: dict[str, tuple[dict[str, str], tuple[str, ...], str]] = {
    # In the study file
    "no such file": (PLAIN, ("run", "studi.yaml"), "studi.yaml: there is no such file; did you mean 'study.yaml'?"),
    "no study file at all": ({}, ("run", "study.yaml"), "there is no such file; `momentum-tuner init` writes one"),
    "a directory": (PLAIN, ("run", "."), "is a directory; name the study file in it"),
    "empty file": ({"study.yaml": ""}, RUN, "is empty; a study file begins with 'name: ...'"),
    "misspelt key": (study("budget:", "bugdet:"), RUN, "did you mean 'budget'?"),
    "missing section": (study("budget: {trials: 3, epochs: 2}\n", ""), RUN, "budget: is missing; it must be a mapping"),
    "duplicate key": (study("pruner:", "name: again\npruner:"), RUN, "'name' is here already on line 2"),
    "tab": (study("optimizers:", "\toptimizers:"), RUN, "a tab is not allowed here; indent with spaces"),
    "low above high": (
        study("low: 0.01", "low: 0.5"),
        RUN,
        "space.learning_rate.high: 0.1 is not allowed; it must be above",
    ),
    "momentum of one": (
        study("high: 0.9}", "high: 1.0}"),
        RUN,
        "space.momentum.high: 1.0 is not allowed; it must be in [0, 1)",
    ),
    "unknown optimizer": (study("[sgd, momentum]", "[sgd, momentun]"), RUN, "did you mean 'momentum'?"),
    "unknown sampler": (study("pruner:", "sampler: {name: tep}\npruner:"), RUN, "did you mean 'tpe'?"),
    "negative budget": (
        study("trials: 3", "trials: -3"),
        RUN,
        "budget.trials: -3 is not allowed; it must be a whole number",
    ),
    "trials as text": (
        study("trials: 3", 'trials: "64"'),
        RUN,
        "budget.trials: '64' is not allowed; it must be a whole",
    ),
    "hostile tag": (
        study("pruner:", "seed: !!python/object/apply:os.getcwd []\npruner:"),
        RUN,
        "holds only plain values",
    ),
    "hostile name": (study("name: small", "name: ../x"), RUN, "it must be 1 to 63 letters, digits, '-' and '_'"),
    # In the task
    "unknown metric": (
        study("pruner:", "objective: {metric: valid_accuracy, direction: maximize}\npruner:"),
        RUN,
        "the task has no 'valid_accuracy'; its metrics are none of its own; or use valid_loss",
    ),
    "unknown task": (study("tasks:quadratic", "tasks:quadratix"), RUN, "did you mean 'quadratic'?"),
    "unknown parameter": (study("kappa", "kapa"), RUN, "did you mean 'kappa'?"),
    "missing task file": ({"study.yaml": OWN}, RUN, "there is no file"),
    "no such function": (task("def build", "def biuld"), RUN, "has no 'build' (did you mean 'biuld'?)"),
    "no Task": (task("return Task(", "return dict("), RUN, "must return a momentum_tuner.Task, not dict"),
    "loss not scalar": (
        task("square().sum()", "square()"),
        RUN,
        "must return a scalar, not shape [1, 1]: return its mean",
    ),
    "loss without gradient": (task("model.weight.square", "torch.ones(1).square"), RUN, "it has no gradient"),
    "a model, not its maker": (task("lambda: torch", "torch"), RUN, "write model=lambda: Net(...)"),
    "an error of the task's own": (task("    return", "    1 / 0\n    return"), RUN, "mine.py:6)"),
    # On the command line
    "misspelt command": (PLAIN, ("rnu", "study.yaml"), "Did you mean 'run'?"),
    "misspelt option": (PLAIN, ("run", "study.yaml", "--wrokers", "2"), "--workers"),
    "no argument": ({}, ("run",), "Missing argument 'STUDY.yaml'"),
    "wrong database": (PLAIN, (*RUN, "--storage", "mysql://u:secret@h/d"), "use sqlite or postgresql"),
    "no URL": (PLAIN, (*RUN, "--storage", "my file"), "write sqlite:///file.db or postgresql://"),
    "no such folder": (PLAIN, (*RUN, "--storage", "sqlite:///no/where/x.db"), "does not exist; make it first"),
    "no database file": (PLAIN, (*RUN, "--storage", "sqlite:///study.yaml"), "is not an SQLite database"),
    "no GPU": (PLAIN, (*RUN, "--device", "cuda:7"), "use --device cpu, or see `nvidia-smi`"),
    "unknown device": (PLAIN, (*RUN, "--device", "tpu"), "write auto, cpu, cuda, cuda:1 or cuda:0,2"),
    "no worker": (PLAIN, ("run", "study.yaml", "--workers", "0"), "--workers '0': write a number above 0, or auto"),
    "too many workers": (
        PLAIN,
        (*RUN, "--checkpoints", "states", "--workers", "100000"),
        "--workers 100000: write 256 or less, or auto; more run on other machines",
    ),
    "no slots": (PLAIN, (*RUN, "--slots", "x"), "--slots 'x': write a number above 0, or auto"),
    "Ray's option without Ray": (PLAIN, (*RUN, "--ray-address", "auto"), "need --engine ray"),
    "MLflow's old file store": (
        PLAIN,
        ("run", "study.yaml", "--tracking-uri", "./mlruns"),
        "write sqlite:///mlflow.db or http",
    ),
    "unknown place for checkpoints": (PLAIN, (*RUN, "--checkpoints", "ftq://x/y"), "write a folder, or a URL as s3://"),
    "no database yet": ({}, ("status",), "start a study with `momentum-tuner run STUDY.yaml`"),
    "nothing to resume": ({}, ("resume", "small"), "start a study with `momentum-tuner run STUDY.yaml`"),
    "nothing to show": ({}, ("ui",), "there is no MLflow store sqlite:///mlflow.db yet; run a study first"),
    "no port for the dashboard": (
        PLAIN,
        ("ui", "--dashboard", "--port", "65535"),
        "the dashboard is on the port after --port; name one below 65535",
    ),
    "a host of another machine": (
        {"mlflow.db": ""},
        ("ui", "--host", "192.0.2.1"),
        "nothing can listen on 192.0.2.1:5000: Cannot assign requested address; name another --host or --port",
    ),
    "a tolerance that is no number": (
        PLAIN,
        ("replay", "small", "sgd", "0", "--tolerance", "nan"),
        "Invalid value for '--tolerance': nan allows any difference; write a number such as 1e-3.",
    ),
    "a tolerance without end": (
        PLAIN,
        ("replay", "small", "sgd", "0", "--tolerance", "inf"),
        "Invalid value for '--tolerance': inf allows any difference; write a number such as 1e-3.",
    ),
    "unknown format": (PLAIN, ("best", "small", "--format", "toml"), "is not one of 'table', 'json', 'yaml', 'torch'"),
}
"""For each mistake: the files that are there, what is typed, and what the message says to change."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("momentum_tuner.cli.ui.find_spec", lambda name: name)
    for name in ("MOMENTUM_TUNER_STORAGE", "MOMENTUM_TUNER_CHECKPOINTS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*arguments: str) -> str:
    """What the command line says against these arguments; it must be short, and exit with 2."""
    found = CliRunner().invoke(cli, list(arguments), prog_name="momentum-tuner")
    assert found.exit_code == 2, (found.stdout, found.stderr, found.exception)
    assert "Traceback" not in found.output
    assert "secret" not in found.output
    lines = [line for line in found.stderr.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 3, found.stderr
    return found.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("mistake", FILES)
def test_a_mistake_is_told_with_its_mend_and_changes_nothing(folder, mistake):
    files, arguments, mend = FILES[mistake]
    for name, text in files.items():
        (folder / name).write_text(text)
    before = contents(folder)
    said = refused(*arguments)
    assert mend in re.sub(r"\s+", " ", said)
    after = contents(folder)
    assert {name: text for name, text in after.items() if "__pycache__" not in name} == before


# Against what a database holds


@pytest.fixture
def held(folder, migrated_sqlite):
    """A database in its default place that holds a study of its own task, and what changed in it since."""
    shutil.copy(migrated_sqlite, folder / "momentum_tuner.db")
    (folder / "mine.py").write_text(TASK)
    (folder / "study.yaml").write_text(OWN)
    database = Database("sqlite:///momentum_tuner.db")
    put_study(database, parse_study(OWN), folder, [str(folder / "mine.py")])

    class Held:
        def execute(self, statement: str) -> None:
            with database.write() as session:
                session.execute(sa.text(statement))

        def rows(self) -> dict[str, list]:
            with database.read() as session:
                names = sa.inspect(session.connection()).get_table_names()
                return {name: session.execute(sa.text(f"SELECT * FROM {name}")).all() for name in names}

    yield Held()
    database.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


COMPLETE = "UPDATE tuner_studies SET phase = 'done'"
HELD: dict[str, tuple[tuple[str, ...], str, str]] = {
    "no such study": (("status", "big"), "", "no study 'big' in sqlite:///{folder}/momentum_tuner.db: it holds small"),
    "no such study to resume": (("resume", "big"), "", "it holds small"),
    "a file for a name": (("best", "study.yaml"), "", "it holds small"),
    "task file not trusted": (("resume", "small"), "", "is not trusted: add --trust {folder}/mine.py if it is yours"),
    "another file trusted": (
        ("resume", "small", "--trust", "other.py"),
        "",
        "add --trust {folder}/mine.py if it is yours",
    ),
    "changed study": (RUN, "", "give the changed study another name, or `momentum-tuner delete small`"),
    "another Optuna": (
        RUN,
        "UPDATE alembic_version SET version_num = 'v2.6.0.a'",
        "or bring them up to date with `optuna storage",
    ),
    "another Optuna on resume": (
        ("resume", "small", "--trust", "mine.py"),
        "UPDATE alembic_version SET version_num = 'v2.6.0.a'",
        "or bring them up to date with `optuna storage",
    ),
    "a newer momentum-tuner": (
        ("status", "small"),
        "UPDATE momentum_tuner_version SET version_num = '9999'",
        "upgrade this one: pip install -U momentum-tuner",
    ),
    "no worker for a complete study": (
        (*RUN, "--workers", "0"),
        COMPLETE,
        "--workers '0': write a number above 0, or auto",
    ),
    "too many workers for a complete study": (
        (*RUN, "--workers", "100000"),
        COMPLETE,
        "--workers 100000: write 256 or less, or auto; more run on other machines",
    ),
    "no GPU for a complete study": ((*RUN, "--device", "cuda:7"), COMPLETE, "use --device cpu, or see `nvidia-smi`"),
    "Ray's option without Ray on a complete study": (
        ("resume", "small", "--gpus-per-worker", "0.5"),
        COMPLETE,
        "--ray-address and --gpus-per-worker need --engine ray",
    ),
    "no such trial": (
        ("replay", "small", "sgd", "7"),
        "",
        "no trial 7 of sgd in the search of 'small'; it has none yet",
    ),
    "no such optimizer": (("replay", "small", "sdg", "0"), "", "did you mean 'sgd'?"),
    "no such optimizer to register": (
        ("register", "small", "foo"),
        "",
        "study 'small': 'foo' is not known (allowed: sgd, momentum)",
    ),
    "a trial that is no number": (("replay", "small", "sgd", "best"), "", "is not a valid integer"),
}
"""For each mistake: what is typed, what is done to the database before, and what the message says to change."""


@pytest.mark.parametrize("mistake", HELD)
def test_a_mistake_about_a_study_is_told_with_its_mend_and_changes_nothing(folder, held, mistake):
    arguments, statement, mend = HELD[mistake]
    if statement:
        held.execute(statement)
    if mistake == "changed study":
        (folder / "study.yaml").write_text(OWN.replace("epochs: 2", "epochs: 3"))
    before = held.rows()
    said = refused(*arguments)
    assert mend.format(folder=folder) in re.sub(r"\s+", " ", said)
    assert held.rows() == before
    assert mistake != "changed study" or "budget.epochs: 2 -> 3" in said


@pytest.mark.parametrize(
    ("arguments", "mend"),
    [
        (("-o", "momentum_tuner.db"), "momentum_tuner.db: write a name that ends in .html or .htm"),
        (("-o", "study.yaml"), "study.yaml: write a name that ends in .html or .htm"),
        (("--trials", "x.csv", "-o", "x.csv"), "x.csv: write a name that ends in .html or .htm"),
        (("--trials", "momentum_tuner.db"), "momentum_tuner.db: write a name that ends in .csv or .parquet"),
    ],
)
def test_a_report_is_written_over_no_database_and_no_study_file(folder, held, arguments, mend):
    before = contents(folder)
    assert refused("report", "small", *arguments) == f"Error: {mend}\n"
    shared = "momentum_tuner.db-shm"  # SQLite's memory of who reads
    assert contents(folder) | {shared: b""} == before | {shared: b""}


@pytest.mark.parametrize(
    ("before", "options", "mend"),
    [
        (0, (), "port {taken} is taken; name another with --port"),
        (
            1,
            ("--dashboard",),
            "port {taken} is taken; the dashboard is on the one after --port; name another with --port",
        ),
    ],
)
def test_a_port_that_is_taken_is_told_and_nobody_is_sent_there(folder, held, monkeypatch, before, options, mend):
    monkeypatch.setattr("momentum_tuner.cli.ui._run_all", lambda commands: None)
    (folder / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        found = CliRunner().invoke(cli, ["ui", "--port", str(taken - before), *options])
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr == f"Error: {mend.format(taken=taken)}\n"
    found = CliRunner().invoke(cli, ["ui", "--port", str(taken)])
    assert (found.exit_code, found.stdout) == (0, f"MLflow: http://127.0.0.1:{taken}\nCtrl-C stops.\n")


def test_servers_that_do_not_run_are_told_with_their_address(folder, held):
    (folder / "study.yaml").write_text(STUDY)
    port = free_port()
    said = refused("run", "study.yaml", "--storage", f"postgresql://anna:secret@127.0.0.1:{port}/d")
    assert f"the database postgresql://***@127.0.0.1:{port}/d does not answer" in said
    before = held.rows()
    said = refused("publish", "small", "--tracking-uri", f"http://anna:secret@127.0.0.1:{port}")
    assert f"MLflow at http://***@127.0.0.1:{port} does not answer" in said
    assert {name: rows for name, rows in held.rows().items() if name != "tuner_studies"} == {
        name: rows for name, rows in before.items() if name != "tuner_studies"
    }


def test_several_mistakes_in_a_file_are_told_at_once_in_one_line_each(folder):
    (folder / "study.yaml").write_text(
        STUDY.replace("trials: 3", "trials: 0").replace("[sgd, momentum]", "[sgdd, momentum]")
    )
    said = refused("run", "study.yaml")
    assert [line.split(": ")[1 if line.startswith("Error") else 0] for line in said.splitlines()] == ["study.yaml"] * 2
