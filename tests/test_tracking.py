from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from mlflow import MlflowClient
from mlflow.entities import ViewType

from momentum_tuner.database import Database, Epoch, Load, Study, Ticket, Worker, database_now
from momentum_tuner.errors import TrackingError
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.tickets import (
    Claim,
    Result,
    WorkerIdentity,
    begin_finish,
    claim,
    delete_study,
    end_finish,
    find_study,
    finish_study,
    give_back,
    note_data,
    record_epochs,
    register_worker,
    set_trials,
    submit_study,
    with_trial,
)
from momentum_tuner.tracking import Publisher, PublisherLoop, check_tracking_uri, quiet_mlflow, run_name, short_momentum
from momentum_tuner.tracking import lease as lease_module
from momentum_tuner.tracking import parent as parent_module
from momentum_tuner.tracking import publisher as publisher_module
from momentum_tuner.tracking import store as store_module
from momentum_tuner.tracking import tables as tables_module
from momentum_tuner.tracking.lease import Lease
from momentum_tuner.tracking.runs import Point
from momentum_tuner.tracking.store import RunStore
from momentum_tuner.tracking.tables import RunChange, RunTables, open_tables
from tests.recorded import Recorded

STEPS = 23
SETTINGS = {
    "learning_rate": 0.03125,
    "momentum": 0.95,
    "weight_decay": 0.0,
    "clip_norm": float("inf"),
    "batch_size": 64,
}
PARENT = "mlflow.parentRunId"


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory) -> Path:
    """An MLflow store with its tables, to be copied: making them takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    quiet_mlflow()
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)  # MLflow puts files beside
    return tmp_path


@pytest.fixture
def uri(folder, empty_mlflow) -> str:
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture
def control_uri(folder, empty_mlflow) -> str:
    """A second MLflow store, to compare with."""
    shutil.copy(empty_mlflow, folder / "control.db")
    return f"sqlite:///{folder / 'control.db'}"


@pytest.fixture
def database(sqlite_database) -> Database:
    return sqlite_database


# A study with finished trials, made as workers make them


def epochs(count: int, offset: float = 0.0) -> list[EpochRecord]:
    first = EpochRecord(epoch=0, step=0, valid_loss=2.5 + offset, metrics={"accuracy": 0.1})
    return [first] + [
        EpochRecord(
            epoch=e,
            step=STEPS * e,
            train_loss=1.0 / e + offset,
            valid_loss=1.1 / e + offset,
            grad_norm=3.0,
            grad_norm_max=9.0,
            layer_grad_ratio=5.0,
            update_norm=0.1,
            oscillation=0.25,
            spikes=e % 2,
            seconds=0.01,
            distance=2.0,
            metrics={"accuracy": 1.0 - 0.5 / e},
        )
        for e in range(1, count + 1)
    ]


DATA = {
    "name": "digits_mlp",
    "source": "momentum_tuner.tasks:digits_mlp",
    "kind": "tensors",
    "digest": "0123456789abcdef",
    "train": [[1437, 64], [1437]],
    "valid": [[360, 64], [360]],
}


def submit(database: Database, make_spec, trials: int = 2, **sections):
    spec = make_spec(optimizers=["momentum", "nesterov"], budget={"trials": trials, "epochs": 4}, **sections)
    study = submit_study(database, spec, None, lambda _: None)
    note_data(database, study.id, DATA)
    return study


def start(database: Database, study, limit: int = 100, worker: str = "host-1-abc") -> list[Claim]:
    with database.read() as session:
        known = session.get(Worker, worker)
    if known is None:
        register_worker(database, WorkerIdentity(worker, "host", 1), "cpu", environment={"python": "3.12.1"})
        note_load(database, study, worker)
    claims = claim(database, study.id, worker, limit, max_attempts=3)
    asked = []
    for c in claims:
        if c.trial_number is None:
            with database.read() as session:
                number = session.get_one(Ticket, c.ticket_id).position
            settings = {**SETTINGS, "learning_rate": 0.03125 * (number + 1)}
            c = with_trial(c, 1000 + c.ticket_id, number, settings)
        asked.append(c)
    return set_trials(database, asked, list(range(len(asked))))


def note_load(database: Database, study, worker: str = "host-1-abc", count: int = 3) -> None:
    with database.write() as session:
        session.add_all(
            Load(
                worker_id=worker,
                study_id=study.id,
                sampled_at=study.created_at + 15.0 * number + 0.5,
                cpu_percent=100.0 + number,
                memory_mb=512.5,
                gpu_memory_mb=None if number else 2048.0,
            )
            for number in range(count)
        )


def finish(database: Database, *results: tuple[Claim, Result, list[EpochRecord]]) -> None:
    for held, _, records in results:
        for record in records:  # one by one, as epochs come
            record_epochs(database, [(held, record)])
    kept = begin_finish(database, [(held, result) for held, result, _ in results])
    assert len(kept) == len(results)
    end_finish(database, [held for held, _ in kept])


def complete(value: float, count: int = 4) -> Result:
    measures = {"best_valid_loss": value, "mean_valid_loss": value + 0.1, "steps": STEPS * count, "epochs": count}
    measures |= {"sharpness": 12.5, "stability_margin": 0.75}
    return Result("complete", value, measures)


def finished_study(database: Database, make_spec, trials: int = 2, **sections):
    """A study that is done: of its first four trials one of each outcome, else complete."""
    study = submit(database, make_spec, trials, **sections)
    claims = start(database, study)
    results = []
    for number, held in enumerate(claims):
        kind = number if number < 4 else 0
        if kind == 1:
            result, count = Result("pruned", 0.9, {"best_valid_loss": 0.9, "steps": STEPS}), 1
        elif kind == 2:
            measures = {"mean_valid_loss": 2.5, "diverged_at_step": 30, "steps": 30, "diverged": True}
            result, count = Result("diverged", 2.5, measures), 1
        elif kind == 3:
            reason = "RuntimeError: no route to postgresql://u:hunter2@host/db <script>"
            trace = 'File "task.py", line 3, in loss\nRuntimeError: no route to postgresql://u:hunter2@host/db <script>'
            result, count = Result("failed", None, None, reason, traceback=trace), 2
        else:
            result, count = complete(0.25 + number), 4
        results.append((held, result, epochs(count, 0.01 * number)))
    finish(database, *results)
    assert finish_study(database, study.id)
    return find_study(database, study.name)


# What MLflow holds, as plain values


def runs_of(uri: str, name: str = "digits-mlp", view: int = ViewType.ACTIVE_ONLY):
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(name)
    found = client.search_runs([experiment.experiment_id], run_view_type=view, max_results=1000)
    parents = [r for r in found if PARENT not in r.data.tags]
    children = sorted((r for r in found if PARENT in r.data.tags), key=lambda r: r.info.run_name)
    return parents, children


def points_of(uri: str, run_id: str) -> dict[str, list[tuple[int, int, float]]]:
    client = MlflowClient(tracking_uri=uri)
    keys = client.get_run(run_id).data.metrics
    return {
        key: [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, key)] for key in sorted(keys)
    }


def contents(uri: str, *, with_ids: bool = True, with_files: bool = True) -> object:
    """All that MLflow shows of the study: to be compared before and after."""
    parents, children = runs_of(uri)
    shown = []
    for run in parents + children:
        info = run.info
        own = {k: v for k, v in run.data.tags.items() if with_ids or k != PARENT}
        times = (info.start_time, info.end_time)
        ids = (info.run_id,) if with_ids else ()
        data = [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs]
        files = artifacts_of(uri, info.run_id) if with_files and run in parents else []
        points = points_of(uri, info.run_id)
        shown.append((*ids, info.run_name, info.status, times, run.data.params, own, points, data, files))
    return shown


def artifacts_of(uri: str, run_id: str, folder: str | None = None) -> list[str]:
    client = MlflowClient(tracking_uri=uri)
    found = client.list_artifacts(run_id, folder)
    return [path for a in found for path in (artifacts_of(uri, run_id, a.path) if a.is_dir else [a.path])]


def text_of(uri: str, run_id: str, name: str) -> str:
    return Path(MlflowClient(tracking_uri=uri).download_artifacts(run_id, name, ".")).read_text()


def publish(database: Database, study, uri: str, name: str = "p"):
    publisher = Publisher(database, study, uri, name)
    try:
        return publisher.publish()
    finally:
        publisher.close()


def notes(database: Database):
    with database.read() as session:
        columns = (Ticket.id, Ticket.run_id, Ticket.published_epoch, Ticket.published_outcome)
        return session.execute(sa.select(*columns).order_by(Ticket.id)).all()


def expire_lease(database: Database) -> None:
    with database.write() as session:
        session.execute(sa.update(Study).values(publisher_until=database_now() - 1.0))


# A finished study


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


# Exactly once


def test_publishing_again_changes_nothing(database, make_spec, uri):
    study = finished_study(database, make_spec)
    publish(database, study, uri)
    before, noted = contents(uri), notes(database)
    again = publish(database, study, uri, "other")
    assert (again.trials, again.complete) == (0, True)
    assert contents(uri) == before
    assert notes(database) == noted


@pytest.mark.parametrize("lost", ["epochs", "outcomes", "runs", "everything"])
def test_a_crash_between_mlflows_write_and_our_note_doubles_nothing(database, make_spec, uri, lost):
    study = finished_study(database, make_spec)
    publish(database, study, uri)
    before, noted = contents(uri), notes(database)
    values: dict[str, object] = {
        "epochs": {"published_epoch": 0, "published_outcome": None},
        "outcomes": {"published_outcome": None},
        "runs": {"run_id": None, "published_epoch": -1, "published_outcome": None},
        "everything": {"run_id": None, "published_epoch": -1, "published_outcome": None},
    }[lost]
    with database.write() as session:
        session.execute(sa.update(Ticket).values(**values))
        if lost == "everything":
            session.execute(sa.update(Study).values(parent_run_id=None, parent_published=None, experiment_id=None))
    assert publish(database, study, uri).trials == 4
    assert contents(uri) == before
    assert notes(database) == noted
    assert len(runs_of(uri, view=ViewType.ALL)[1]) == 4


class Died(BaseException):
    pass


DEATHS = [
    (RunStore, "learn", 1, "after"),
    (RunStore, "create", 1, "before"),
    (RunStore, "create", 1, "after"),
    (RunStore, "show", 1, "after"),
    (RunStore, "show_file", 1, "after"),
    (RunStore, "show_data", 1, "before"),
    (RunStore, "show_file", 3, "after"),
    (RunStore, "show_file", 7, "after"),
    (RunStore, "mark", 1, "before"),
    (RunStore, "mark", 1, "after"),
]
DEATHS_TOGETHER = [
    (RunStore, "show_together", 1, "before"),
    (RunStore, "show_together", 1, "after"),
    (RunTables, "_write_runs", 1, "after"),
    (RunTables, "_write_runs", 3, "before"),
    (RunTables, "_write_runs", 3, "after"),
    (RunTables, "_write_inputs", 1, "after"),
]
DEATHS_ONE_BY_ONE = [
    (RunStore, "create", 3, "after"),
    (RunStore, "show", 4, "after"),
    (RunStore, "show_data", 3, "after"),
    (RunStore, "end", 3, "after"),
    (RunStore, "end", 5, "after"),
]


@pytest.fixture
def one_by_one(monkeypatch) -> None:
    """Trials are shown through MLflow's client, as where its tables are out of reach."""
    monkeypatch.setattr(store_module, "open_tables", lambda _: None)


@pytest.mark.parametrize(("where", "name", "number", "when"), DEATHS + DEATHS_TOGETHER)
def test_a_publisher_that_dies_anywhere_is_followed_without_a_double(
    database, make_spec, uri, control_uri, monkeypatch, where, name, number, when
):
    check_death(database, make_spec, uri, control_uri, monkeypatch, where, name, number, when)


@pytest.mark.parametrize(("where", "name", "number", "when"), DEATHS_ONE_BY_ONE)
@pytest.mark.usefixtures("one_by_one")
def test_a_publisher_that_dies_between_two_calls_is_followed_without_a_double(
    database, make_spec, uri, control_uri, monkeypatch, where, name, number, when
):
    check_death(database, make_spec, uri, control_uri, monkeypatch, where, name, number, when)


def check_death(database, make_spec, uri, control_uri, monkeypatch, where, name, number, when):
    study = finished_study(database, make_spec)
    publish(database, study, control_uri)
    control = contents(control_uri, with_ids=False)
    dead = Database(database.text)
    real, calls = getattr(where, name), 0

    def die() -> None:
        raise Died

    def dying(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        result = real(self, *args, **kwargs) if calls != number or when == "after" else None
        if calls == number:
            monkeypatch.setattr(dead, "write", die)  # the dead note nothing
            raise Died
        return result

    with monkeypatch.context() as patch:
        patch.setattr(where, name, dying)
        with pytest.raises(Died):
            Publisher(dead, study, uri, "dead").publish()
    dead.close()
    assert publish(database, study, uri, "heir").busy
    expire_lease(database)
    assert publish(database, study, uri, "heir").complete
    assert contents(uri, with_ids=False) == control
    parents, children = runs_of(uri, view=ViewType.ALL)
    assert (len(parents), len(children)) == (1, 4)


def test_a_deleted_store_is_rebuilt(database, make_spec, uri, control_uri):
    study = finished_study(database, make_spec)
    publish(database, study, uri)
    before = contents(uri, with_ids=False)
    assert publish(database, study, control_uri).trials == 4
    assert contents(control_uri, with_ids=False) == before
    assert publish(database, study, uri).trials == 4, "back in the first store all runs are found again"
    assert contents(uri, with_ids=False) == before
    assert len(runs_of(uri, view=ViewType.ALL)[1]) == 4


def test_a_store_that_fell_back_to_an_older_state_catches_up(database, make_spec, uri, folder):
    study = submit(database, make_spec)
    claims = start(database, study)
    finish(database, *((c, complete(0.5), epochs(4)) for c in claims[:2]))
    publish(database, study, uri)
    backup = sqlite3.connect(folder / "backup.db")
    with sqlite3.connect(folder / "mlflow.db") as live:
        live.backup(backup)
    finish(database, *((c, complete(0.5), epochs(4)) for c in claims[2:]))
    finish_study(database, study.id)
    publish(database, study, uri)
    whole = contents(uri, with_ids=False)
    with sqlite3.connect(folder / "mlflow.db") as live:
        backup.backup(live)
    backup.close()
    assert publish(database, study, uri).trials == 2
    assert contents(uri, with_ids=False) == whole


def test_a_run_made_twice_is_shown_once(database, make_spec, uri):
    """A request that MLflow carries out after the publisher has given it up makes a run that nobody knows."""
    study = finished_study(database, make_spec)
    publish(database, study, uri)
    before = contents(uri)
    (parent,), children = runs_of(uri)
    client = MlflowClient(tracking_uri=uri)
    for run in (parent, children[0]):
        for start_time in (1, run.info.start_time + 10_000):  # found before it and after it
            tags = {k: v for k, v in run.data.tags.items() if k.startswith(("momentum_tuner.", PARENT))}
            client.create_run(run.info.experiment_id, start_time=start_time, tags=tags)
    assert publish(database, study, uri).complete
    assert contents(uri) == before


@pytest.mark.usefixtures("one_by_one")
def test_a_run_made_twice_while_publishing_is_gone_at_the_end(database, make_spec, uri, monkeypatch):
    study = finished_study(database, make_spec)
    real = RunStore.create

    def twice(self, key, name, start, tags):
        real(self, key, name, start, tags)
        return real(self, key, name, start, tags)

    monkeypatch.setattr(RunStore, "create", twice)
    assert publish(database, study, uri).complete
    parents, children = runs_of(uri)
    assert (len(parents), len(children)) == (1, 4)
    assert {r.info.status for r in parents + children} == {"FINISHED", "KILLED", "FAILED"}
    assert {c.info.run_id for c in children} == {n[1] for n in notes(database)}


@pytest.mark.usefixtures("one_by_one")
def test_runs_that_vanish_again_and_again_do_not_keep_the_publisher_for_ever(database, make_spec, uri, monkeypatch):
    study = finished_study(database, make_spec)
    real = RunStore.end

    def end_and_delete(self, run, *args):
        real(self, run, *args)
        self._client.delete_run(run.id)

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "end", end_and_delete)
        assert not publish(database, study, uri).complete
    assert publish(database, study, uri).complete
    assert len(runs_of(uri)[1]) == 4


def test_a_run_that_somebody_deletes_is_made_again(database, make_spec, uri):
    study = submit(database, make_spec)
    claims = start(database, study)
    finish(database, *((c, complete(0.5), epochs(4)) for c in claims[:2]))
    publisher = Publisher(database, study, uri, "p")
    publisher.publish()
    client = MlflowClient(tracking_uri=uri)
    (parent,), children = runs_of(uri)
    client.delete_run(children[0].info.run_id)
    client.delete_run(parent.info.run_id)
    finish(database, *((c, complete(0.5), epochs(4)) for c in claims[2:]))
    finish_study(database, study.id)
    assert publisher.publish().complete, "the publisher that knew the old runs"
    publisher.close()
    (parent,), children = runs_of(uri)
    assert len(children) == 4
    assert {c.data.tags[PARENT] for c in children} == {parent.info.run_id}
    assert all(len(points_of(uri, c.info.run_id)["valid_loss"]) == 5 for c in children)


def test_an_experiment_that_somebody_deletes_is_restored(database, make_spec, uri):
    study = finished_study(database, make_spec)
    publish(database, study, uri)
    before = contents(uri)
    client = MlflowClient(tracking_uri=uri)
    client.delete_experiment(client.get_experiment_by_name("digits-mlp").experiment_id)
    assert publish(database, study, uri).complete
    assert contents(uri) == before


def test_a_trial_that_mlflow_does_not_take_does_not_stop_the_others(database, make_spec, uri, caplog):
    study = finished_study(database, make_spec)
    bad = EpochRecord(epoch=9, step=999, metrics={"no*name": 1.0})
    with database.write() as session:
        session.add(Epoch(ticket_id=1, epoch=9, step=999, recorded_at=1.0, metrics=dict(bad.metrics)))
    publisher = Publisher(database, study, uri, "p")
    with caplog.at_level(logging.WARNING):
        result = publisher.publish()
    assert (result.trials, result.complete, result.refused) == (3, False, 1)
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("momentum_tuner")]
    assert said.startswith("MLflow does not take trial momentum 0: ")
    assert "no*name" in said
    assert [n[3] for n in notes(database)] == [None, "diverged", "pruned", "failed"]
    assert publisher.publish().refused == 1
    with database.write() as session:
        session.execute(sa.delete(Epoch).where(Epoch.epoch == 9))
    publisher.close()
    assert publish(database, study, uri).complete


def test_two_studies_of_one_name_one_after_the_other_have_parents_of_their_own(database, make_spec, uri):
    first = finished_study(database, make_spec)
    publish(database, first, uri)
    delete_study(database, first.id)
    time.sleep(0.01)
    second = finished_study(database, make_spec)
    assert publish(database, second, uri).complete
    parents, children = runs_of(uri)
    assert (len(parents), len(children)) == (2, 8)
    assert sorted(sum(c.data.tags[PARENT] == p.info.run_id for c in children) for p in parents) == [4, 4]


def test_a_study_that_grew_has_a_new_parent_that_runs_and_then_shows_the_new_result(
    database, make_spec, uri, control_uri
):
    study = finished_study(database, make_spec)
    publish(database, study, uri)
    (parent,), _ = runs_of(uri)
    grown = submit(database, make_spec, trials=4)
    publish(database, grown, uri)
    (again,), children = runs_of(uri)
    assert again.info.run_id != parent.info.run_id, "params never change"
    assert (again.info.status, again.info.start_time) == ("RUNNING", parent.info.start_time)
    assert again.data.params["budget"] == "4 trials of 4 epochs for each optimizer"
    assert "best_optimizer" not in again.data.params
    assert "The search is not complete" in again.data.tags["mlflow.note.content"]
    assert {c.data.tags[PARENT] for c in children} == {again.info.run_id}
    assert not [c for c in children if "champion" in c.data.tags], "it may be another one in the end"
    finish(database, *((c, complete(0.125 + n), epochs(4)) for n, c in enumerate(start(database, grown))))
    finish_study(database, grown.id)
    assert publish(database, find_study(database, "digits-mlp"), uri).complete
    (last,), children = runs_of(uri)
    assert (last.info.run_id, last.info.status, len(children)) == (again.info.run_id, "FINISHED", 8)
    assert last.data.metrics["objective"] == last.data.metrics["best_valid_loss"] == 0.125
    assert last.data.metrics["complete"] == 5.0
    assert last.data.params["best_trial"] == "2"
    assert [c.info.run_name[:13] for c in children if "champion" in c.data.tags] == ["momentum 0002", "nesterov 0002"]
    assert text_of(uri, last.info.run_id, "study.yaml") == grown.spec.to_yaml()
    before = contents(uri, with_ids=False)
    publish(database, find_study(database, "digits-mlp"), control_uri)
    assert contents(control_uri, with_ids=False) == before, "as if it had never been smaller"


def test_a_trial_that_becomes_visible_late_has_its_place_on_the_curves(
    database, make_spec, uri, control_uri, monkeypatch
):
    """PostgreSQL shows what was committed, not what was begun: a trial may have ended before those that are shown."""
    monkeypatch.setattr(parent_module, "SETTLE_SECONDS", -1.0)
    study = submit(database, make_spec)
    claims = start(database, study)
    finish(database, *((c, complete(0.5), epochs(4)) for c in claims[:2]))
    publish(database, study, uri)
    (parent,), _ = runs_of(uri)
    assert parent.data.metrics["trials"] == 2.0
    finish(database, *((c, complete(0.25), epochs(4)) for c in claims[2:]))
    with database.write() as session:
        ended = sa.select(sa.func.min(Ticket.finished_at)).scalar_subquery()
        session.execute(sa.update(Ticket).where(Ticket.id == claims[2].ticket_id).values(finished_at=ended - 0.25))
    publish(database, study, uri)
    finish_study(database, study.id)
    assert publish(database, find_study(database, study.name), uri).complete
    publish(database, find_study(database, study.name), control_uri)
    assert contents(uri, with_ids=False) == contents(control_uri, with_ids=False)


def test_a_trial_that_has_just_ended_is_not_on_the_curves_of_a_study_that_goes_on(
    database, make_spec, uri, monkeypatch
):
    study = submit(database, make_spec)
    claims = start(database, study)
    finish(database, *((c, complete(0.5), epochs(4)) for c in claims[:2]))
    assert publish(database, study, uri).trials == 2
    (parent,), _ = runs_of(uri)
    assert "trials" not in parent.data.metrics
    with database.write() as session:
        session.execute(sa.update(Ticket).where(Ticket.state == "done").values(finished_at=Ticket.finished_at - 20.0))
    publish(database, study, uri)
    (parent,), _ = runs_of(uri)
    assert parent.data.metrics["trials"] == 2.0


def test_a_report_that_cannot_be_made_keeps_no_run_from_mlflow(database, make_spec, uri, monkeypatch, caplog):
    study = finished_study(database, make_spec)
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        broken.setattr("momentum_tuner.report.publication", lambda *_: 1 / 0)
        assert publish(database, study, uri).complete
    assert [r.getMessage() for r in caplog.records] == ["the report of digits-mlp could not be made for MLflow"]
    (parent,), children = runs_of(uri)
    assert (parent.info.status, len(children)) == ("FINISHED", 4)
    assert artifacts_of(uri, parent.info.run_id) == ["study.yaml"]
    assert publish(database, study, uri).complete
    assert "report.html" in artifacts_of(uri, parent.info.run_id)


def test_a_store_that_takes_no_files_shows_all_else(database, make_spec, uri, control_uri, monkeypatch):
    study = finished_study(database, make_spec)
    publish(database, study, control_uri)

    def refuse(*_):
        raise PermissionError("/mlartifacts")

    with monkeypatch.context() as broken:
        broken.setattr(RunStore, "show_file", refuse)
        assert publish(database, study, uri).complete
    (parent,), _ = runs_of(uri)
    assert artifacts_of(uri, parent.info.run_id) == []
    assert "had the best trial" in parent.data.tags["verdict"]
    assert publish(database, study, uri).complete
    assert contents(uri, with_ids=False) == contents(control_uri, with_ids=False), "the next one may write"


def test_the_lease_is_renewed_while_the_report_is_made(database, make_spec, uri, monkeypatch):
    from momentum_tuner import report

    study = finished_study(database, make_spec)
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.1)
    real, others = report.publication, []

    def slow(*arguments):
        for _ in range(3):
            time.sleep(0.5)
            others.append(Publisher(database, study, uri, "other").publish().busy)
        return real(*arguments)

    monkeypatch.setattr(report, "publication", slow)
    assert publish(database, study, uri).complete
    assert others == [True] * 3


# While it runs


def make_live(database: Database) -> None:
    with database.write() as session:
        session.execute(sa.update(Ticket).values(started_at=Ticket.started_at - publisher_module.LIVE_SECONDS))


def test_the_curve_of_a_running_trial_grows_and_its_run_runs(database, make_spec, uri, monkeypatch):
    monkeypatch.setattr(publisher_module, "LIVE_SHARE", 1e9)
    monkeypatch.setattr(publisher_module, "LIVE_SECONDS", 1000.0)  # longer than a slow machine takes
    study = submit(database, make_spec)
    (held,) = start(database, study, 1)
    records = epochs(4)
    record_epochs(database, [(held, records[0]), (held, records[1])])
    publisher = Publisher(database, study, uri, "p")
    assert publisher.publish().trials == 0, "a trial that has just begun may end before it is worth it"
    make_live(database)
    for count, expected in ((2, 2), (2, 2), (4, 4)):
        publisher._live_due = 0.0
        record_epochs(database, [(held, r) for r in records[:count]])
        publisher.publish()
        (parent,), (run,) = runs_of(uri)
        assert (parent.info.status, run.info.status) == ("RUNNING", "RUNNING")
        assert [p[0] for p in points_of(uri, run.info.run_id)["valid_loss"]] == [STEPS * e for e in range(expected)]
    assert publisher.publish().trials == 0, "not due"
    publisher._live_due = 0.0
    assert publisher.publish().trials == 0, "nothing new"
    finish(database, (held, complete(0.5), records))
    assert publisher.publish().trials == 1
    _, (run,) = runs_of(uri)
    assert run.info.status == "FINISHED"
    assert [p[0] for p in points_of(uri, run.info.run_id)["valid_loss"]] == [STEPS * e for e in range(5)]
    publisher.close()


def test_a_trial_that_was_given_back_waits_and_then_runs_on_in_its_run(database, make_spec, uri):
    study = submit(database, make_spec)
    (held,) = start(database, study, 1)
    record_epochs(database, [(held, r) for r in epochs(2)])
    make_live(database)
    publisher = Publisher(database, study, uri, "p")
    publisher.publish()
    give_back(database, [held])
    publisher.show_waiting()
    publisher.close()
    (parent,), (run,) = runs_of(uri)
    assert (parent.info.status, run.info.status) == ("SCHEDULED", "SCHEDULED")
    (again,) = start(database, study, 1, "other-worker")
    assert again.ticket_id == held.ticket_id
    record_epochs(database, [(again, r) for r in epochs(3)])
    make_live(database)
    second = Publisher(database, study, uri, "q")
    second.publish()
    second.close()
    (parent,), (resumed,) = runs_of(uri)
    assert resumed.info.run_id == run.info.run_id
    assert (parent.info.status, resumed.info.status) == ("RUNNING", "RUNNING")
    assert resumed.data.tags["worker"] == "other-worker"
    assert [p[0] for p in points_of(uri, run.info.run_id)["valid_loss"]] == [STEPS * e for e in range(4)]


def test_curves_take_no_more_than_their_share_of_the_time(database, make_spec, uri):
    study = submit(database, make_spec, trials=8)
    record_epochs(database, [(c, r) for c in start(database, study) for r in epochs(4)])
    make_live(database)
    publisher = Publisher(database, study, uri, "p")
    before = time.monotonic()
    assert publisher.publish().trials == 16
    after = time.monotonic()
    publisher.close()
    assert publisher._live_due >= after + publisher_module.LIVE_SECONDS - 0.5
    assert publisher._live_due <= after + max(publisher_module.LIVE_SECONDS, 10.0 * (after - before))


# The lease


def test_one_of_two_publishers_holds_the_lease(database, make_spec, uri):
    study = finished_study(database, make_spec)
    first, second = Publisher(database, study, uri, "first"), Publisher(database, study, uri, "second")
    first._lease.take()
    assert second.publish().busy
    second.close()  # is not the other's to give back
    assert Publisher(database, study, uri, "third").publish().busy
    first.close()
    assert second.publish().complete
    assert first.publish().busy
    expire_lease(database)
    assert first.publish().complete
    assert len(runs_of(uri)[1]) == 4


def test_a_lease_is_renewed_while_publishing(database, make_spec, uri, monkeypatch):
    study = finished_study(database, make_spec)
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.0)
    taken = []
    take = Lease.take
    monkeypatch.setattr(Lease, "take", lambda self: (taken.append(1), take(self))[1])
    assert publish(database, study, uri).complete
    assert len(taken) >= 5


@pytest.mark.parametrize("noticed", ["at the next trial", "as it notes"])
@pytest.mark.usefixtures("one_by_one")
def test_a_publisher_that_lost_its_lease_stops_and_notes_nothing(database, make_spec, uri, monkeypatch, noticed):
    study = finished_study(database, make_spec)
    slow, quick = Publisher(database, study, uri, "slow"), Publisher(database, study, uri, "quick")
    real = RunStore.create
    calls = 0

    def sleeping(self, key, name, start, tags):
        nonlocal calls
        calls += 1
        if calls == 3:  # stopped for so long that the other takes over and does all the work
            expire_lease(database)
            with monkeypatch.context() as patch:
                patch.setattr(RunStore, "create", real)
                assert quick.publish().complete
            if noticed == "at the next trial":
                slow._lease._taken -= 1000.0
        return real(self, key, name, start, tags)

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "create", sleeping)
        assert slow.publish().busy
    noted = notes(database)
    assert len(runs_of(uri)[1]) == (5 if noticed == "at the next trial" else 7), "the zombie has made runs"
    quick.close()
    assert slow.publish().complete
    slow.close()
    assert notes(database) == noted
    _, children = runs_of(uri)
    assert sorted(c.info.run_id for c in children) == sorted(n[1] for n in noted)


def test_a_publisher_that_lost_its_lease_as_it_wrote_all_at_once_notes_nothing(database, make_spec, uri, monkeypatch):
    study = finished_study(database, make_spec)
    slow, quick = Publisher(database, study, uri, "slow"), Publisher(database, study, uri, "quick")
    real = RunStore.show_together

    def sleeping(self, trials, data):
        expire_lease(database)
        with monkeypatch.context() as patch:
            patch.setattr(RunStore, "show_together", real)
            assert quick.publish().complete
        return real(self, trials, data)

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "show_together", sleeping)
        assert slow.publish().busy
    noted = notes(database)
    assert len(runs_of(uri)[1]) == 8, "the zombie has made runs"
    quick.close()
    assert slow.publish().complete
    slow.close()
    assert notes(database) == noted
    _, children = runs_of(uri)
    assert sorted(c.info.run_id for c in children) == sorted(n[1] for n in noted)


def test_threads_that_publish_at_once_double_nothing(database, make_spec, uri):
    study = finished_study(database, make_spec, trials=6)
    loops = [PublisherLoop(database, ["digits-mlp"], uri, f"p{n}") for n in range(2)]
    found, finishing = [], threading.Event()
    finishing.set()
    threads = [threading.Thread(target=lambda one=one: found.append(one.run(finishing, 0.05))) for one in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True, True]
    parents, children = runs_of(uri, view=ViewType.ALL)
    assert (len(parents), len(children)) == (1, 12)
    assert find_study(database, study.name).phase == "done"


# The loop


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real MLflow server on this machine, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self.process is None, "it runs already"
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            f"sqlite:///{self.folder}/mlflow.db",
        ]
        command += ["--artifacts-destination", str(self.folder / "files")]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError("the MLflow server did not start")

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(folder, empty_mlflow):
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    one = Server(folder)
    yield one
    one.kill()


class Loop:
    """A publisher loop in a thread."""

    def __init__(self, database: Database, uri: str, studies: tuple[str, ...] = ("digits-mlp",)) -> None:
        self.loop = PublisherLoop(database, studies, uri, "loop")
        self.finishing = threading.Event()
        self.whole: bool | None = None
        self.thread = threading.Thread(target=self.work, daemon=True)  # a failed test must not keep pytest from ending
        self.thread.start()

    def work(self) -> None:
        self.whole = self.loop.run(self.finishing, 0.1)

    def finish(self) -> bool:
        self.finishing.set()
        self.thread.join(60)
        assert self.whole is not None
        return self.whole


def wait_for(happened, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def shown(database: Database) -> int:
    return sum(n[3] is not None for n in notes(database))


def test_a_server_that_is_down_at_first_and_killed_midway_loses_and_doubles_nothing(
    database, make_spec, folder, server, control_uri, monkeypatch, caplog
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setattr("momentum_tuner.tracking.loop.LONGEST_PAUSE", 0.5)
    study = submit(database, make_spec, trials=6)
    claims = start(database, study)
    finish(database, *((c, complete(0.5), epochs(4)) for c in claims[:4]))
    with caplog.at_level(logging.WARNING):
        loop = Loop(database, server.uri)
        wait_for(lambda: loop.loop._failing)
        server.start()
        wait_for(lambda: shown(database) == 4 and not loop.loop._failing)

        real, calls = RunStore.show, 0

        def killing(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 2:
                server.kill()
            return real(self, *args, **kwargs)

        monkeypatch.setattr(RunStore, "show", killing)
        finish(database, *((c, complete(0.5), epochs(4)) for c in claims[4:9]))
        wait_for(lambda: loop.loop._failing)
        server.start()
        wait_for(lambda: shown(database) == 9 and not loop.loop._failing)
        server.signal(signal.SIGSTOP)  # it hangs: it takes connections and says nothing
        finish(database, *((c, complete(0.5), epochs(4)) for c in claims[9:]))
        finish_study(database, study.id)
        wait_for(lambda: loop.loop._failing)
        server.signal(signal.SIGCONT)
        wait_for(lambda: shown(database) == 12)
        assert loop.finish() is True
    server.kill()
    uri = f"sqlite:///{folder / 'mlflow.db'}"  # quicker without the server, which has the files
    found = contents(uri, with_ids=False, with_files=False)
    assert len([path for path in (folder / "files").rglob("*") if path.is_file()]) == 7
    parents, children = runs_of(uri)
    assert (len(parents), len(children)) == (1, 12)
    publish(database, find_study(database, study.name), control_uri)
    assert found == contents(control_uri, with_ids=False, with_files=False)
    said = [r.getMessage() for r in caplog.records if r.name == "momentum_tuner.tracking.loop"]
    assert [line.partition(" (")[0] for line in said] == ["MLflow does not answer", "MLflow answers again"] * 3


def test_a_loop_ends_at_once_and_says_no_where_mlflow_never_answers(database, make_spec, folder):
    study = finished_study(database, make_spec)
    loop = Loop(database, f"http://127.0.0.1:{free_port()}")
    wait_for(lambda: loop.loop._failing)
    before = time.monotonic()
    assert loop.finish() is False
    assert time.monotonic() - before < 10
    assert shown(database) == 0
    with database.read() as session:
        assert session.get_one(Study, study.id).publisher is None


def test_a_loop_shows_trials_as_they_end_and_all_studies_if_none_is_named(database, make_spec, uri):
    study = submit(database, make_spec)
    loop = Loop(database, uri, ())
    claims = start(database, study)
    finish(database, (claims[0], complete(0.5), epochs(4)))
    wait_for(lambda: shown(database) == 1)
    other = submit(database, make_spec, name="other")
    more = start(database, other)
    finish(database, (more[0], complete(0.5), epochs(4)))
    wait_for(lambda: shown(database) == 2)
    assert loop.finish() is True
    assert [len(runs_of(uri, name)[1]) for name in ("digits-mlp", "other")] == [1, 1]
    assert runs_of(uri)[0][0].info.status == "SCHEDULED"
    with database.read() as session:
        assert session.scalars(sa.select(Study.publisher)).all() == [None, None]


def test_a_loop_shows_what_a_study_that_grew_adds(database, make_spec, uri):
    finished_study(database, make_spec)
    loop = Loop(database, uri)
    wait_for(lambda: shown(database) == 4)
    grown = submit(database, make_spec, trials=3)
    finish(database, *((c, complete(0.1), epochs(4)) for c in start(database, grown)))
    finish_study(database, grown.id)
    assert loop.finish() is True
    (parent,), children = runs_of(uri)
    assert (parent.info.status, len(children)) == ("FINISHED", 6)
    assert parent.data.params["budget"] == "3 trials of 4 epochs for each optimizer"


def test_a_loop_sees_that_a_study_was_deleted_and_submitted_again(database, make_spec, uri):
    first = finished_study(database, make_spec)
    loop = Loop(database, uri, ())
    wait_for(lambda: shown(database) == 4)
    delete_study(database, first.id)
    second = finished_study(database, make_spec)
    assert second.id == first.id, "SQLite gives the number again"
    wait_for(lambda: shown(database) == 4)
    assert loop.finish() is True
    parents, children = runs_of(uri)
    assert (len(parents), len(children)) == (2, 8)


def test_a_loop_waits_for_the_lease_of_a_publisher_that_was_killed(database, make_spec, uri, monkeypatch):
    study = finished_study(database, make_spec)
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 1.5)
    Publisher(database, study, uri, "killed")._lease.take()
    loop = Loop(database, uri)
    assert loop.finish() is True
    assert shown(database) == 4


def test_a_loop_survives_a_database_that_fails(database, make_spec, uri, monkeypatch, caplog):
    from momentum_tuner.errors import StorageError

    finished_study(database, make_spec)
    monkeypatch.setattr("momentum_tuner.tracking.loop.LONGEST_PAUSE", 0.2)
    failures = []

    def broken():
        failures.append(1)
        raise StorageError("the database postgresql://***@host/db does not answer: no\nsecond line")

    with caplog.at_level(logging.WARNING):
        with monkeypatch.context() as patch:
            patch.setattr(database, "write", broken)
            loop = Loop(database, uri)
            wait_for(lambda: len(failures) >= 2)
        assert loop.finish() is True
    said = [r.getMessage() for r in caplog.records if r.name == "momentum_tuner.tracking.loop"]
    assert said[0] == "publishing: the database postgresql://***@host/db does not answer: no"
    assert shown(database) == 4


def test_the_same_on_postgresql(postgresql_database, make_spec, uri, control_uri):
    study = finished_study(postgresql_database, make_spec)
    publish(postgresql_database, study, uri)
    before = contents(uri)
    with postgresql_database.write() as session:
        session.execute(sa.update(Ticket).values(run_id=None, published_epoch=-1, published_outcome=None))
    assert publish(postgresql_database, study, uri).trials == 4
    assert contents(uri) == before


# Settings and names


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///mlflow.db",
        "http://host:5000",
        "https://user:secret@host/path",
        "postgresql://u:p@host/mlflow",
        "postgresql+psycopg2://u:p@host/mlflow",
        "mysql+pymysql://u:p@host/mlflow",
        "databricks",
        "databricks://profile",
    ],
)
def test_uris_that_mlflow_takes_are_taken_unchanged(uri):
    assert check_tracking_uri(uri) == uri


@pytest.mark.parametrize(
    "uri",
    [
        "mlruns",
        "./mlruns",
        "file:///tmp/mlruns",
        "",
        "http://",
        "sqlite:mlflow.db",
        "sqlite://",
        "ftp://host",
        "a+b://c",
    ],
)
def test_uris_that_mlflow_does_not_take_are_refused_in_one_line(uri):
    with pytest.raises(TrackingError) as refused:
        check_tracking_uri(uri)
    text = str(refused.value)
    assert text.startswith(f"--tracking-uri {uri!r} is not supported; write sqlite:///mlflow.db or http://host:5000")
    assert "\n" not in text


def test_a_wrong_uri_is_refused_without_its_password():
    with pytest.raises(TrackingError) as refused:
        check_tracking_uri("ftp://user:hunter2@host")
    assert "hunter2" not in str(refused.value)


def test_a_store_in_a_folder_that_is_not_there_is_refused(database, make_spec, tmp_path):
    study = submit(database, make_spec)
    with pytest.raises(TrackingError, match="the folder /no/such does not exist; make it first"):
        Publisher(database, study, "sqlite:////no/such/mlflow.db", "p")


def test_telemetry_is_off_unless_the_user_wants_it(monkeypatch):
    names = ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    quiet_mlflow()
    assert [os.environ[name] for name in names] == ["true", "0", "10"]
    for name, value in zip(names, ("false", "5", "60"), strict=True):
        monkeypatch.setenv(name, value)
    quiet_mlflow()
    assert [os.environ[name] for name in names] == ["false", "5", "60"]


def test_a_process_that_publishes_starts_no_telemetry_and_writes_nothing(database, make_spec, uri):
    finished_study(database, make_spec)
    code = (
        "import sys\n"
        "from momentum_tuner.database import Database\n"
        "from momentum_tuner.tickets import find_study\n"
        "from momentum_tuner.tracking import Publisher\n"
        "assert not any(name.partition('.')[0] in {'mlflow', 'torch'} for name in sys.modules), 'heavy'\n"
        "database = Database(sys.argv[1])\n"
        "assert Publisher(database, find_study(database, 'digits-mlp'), sys.argv[2], 'p').publish().complete\n"
        "from mlflow.telemetry import get_telemetry_client\n"
        "assert get_telemetry_client() is None\n"
    )
    mine = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    done = subprocess.run([sys.executable, "-c", code, database.text, uri], env=mine, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"learning_rate": 0.031, "momentum": 0.95}, "nesterov 0042 lr=0.031 beta=0.95"),
        ({"learning_rate": 0.0312345, "momentum": 0.9}, "nesterov 0042 lr=0.031 beta=0.9"),
        ({"learning_rate": 1.0, "momentum": 0.0}, "nesterov 0042 lr=1 beta=0"),
        ({"learning_rate": 1.234e-5, "momentum": 0.9973}, "nesterov 0042 lr=1.2e-05 beta=0.9973"),
        ({"learning_rate": 0.5}, "nesterov 0042 lr=0.5"),
        ({}, "nesterov 0042"),
    ],
)
def test_the_name_of_a_run_says_its_settings(settings, name):
    assert run_name("nesterov", 42, settings) == name


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.25, 0.5, 0.9, 0.95, 0.99, 0.995, 0.9973, 0.999, 0.99987])
def test_a_short_momentum_keeps_its_distance_to_one(momentum):
    short = float(short_momentum(momentum))
    assert abs(short - momentum) <= 0.05 * (1.0 - momentum)
    assert len(short_momentum(momentum)) <= 8


# MLflow's own tables


def rows_of(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """All rows that MLflow has of runs, with names in place of its random ids."""
    tables = ("runs", "tags", "params", "metrics", "latest_metrics", "datasets", "inputs", "input_tags")
    with sqlite3.connect(path) as connection:
        names = dict(connection.execute("SELECT run_uuid, name FROM runs"))
        names |= dict(connection.execute("SELECT dataset_uuid, name FROM datasets"))
        for key, source, destination in connection.execute("SELECT input_uuid, source_id, destination_id FROM inputs"):
            names[key] = f"{names[source]} of {names[destination]}"
        found = {table: list(connection.execute(f"SELECT * FROM {table}")) for table in tables}
    connection.close()

    def plain(value: object) -> object:
        if isinstance(value, str):
            for key, name in names.items():
                value = value.replace(key, name)
        return value

    return {table: sorted((tuple(map(plain, row)) for row in rows), key=repr) for table, rows in found.items()}


def test_what_is_written_into_the_tables_is_what_mlflows_client_writes(
    database, make_spec, uri, control_uri, folder, monkeypatch
):
    made = {"together": 0, "one by one": 0}
    write, create = RunTables.write, RunStore.create

    def counted(self, experiment_id, changes, data):
        made["together"] += sum(change.new for change in changes)
        write(self, experiment_id, changes, data)

    def counted_one(self, key, *args):
        made["one by one"] += key != ""
        return create(self, key, *args)

    monkeypatch.setattr(RunTables, "write", counted)
    monkeypatch.setattr(RunStore, "create", counted_one)

    def publish_both() -> None:
        """Each finds the notes of the other, and so shows all of it, which is there in part."""
        publish(database, study, uri)
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "open_tables", lambda _: None)
            publish(database, study, control_uri)
        assert rows_of(folder / "mlflow.db") == rows_of(folder / "control.db")

    study = submit(database, make_spec)
    pruned, whole = start(database, study, 2)
    record_epochs(database, [(c, r) for c in (pruned, whole) for r in epochs(2)])
    make_live(database)
    publish_both()
    assert made == {"together": 2, "one by one": 2}
    give_back(database, [whole])
    whole, failed, late = start(database, study, worker="other-worker")
    reason = Result("failed", None, None, "ValueError: `x`", traceback="Traceback\n  ValueError")
    finish(
        database,
        (pruned, Result("pruned", 1.5, {"best_valid_loss": 1.5, "steps": 46}), epochs(3)),
        (failed, reason, []),
        (whole, complete(0.5), epochs(4)),
        (late, complete(0.25), epochs(4, -1.0)),
    )
    publish_both()
    finish_study(database, study.id)
    publish_both()
    assert made == {"together": 4, "one by one": 4}
    assert contents(uri, with_ids=False) == contents(control_uri, with_ids=False)


def test_the_latest_value_is_that_of_the_newest_point_and_not_of_the_last_one_written(uri):
    client = MlflowClient(tracking_uri=uri)
    experiment, tables = client.create_experiment("some"), open_tables(client)
    one = RunChange("0" * 32, True, "one", 1, "RUNNING", None, {}, {}, [], data=False)
    for new, points in ((True, [(5, 10, 0.5), (4, 99, 9.0)]), (False, [(3, 11, 8.0)]), (False, [(5, 10, 0.25)])):
        found = [Point("loss", value, timestamp, step) for step, timestamp, value in points]
        tables.write(experiment, [replace(one, new=new, points=found)], None)
        assert client.get_run(one.id).data.metrics == {"loss": 0.5}
    tables.write(experiment, [replace(one, new=False, points=[Point("loss", 0.75, 10, 5)])], None)
    assert client.get_run(one.id).data.metrics == {"loss": 0.75}
    assert len(client.get_metric_history(one.id, "loss")) == 5


def test_the_runs_that_the_tables_have_are_those_that_mlflows_client_finds(database, make_spec, uri, monkeypatch):
    study = finished_study(database, make_spec)
    publish(database, study, uri)
    (parent,), children = runs_of(uri)
    client = MlflowClient(tracking_uri=uri)
    client.delete_run(children[0].info.run_id)
    for start_time in (1, 2**42, 2**42):
        client.create_run(parent.info.experiment_id, start_time=start_time, tags=children[1].data.tags)
    client.create_run(parent.info.experiment_id, tags={"momentum_tuner.study": "another"})
    store = Publisher(database, study, uri, "p")._store
    store.experiment_id = parent.info.experiment_id
    read = list(store._found())
    store._tables = None
    assert read == list(store._found())
    assert len(read) == 4 + 3
    assert sum(run.has_data for run in read) == sum(bool(run.params) for run in read) == 4


def test_tables_on_postgresql_are_written_as_mlflows_client_writes_them_on_sqlite(
    database, make_spec, uri, postgresql, monkeypatch
):
    name = postgresql.create()
    on_postgresql = postgresql.url(name)
    written = []
    write = RunTables.write
    monkeypatch.setattr(RunTables, "write", lambda *args: (write(*args), written.extend(c.id for c in args[2]))[0])
    study = submit(database, make_spec)
    held = start(database, study)
    record_epochs(database, [(c, r) for c in held for r in epochs(2)])
    make_live(database)
    for outcome in (None, complete(0.5)):
        if outcome is not None:
            finish(database, *((c, outcome, epochs(4)) for c in held))
        publish(database, study, on_postgresql)
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "open_tables", lambda _: None)
            publish(database, study, uri)
    _, children = runs_of(on_postgresql)
    assert {c.info.run_id for c in children} <= set(written)
    assert {c.info.status for c in children} == {"FINISHED"}
    assert contents(on_postgresql, with_ids=False) == contents(uri, with_ids=False)
    MlflowClient(tracking_uri=on_postgresql)._tracking_client.store._dispose_engine()
    postgresql.drop(name)


def test_tables_of_an_mlflow_that_is_not_known_or_behind_a_server_are_left_alone(uri, monkeypatch):
    client = MlflowClient(tracking_uri=uri)
    assert open_tables(client) is not None
    assert open_tables(MlflowClient(tracking_uri="http://127.0.0.1:9")) is None
    monkeypatch.setitem(tables_module.COLUMNS, "runs", tables_module.COLUMNS["runs"] + " color")
    assert open_tables(client) is None


def test_more_points_than_go_at_once_are_all_shown(database, make_spec, uri, control_uri, monkeypatch):
    study = finished_study(database, make_spec)
    publish(database, study, control_uri)
    monkeypatch.setattr(publisher_module, "FLUSH_POINTS", 60)
    sizes = []
    write = RunTables.write
    monkeypatch.setattr(RunTables, "write", lambda *args: (sizes.append(sum(c.new for c in args[2])), write(*args))[1])
    assert publish(database, study, uri).trials == 4
    assert sum(sizes) == 4
    assert max(sizes) < 4
    assert contents(uri, with_ids=False) == contents(control_uri, with_ids=False)


@pytest.fixture
def nothing_kept(tmp_path_factory, monkeypatch):
    """As on a machine where MLflow has made no file yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))


def test_a_store_that_could_not_be_made_whole_is_not_there_at_all(folder, monkeypatch, nothing_kept):
    import mlflow.store.db.utils as made_by_mlflow

    def half(engine):
        made_by_mlflow.InitialBase.metadata.create_all(engine)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(made_by_mlflow, "_initialize_tables", half)
        with pytest.raises(KeyboardInterrupt):
            RunStore(f"sqlite:///{folder / 'mlflow.db'}", "study", "identity")
    assert list(folder.iterdir()) == []
    store = RunStore(f"sqlite:///{folder / 'mlflow.db'}", "study", "identity")
    store.learn({})
    assert store.experiment_id
    assert [path.name for path in folder.iterdir()] == ["mlflow.db"]


def test_the_empty_file_that_mlflow_made_is_kept_for_the_next_store(tmp_path, monkeypatch, nothing_kept):
    import mlflow.store.db.utils as made_by_mlflow

    def schema(name):
        with sqlite3.connect(tmp_path / name) as connection:
            revision = connection.execute("SELECT version_num FROM alembic_version").fetchall()
            return revision, connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2").fetchall()

    store_module.make_sqlite_store(f"sqlite:///{tmp_path / 'first.db'}")
    kept = store_module.kept_store()
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    monkeypatch.setattr(made_by_mlflow, "_initialize_tables", None)
    store_module.make_sqlite_store(f"sqlite:///{tmp_path / 'second.db'}")
    assert schema("second.db") == schema("first.db")
    RunStore(f"sqlite:///{tmp_path / 'second.db'}", "study", "identity").learn({})
    with sqlite3.connect(kept) as connection:
        assert connection.execute("SELECT COUNT(*) FROM experiments").fetchone() == (0,)


def test_a_home_that_cannot_be_written_to_keeps_no_store(tmp_path, monkeypatch):
    (tmp_path / "caches").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for name in ("first", "second"):
        store = RunStore(f"sqlite:///{tmp_path / name}.db", "study", "identity")
        store.learn({})
        assert store.experiment_id
