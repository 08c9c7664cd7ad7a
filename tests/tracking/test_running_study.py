"""Trials are shown as they train, by the one publisher that holds the lease."""

from __future__ import annotations

import threading
import time

import pytest
from mlflow.entities import ViewType

from momentum_tuner.tickets import (
    find_study,
    give_back,
    record_epochs,
)
from momentum_tuner.tracking import Publisher, PublisherLoop
from momentum_tuner.tracking import lease as lease_module
from momentum_tuner.tracking import publisher as publisher_module
from momentum_tuner.tracking.lease import Lease
from momentum_tuner.tracking.store import RunStore

from .published import (
    STEPS,
    complete,
    epochs,
    expire_lease,
    finish,
    finished_study,
    make_live,
    notes,
    points_of,
    publish,
    runs_of,
    start,
    submit,
)


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
