"""Whatever dies, vanishes or comes late, each trial is shown once."""

from __future__ import annotations

import logging
import sqlite3
import time

import pytest
import sqlalchemy as sa
from mlflow import MlflowClient
from mlflow.entities import ViewType

from momentum_tuner.database import Database, Epoch, Study, Ticket
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.tickets import (
    delete_study,
    find_study,
    finish_study,
)
from momentum_tuner.tracking import Publisher
from momentum_tuner.tracking import lease as lease_module
from momentum_tuner.tracking import parent as parent_module
from momentum_tuner.tracking.store import RunStore
from momentum_tuner.tracking.tables import RunTables

from .published import (
    PARENT,
    artifacts_of,
    complete,
    contents,
    epochs,
    expire_lease,
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


def test_publishing_again_changes_nothing(database, make_spec, uri):
    study = finished_study(database, make_spec)
    publish(database, study, uri)
    before, noted = contents(uri), notes(database)
    again = publish(database, study, uri, "other")
    assert (again.trials, again.complete) == (0, True)
    assert contents(uri) == before
    assert notes(database) == noted


def test_a_champion_that_was_deleted_comes_back_as_champion_and_only_once(database, make_spec, uri, monkeypatch):
    study = finished_study(database, make_spec)
    publish(database, study, uri)
    _, children = runs_of(uri)
    (champion,) = [c for c in children if "champion" in c.data.tags]
    MlflowClient(tracking_uri=uri).delete_run(champion.info.run_id)
    assert publish(database, study, uri).trials == 1
    (parent,), children = runs_of(uri)
    (again,) = [c for c in children if "champion" in c.data.tags]
    assert (again.info.run_name, len(children)) == (champion.info.run_name, 4)
    assert again.info.run_id != champion.info.run_id
    assert parent.info.status == "FINISHED"
    before = contents(uri)
    monkeypatch.setattr(RunStore, "show_file", lambda *_: pytest.fail("the result was shown again"))
    assert publish(database, study, uri).complete
    assert contents(uri) == before


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


@pytest.mark.parametrize("deleted", [False, True])
def test_an_experiment_that_somebody_renames_stays_that_of_its_study(database, make_spec, uri, control_uri, deleted):
    study = finished_study(database, make_spec)
    publish(database, study, uri)
    client = MlflowClient(tracking_uri=uri)
    (parent,), children = runs_of(uri)
    client.rename_experiment(parent.info.experiment_id, "learning rates")
    if deleted:
        client.delete_run(parent.info.run_id)
    client.delete_run(children[0].info.run_id)
    assert publish(database, study, uri).trials == 1
    assert [e.name for e in client.search_experiments()] == ["learning rates", "Default"]
    (again,), children = runs_of(uri, "learning rates")
    assert len(children) == 4
    assert (again.info.run_id == parent.info.run_id) != deleted
    publish(database, study, control_uri)
    assert len(runs_of(control_uri)[1]) == 4, "in an MLflow that has no such run it has the study's name"


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


def test_a_store_that_takes_no_files_shows_all_else(database, make_spec, uri, control_uri, monkeypatch, caplog):
    study = finished_study(database, make_spec)
    publish(database, study, control_uri)

    def refuse(*_):
        raise PermissionError("/mlartifacts")

    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        broken.setattr(RunStore, "show_file", refuse)
        assert publish(database, study, uri).complete
    (said,) = [r.getMessage() for r in caplog.records]
    reason = "MLflow cannot keep study.yaml, so digits-mlp has no files there: PermissionError: /mlartifacts"
    assert said.startswith(reason)
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


def test_the_same_on_postgresql(postgresql_database, make_spec, uri, control_uri):
    study = finished_study(postgresql_database, make_spec)
    publish(postgresql_database, study, uri)
    before = contents(uri)
    with postgresql_database.write() as session:
        session.execute(sa.update(Ticket).values(run_id=None, published_epoch=-1, published_outcome=None))
    assert publish(postgresql_database, study, uri).trials == 4
    assert contents(uri) == before
