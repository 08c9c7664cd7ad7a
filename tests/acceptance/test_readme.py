"""Every command of the README runs, and its outputs look like the real ones."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from momentum_tuner.cli import COMMANDS
from momentum_tuner.tickets import submit_study

from .conftest import Shell
from .page import Page

ROOT = Path(__file__).parents[2]
README = Page(ROOT / "README.md")


def test_every_shell_block_is_marked_so_that_it_is_run_here():
    shell_blocks = re.findall(r"```bash\n", README.text)
    marked = [
        w
        for w, _ in README.blocks
        if w.startswith("commands on") or w in ("the first command", "the test command", "commands of completion")
    ]
    assert len(shell_blocks) == len(marked)


def test_the_first_command_installs_and_runs_digits_mlp():
    install, run = README.block("the first command").strip().rsplit(" && ", 1)
    assert "pip install ." in install
    assert run == "momentum-tuner run studies/digits-mlp.yaml"  # what the fixture `finished` runs


@pytest.fixture(scope="module")
def said(finished):
    """What each command on digits-mlp says."""
    shell, _ = finished
    return {" ".join(arguments): shell.run(*arguments) for arguments in README.commands("digits-mlp")}


def test_commands_on_digits_mlp_run(said):
    assert len(said) == 8
    assert all(said.values())


def test_the_shown_table_has_the_columns_and_optimizers_of_the_real_one(finished):
    _, out = finished
    shown = README.block("output of run").strip().splitlines()
    start, end = out.index("digits-mlp: best setting of"), out.index("digits-mlp: best settings, the fastest first")
    real = out[start:end].strip().splitlines()
    first_words = [[line.split()[0] if line.split() else "" for line in lines] for lines in (shown, real)]
    assert shown[0].strip() == real[0].strip()
    assert shown[2].split() == real[2].split()  # the heading
    assert sorted(first_words[0]) == sorted(first_words[1])


def test_the_shown_verdict_has_the_headings_and_contestants_of_the_real_one(finished):
    _, out = finished
    shown, real = (
        README.block("output of the verdict"),
        out[out.index("digits-mlp: best settings, the fastest first") :],
    )
    lines = [line.split() for line in real.splitlines()]
    for heading in [*shown.splitlines()[:4], *(s for s in shown.splitlines() if s.startswith(("equal", " pair")))]:
        assert heading.split() in lines, heading
    for contestant in ("momentum_0.9", "sgd", "momentum", "nesterov"):
        assert [contestant] in [line[:1] for line in lines]
    assert shown.count(" / ") == real.count(" / ") == 6


def test_the_shown_torch_lines_have_the_form_of_the_real_ones(said):
    real = said["best digits-mlp --format torch"]

    def form(text):
        return sorted(re.sub(r"=[\d.e-]+", "=N", line) for line in text.strip().splitlines())

    assert form(README.block("output of best")) == form(real)


def test_the_shown_end_of_replay_is_the_real_one(finished):
    shell, _ = finished
    (arguments,) = [a for a in README.commands("digits-mlp") if a[0] == "replay"]
    said = json.loads(shell.run(*arguments, "--json"))
    assert re.fullmatch(
        r"Equal: the losses of all \d+ epochs are the same to the last bit.", README.block("output of replay").strip()
    )
    assert said["verdict"] in ("equal", "within tolerance")


def test_bash_completes_after_the_shown_line(tmp_path, sqlite_database, make_spec):
    for name in ("digits-mlp", "digits-cnn"):
        submit_study(sqlite_database, make_spec(name=name), None, lambda _: None)
    (tmp_path / "momentum-tuner").write_text(f'#!/bin/sh\nexec {sys.executable} -m momentum_tuner "$@"\n')
    (tmp_path / "momentum-tuner").chmod(0o755)
    script = README.block("commands of completion") + (
        "COMP_WORDS=(momentum-tuner status digits-c) COMP_CWORD=2\n"
        "_momentum_tuner_completion momentum-tuner\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    environment = {**Shell(tmp_path).environment(), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("digits-cnn\n", "")


def test_your_own_model_runs_as_written(shell):
    for what, text in README.blocks:
        if what.startswith("file "):
            (shell.folder / what.removeprefix("file ")).write_text(text)
    (arguments,) = README.commands("my-study")
    assert "my-study: best setting of each optimizer" in shell.run(*arguments)
    assert len([line for line in README.block("file my_task.py").splitlines() if line.startswith("    ")]) <= 10


def test_commands_on_quadratic_run(shell, studies):
    shutil.copytree(studies, shell.folder / "studies")
    for arguments in README.commands("quadratic"):
        out = shell.run(*arguments)
    assert "quadratic: done" in out


def test_ui_serves_the_runs_of_the_study(finished):
    shell, _ = finished
    assert "`momentum-tuner ui`" in README.text
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = shell.start("ui", "--port", str(port))
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert time.monotonic() < deadline
                assert server.poll() is None
                time.sleep(0.5)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
        assert client.get_experiment_by_name("digits-mlp") is not None
    finally:
        server.terminate()
        server.communicate(timeout=30)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command):
    assert f"`{command}" in README.text
