"""`init`: what it writes can be run, and nothing is overwritten."""

import re

import pytest
from click.testing import CliRunner

from momentum_tuner.cli import cli
from momentum_tuner.launcher import load_checked_task, own_trust, put_study
from momentum_tuner.spec import load_study


@pytest.fixture
def init(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli, ["init", *arguments])


def test_it_writes_a_study_and_its_task_and_says_what_to_type_next(init, tmp_path):
    found = init("new/demo")
    assert found.exit_code == 0
    assert found.output.splitlines() == [
        "Wrote new/demo/study.yaml and new/demo/task.py. Next:",
        "  cd new/demo",
        "  momentum-tuner run study.yaml",
    ]
    folder = tmp_path / "new/demo"
    assert sorted(p.name for p in folder.iterdir()) == ["study.yaml", "task.py"]
    spec = load_study(folder / "study.yaml")
    assert (spec.name, spec.optimizers, spec.confirm.seeds) == ("demo", ("sgd", "momentum", "nesterov"), 10)
    task = load_checked_task(spec, folder, own_trust(spec, folder))
    assert len(task.train) + len(task.valid) == 569


def test_every_line_of_the_study_file_is_explained(init, tmp_path):
    init()
    lines = (tmp_path / "study.yaml").read_text().splitlines()
    sections = [line for line in lines if re.match(r"[a-z]+:", line)]
    assert len(sections) >= 10
    assert all("#" in line for line in sections if not line.endswith(":"))


def test_without_a_folder_it_writes_here_and_needs_no_cd(init, tmp_path):
    assert init().output.splitlines()[1:] == ["  momentum-tuner run study.yaml"]
    assert (tmp_path / "study.yaml").is_file()


@pytest.mark.parametrize("there", ["study.yaml", "task.py"])
def test_nothing_is_overwritten(init, tmp_path, there):
    (tmp_path / there).write_text("mine")
    found = init(".")
    assert found.exit_code == 2
    assert found.stderr == f"Error: {there} is there already, and is not overwritten; name another folder\n"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(there, "mine")]


def test_a_folder_that_cannot_be_made_is_said_so(init, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in ("file", "file/below"):
        found = init(folder)
        assert found.exit_code == 2
        assert len(found.stderr.splitlines()) <= 4
    assert found.stderr == "Error: file/below cannot be written: Not a directory; name another folder\n"


@pytest.mark.parametrize(
    ("folder", "name"),
    [("123", "123"), ("no", "no"), ("1e5", "1e5"), ("Mon étude 2", "Mon-tude-2"), ("...x", "x"), ("-_-", "my-study")],
)
def test_a_study_has_its_folders_name_as_far_as_that_can_be(init, tmp_path, folder, name):
    assert init("--", folder).exit_code == 0
    assert load_study(tmp_path / folder / "study.yaml").name == name


def test_two_first_studies_in_one_database_are_two(init, tmp_path, sqlite_database):
    for folder in ("a", "b"):
        init(folder)
        spec = load_study(tmp_path / folder / "study.yaml")
        trusted = own_trust(spec, tmp_path / folder)
        assert put_study(sqlite_database, spec, tmp_path / folder, trusted).name == folder
