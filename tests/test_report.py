"""The report: what it says in every phase, that it needs nothing else, and that no text can break out of it."""

import csv
import io
import json
import re
import subprocess
import sys

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from momentum_tuner.cli import cli
from momentum_tuner.database import Study
from momentum_tuner.errors import InputError, TaskError
from momentum_tuner.report import trajectories as trajectories_module
from momentum_tuner.report import trials_csv, write_report, write_trials
from momentum_tuner.search import design
from momentum_tuner.tickets import find_study, note_data, submit_study
from momentum_tuner.worker import StopSignal, run_worker
from momentum_tuner.worker_options import WorkerOptions

from .recorded import Recorded

SPACE = {"learning_rate": {"low": 1e-3, "high": 1.0, "log": True}, "momentum": {"low": 0.0, "high": 0.99}}


def submit(database, spec):
    return submit_study(database, spec, None, lambda optimizer: design(spec, optimizer))


def written(database, name, tmp_path) -> str:
    return write_report(database, find_study(database, name), tmp_path / "report.html").read_text()


def data_of(page: str) -> dict:
    """What the page's script draws."""
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture
def finished(sqlite_database, make_spec):
    spec = make_spec(
        name="bowl",
        task={"factory": "momentum_tuner.tasks:quadratic", "params": {"dim": 2, "kappa": 10.0, "start": "random"}},
        optimizers=["sgd", "momentum"],
        space=SPACE,
        budget={"trials": 12, "epochs": 3},
        confirm={"seeds": 4},
        target=0.01,
    )
    submit(sqlite_database, spec)
    run_worker(sqlite_database.text, WorkerOptions(studies=("bowl",), slots=16), StopSignal())
    return sqlite_database


def test_a_finished_study_has_every_section_every_figure_its_data_and_every_trial(finished, tmp_path):
    page = written(finished, "bowl", tmp_path)
    for section in ("Verdict", "Best settings", "Learning curves", "Speed", "Stability", "Search", "Workers", "Trials"):
        assert f">{section}</h2>" in page, section
    figures = re.findall(r'data-figure="([^"]+)"', page)
    data = data_of(page)
    assert len(figures) == len(set(figures)) > 8
    drawn = json.dumps(data)
    assert all(f'"{figure}"' in drawn for figure in figures)
    assert "torch.optim.SGD(model.parameters(), lr=" in page
    assert len(list(csv.DictReader(io.StringIO(trials_csv(finished, find_study(finished, "bowl")))))) == 3 * 12 + 3 * 4
    assert len(page) < 5_000_000


def test_a_report_of_different_batch_sizes_shows_speed_in_epochs(database, make_spec, tmp_path):
    spec = make_spec(
        optimizers=["sgd", "momentum_0.9"],
        space={"batch_size": [16, 64]},
        budget={"trials": 1, "epochs": 4},
        confirm={"seeds": 8},
        target=0.5,
    )
    study = Recorded(database, spec)
    study.reach("sgd", study.search("sgd", 0.3, batch_size=16), {s: 400.0 + 8 * s for s in range(8)})
    large = study.search("momentum_0.9", 0.4)
    study.reach("momentum_0.9", large, {s: None if s == 7 else 200.0 + s for s in range(8)})
    page = written(database, spec.name, tmp_path)
    assert "sgd reaches the target in fewer epochs than momentum_0.9." in page
    assert ">ratio of epochs</th>" in page and ">epochs to target</th>" in page
    assert "so speed is compared in epochs" in page
    figure = data_of(page)["figures"]["steps-to-target"]
    shown = {trace["name"]: trace["x"] for trace in figure["data"] if trace["type"] == "scatter"}
    assert shown["sgd, reached"] == pytest.approx([1.0 + 0.02 * s for s in range(8)])
    assert shown["momentum_0.9, reached"] == pytest.approx([2.0 + 0.01 * s for s in range(7)])
    assert shown["momentum_0.9, missed"] == [8.0]
    assert figure["layout"]["xaxis"]["title"]["text"] == "epochs to target"


def test_a_report_loads_nothing(finished, tmp_path):
    page = written(finished, "bowl", tmp_path)
    assert "default-src &#39;none&#39;" in page
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', markup)
    assert "@import" not in markup and "url(" not in markup


def test_a_study_that_has_not_begun_has_a_report_that_says_so(database, make_spec, tmp_path):
    submit(database, make_spec(name="new", space=SPACE, confirm={"seeds": 3}))
    page = written(database, "new", tmp_path)
    assert ">Verdict</h2>" in page
    assert "no completed" in page or "not yet" in page or "nothing" in page


def test_no_text_of_a_user_becomes_markup_or_ends_a_script(database, make_spec, tmp_path):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    spec = make_spec(
        name="evil",
        task={"factory": "momentum_tuner.tasks:quadratic", "params": {"spectrum": hostile}},
        space=SPACE,
        confirm={"seeds": 2},
    )
    study = Recorded(database, spec)
    for optimizer in spec.contestants:
        study.search(optimizer, 0.5, momentum=0.5 if optimizer in ("momentum", "nesterov") else None)
    page = written(database, "evil", tmp_path)
    assert hostile not in page
    assert "<img src=x" not in page
    assert page.count("<script>alert") == 0
    data_of(page)


def test_trials_go_to_csv_and_parquet_with_the_same_rows(finished, tmp_path):
    from pyarrow import parquet

    study = find_study(finished, "bowl")
    rows = list(csv.DictReader(io.StringIO(write_trials(finished, study, tmp_path / "t.csv").read_text())))
    table = parquet.read_table(write_trials(finished, study, tmp_path / "t.parquet")).to_pylist()
    assert len(rows) == len(table) == 48
    for row, entry in zip(rows, table, strict=True):
        assert (row["kind"], row["optimizer"], int(row["number"])) == (
            entry["kind"],
            entry["optimizer"],
            entry["number"],
        )
        assert float(row["learning_rate"]) == entry["learning_rate"]
    assert {row["kind"] for row in rows} == {"search", "reference", "confirm"}
    with pytest.raises(InputError, match=r"ends in \.csv or \.parquet"):
        write_trials(finished, study, tmp_path / "t.xlsx")


def test_the_command_writes_both_and_says_where(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(cli, ["report", "bowl", "--trials", "t.csv", "--storage", finished.text])
    assert run.exit_code == 0, run.output
    assert "Report: bowl-report.html" in run.output
    assert (tmp_path / "bowl-report.html").stat().st_size > 1_000_000
    assert (tmp_path / "t.csv").exists()


def test_what_is_pasted_says_with_which_batch_size_and_schedule_it_was_tuned(sqlite_database, make_spec, tmp_path):
    spec = make_spec(
        name="noted",
        optimizers=["sgd", "momentum_classic"],
        space={"batch_size": [32, 64]},
        schedule={"name": "cosine"},
        confirm={"seeds": 0},
    )
    made = Recorded(sqlite_database, spec)
    made.search("sgd", 0.5, 0.25, batch_size=32)
    made.search("momentum_classic", 0.6, 0.125, 0.5, batch_size=64)
    schedule = "# schedule: cosine over 20 epochs, final_fraction=0"
    run = CliRunner().invoke(cli, ["best", "noted", "--format", "torch", "--storage", sqlite_database.text])
    assert run.output.splitlines() == [
        "torch.optim.SGD(model.parameters(), lr=0.25)",
        "# batch_size=32",
        schedule,
        "# momentum_classic is not in torch.optim: learning_rate=0.125, clip_norm=inf, batch_size=64, momentum=0.5",
        schedule,
    ]
    page = written(sqlite_database, "noted", tmp_path)
    assert f"torch.optim.SGD(model.parameters(), lr=0.25)  # sgd\n# batch_size=32\n{schedule}\n" in page


def test_a_task_with_data_is_not_loaded_for_a_landscape_that_it_has_not(
    sqlite_database, make_spec, tmp_path, monkeypatch
):
    made = Recorded(sqlite_database, make_spec(optimizers=["sgd"], confirm={"seeds": 0}))
    made.search("sgd", 0.5, 0.5)
    loaded = []

    def load(*arguments, **_):
        loaded.append(arguments[0])
        raise TaskError("not here")

    monkeypatch.setattr(trajectories_module, "load_task", load)
    note_data(sqlite_database, made.record.id, {"name": "digits_mlp", "kind": "tensors", "digest": "0"})
    written(sqlite_database, made.record.name, tmp_path)
    assert loaded == []
    with sqlite_database.write() as session:
        session.execute(sa.update(Study).values(data={"name": "bowl", "kind": "landscape", "digest": "0"}))
    written(sqlite_database, made.record.name, tmp_path)
    assert loaded == [made.record.spec.task.factory]


def test_what_is_prepared_is_what_takes_long_to_import():
    """The publisher does it while trials run; what only a landscape or nobody takes is not among it."""
    script = (
        "import sys; from momentum_tuner import report; report.prepare()\n"
        "missing = {'jinja2', 'optuna.importance._ped_anova'} - set(sys.modules)\n"
        "assert not missing, missing\n"
        "assert not {'torch', 'sklearn'} & set(sys.modules)\n"
        "import optuna; optuna.importance.PedAnovaImportanceEvaluator()\n"
        "import sklearn\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
