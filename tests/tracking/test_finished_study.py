"""A finished study is one experiment with one parent and a child for each trial."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from mlflow import MlflowClient

from momentum_tuner.database import Epoch, Load, Study, Ticket
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.tickets import (
    Result,
    find_study,
    finish_study,
    record_epochs,
    submit_study,
)
from momentum_tuner.tracking import parent as parent_module

from ..recorded import Recorded
from .published import (
    PARENT,
    STEPS,
    artifacts_of,
    complete,
    epochs,
    finish,
    finished_study,
    notes,
    points_of,
    publish,
    runs_of,
    start,
    submit,
    text_of,
)


def test_a_finished_study_is_one_experiment_with_one_parent_and_a_child_for_each_trial(database, make_spec, uri):
    study = finished_study(database, make_spec)
    result = publish(database, study, uri)
    assert (result.trials, result.complete, result.busy, result.refused) == (4, True, False, 0)
    client = MlflowClient(tracking_uri=uri)
    assert [e.name for e in client.search_experiments() if e.name != "Default"] == ["digits-mlp"]
    (parent,), children = runs_of(uri)
    assert parent.info.run_name == "digits-mlp"
    assert parent.info.status == "FINISHED"
    assert {c.data.tags[PARENT] for c in children} == {parent.info.run_id}
    assert [c.info.run_name for c in children] == [
        "momentum 0000 lr=0.031 beta=0.95",
        "momentum 0001 lr=0.062 beta=0.95",
        "nesterov 0000 lr=0.031 beta=0.95",
        "nesterov 0001 lr=0.062 beta=0.95",
    ]
    with database.read() as session:
        row = session.get_one(Study, study.id)
        assert (row.parent_run_id, row.parent_published) == (parent.info.run_id, "done")
        assert row.experiment_id == parent.info.experiment_id
        assert (row.publisher, row.publisher_until) == (None, None)
        assert parent.info.start_time == int(row.created_at * 1000)
        assert parent.info.end_time == int(row.finished_at * 1000)
    assert [n[3] for n in notes(database)] == ["complete", "diverged", "pruned", "failed"]
    assert [n[2] for n in notes(database)] == [4, 1, 1, 2]


def test_each_child_has_the_params_tags_status_and_times_of_its_trial(database, make_spec, uri):
    publish(database, finished_study(database, make_spec), uri)
    _, children = runs_of(uri)
    by_ticket = {int(c.data.tags["momentum_tuner.ticket"]): c for c in children}
    with database.read() as session:
        tickets = {t.id: t for t in session.scalars(sa.select(Ticket))}
    assert set(by_ticket) == set(tickets)
    for ticket_id, child in by_ticket.items():
        ticket = tickets[ticket_id]
        assert child.info.run_id == ticket.run_id
        assert child.data.params == {
            "optimizer": ticket.optimizer,
            "seed": "0",
            "learning_rate": f"{0.03125 * (ticket.position + 1):.8g}",
            "momentum": "0.95",
            "weight_decay": "0",
            "clip_norm": "inf",
            "batch_size": "64",
        }
        tags = {k: v for k, v in child.data.tags.items() if not k.startswith(("mlflow.", "momentum_tuner."))}
        reason = tags.pop("reason", None)
        assert tags.pop("champion", None) == ("true" if ticket.id == 1 else None)
        assert tags == {
            "outcome": ticket.outcome,
            "optimizer": ticket.optimizer,
            "kind": "search",
            "worker": "host-1-abc",
            "slot": str(ticket.slot),
            "attempts": "1",
        }
        assert (
            child.info.status
            == {
                "complete": "FINISHED",
                "pruned": "KILLED",
                "diverged": "FINISHED",
                "failed": "FAILED",
            }[ticket.outcome]
        )
        assert [(i.dataset.name, i.dataset.digest) for i in child.inputs.dataset_inputs] == [
            ("digits_mlp", "0123456789abcdef")
        ]
        description = child.data.tags.get("mlflow.note.content")
        if ticket.outcome == "failed":
            said = "RuntimeError: no route to postgresql://***@host/db <script>"
            assert description == f'    File "task.py", line 3, in loss\n    {said}'
        else:
            assert description is None
        if ticket.outcome == "failed":
            assert reason == "RuntimeError: no route to postgresql://***@host/db <script>"
        assert (child.info.start_time, child.info.end_time) == (
            int(ticket.started_at * 1000),
            int(ticket.finished_at * 1000),
        )


def test_each_curve_has_every_epoch_once_at_its_real_step_and_time(database, make_spec, uri):
    publish(database, finished_study(database, make_spec), uri)
    _, children = runs_of(uri)
    (run,) = [c for c in children if c.data.tags["outcome"] == "complete"]
    with database.read() as session:
        rows = session.scalars(
            sa.select(Epoch).where(Epoch.ticket_id == int(run.data.tags["momentum_tuner.ticket"])).order_by(Epoch.epoch)
        ).all()
        ticket = session.get_one(Ticket, rows[0].ticket_id)
    times = [int(r.recorded_at * 1000) for r in rows]
    found = points_of(uri, run.info.run_id)
    trained = ("train_loss", "grad_norm", "grad_norm_max", "layer_grad_ratio", "update_norm", "oscillation", "spikes")
    for key in (*trained, "seconds", "distance"):
        expected = [(r.step, t, float(getattr(r, key))) for r, t in zip(rows[1:], times[1:], strict=True)]
        assert found.pop(key) == expected, key
    assert found.pop("valid_loss") == [(r.step, t, r.valid_loss) for r, t in zip(rows, times, strict=True)]
    assert found.pop("valid_accuracy") == [(r.step, t, r.metrics["accuracy"]) for r, t in zip(rows, times, strict=True)]
    end = (STEPS * 4, int(ticket.finished_at * 1000))
    assert found == {
        "best_valid_loss": [(*end, 0.25)],
        "mean_valid_loss": [(*end, 0.35)],
        "objective": [(*end, 0.25)],
        "sharpness": [(*end, 12.5)],
        "stability_margin": [(*end, 0.75)],
    }
    assert [r.step for r in rows] == [0, 23, 46, 69, 92]
    assert run.data.metrics["valid_loss"] == rows[-1].valid_loss, "the last one is shown as the latest"


def test_a_diverged_trial_shows_at_which_step(database, make_spec, uri):
    publish(database, finished_study(database, make_spec), uri)
    _, children = runs_of(uri)
    (run,) = [c for c in children if c.data.tags["outcome"] == "diverged"]
    assert run.data.metrics["diverged_at_step"] == 30.0
    assert run.data.metrics["objective"] == 2.5


def test_the_parent_shows_the_study_its_counts_and_the_best_settings(database, make_spec, uri):
    space = {"learning_rate": {"low": 0.001, "high": 1.0}, "momentum": [0.9, 0.95], "nesterov": {"weight_decay": 0.0}}
    study = finished_study(database, make_spec, trials=3, space=space)
    publish(database, study, uri)
    (parent,), children = runs_of(uri)
    best = {"learning_rate": "0.03125", "momentum": "0.95", "weight_decay": "0", "clip_norm": "inf", "batch_size": "64"}
    second = {**best, "learning_rate": "0.09375"}
    assert parent.data.params == {
        "task": "momentum_tuner.tasks:digits_mlp",
        "optimizers": "momentum, nesterov",
        "sampler": "tpe",
        "pruner": "successive_halving",
        "schedule": "constant",
        "objective": "minimize valid_loss",
        "budget": "3 trials of 4 epochs for each optimizer",
        "confirmation_seeds": "0",
        "target": "auto",
        "precision": "auto",
        "seed": "0",
        "space.learning_rate": "0.001 to 1 (log)",
        "space.momentum": "0.9, 0.95",
        "space.nesterov.weight_decay": "0",
        "best_optimizer": "momentum",
        "best_trial": "0",
        **{f"best_{name}": value for name, value in best.items()},
        **{f"best_momentum_{name}": value for name, value in best.items()},
        **{f"best_nesterov_{name}": value for name, value in second.items()},
    }
    champions = [c.info.run_name for c in children if "champion" in c.data.tags]
    assert champions == ["momentum 0000 lr=0.031 beta=0.95", "nesterov 0002 lr=0.094 beta=0.95"]
    assert [(i.dataset.digest, i.tags[0].value) for i in parent.inputs.dataset_inputs] == [
        ("0123456789abcdef", "train")
    ]


def test_the_parent_shows_a_space_without_clipping_among_its_choices(database, make_spec, uri):
    space = {"clip_norm": [float("inf"), 1.0], "nesterov": {"clip_norm": float("inf")}}
    study = finished_study(database, make_spec, space=space)
    assert publish(database, study, uri).complete
    (parent,), _ = runs_of(uri)
    shown = {name: value for name, value in parent.data.params.items() if name.endswith("clip_norm")}
    assert (shown["space.clip_norm"], shown["space.nesterov.clip_norm"]) == ("inf, 1", "inf")


def test_the_curves_of_the_parent_go_over_the_trials_as_they_ended(database, make_spec, uri):
    study = finished_study(database, make_spec, trials=3)
    with database.write() as session:  # in another order than that of their numbers
        for number, ticket in enumerate(session.scalars(sa.select(Ticket).order_by(Ticket.id.desc()))):
            ticket.started_at, ticket.finished_at = study.created_at, study.created_at + 36.0 * (number + 1)
    publish(database, study, uri)
    (parent,), _ = runs_of(uri)
    found = points_of(uri, parent.info.run_id)
    times = [int((study.created_at + 36.0 * step) * 1000) for step in range(1, 7)]
    assert {key: [p[:2] for p in found[key]] for key in ("trials", "trials_per_hour")} == {
        key: list(zip(range(1, 7), times, strict=True)) for key in ("trials", "trials_per_hour")
    }
    values = {key: [p[2] for p in points] for key, points in found.items() if not key.startswith("system/")}
    assert values.pop("trials_per_hour") == pytest.approx([100.0] * 6)
    assert values == {  # complete 5.25, failed, pruned, complete 4.25, diverged, complete 0.25
        "trials": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "complete": [1.0, 1.0, 1.0, 2.0, 2.0, 3.0],
        "pruned": [0.0, 0.0, 1.0, 1.0, 1.0, 1.0],
        "diverged": [0.0, 0.0, 0.0, 0.0, 1.0, 1.0],
        "failed": [0.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        "objective": [5.25, 5.25, 5.25, 4.25, 4.25, 0.25],
        "best_valid_loss": [5.25, 5.25, 5.25, 4.25, 4.25, 0.25],
    }


def test_the_parent_has_the_files_and_the_verdict_of_a_confirmed_study(database, make_spec, uri):
    spec = make_spec(
        optimizers=["sgd", "nesterov"], budget={"trials": 1, "epochs": 20}, confirm={"seeds": 6}, target=0.5
    )
    made = Recorded(database, spec)
    slow, quick = made.search("sgd", 0.5, 0.5), made.search("nesterov", 0.25, 0.125, 0.75)
    made.reach("sgd", slow, {seed: 1000.0 + seed for seed in range(6)})
    made.reach("nesterov", quick, {seed: 250.0 + seed for seed in range(6)})
    assert publish(database, made.record, uri).complete
    (parent,), children = runs_of(uri)
    tags = parent.data.tags
    assert tags["verdict"] == "nesterov reaches the target sooner than sgd."
    assert tags["verdict.sgd.nesterov"].startswith(
        "nesterov is 3.97x faster than sgd (6 seeds); steps nesterov / sgd: 0.252,"
    )
    description = tags["mlflow.note.content"]
    assert description.startswith("**nesterov reaches the target sooner than sgd.**\n\n- nesterov is 3.97x faster")
    (row,) = [line for line in description.splitlines() if line.startswith("| nesterov |")]
    assert row.startswith("| nesterov | 0.125 | 0.75 | 0.25 | 0 | 6 | 252.5 |")
    assert "    torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.75, nesterov=True)  # nesterov" in description
    assert "momentum-tuner run study.yaml" in description
    pages = ["figures/curves.html", "figures/stability.html"]  # there is nothing of a search of one trial
    files = ["environment.json", *pages, "report.html", "study.yaml", "trials.csv"]
    assert artifacts_of(uri, parent.info.run_id) == files
    assert text_of(uri, parent.info.run_id, "study.yaml") == made.record.spec.to_yaml()
    trials = text_of(uri, parent.info.run_id, "trials.csv").splitlines()
    assert len(trials) == 1 + 14 == 1 + len(children)
    assert "nesterov reaches the target sooner than sgd." in text_of(uri, parent.info.run_id, "report.html")
    assert "Plotly" in text_of(uri, parent.info.run_id, "figures/curves.html")


def test_the_parent_shows_how_busy_each_worker_was(database, make_spec, uri):
    study = finished_study(database, make_spec)
    publish(database, study, uri)
    (parent,), _ = runs_of(uri)
    found = points_of(uri, parent.info.run_id)
    times = [(step, int((study.created_at + step + 0.5) * 1000)) for step in (0, 15, 30)]
    assert {key: points for key, points in found.items() if key.startswith("system/")} == {
        "system/cpu_utilization_percentage.host-1-abc": [
            (*t, v) for t, v in zip(times, (100.0, 101.0, 102.0), strict=True)
        ],
        "system/system_memory_usage_megabytes.host-1-abc": [(*t, 512.5) for t in times],
        "system/gpu_memory_usage_megabytes.host-1-abc": [(*times[0], 2048.0)],
    }
    with database.read() as session:
        assert set(session.scalars(sa.select(Load.published))) == {True}


def test_more_loads_than_go_at_once_are_all_shown(database, make_spec, uri, monkeypatch):
    monkeypatch.setattr(parent_module, "FLUSH_LOADS", 2)
    publish(database, finished_study(database, make_spec), uri)
    (parent,), _ = runs_of(uri)
    assert len(points_of(uri, parent.info.run_id)["system/cpu_utilization_percentage.host-1-abc"]) == 3


def test_a_child_whose_traceback_could_end_a_block_of_code_shows_it_as_text(database, make_spec, uri):
    study = submit(database, make_spec, trials=1)
    first, second = start(database, study)
    trace = "```\n# <script>alert(1)</script>\nValueError: ```"
    finish(database, (first, Result("failed", None, None, "ValueError", traceback=trace), []))
    finish(database, (second, complete(0.5), epochs(4)))
    finish_study(database, study.id)
    publish(database, study, uri)
    _, (child, _) = runs_of(uri)
    lines = child.data.tags["mlflow.note.content"].splitlines()
    assert lines == ["    ```", "    # <script>alert(1)</script>", "    ValueError: ```"]


def test_a_curve_longer_than_mlflows_batch_is_shown_whole(database, make_spec, uri):
    spec = make_spec(optimizers=["sgd"], budget={"trials": 1, "epochs": 250})
    study = submit_study(database, spec, None, lambda _: None)
    (held,) = start(database, study)
    record_epochs(database, [(held, r) for r in epochs(250)])
    finish(database, (held, complete(0.1, 250), []))
    finish_study(database, study.id)
    publish(database, find_study(database, study.name), uri)
    _, (run,) = runs_of(uri)
    found = points_of(uri, run.info.run_id)
    assert len(found["train_loss"]) == 250
    assert [p[0] for p in found["valid_loss"]] == [STEPS * e for e in range(251)]
    assert run.data.metrics["valid_loss"] == pytest.approx(1.1 / 250)
    assert run.data.params["learning_rate"] == "0.03125"


def test_values_that_mlflow_cannot_show_are_left_out(database, make_spec, uri):
    study = submit(database, make_spec, trials=1)
    first, second = start(database, study)
    odd = EpochRecord(epoch=0, step=0, valid_loss=float("inf"), grad_norm=1.0, metrics={"accuracy": float("nan")})
    finish(
        database,
        (first, Result("complete", 1.0, {"best_valid_loss": float("nan"), "steps": 5}), [odd]),
        (second, complete(1.0), epochs(4)),
    )
    finish_study(database, study.id)
    assert publish(database, study, uri).complete
    _, children = runs_of(uri)
    assert children[0].data.metrics == {"grad_norm": 1.0, "objective": 1.0}
