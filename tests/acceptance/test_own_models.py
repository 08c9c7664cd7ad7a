"""Every command of the guide to one's own models runs, and its code is that of the files beside it."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from sklearn.datasets import load_digits

from momentum_tuner.cli import cli
from momentum_tuner.spec import load_study

from .conftest import ROOT, Shell
from .page import Page

torch.set_num_threads(1)
GUIDE = Page(ROOT / "studies" / "own-models.md")
FILES = ROOT / "studies" / "own_models"
STUDIES = sorted(FILES.glob("*.yaml"))
TINY = {
    "space": {"learning_rate": 0.2, "momentum": 0.5},
    "budget": {"trials": 1, "epochs": 2},
    "confirm": {"seeds": 0},
}


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> Shell:
    """A folder with the studies of the guide, at a tiny budget."""
    shell = Shell(tmp_path_factory.mktemp("guide"), {"MLFLOW_TRACKING_URI": "none"})
    shutil.copytree(ROOT / "studies", shell.folder / "studies")
    for path in (shell.folder / "studies" / "own_models").glob("*.yaml"):
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **TINY}, sort_keys=False))
    return shell


@pytest.fixture
def say(shell, monkeypatch):
    """A function that runs a command in this process, as what each would import anew takes seconds."""
    monkeypatch.chdir(shell.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")

    def say(*arguments: str) -> str:
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
        return done.output

    return say


def check_complete(say, name: str) -> list[dict]:
    """That each optimizer's trial ran to its end; returns what came of them."""
    progress = json.loads(say("status", name, "--json"))
    assert progress["phase"] == "done"
    for optimizer in progress["optimizers"]:
        assert (optimizer["complete"], optimizer["tickets"]) == (1, 1), optimizer
    best = json.loads(say("best", name, "--format", "json"))
    assert {row["optimizer"] for row in best} == {"sgd", "momentum", "nesterov"}
    return best


# The page


def test_every_block_is_marked_so_that_it_is_run_or_compared_here():
    assert len(re.findall(r"^```\w+$", GUIDE.text, re.MULTILINE)) == len(GUIDE.blocks)
    known = r"(commands on (tensors|vision|all)|part of \w+\.py|diff of sgd_script\.py and sgd_study\.py)"
    assert [what for what, _ in GUIDE.blocks if not re.fullmatch(known, what)] == []


def test_the_code_in_the_guide_is_that_of_the_files():
    parts = [(what.removeprefix("part of "), text) for what, text in GUIDE.blocks if what.startswith("part of ")]
    assert {name for name, _ in parts} == {f"{p.stem}.py" for p in STUDIES} - {"sgd_study.py"}
    for name, text in parts:
        assert text in (FILES / name).read_text(), name


def test_the_guide_links_and_runs_every_example():
    linked = re.findall(r"\]\(own_models/(\w+)\.py\)", GUIDE.text)
    assert {path.stem for path in STUDIES} <= set(linked)
    every = [arguments for about in ("tensors", "vision", "all") for arguments in GUIDE.commands(about)]
    named = [Path(arguments[1]).name for arguments in every if arguments[0] in ("run", "submit")]
    assert sorted(named) == [path.name for path in STUDIES]


def test_a_script_becomes_a_study_in_ten_changed_lines():
    before, after = ((FILES / name).read_text().splitlines() for name in ("sgd_script.py", "sgd_study.py"))
    diff = list(difflib.unified_diff(before, after, lineterm=""))[2:]
    assert len([line for line in diff if line[0] in "+-"]) <= 10
    assert GUIDE.block("diff of sgd_script.py and sgd_study.py").splitlines() == diff


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_guide_is_valid_and_fits_its_file(path):
    spec = load_study(path)
    assert spec.name == path.stem.replace("_", "-")
    assert spec.task.factory == f"{path.stem}.py:build"


# Its commands


def test_the_script_prints_the_same_before_and_after(capsys):
    printed = []
    for name in ("sgd_script.py", "sgd_study.py"):
        runpy.run_path(str(FILES / name), run_name="__main__")
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    losses = [float(line.split(": ")[1]) for line in printed[0].splitlines()]
    assert len(losses) == 20 and losses[-1] < 0.1 < losses[0]


def test_run_trains_what_is_in_memory(shell, say):
    ((*arguments,),) = GUIDE.commands("tensors")
    assert "tensors: best setting of each optimizer" in shell.run(*arguments)
    check_complete(say, "tensors")


def test_one_worker_serves_a_loader_adapters_a_loop_and_what_was_a_script(shell, say):
    *submits, worker, best = GUIDE.commands("all")
    for arguments in submits:
        assert say(*arguments).startswith("Submitted ")
    shell.run(*worker)
    names = [Path(arguments[1]).stem.replace("_", "-") for arguments in submits]
    found = {name: check_complete(say, name) for name in names}
    assert say(*best).count("torch.optim.SGD(model.parameters(), lr=0.2") == 3
    for name, metric in (("loader", "accuracy"), ("huggingface", "accuracy"), ("loop", "reward")):
        assert all(0.1 < row[f"valid_{metric}"] <= 1 for row in found[name])  # better than to guess one of ten


def write_mnist(folder: Path) -> None:
    """scikit-learn's digits in the files of MNIST: big-endian numbers, then bytes."""
    folder.mkdir(parents=True)
    data = load_digits()
    images = np.pad(np.kron(data.images * 255 / 16, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    for name, rows in (("train", slice(0, 400)), ("t10k", slice(400, 500))):
        count = rows.stop - rows.start
        header = struct.pack(">iiii", 2051, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images[rows].tobytes())
        labels = data.target[rows].astype(np.uint8).tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + labels)


OPERATORS = '''
"""PyPI's torchvision is built for CUDA; beside a CPU build of torch it misses two operators when it is imported."""

import sys


class Operators:
    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision" and cls.library is None:
            import torch

            cls.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                cls.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Operators)
'''


@pytest.fixture
def torchvision(shell, tmp_path) -> Shell:
    """The shell with torchvision: installed, or in a folder of its own, where other packages do not find it."""
    folder = os.environ.get("TORCHVISION_FOLDER")
    if folder is None and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    path = [str(ROOT), *([folder] if folder else [])]
    environment = {**shell.environment(), "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", "import torchvision"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "operator torchvision::nms does not exist" in found.stderr:
        (tmp_path / "sitecustomize.py").write_text(OPERATORS)
        path.insert(0, str(tmp_path))
    else:
        assert found.returncode == 0, found.stderr
    return Shell(shell.folder, {**shell.variables, "PYTHONPATH": os.pathsep.join(path)})


def test_run_trains_on_a_data_set_of_torchvision(torchvision, say):
    write_mnist(torchvision.folder / "data" / "MNIST" / "raw")
    ((*arguments,),) = GUIDE.commands("vision")
    assert "vision: best setting of each optimizer" in torchvision.run(*arguments)
    assert min(row["valid_accuracy"] for row in check_complete(say, "vision")) > 0.12
