"""Several workers, interruptions and deaths: the budget stays exact."""

import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import optuna
import psutil
import pytest
import sqlalchemy as sa

TRIALS = 16
QUICK = ("--slots", "8", "--compile", "off")


@pytest.fixture
def short_study(studies, tmp_path):
    """digits-mlp with fewer trials and epochs, confirmed on fewer seeds."""
    return shorten(studies / "digits-mlp.yaml", tmp_path, trials=TRIALS, epochs=4, seeds=2)


def shorten(study: Path, folder: Path, **numbers: int) -> str:
    """Write a study with other numbers into a folder; returns where it is."""
    text = study.read_text()
    for name, number in numbers.items():
        text, found = re.subn(rf"\b{name}: \d+", f"{name}: {number}", text)
        assert found == 1, name
    (folder / study.name).write_text(text)
    return str(folder / study.name)


def trial_counts(shell) -> dict[str, int]:
    summaries = optuna.get_all_study_summaries(shell.storage)
    return {s.study_name: s.n_trials for s in summaries}


def progress(shell) -> dict:
    return json.loads(shell.run("status", "digits-mlp", "--json"))


def wait_for(shell, process, done: int) -> None:
    """Until so many trials are done."""
    query = sa.text("SELECT count(*) FROM tickets WHERE state = 'done'")
    engine = sa.create_engine(shell.storage)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        try:
            with engine.connect() as connection:
                if connection.execute(query).scalar() >= done:
                    engine.dispose()
                    return
        except sa.exc.OperationalError:
            pass  # the tables are not there yet
        time.sleep(0.05)
    raise AssertionError("nothing got done")


def exactly_the_budget_of_each(shell) -> None:
    contestants = ("sgd", "momentum", "nesterov", "momentum_0.9")
    assert trial_counts(shell) == {f"digits-mlp/{o}": TRIALS for o in contestants} | {
        f"digits-mlp/{o}/confirm": 2 for o in contestants
    }
    status = progress(shell)
    assert status["phase"] == "done"
    assert all(o["done"] == o["tickets"] == TRIALS and o["failed"] == 0 for o in status["optimizers"])


def test_four_workers_do_exactly_the_trials_of_each_optimizer(shell, short_study):
    shell.run("run", short_study, "--workers", "4", *QUICK, "--tracking-uri", "none")
    exactly_the_budget_of_each(shell)
    engine = sa.create_engine(shell.storage)
    with engine.connect() as connection:
        holders = connection.execute(sa.text("SELECT worker_id, count(*) FROM tickets GROUP BY worker_id")).all()
    engine.dispose()
    assert len(holders) > 1


def test_ctrl_c_gives_trials_back_and_resume_goes_on(shell, short_study):
    process = shell.start("run", short_study, *QUICK)
    wait_for(shell, process, done=10)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, out + error
    assert "resume digits-mlp" in out
    assert "Traceback" not in out + error
    stopped = progress(shell)
    assert stopped["workers"] == []
    assert all(o["running"] == 0 for o in stopped["optimizers"])
    assert 10 <= sum(o["done"] for o in stopped["optimizers"]) < 3 * TRIALS
    shell.run("resume", "digits-mlp", *QUICK)
    exactly_the_budget_of_each(shell)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=shell.tracking)
    experiment = client.get_experiment_by_name("digits-mlp")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert len(runs) == 1 + 4 * TRIALS + 4 * 2
    assert {r.info.status for r in runs} <= {"FINISHED", "KILLED"}


def held_tickets(shell) -> list[tuple]:
    """State, attempts and whether there is a checkpoint, of the tickets that are neither done nor untouched."""
    engine = sa.create_engine(shell.storage)
    with engine.connect() as connection:
        found = connection.execute(
            sa.text(
                "SELECT state, attempts, worker_id, checkpoint IS NOT NULL FROM tickets "
                "WHERE state != 'done' AND generation > 0"
            )
        ).all()
    engine.dispose()
    return [tuple(row) for row in found]


def test_a_signal_to_all_processes_at_once_gives_trials_back_too(shell, short_study):
    """As systemd and batch systems send it."""
    process = shell.start("run", short_study, "--workers", "2", *QUICK)
    wait_for(shell, process, done=10)
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, out + error
    assert "Stopping: giving trials back" in out
    held = held_tickets(shell)
    assert held and all(row == ("open", 0, None, 1) for row in held), held


def test_where_the_workers_alone_are_asked_to_end_the_command_says_how_to_go_on(shell, short_study):
    process = shell.start("run", short_study, "--workers", "2", *QUICK, "--tracking-uri", "none")
    wait_for(shell, process, done=10)
    (server,) = psutil.Process(process.pid).children()
    for worker in server.children():
        worker.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 1, out + error
    assert re.search(r"Error: the workers ended at \d+ of 64 trials; go on with: momentum-tuner resume ", error), error
    assert error.endswith(" digits-mlp --tracking-uri none --workers 2 --compile off --slots 8\n")
    assert all(row == ("open", 0, None, 1) for row in held_tickets(shell))


def test_a_second_ctrl_c_ends_all_at_once(shell, short_study):
    process = shell.start("run", short_study, "--workers", "2", *QUICK)
    wait_for(shell, process, done=10)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, out + error
    assert "Traceback" not in out + error
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    shell.run("resume", "digits-mlp", *QUICK)
    exactly_the_budget_of_each(shell)


def test_a_killed_worker_is_replaced_and_its_trials_keep_their_numbers(shell, short_study):
    process = shell.start("run", short_study, "--workers", "2", *QUICK, "--tracking-uri", "none")
    wait_for(shell, process, done=10)
    engine = sa.create_engine(shell.storage)
    with engine.connect() as connection:
        pid = connection.execute(sa.text("SELECT pid FROM workers WHERE state = 'running' LIMIT 1")).scalar()
    engine.dispose()
    os.kill(pid, signal.SIGKILL)
    out, error = process.communicate(timeout=280)
    assert process.returncode == 0, out + error
    assert "was ended by signal 9" in out
    exactly_the_budget_of_each(shell)


def test_a_study_outlives_what_its_workers_were_forked_from(shell, short_study):
    process = shell.start("run", short_study, "--workers", "2", *QUICK, "--tracking-uri", "none")
    wait_for(shell, process, done=10)
    (server,) = [p for p in psutil.Process(process.pid).children() if "momentum_tuner.fork_server" in p.cmdline()]
    server.kill()
    out, error = process.communicate(timeout=280)
    assert process.returncode == 0, out + error
    assert "was ended by signal 9" in out
    exactly_the_budget_of_each(shell)


def test_a_second_run_at_the_same_time_joins(shell, short_study):
    first = shell.start("run", short_study, "--workers", "2", *QUICK)
    second = shell.start("run", short_study, "--workers", "2", *QUICK)
    for process in (first, second):
        out, error = process.communicate(timeout=280)
        assert process.returncode == 0, out + error
    exactly_the_budget_of_each(shell)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=shell.tracking)
    experiment = client.get_experiment_by_name("digits-mlp")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert len([r for r in runs if "mlflow.parentRunId" not in r.data.tags]) == 1
    assert len(runs) == 1 + 4 * TRIALS + 4 * 2


def test_submit_then_a_worker_elsewhere_does_the_work(shell, studies, tmp_path):
    out = shell.run("submit", shorten(studies / "quadratic.yaml", tmp_path, trials=8, refine=4, seeds=2))
    assert "Submitted quadratic" in out
    shell.run("worker", "quadratic", "--tracking-uri", "none")
    status = json.loads(shell.run("status", "quadratic", "--json"))
    assert status["phase"] == "done"


def test_a_task_file_beside_the_study_runs_and_a_resume_needs_trust(shell, studies, tmp_path):
    shorten(studies / "own-task.yaml", tmp_path, trials=6, epochs=3, seeds=2)
    shutil.copy(studies / "own_task.py", tmp_path)
    shell.run("submit", "own-task.yaml")
    message = shell.run("resume", "own-task", "--tracking-uri", "none", code=2)
    assert f"--trust {tmp_path / 'own_task.py'}" in message
    out = shell.run("run", "own-task.yaml", "--tracking-uri", "none")
    assert "best setting of each optimizer" in out
