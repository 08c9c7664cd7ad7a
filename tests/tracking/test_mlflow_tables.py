"""What is written into MLflow's own tables is what its client writes."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

from mlflow import MlflowClient

from momentum_tuner.tickets import (
    Result,
    finish_study,
    give_back,
    record_epochs,
)
from momentum_tuner.tracking import Publisher
from momentum_tuner.tracking import publisher as publisher_module
from momentum_tuner.tracking import store as store_module
from momentum_tuner.tracking import tables as tables_module
from momentum_tuner.tracking.runs import Point
from momentum_tuner.tracking.store import RunStore
from momentum_tuner.tracking.tables import RunChange, RunTables, open_tables

from .published import (
    complete,
    contents,
    epochs,
    finish,
    finished_study,
    make_live,
    publish,
    runs_of,
    start,
    submit,
)


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
