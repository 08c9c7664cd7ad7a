"""`replay`: a trial trained again from its ticket is the trial that was recorded, and what differs is named."""

import json
import math
from dataclasses import replace

import pytest
import sqlalchemy as sa
import torch
from click.testing import CliRunner

from momentum_tuner.cli import cli
from momentum_tuner.cli.replay import verdict_line
from momentum_tuner.database import Epoch, Study, Ticket, Worker
from momentum_tuner.errors import StudyFailedError, TaskError, TrialNotFoundError
from momentum_tuner.replay import replay_trial
from momentum_tuner.tickets import find_study, find_trial

from .workbench import RATES, sqlite_benches

FAST = 1.0
"""A learning rate at which the watched task diverges or ends near the edge; the others are tame."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory, migrated_sqlite):
    """A study of four tame trials and its confirmation, which a worker trained side by side."""
    with sqlite_benches(tmp_path_factory.mktemp("replay"), migrated_sqlite) as make:
        bench = make("a")
        study = bench.submit(confirm={"seeds": 2})
        bench.start().join()
        bench.study = find_study(bench.database, study.name)
        assert bench.study.phase == "done"
        yield bench


@pytest.fixture
def change(bench):
    """Change what was recorded of a trial, for one test."""
    undo = []

    def change(table, where, **values):
        with bench.database.write() as session:
            columns = [getattr(table, name) for name in values]
            before = session.execute(sa.select(*columns).where(*where)).one()
            session.execute(sa.update(table).where(*where).values(**values))
        undo.append((table, where, dict(zip(values, before, strict=True))))

    yield change
    with bench.database.write() as session:
        for table, where, values in reversed(undo):
            session.execute(sa.update(table).where(*where).values(**values))


def trial(bench, number=0, **options):
    return find_trial(bench.database, bench.study, "sgd", number, **options)


def again(bench, number=0, confirmation=False, **options):
    found = trial(bench, number, confirmation=confirmation)
    return replay_trial(bench.database, bench.study, found, trusted=bench.options().trust, **options)


# Trials as they were recorded


@pytest.mark.parametrize("number", range(len(RATES)))
def test_a_trial_of_the_search_is_trained_as_it_was_beside_others(bench, number):
    found = again(bench, number)
    assert found.verdict in ("equal", "within tolerance")
    assert found.largest < 1e-5
    assert (found.kind, found.seed, found.settings["learning_rate"]) == ("search", 0, RATES[number])
    assert [pair.epoch for pair in found.epochs] == [0, 1, 2, 3, 4]
    assert found.epochs[0].recorded["train_loss"] is None
    assert found.epochs[0].recorded["valid_loss"] > found.epochs[4].recorded["valid_loss"] > 0


def test_a_trial_of_the_confirmation_is_one_of_its_own_seed(bench):
    confirmed, searched = again(bench, confirmation=True), again(bench)
    assert (confirmed.kind, confirmed.outcome) == ("confirm", "complete")
    assert confirmed.verdict in ("equal", "within tolerance")
    assert confirmed.seed != searched.seed
    assert confirmed.epochs[4].replayed != searched.epochs[4].replayed


def test_the_reference_that_the_file_does_not_name_has_trials_too(bench):
    found = find_trial(bench.database, bench.study, "momentum_0.9", 0)
    assert found.kind == "reference"
    assert replay_trial(bench.database, bench.study, found, trusted=bench.options().trust).verdict != "not equal"


def test_nothing_is_written_and_no_thread_setting_stays(bench):
    def everything():
        with bench.database.read() as session:
            return [session.execute(sa.select(table.__table__)).all() for table in (Study, Ticket, Epoch, Worker)]

    before, threads = everything(), torch.get_num_threads()
    told = []
    again(bench, after_epoch=lambda epoch, last: told.append((epoch, last)))
    assert everything() == before
    assert torch.get_num_threads() == threads
    assert told == [(epoch, 4) for epoch in range(5)]


# What differs


def test_a_curve_that_parts_is_not_equal_from_that_epoch_on(bench, change):
    ticket = trial(bench).ticket_id
    true = again(bench).epochs[3].recorded["valid_loss"]
    change(Epoch, (Epoch.ticket_id == ticket, Epoch.epoch == 3), valid_loss=true * 1.25)
    found = again(bench)
    assert (found.verdict, found.apart_from) == ("not equal", 3)
    assert found.largest == pytest.approx(0.2, rel=1e-4)
    assert again(bench, tolerance=0.21).verdict == "within tolerance"


def test_another_setting_or_seed_than_recorded_is_not_equal(bench, change):
    ticket = trial(bench).ticket_id
    change(Ticket, (Ticket.id == ticket,), settings={**trial(bench).settings, "learning_rate": 0.02})
    assert again(bench).verdict == "not equal"
    change(Ticket, (Ticket.id == ticket,), settings=dict(trial(bench).settings), seed=7)
    found = again(bench)
    assert (found.verdict, found.apart_from) == ("not equal", 0)


def test_a_trial_that_diverged_when_it_was_recorded_but_does_not_now_is_not_equal(bench, change):
    ticket = trial(bench).ticket_id
    change(Epoch, (Epoch.ticket_id == ticket, Epoch.epoch == 4), diverged_at_step=38, valid_loss=None)
    found = again(bench)
    assert (found.verdict, found.apart_from, found.largest) == ("not equal", 4, math.inf)
    assert "in epoch 4, one of the two ended there" in verdict_line(found)


def test_a_diverged_trial_is_diverged_again_and_compared_as_far_as_it_came(tmp_path, migrated_sqlite):
    with sqlite_benches(tmp_path, migrated_sqlite) as make:
        bench = make("diverging")
        bench.study = bench.submit([1.9], confirm={"seeds": 0})
        bench.start().join()
        assert trial(bench).outcome == "diverged"
        found = again(bench)
        assert found.verdict in ("equal", "within tolerance")
        assert len(found.epochs) < 5


def test_what_may_explain_a_difference_is_what_differs(bench, change):
    ticket = trial(bench).ticket_id
    change(Epoch, (Epoch.ticket_id == ticket, Epoch.epoch == 3), valid_loss=1.0)
    with bench.database.read() as session:
        worker = session.scalar(sa.select(Ticket.worker_id).where(Ticket.id == ticket))
    same = again(bench).reasons
    assert not any(reason.startswith(("torch:", "device:", "its data")) for reason in same)
    assert "the task is your own code: watched_task.py:build may have changed since" in same
    environment = {**trial(bench).environment, "torch": "1.0"}
    change(Worker, (Worker.id == worker,), device="cuda:0", environment=environment)
    change(Study, (Study.id == bench.study.id,), data={"digest": "0123"})
    reasons = again(bench).reasons
    assert reasons[0].startswith("its data are others now: their digest was 0123 and is ")
    assert "device: cuda:0 when it was recorded, cpu now" in reasons
    assert any(reason.startswith("torch: 1.0 when it was recorded, ") for reason in reasons)


# What cannot be replayed


def test_a_trial_that_is_not_there_is_said_with_those_that_are(bench):
    with pytest.raises(TrialNotFoundError, match=r"no trial 99 of sgd in the search of 'watched'; they are .* 0 to 3"):
        trial(bench, 99)
    with pytest.raises(TrialNotFoundError, match="in the confirmation of 'watched'; they are numbered 0 to 1"):
        trial(bench, 2, confirmation=True)
    with pytest.raises(TrialNotFoundError, match="'sgdd' is not known; did you mean 'sgd'"):
        find_trial(bench.database, bench.study, "sgdd", 0)


def test_a_task_that_is_not_trusted_is_not_imported(bench):
    with pytest.raises(TaskError, match=r"is not trusted: add --trust .*watched_task\.py"):
        replay_trial(bench.database, bench.study, trial(bench))


def test_a_trial_of_which_nothing_was_recorded_is_said_so(bench):
    with pytest.raises(TrialNotFoundError, match="no epoch of trial 0 of sgd was recorded"):
        replay_trial(bench.database, bench.study, replace(trial(bench), ticket_id=10**6))


def test_a_task_that_fails_now_is_said_with_its_epoch(bench):
    bench.ask_for("fail-beyond", 0.105)  # beyond the tenth step at this rate: in the second epoch
    try:
        with pytest.raises(StudyFailedError, match="the trial fails in epoch 2 now: RuntimeError: this setting fails"):
            again(bench)
    finally:
        bench.no_more("fail-beyond")


# The command


def command(bench, *arguments):
    trust = [word for entry in bench.options().trust for word in ("--trust", entry)]
    return CliRunner().invoke(cli, ["replay", *arguments, "--storage", bench.database.text, "--device", "cpu", *trust])


def test_the_command_shows_every_epoch_and_ends_in_0_where_they_agree(bench):
    found = command(bench, "watched", "sgd", "1")
    assert found.exit_code == 0
    lines = found.stdout.splitlines()
    assert lines[0].startswith("watched: sgd 1 (search, lr=0.02, seed 0) on cpu")
    assert [line.split()[0] for line in lines if line.split() and line.split()[0].isdecimal()] == list("01234")
    assert any(line.startswith(("Equal: ", "Within tolerance: ")) for line in lines)


def test_the_command_ends_in_1_where_they_do_not_and_names_what_may_explain_it(bench, change):
    where = (Epoch.ticket_id == trial(bench).ticket_id, Epoch.epoch == 3)
    change(Epoch, where, valid_loss=1.0)
    found = command(bench, "watched", "sgd", "0")
    assert found.exit_code == 1
    assert "Not equal: the losses part in epoch 3, by up to" in found.stdout
    assert "What may explain the difference:" in found.stdout
    report = json.loads(command(bench, "watched", "sgd", "0", "--json").stdout)
    assert (report["verdict"], report["apart_from"], len(report["epochs"])) == ("not equal", 3, 5)
    assert report["epochs"][3]["recorded"]["valid_loss"] == 1.0
    assert report["settings"]["clip_norm"] == "inf"
