"""The main job as a newcomer runs it: one command on studies/digits-mlp.yaml, then a look at everything it left."""

import json
import re
import shutil
from collections import Counter

import optuna
import pytest
from optuna.trial import TrialState

OPTIMIZERS = ("sgd", "momentum", "nesterov")


@pytest.fixture(scope="module")
def best(finished):
    """What `best --format json` says."""
    shell, _ = finished
    return json.loads(shell.run("best", "digits-mlp", "--format", "json"))


def test_run_ends_in_a_table_of_the_best_setting_of_each_optimizer(finished):
    _, out = finished
    table = out[out.index("best setting of each optimizer") : out.index("best settings, the fastest first")]
    for name in ("learning rate", "momentum", "valid loss", "valid accuracy", "pruned", "diverged"):
        assert name in table
    rows = [line.split() for line in table.splitlines() if line.split() and line.split()[0] in OPTIMIZERS]
    assert sorted(row[0] for row in rows) == sorted(OPTIMIZERS)
    for _, learning_rate, _, loss, accuracy, _, complete, pruned, diverged in rows:
        assert 1e-4 <= float(learning_rate) <= 1.0
        assert float(loss) < 0.2
        assert float(accuracy) > 0.93
        assert int(complete) + int(pruned) + int(diverged) == 64
        assert int(pruned) > 20


def test_the_same_command_again_says_that_the_study_is_complete(finished, studies):
    shell, first = finished
    out = shell.run("run", str(studies / "digits-mlp.yaml"))
    assert "Study digits-mlp is complete." in out
    table = first[first.index("digits-mlp: best setting") : first.index("Paste into")]
    assert table in out


def test_resume_of_a_complete_study_says_so_too(finished):
    shell, _ = finished
    assert "Study digits-mlp is complete." in shell.run("resume", "digits-mlp")


def test_best_as_torch_lines_builds_the_optimizers(finished, best):
    import torch

    shell, _ = finished
    lines = shell.run("best", "digits-mlp", "--format", "torch").splitlines()
    assert len(lines) == 3
    pattern = r"torch\.optim\.SGD\(model\.parameters\(\), lr=[\d.e-]+(, momentum=[\d.e-]+)?(, nesterov=True)?\)"
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert sum("nesterov=True" in line for line in lines) == 1
    model = torch.nn.Linear(2, 2)
    for line, setting in zip(lines, best, strict=True):
        group = eval(line, {"torch": torch, "model": model}).param_groups[0]
        assert group["lr"] == pytest.approx(setting["learning_rate"], rel=1e-5)
        assert group["momentum"] == pytest.approx(setting.get("momentum", 0.0), rel=1e-5)


def test_best_as_json_is_a_list_best_first(best):
    assert [f["objective"] for f in best] == sorted(f["objective"] for f in best)
    assert {f["optimizer"] for f in best} == set(OPTIMIZERS)
    for f in best:
        assert f["study"] == "digits-mlp"
        assert f["objective"] == f["best_valid_loss"]
        assert f["trial"] in range(64)
        assert ("momentum" in f) == (f["optimizer"] != "sgd")


def test_optuna_reads_64_finished_trials_of_each_optimizer(finished, best):
    shell, _ = finished
    for optimizer in OPTIMIZERS:
        study = optuna.load_study(study_name=f"digits-mlp/{optimizer}", storage=shell.storage)
        assert sorted(t.number for t in study.trials) == list(range(64))
        assert {t.state for t in study.trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
        names = {"learning_rate"} if optimizer == "sgd" else {"learning_rate", "one_minus_momentum"}
        assert all(set(t.params) == names for t in study.trials)
        mine = next(b for b in best if b["optimizer"] == optimizer)
        assert study.best_value == mine["objective"]
        assert study.best_trial.number == mine["trial"]


def test_pruned_trials_stopped_at_a_rung_and_complete_ones_ran_their_budget(finished):
    import sqlalchemy as sa

    shell, _ = finished
    engine = sa.create_engine(shell.storage)
    query = sa.text(
        "SELECT outcome, (SELECT max(epoch) FROM epochs WHERE ticket_id = tickets.id) AS last, count(*)"
        " FROM tickets GROUP BY outcome, last"
    )
    with engine.connect() as connection:
        for outcome, last, _count in connection.execute(query):
            if outcome == "complete":
                assert last == 20
            elif outcome == "pruned":
                assert last in (1, 3, 9)
    engine.dispose()


def test_mlflow_has_one_parent_and_192_children_of_the_search_none_running_with_rising_steps(finished):
    from mlflow import MlflowClient

    shell, _ = finished
    client = MlflowClient(tracking_uri=shell.tracking)
    experiment = client.get_experiment_by_name("digits-mlp")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(parents) == 1
    kinds = Counter(c.data.tags["kind"] for c in children)
    assert kinds == {"search": 192, "reference": 64, "confirm": 40}
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {parents[0].info.run_id}
    assert {r.info.status for r in runs} <= {"FINISHED", "KILLED"}
    assert parents[0].info.status == "FINISHED"
    name = r"((sgd|momentum_0\.9) (confirm )?\d{4} lr=\S+|(momentum|nesterov) (confirm )?\d{4} lr=\S+ beta=\S+)"
    assert all(re.fullmatch(name, c.info.run_name) for c in children)
    outcomes = {"complete": "FINISHED", "diverged": "FINISHED", "pruned": "KILLED"}
    for child in children[::16]:
        assert outcomes[child.data.tags["outcome"]] == child.info.status
        for key in ("valid_loss", "train_loss", "valid_accuracy"):
            if key in child.data.metrics:
                steps = [m.step for m in client.get_metric_history(child.info.run_id, key)]
                assert steps == sorted(set(steps))
                assert all(step % 22 == 0 for step in steps) or child.data.tags["outcome"] == "diverged"


def test_status_and_list_as_json(finished):
    shell, _ = finished
    status = json.loads(shell.run("status", "digits-mlp", "--json"))
    assert status["study"] == "digits-mlp"
    assert status["phase"] == "done"
    assert [o["optimizer"] for o in status["optimizers"]] == list(OPTIMIZERS)
    for o in status["optimizers"]:
        assert o["tickets"] == o["done"] == 64
        assert o["running"] == o["failed"] == 0
        assert o["complete"] + o["pruned"] + o["diverged"] == 64
    assert status["workers"] == []
    (row,) = json.loads(shell.run("list", "--json"))
    assert row["study"] == "digits-mlp"
    assert row["done"] == row["tickets"] == 192 + 64 + 40
    assert status["reference"] == {"tickets": 64, "done": 64, "running": 0}
    assert status["confirm"] == {"tickets": 40, "done": 40, "running": 0}


def test_a_changed_study_file_is_refused_naming_the_fields(finished, studies, tmp_path):
    shell, _ = finished
    changed = tmp_path / "study.yaml"
    changed.write_text((studies / "digits-mlp.yaml").read_text().replace("epochs: 20", "epochs: 30"))
    message = shell.run("run", str(changed), code=2)
    assert "budget.epochs: 20 -> 30" in message


def test_mlflow_rebuilds_after_its_store_was_deleted(finished, shell):
    from mlflow import MlflowClient

    shutil.copy(finished[0].folder / "momentum_tuner.db", shell.folder)  # which knows from then on the runs made here
    again = f"sqlite:///{shell.folder / 'again.db'}"
    message = shell.run("register", "digits-mlp", "momentum", "--tracking-uri", again, code=2)
    assert "MLflow has no run of that trial; type: momentum-tuner publish digits-mlp" in message
    shell.run("publish", "digits-mlp", "--tracking-uri", again)
    client = MlflowClient(tracking_uri=again)
    experiment = client.get_experiment_by_name("digits-mlp")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert len(runs) == 1 + 192 + 64 + 40
    assert not [r for r in runs if r.info.status == "RUNNING"]
