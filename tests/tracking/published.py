"""Studies with finished trials, made as workers make them, and what MLflow holds of them as plain values."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from mlflow import MlflowClient
from mlflow.entities import ViewType

from momentum_tuner.database import Database, Load, Study, Ticket, Worker, database_now
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.tickets import (
    Claim,
    Result,
    WorkerIdentity,
    begin_finish,
    claim,
    end_finish,
    find_study,
    finish_study,
    note_data,
    record_epochs,
    register_worker,
    set_trials,
    submit_study,
    with_trial,
)
from momentum_tuner.tracking import Publisher
from momentum_tuner.tracking import publisher as publisher_module

STEPS = 23
SETTINGS = {
    "learning_rate": 0.03125,
    "momentum": 0.95,
    "weight_decay": 0.0,
    "clip_norm": float("inf"),
    "batch_size": 64,
}
PARENT = "mlflow.parentRunId"


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


def make_live(database: Database) -> None:
    with database.write() as session:
        session.execute(sa.update(Ticket).values(started_at=Ticket.started_at - publisher_module.LIVE_SECONDS))
