from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import sqlalchemy as sa

from momentum_tuner.database import Database, Epoch, Load, Study, Ticket, Worker, database_now
from momentum_tuner.errors import StorageError, StudyChangedError, StudyNotFoundError
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.tickets import (
    Claim,
    Heartbeat,
    LoadSample,
    Outage,
    Result,
    WorkerIdentity,
    alive_workers,
    assign_worker,
    begin_finish,
    best_settings,
    claim,
    delete_study,
    end_finish,
    find_study,
    finish_study,
    give_back,
    list_studies,
    note_checkpoints,
    note_data,
    noted_checkpoints,
    noted_trials,
    read_epochs,
    record_epochs,
    register_worker,
    set_trials,
    stop_worker,
    studies_with_work,
    study_progress,
    submit_study,
    with_trial,
)
from momentum_tuner.tickets import workers as workers_module

GRACE = 30.0


def no_design(_: str) -> None:
    return None


def submit(database: Database, spec):
    return submit_study(database, spec, None, no_design)


def join(database: Database, *names: str) -> None:
    for name in names:
        register_worker(database, WorkerIdentity(name, "host", 1), "cpu")


def take(database: Database, study, worker: str, limit: int = 100, *, max_attempts: int = 3, **options) -> list[Claim]:
    """Claim as a worker does that knows what it holds."""
    with database.read() as session:
        held = session.scalars(sa.select(Ticket.id).where(Ticket.worker_id == worker)).all()
    options = {"holding": held, "grace_seconds": GRACE, **options}
    return claim(database, study.id, worker, limit, max_attempts=max_attempts, **options)


def ask(database: Database, claims: list[Claim], settings: dict[str, float] | None = None) -> list[Claim]:
    """Note a trial on each, as a worker does: trial ids 1000 + ticket, numbers in order."""
    asked = [with_trial(c, 1000 + c.ticket_id, c.ticket_id, settings or {"learning_rate": 0.1}) for c in claims]
    return set_trials(database, asked, list(range(len(asked))))


def finish(database: Database, *results: tuple[Claim, Result]) -> None:
    kept = begin_finish(database, results)
    assert len(kept) == len(results)
    end_finish(database, [c for c, _ in kept])


def age_heartbeat(database: Database, worker: str, seconds: float) -> None:
    with database.write() as session:
        session.execute(sa.update(Worker).where(Worker.id == worker).values(heartbeat=database_now() - seconds))


def rows(database: Database, *columns):
    with database.read() as session:
        return [tuple(row) for row in session.execute(sa.select(*columns).order_by(Ticket.id))]


def row(database: Database, ticket_id: int) -> Ticket:
    with database.read() as session:
        return session.get_one(Ticket, ticket_id)


def record(epoch: int, **measures: float) -> EpochRecord:
    return EpochRecord(epoch=epoch, step=23 * epoch, **measures)


# Submitting


def test_a_study_has_one_ticket_for_each_trial_of_each_optimizer(database, make_spec):
    study = submit(database, make_spec(budget={"trials": 5, "epochs": 3}, seed=7))
    found = rows(database, Ticket.optimizer, Ticket.position, Ticket.state, Ticket.attempts, Ticket.seed, Ticket.kind)
    expected = [(o, p, "open", 0, 7, "search") for o in ("sgd", "momentum", "nesterov") for p in range(5)]
    assert sorted(found) == sorted(expected)
    assert (study.name, study.phase, study.folder) == ("digits-mlp", "search", None)
    assert study.spec == make_spec(budget={"trials": 5, "epochs": 3}, seed=7)
    assert abs(study.created_at - time.time()) < 30


def test_submitting_twice_joins(database, make_spec):
    first = submit_study(database, make_spec(), "/first", no_design)
    second = submit_study(database, make_spec(), "/second", no_design)
    assert first == second
    assert second.folder == "/first"
    assert len(rows(database, Ticket.id)) == 12


SUBMIT = """
database = Database(argument)
spec = StudySpec.model_validate(
    {"name": "s", "task": {"factory": "a:b"}, "optimizers": ["sgd", "nesterov"], "budget": {"trials": 40, "epochs": 2},
     "confirm": {"seeds": 0}}
)
study = submit_study(database, spec, None, lambda o: None)
database.close()
print(json.dumps([study.id, study.created_at]))
"""


def test_processes_that_submit_at_once_make_one_study_with_one_budget(database, race):
    imports = (
        "from momentum_tuner.database import Database\n"
        "from momentum_tuner.spec import StudySpec\n"
        "from momentum_tuner.tickets import submit_study"
    )
    found = race(imports, SUBMIT, 3, database.text)
    assert found[0] == found[1] == found[2]
    assert Counter(rows(database, Ticket.optimizer)) == {("sgd",): 40, ("nesterov",): 40}


def test_a_larger_budget_adds_exactly_the_missing_tickets_and_opens_the_study_again(database, make_spec):
    study = submit(database, make_spec(budget={"trials": 2, "epochs": 3}))
    join(database, "w")
    before = take(database, study, "w")
    finish(database, *((c, Result("complete", 1.0)) for c in ask(database, before)))
    assert finish_study(database, study.id)
    with database.write() as session:
        session.get_one(Study, study.id).parent_published = "done"
    asked_for: list[str] = []
    design = {o: [{"learning_rate": 0.1 * n} for n in range(5)] for o in ("sgd", "momentum", "nesterov")}

    def noted(optimizer: str):
        asked_for.append(optimizer)
        return design[optimizer]

    grown = submit_study(database, make_spec(budget={"trials": 5, "epochs": 3}), None, noted)
    assert grown.phase == "search"
    assert grown.spec.budget.trials == find_study(database, "digits-mlp").spec.budget.trials == 5
    assert sorted(asked_for) == ["momentum", "nesterov", "sgd"]
    found = rows(database, Ticket.optimizer, Ticket.position, Ticket.state, Ticket.fixed)
    assert sorted(f[:3] for f in found if f[1] < 2) == sorted((o, p, "done") for o in design for p in range(2))
    assert sorted(found[6:], key=str) == sorted(
        ((o, p, "open", {"learning_rate": 0.1 * p}) for o in design for p in (2, 3, 4)), key=str
    )
    with database.read() as session:
        study_row = session.get_one(Study, study.id)
        assert (study_row.finished_at, study_row.parent_published) == (None, None)
    again = submit_study(database, make_spec(budget={"trials": 5, "epochs": 3}), None, noted)
    assert (again.phase, len(rows(database, Ticket.id)), len(asked_for)) == ("search", 15, 3)


def test_a_changed_study_is_refused_naming_each_field_and_nothing_changes(database, make_spec):
    submit(database, make_spec(space={"momentum": {"low": 0.0, "high": 0.99}}))
    with pytest.raises(StudyChangedError) as refused:
        submit(
            database,
            make_spec(space={"momentum": {"low": 0.0, "high": 0.9}}, budget={"trials": 9, "epochs": 5}, seed=1),
        )
    lines = str(refused.value).splitlines()
    assert "study 'digits-mlp' is in the database with other settings" in lines[0]
    assert "momentum-tuner delete digits-mlp" in lines[0]
    assert sorted(lines[1:]) == ["  budget.epochs: 20 -> 5", "  seed: 0 -> 1", "  space.momentum.high: 0.99 -> 0.9"]
    assert len(rows(database, Ticket.id)) == 12
    assert find_study(database, "digits-mlp").spec.budget.epochs == 20


def test_a_smaller_budget_is_refused(database, make_spec):
    submit(database, make_spec())
    with pytest.raises(StudyChangedError, match=r"budget\.trials: 4 -> 3"):
        submit(database, make_spec(budget={"trials": 3, "epochs": 20}))


def test_a_design_is_drawn_while_nobody_waits_for_it(database, make_spec):
    def slow(_: str) -> list[dict[str, float]]:
        with database.write() as session:  # would wait for ever, if the submission held the database
            session.scalar(sa.select(sa.func.count()).select_from(Study))
        return [{"learning_rate": 0.5}] * 4

    submit_study(database, make_spec(), None, slow)
    assert rows(database, Ticket.fixed) == [({"learning_rate": 0.5},)] * 12


def test_an_unknown_study_is_refused_naming_those_there_are(database, make_spec):
    with pytest.raises(StudyNotFoundError, match="it holds none yet; start one with"):
        find_study(database, "s")
    for name in ("a", "b"):
        submit(database, make_spec(name=name))
    with pytest.raises(StudyNotFoundError, match=r"no study 's' in .*: it holds b, a"):
        find_study(database, "s")
    assert [s.name for s in list_studies(database)] == ["a", "b"]
    assert find_study(database, "b").spec == make_spec(name="b")


# Claiming


def test_the_optimizers_take_turns(database, make_spec):
    study = submit(database, make_spec())
    join(database, "a", "b")
    first, second = take(database, study, "a", 4), take(database, study, "b", 100)
    assert [c.optimizer for c in first + second] == ["sgd", "momentum", "nesterov"] * 4
    assert [row(database, c.ticket_id).position for c in first] == [0, 0, 0, 1]
    assert take(database, study, "a") == []
    assert take(database, study, "a", 0) == []


def test_a_claim_says_what_the_ticket_holds(database, make_spec):
    spec = make_spec(optimizers=["nesterov"], budget={"trials": 1, "epochs": 2}, seed=2**32 - 1)
    study = submit_study(database, spec, None, lambda _: [{"learning_rate": 0.1, "clip_norm": math.inf}])
    join(database, "w")
    (held,) = take(database, study, "w")
    assert held == Claim(
        ticket_id=held.ticket_id,
        worker_id="w",
        generation=1,
        optimizer="nesterov",
        kind="search",
        seed=2**32 - 1,
        fixed={"learning_rate": 0.1, "clip_norm": math.inf},
        trial_id=None,
        trial_number=None,
        settings=None,
        outcome=None,
        value=None,
        second_value=None,
        checkpoint=None,
        attempts=1,
    )
    found = row(database, held.ticket_id)
    assert (found.state, found.worker_id, found.attempts, found.generation) == ("running", "w", 1, 1)
    assert abs(found.started_at - time.time()) < 30


def test_claims_of_another_study_are_left_alone(database, make_spec):
    first, second = submit(database, make_spec()), submit(database, make_spec(name="other"))
    join(database, "w")
    take(database, first, "w")
    states = Counter(rows(database, Ticket.study_id, Ticket.state))
    assert states == {(first.id, "running"): 12, (second.id, "open"): 12}


def test_threads_that_claim_at_once_get_every_ticket_exactly_once(database, make_spec):
    study = submit(database, make_spec(budget={"trials": 40, "epochs": 2}))
    names = ("a", "b", "c", "d")
    join(database, *names)
    barrier = threading.Barrier(len(names))

    def work(name: str) -> list[tuple[int, int]]:
        mine = []
        for _ in range(30):
            barrier.wait(60)
            mine += [(c.ticket_id, c.generation) for c in take(database, study, name, 1)]
        return mine

    with ThreadPoolExecutor(len(names)) as pool:
        found = [held for mine in pool.map(work, names) for held in mine]
    assert sorted(found) == [(ticket_id, 1) for (ticket_id,) in rows(database, Ticket.id)]
    assert len(found) == 120


CLAIM = """
database = Database(argument)
study = find_study(database, "digits-mlp")
name = f"w{number}"
register_worker(database, WorkerIdentity(name, "host", 1), "cpu")
while True:
    with database.read() as session:
        if session.scalar(sa.select(sa.func.count()).select_from(Worker)) == 3:
            break
mine = []
while True:
    claims = claim(database, study.id, name, 1, max_attempts=3, holding=mine)
    if not claims:
        break
    mine += [c.ticket_id for c in claims]
    time.sleep(0.002)
database.close()
print(json.dumps(mine))
"""


def test_processes_that_claim_at_once_get_every_ticket_exactly_once(database, make_spec, race):
    submit(database, make_spec(budget={"trials": 60, "epochs": 2}))
    imports = (
        "import time\n"
        "import sqlalchemy as sa\n"
        "from momentum_tuner.database import Database, Worker\n"
        "from momentum_tuner.tickets import WorkerIdentity, claim, find_study, register_worker"
    )
    found = race(imports, CLAIM, 3, database.text)
    assert sum(map(bool, found)) >= 2, "they did compete"
    assert sorted(t for mine in found for t in mine) == [t for (t,) in rows(database, Ticket.id)]
    assert set(rows(database, Ticket.generation, Ticket.attempts)) == {(1, 1)}


def test_threads_that_adopt_at_once_get_every_ticket_exactly_once(database, make_spec):
    study = submit(database, make_spec(budget={"trials": 20, "epochs": 2}))
    names = ("a", "b", "c")
    join(database, "dead", *names)
    held = take(database, study, "dead")
    age_heartbeat(database, "dead", GRACE + 1)
    barrier = threading.Barrier(len(names))

    def work(name: str) -> list[tuple[int, int]]:
        mine = []
        for _ in range(30):
            barrier.wait(60)
            mine += [(c.ticket_id, c.generation) for c in take(database, study, name, 1)]
        return mine

    with ThreadPoolExecutor(len(names)) as pool:
        found = [one for mine in pool.map(work, names) for one in mine]
    assert sorted(found) == sorted((c.ticket_id, 2) for c in held)


# Adopting, and the fence


def test_tickets_of_a_silent_worker_are_adopted_with_their_trial(database, make_spec):
    study = submit(database, make_spec(budget={"trials": 1, "epochs": 2}))
    join(database, "old", "new")
    settings = {"learning_rate": 0.1, "momentum": 0.95, "clip_norm": math.inf, "batch_size": 64}
    before = ask(database, take(database, study, "old"), settings)
    started = row(database, before[0].ticket_id).started_at
    age_heartbeat(database, "old", GRACE - 5)
    assert take(database, study, "new") == []
    age_heartbeat(database, "old", GRACE + 1)
    after = take(database, study, "new")
    assert after == [replace(c, worker_id="new", generation=2, attempts=2) for c in before]
    assert after[0].settings == settings
    found = row(database, before[0].ticket_id)
    assert (found.state, found.worker_id, found.attempts, found.generation) == ("running", "new", 2, 2)
    assert found.started_at == started
    assert found.slot is None
    assert (found.trial_id, found.trial_number) == (before[0].trial_id, before[0].trial_number)


def test_tickets_of_a_stopped_worker_are_adopted_at_once(database, make_spec):
    study = submit(database, make_spec())
    join(database, "old", "new")
    before = take(database, study, "old", 5)
    stop_worker(database, "old")
    assert {c.ticket_id for c in take(database, study, "new", 5)} == {c.ticket_id for c in before}


def test_tickets_of_a_worker_that_nobody_knows_are_adopted(database, make_spec):
    study = submit(database, make_spec())
    join(database, "old", "new")
    take(database, study, "old")
    with database.write() as session:
        session.execute(sa.delete(Worker).where(Worker.id == "old"))
    assert len(take(database, study, "new")) == 12


def test_a_worker_that_was_silent_does_not_claim_what_it_holds_and_is_alive_once_it_claims(database, make_spec):
    study = submit(database, make_spec())
    join(database, "zombie", "other")
    take(database, study, "zombie", 11)
    age_heartbeat(database, "zombie", GRACE + 100)
    assert [c.generation for c in take(database, study, "zombie")] == [1]
    assert take(database, study, "other") == []
    stop_worker(database, "zombie")
    assert take(database, study, "zombie") == []


def test_whoever_lost_its_ticket_writes_nothing(database, make_spec):
    study = submit(database, make_spec())
    join(database, "old", "new")
    stale = ask(database, take(database, study, "old", 1))
    age_heartbeat(database, "old", GRACE + 1)
    (current,) = take(database, study, "new", 1)
    before = row(database, current.ticket_id).__dict__.copy()
    (zombie,) = stale
    assert set_trials(database, [with_trial(zombie, 5, 5, {"learning_rate": 9.0})], [3]) == []
    assert record_epochs(database, [(zombie, record(0, valid_loss=1.0))]) == set()
    assert begin_finish(database, [(zombie, Result("complete", 0.0))]) == []
    end_finish(database, [zombie])
    give_back(database, [zombie])
    after = row(database, current.ticket_id).__dict__
    before.pop("_sa_instance_state"), after.pop("_sa_instance_state")
    assert after == before
    assert read_epochs(database, [current.ticket_id])[current.ticket_id] == []
    assert note_checkpoints(database, [(zombie, "stale", True)]) == set()
    assert row(database, current.ticket_id).checkpoint is None
    assert record_epochs(database, [(current, record(0, valid_loss=2.0))]) == {current.ticket_id}
    assert [r.valid_loss for r in read_epochs(database, [current.ticket_id])[current.ticket_id]] == [2.0]


def test_the_generation_alone_is_a_fence_too(database, make_spec):
    study = submit(database, make_spec())
    join(database, "w")
    (first,) = take(database, study, "w", 1)
    give_back(database, [first])
    (second,) = take(database, study, "w", 1)
    assert (second.ticket_id, second.generation) == (first.ticket_id, 2)
    assert record_epochs(database, [(first, record(0))]) == set()
    assert begin_finish(database, [(first, Result("complete", 0.0))]) == []
    assert record_epochs(database, [(second, record(0))]) == {second.ticket_id}


def test_of_several_records_only_those_of_lost_tickets_are_refused(database, make_spec):
    study = submit(database, make_spec())
    join(database, "old", "new")
    claims = ask(database, take(database, study, "old"))
    with database.write() as session:
        session.execute(sa.update(Ticket).where(Ticket.id == claims[0].ticket_id).values(worker_id="new", generation=2))
    kept = {c.ticket_id for c in claims[1:]}
    assert record_epochs(database, [(c, record(0, valid_loss=1.0)) for c in claims]) == kept
    assert {t for c in claims for t in [c.ticket_id] if read_epochs(database, [t])[t]} == kept
    results = begin_finish(database, [(c, Result("complete", 1.0)) for c in claims])
    assert {c.ticket_id for c, _ in results} == kept


def test_a_ticket_that_kills_its_workers_fails_with_its_reason(database, make_spec):
    study = submit(database, make_spec(optimizers=["sgd"], budget={"trials": 1, "epochs": 2}))
    for attempt in range(1, 4):
        join(database, f"w{attempt}")
        (held,) = take(database, study, f"w{attempt}")
        assert (held.outcome, row(database, held.ticket_id).attempts) == (None, attempt)
        ask(database, [held])
        age_heartbeat(database, f"w{attempt}", GRACE + 1)
    join(database, "last")
    (held,) = take(database, study, "last")
    assert (held.outcome, held.value, held.trial_id) == ("failed", None, 1000 + held.ticket_id)
    assert row(database, held.ticket_id).state == "finishing"
    end_finish(database, [held])
    found = row(database, held.ticket_id)
    assert (found.state, found.outcome, found.attempts, found.value) == ("done", "failed", 3, None)
    assert found.reason == "gave up after 3 attempts: each worker that trained it died"
    assert finish_study(database, study.id)


def test_giving_back_opens_the_ticket_without_counting_an_attempt(database, make_spec):
    study = submit(database, make_spec(optimizers=["sgd"], budget={"trials": 1, "epochs": 2}))
    join(database, "w")
    for _ in range(5):
        (held,) = take(database, study, "w")
        assert held.outcome is None
        (held,) = ask(database, [held])
        record_epochs(database, [(held, record(0))])
        give_back(database, [held])
        found = row(database, held.ticket_id)
        assert (found.state, found.worker_id, found.slot, found.attempts) == ("open", None, None, 0)
        assert found.trial_id == held.trial_id
    assert len(read_epochs(database, [held.ticket_id])[held.ticket_id]) == 1


def test_tickets_of_a_claim_whose_answer_was_lost_come_back_and_none_that_is_held(database, make_spec):
    study = submit(database, make_spec())
    join(database, "w", "other")
    known = take(database, study, "w", 2)
    lost = take(database, study, "w", 3)
    back = take(database, study, "w", 3, holding=[c.ticket_id for c in known], max_attempts=1)
    assert back == [replace(c, generation=2) for c in lost], "the same attempt, and not one too many"
    held = [*known, *back]
    rest = take(database, study, "w", holding=[c.ticket_id for c in held])
    assert not {c.ticket_id for c in rest} & {c.ticket_id for c in held}
    assert len(held) + len(rest) == 12
    assert {(c.worker_id, c.generation) for c in rest} == {("w", 1)}
    assert take(database, study, "other") == []
    assert record_epochs(database, [(lost[0], record(0))]) == set(), "the lost answer is fenced"


def test_a_lost_claim_of_a_decided_ticket_comes_back_with_what_is_left_to_tell(database, make_spec):
    study = submit(database, make_spec(optimizers=["sgd"], budget={"trials": 1, "epochs": 2}))
    join(database, "w")
    (held,) = ask(database, take(database, study, "w"))
    begin_finish(database, [(held, Result("complete", 0.5))])
    (back,) = take(database, study, "w", holding=[])
    assert (back.outcome, back.value, back.generation, back.attempts) == ("complete", 0.5, 2, 1)


def test_after_an_outage_only_tickets_of_stopped_workers_are_adopted(database, make_spec):
    study = submit(database, make_spec())
    join(database, "silent", "stopped", "new")
    take(database, study, "silent", 6)
    gone = take(database, study, "stopped", 6)
    age_heartbeat(database, "silent", GRACE + 1000)
    stop_worker(database, "stopped")
    assert {c.ticket_id for c in take(database, study, "new", adopt=False)} == {c.ticket_id for c in gone}
    assert take(database, study, "new", adopt=False) == []
    assert len(take(database, study, "new")) == 6


def test_of_tickets_on_their_last_attempt_a_worker_takes_one_at_a_time(database, make_spec):
    study = submit(database, make_spec(optimizers=["sgd"], budget={"trials": 6, "epochs": 2}))
    join(database, "dead", "w")
    ids = [c.ticket_id for c in take(database, study, "dead")]
    with database.write() as session:  # the first three killed a worker before this one
        session.execute(sa.update(Ticket).where(Ticket.id.in_(ids[:3])).values(attempts=2))
    stop_worker(database, "dead")
    without = take(database, study, "w", 2, with_last_attempt=False)
    assert [c.ticket_id for c in without] == ids[3:5]
    first = take(database, study, "w")
    assert [(c.ticket_id, c.attempts) for c in first] == [(ids[0], 3), (ids[5], 2)]
    assert take(database, study, "w", with_last_attempt=False) == []
    second = take(database, study, "w")
    assert [(c.ticket_id, c.attempts, c.outcome) for c in second] == [(ids[1], 3, None)]


def test_with_a_single_attempt_no_ticket_is_on_its_last(database, make_spec):
    study = submit(database, make_spec(optimizers=["sgd"], budget={"trials": 6, "epochs": 2}))
    join(database, "w", "next")
    assert len(take(database, study, "w", max_attempts=1)) == 6
    stop_worker(database, "w")
    given_up = take(database, study, "next", max_attempts=1)
    assert [c.outcome for c in given_up] == ["failed"] * 6


# Checkpoints


def test_a_checkpoint_is_noted_and_forgives_attempts_only_where_the_trial_has_come_further(database, make_spec):
    study = submit(database, make_spec(optimizers=["sgd"], budget={"trials": 2, "epochs": 2}))
    join(database, "first", "second", "third")
    take(database, study, "first")
    stop_worker(database, "first")
    ahead, stuck = take(database, study, "second")
    assert noted_checkpoints(database, study.id) == []
    noted = note_checkpoints(database, [(ahead, "[1]", True), (stuck, "[2]", False)])
    assert noted == {ahead.ticket_id, stuck.ticket_id}
    assert sorted(noted_checkpoints(database, study.id)) == ["[1]", "[2]"]
    assert rows(database, Ticket.attempts, Ticket.checkpoint) == [(1, "[1]"), (2, "[2]")]
    stop_worker(database, "second")
    found = {c.ticket_id: c for c in take(database, study, "third")}
    assert (found[ahead.ticket_id].attempts, found[ahead.ticket_id].checkpoint) == (2, "[1]")
    assert (found[stuck.ticket_id].attempts, found[stuck.ticket_id].checkpoint) == (3, "[2]")
    assert note_checkpoints(database, [(ahead, "[3]", True)]) == set()
    assert rows(database, Ticket.attempts, Ticket.checkpoint) == [(2, "[1]"), (3, "[2]")]


def test_a_checkpoint_stays_with_a_ticket_that_is_given_back_and_goes_when_it_is_done(database, make_spec):
    study = submit(database, make_spec(optimizers=["sgd"], budget={"trials": 1, "epochs": 2}))
    join(database, "w")
    (held,) = ask(database, take(database, study, "w"))
    note_checkpoints(database, [(held, "[1]", True)])
    give_back(database, [held])
    assert note_checkpoints(database, [(held, "[2]", True)]) == set()
    (back,) = take(database, study, "w")
    assert (back.checkpoint, back.attempts, back.trial_id) == ("[1]", 1, held.trial_id)
    begin_finish(database, [(back, Result("complete", 1.0))])
    assert note_checkpoints(database, [(back, "[2]", True)]) == set()
    assert noted_checkpoints(database, study.id) == ["[1]"]
    end_finish(database, [back])
    assert noted_checkpoints(database, study.id) == []
    assert row(database, back.ticket_id).checkpoint is None


def test_checkpoints_of_other_studies_are_not_listed(database, make_spec):
    study, other = submit(database, make_spec()), submit(database, make_spec(name="other"))
    join(database, "w")
    note_checkpoints(database, [(take(database, other, "w", 1)[0], "[1]", True)])
    assert noted_checkpoints(database, study.id) == []
    assert noted_checkpoints(database, other.id) == ["[1]"]


# Recording


def test_records_come_back_as_they_were_written(database, make_spec):
    study = submit(database, make_spec())
    join(database, "w")
    held, other = take(database, study, "w", 2)
    full = EpochRecord(
        epoch=1,
        step=23,
        train_loss=0.1 + 0.2,
        valid_loss=1e-300,
        grad_norm=3.0,
        grad_norm_max=1e300,
        layer_grad_ratio=2.0,
        update_norm=0.5,
        oscillation=0.25,
        spikes=3,
        seconds=0.125,
        distance=1 / 3,
        metrics={"accuracy": 0.9, "f1": 0.1},
        diverged_at_step=17,
    )
    bare = EpochRecord(epoch=0, step=0)
    assert record_epochs(database, [(held, full), (held, bare), (other, bare)]) == {held.ticket_id, other.ticket_id}
    assert read_epochs(database, [held.ticket_id])[held.ticket_id] == [bare, full]
    assert read_epochs(database, [other.ticket_id])[other.ticket_id] == [bare]
    with database.read() as session:
        times = session.scalars(sa.select(Epoch.recorded_at)).all()
        assert all(abs(t - time.time()) < 30 for t in times)


def test_records_that_come_again_stay_as_they_were_first(database, make_spec):
    study = submit(database, make_spec())
    join(database, "w")
    (held,) = take(database, study, "w", 1)
    record_epochs(database, [(held, record(e, valid_loss=float(e))) for e in range(3)])
    with database.read() as session:
        before = session.execute(sa.select(Epoch.epoch, Epoch.recorded_at).order_by(Epoch.epoch)).all()
    time.sleep(0.02)
    again = [(held, record(e, valid_loss=100.0 + e)) for e in range(1, 5)]
    assert record_epochs(database, again) == {held.ticket_id}
    found = read_epochs(database, [held.ticket_id])[held.ticket_id]
    assert [r.valid_loss for r in found] == [0.0, 1.0, 2.0, 103.0, 104.0]
    with database.read() as session:
        after = session.execute(sa.select(Epoch.epoch, Epoch.recorded_at).order_by(Epoch.epoch)).all()
    assert after[:3] == before


def test_nothing_to_record_is_nothing(database):
    assert record_epochs(database, []) == set()
    assert set_trials(database, [], []) == []
    assert begin_finish(database, []) == []
    end_finish(database, [])
    give_back(database, [])


# Finishing


def test_a_result_goes_through_finishing_to_done(database, make_spec):
    study = submit(database, make_spec())
    join(database, "w")
    (held,) = ask(database, take(database, study, "w", 1))
    result = Result("complete", 0.25, {"best_valid_loss": 0.25, "diverged": False, "spikes": 3})
    assert begin_finish(database, [(held, result)]) == [(held, result)]
    found = row(database, held.ticket_id)
    assert (found.state, found.outcome, found.value, found.finished_at) == ("finishing", "complete", 0.25, None)
    assert begin_finish(database, [(held, result)]) == [(held, result)], "as if the first answer was lost"
    again = row(database, held.ticket_id)
    assert (again.state, again.outcome, again.value, again.measures) == ("finishing", "complete", 0.25, found.measures)
    assert record_epochs(database, [(held, record(9))]) == set()
    end_finish(database, [held])
    assert begin_finish(database, [(held, result)]) == [], "what is done is not opened again"
    found = row(database, held.ticket_id)
    assert (found.state, found.outcome, found.value, found.reason) == ("done", "complete", 0.25, None)
    assert found.measures == {"best_valid_loss": 0.25, "diverged": False, "spikes": 3}
    assert abs(found.finished_at - time.time()) < 30
    finished_at = found.finished_at
    end_finish(database, [held])
    assert row(database, held.ticket_id).finished_at == finished_at
    assert noted_trials(database, study.id)[held.ticket_id] == (held.trial_id, True)


def test_a_finishing_ticket_of_a_dead_worker_comes_back_with_what_is_left_to_tell(database, make_spec):
    study = submit(database, make_spec(optimizers=["sgd"], budget={"trials": 1, "epochs": 2}))
    join(database, "old", "new")
    (held,) = ask(database, take(database, study, "old"))
    begin_finish(database, [(held, Result("pruned", 0.75))])
    age_heartbeat(database, "old", GRACE + 1)
    (back,) = take(database, study, "new", max_attempts=1)
    assert (back.outcome, back.value, back.trial_id, back.generation) == ("pruned", 0.75, held.trial_id, 2)
    end_finish(database, [held])
    assert row(database, held.ticket_id).state == "finishing"
    end_finish(database, [back])
    found = row(database, held.ticket_id)
    assert (found.state, found.outcome, found.attempts) == ("done", "pruned", 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_no_value(database, make_spec, value):
    study = submit(database, make_spec())
    join(database, "w")
    (held,) = ask(database, take(database, study, "w", 1))
    finish(database, (held, Result("complete", value, {"contraction": value})))
    found = row(database, held.ticket_id)
    assert found.value is None
    assert repr(found.measures) == repr({"contraction": value})
    assert best_settings(database, study) == []


def test_a_reason_may_hold_any_character(database, make_spec):
    study = submit(database, make_spec())
    join(database, "w")
    (held,) = ask(database, take(database, study, "w", 1))
    finish(database, (held, Result("failed", reason="ValueError: \0 <script> 'ü' \U0001f600 %s", traceback="a\0b\nc")))
    assert row(database, held.ticket_id).reason == "ValueError:  <script> 'ü' \U0001f600 %s"
    assert row(database, held.ticket_id).traceback == "ab\nc"


def test_a_study_is_done_only_when_every_ticket_is(database, make_spec):
    study = submit(database, make_spec(budget={"trials": 1, "epochs": 2}))
    join(database, "w")
    assert not finish_study(database, study.id)
    first, second, third = ask(database, take(database, study, "w"))
    finish(database, (first, Result("complete", 1.0)), (second, Result("failed", reason="x")))
    assert not finish_study(database, study.id)
    begin_finish(database, [(third, Result("complete", 1.0))])
    assert not finish_study(database, study.id)
    assert find_study(database, study.name).phase == "search"
    end_finish(database, [third])
    assert finish_study(database, study.id)
    assert find_study(database, study.name).phase == "done"
    with database.read() as session:
        finished_at = session.get_one(Study, study.id).finished_at
    assert abs(finished_at - time.time()) < 30
    assert finish_study(database, study.id), "again is harmless"
    with database.read() as session:
        assert session.get_one(Study, study.id).finished_at == finished_at
    assert finish_study(database, 12345), "nobody waits for what was deleted"


# Progress


def test_counts_add_up(database, make_spec):
    study = submit(database, make_spec(budget={"trials": 10, "epochs": 2}))
    join(database, "w", "stopped", "silent")
    for name in ("w", "stopped", "silent"):
        assign_worker(database, name, study.id, 8)
    stop_worker(database, "stopped")
    age_heartbeat(database, "silent", 1000.0)
    claims = ask(database, take(database, study, "w", 24))
    sgd = [c for c in claims if c.optimizer == "sgd"]
    outcomes = ["complete", "complete", "pruned", "diverged", "failed"]
    finish(database, *((c, Result(o, 1.0 + n)) for n, (c, o) in enumerate(zip(sgd, outcomes, strict=False))))
    begin_finish(database, [(sgd[5], Result("complete", 0.0))])
    progress = study_progress(database, study)
    found = {o.optimizer: o for o in progress.optimizers}
    assert list(found) == ["sgd", "momentum", "nesterov"]
    one = found["sgd"]
    assert (one.tickets, one.done, one.running) == (10, 5, 3)
    assert (one.complete, one.pruned, one.diverged, one.failed) == (2, 1, 1, 1)
    assert one.best == 1.0
    assert one.best_setting == {"trial": sgd[0].trial_number, "learning_rate": 0.1}
    assert (found["nesterov"].tickets, found["nesterov"].done, found["nesterov"].running) == (10, 0, 8)
    assert (found["nesterov"].best, found["nesterov"].best_setting) == (None, None)
    assert (progress.study, progress.phase, progress.tickets, progress.done) == ("digits-mlp", "search", 30, 5)
    assert [(w.id, w.slots, w.state) for w in progress.workers] == [("w", 8, "running"), ("silent", 8, "lost")]
    assert progress.workers[0].heartbeat_age_s < 30
    assert 999 < progress.workers[1].heartbeat_age_s < 1030


def test_progress_and_best_settings_are_plain_json(database, make_spec):
    study = submit(database, make_spec())
    join(database, "w")
    settings = {"learning_rate": 0.1, "clip_norm": math.inf}
    claims = ask(database, take(database, study, "w"), settings)
    finish(database, *((c, Result("complete", 0.5, {"learning_rate": 9.0, "seconds": 1.5})) for c in claims))
    (best, *_) = best_settings(database, study)
    assert best.settings == settings
    assert json.loads(json.dumps(best.flat(), allow_nan=False)) == {
        "study": "digits-mlp",
        "optimizer": "sgd",
        "trial": claims[0].trial_number,
        "objective": 0.5,
        "learning_rate": 0.1,
        "clip_norm": "inf",
        "seconds": 1.5,
    }
    assert list(best.flat()) == ["study", "optimizer", "trial", "objective", "learning_rate", "clip_norm", "seconds"]
    flat = json.loads(json.dumps(study_progress(database, study).flat(), allow_nan=False))
    assert flat["optimizers"][0]["best_setting"] == {
        "trial": claims[0].trial_number,
        "learning_rate": 0.1,
        "clip_norm": "inf",
    }


@pytest.mark.parametrize(("direction", "winner", "order"), [("minimize", 1, -1), ("maximize", 3, 1)])
def test_the_best_setting_follows_the_direction_and_ties_go_to_the_earlier_trial(
    database, make_spec, direction, winner, order
):
    spec = make_spec(
        optimizers=["sgd", "nesterov"],
        budget={"trials": 8, "epochs": 2},
        objective={"metric": "valid_accuracy", "direction": direction},
    )
    study = submit(database, spec)
    join(database, "w")
    claims = take(database, study, "w")
    values = {"sgd": [0.5, 0.1, 0.1, 0.9, 0.9, 0.4], "nesterov": [0.6, 0.2, 0.2, 0.8, 0.8, 0.6]}
    for optimizer, found in values.items():
        mine = [c for c in claims if c.optimizer == optimizer]
        # numbers run against the order of the tickets
        asked = [with_trial(c, 100 - n, 10 - n, {"learning_rate": n}) for n, c in enumerate(mine)]
        set_trials(database, asked, [0] * len(asked))
        finish(database, *((c, Result("complete", v)) for c, v in zip(asked[:6], found, strict=True)))
        extreme = 100.0 * order
        finish(database, (asked[6], Result("pruned", extreme)), (asked[7], Result("diverged", extreme)))
    best = best_settings(database, study)
    tied = winner + 1  # of two equal values the one with the smaller number
    chosen = ["nesterov", "sgd"] if order < 0 and values["nesterov"][1] < values["sgd"][1] else ["sgd", "nesterov"]
    assert [b.optimizer for b in best] == chosen
    assert [b.trial for b in best] == [10 - tied] * 2
    assert [b.settings for b in best] == [{"learning_rate": tied}] * 2
    assert [b.objective for b in best] == [values[o][winner] for o in chosen]


# Deleting


def test_deleting_a_study_leaves_no_row_of_it(database, make_spec):
    study, other = submit(database, make_spec()), submit(database, make_spec(name="other"))
    join(database, "w")
    assign_worker(database, "w", study.id, 4)
    claims = take(database, study, "w")
    record_epochs(database, [(c, record(e)) for c in claims for e in range(3)])
    kept = take(database, other, "w", 1)
    record_epochs(database, [(kept[0], record(0))])
    again = Database(database.text)
    delete_study(again, study.id)
    again.close()
    with database.read() as session:
        assert session.scalars(sa.select(Study.name)).all() == ["other"]
        assert session.scalar(sa.select(sa.func.count()).select_from(Ticket)) == 12
        assert session.scalars(sa.select(Epoch.ticket_id)).all() == [kept[0].ticket_id]
        assert session.scalars(sa.select(Worker.study_id)).all() == [None]
    assert record_epochs(database, [(c, record(4)) for c in claims]) == set()
    fresh = submit(database, make_spec())
    assert (fresh.phase, len(take(database, fresh, "w"))) == ("search", 12)


# Workers


def test_studies_with_work_are_those_with_a_ticket_to_claim_now(database, make_spec):
    untouched, held, lost, mine = (submit(database, make_spec(name=name)) for name in ("a", "b", "c", "d"))
    ids = [untouched.id, held.id, lost.id, mine.id]
    join(database, "w", "alive", "silent")
    take(database, held, "alive")
    take(database, lost, "silent")
    take(database, mine, "w")
    assert studies_with_work(database, ids, "w", GRACE) == {untouched.id}
    age_heartbeat(database, "silent", GRACE + 1)
    assert studies_with_work(database, ids, "w", GRACE) == {untouched.id, lost.id}
    assert studies_with_work(database, ids, "silent", GRACE) == {untouched.id}, "it knows what it holds"
    assert studies_with_work(database, [held.id, lost.id], "w", GRACE) == {lost.id}
    assert studies_with_work(database, [], "w", GRACE) == set()
    (one, *_) = take(database, untouched, "w")
    assert studies_with_work(database, ids, "w", GRACE) == {lost.id}
    give_back(database, [one])
    assert studies_with_work(database, ids, "w", GRACE) == {untouched.id, lost.id}


def test_alive_are_the_workers_that_have_not_stopped_and_are_heard_of(database):
    join(database, "alive", "silent", "stopped")
    age_heartbeat(database, "silent", GRACE + 1)
    age_heartbeat(database, "alive", GRACE - 5)
    stop_worker(database, "stopped")
    assert alive_workers(database, GRACE) == {"alive"}
    assert alive_workers(database, GRACE + 10) == {"alive", "silent"}


def test_the_id_of_a_worker_can_begin_a_files_name_and_holds_no_dash_of_the_hosts(monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "gpu-17.lab/é x")
    identity = WorkerIdentity.of_this_process()
    assert identity.host == "gpu-17.lab/é x"
    assert identity.id.startswith(f"gpu_17.lab___x-{identity.pid}-")
    assert identity.id.count("-") == 2


def test_an_outage_is_over_once_the_database_has_answered_for_so_long(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    outage = Outage()
    assert outage.over_for(1e9), "there was none"
    outage.notice()
    assert not outage.over_for(0.1)
    now = 1009.0
    assert not outage.over_for(10.0)
    now = 1010.0
    assert outage.over_for(10.0)
    outage.notice()
    assert not outage.over_for(10.0)


def test_an_identity_is_never_given_twice():
    first, second = WorkerIdentity.of_this_process(), WorkerIdentity.of_this_process()
    assert first.id != second.id
    assert (first.host, first.pid) == (second.host, second.pid)
    assert len(first.id) <= 64


def wait_for(happened, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def heartbeat_of(database: Database, worker: str) -> float:
    with database.read() as session:
        return session.get_one(Worker, worker).heartbeat


def test_a_heartbeat_beats_until_it_is_left(database):
    join(database, "w", "other")
    age_heartbeat(database, "w", 1000.0)
    age_heartbeat(database, "other", 1000.0)
    stop_worker(database, "w")  # as a launcher does where another container's worker of the same number died
    outage = Outage()
    with Heartbeat(database, "w", every=0.02, outage=outage):
        wait_for(lambda: abs(heartbeat_of(database, "w") - time.time()) < 30)
        first = heartbeat_of(database, "w")
        wait_for(lambda: heartbeat_of(database, "w") > first)
    assert alive_workers(database, 60.0) == {"w"}
    last = heartbeat_of(database, "w")
    time.sleep(0.2)
    assert heartbeat_of(database, "w") == last
    assert heartbeat_of(database, "other") < time.time() - 900
    assert outage.over_for(1e9), "no beat failed"
    assert not [t for t in threading.enumerate() if t.name == "heartbeat"]


def test_a_heartbeat_notes_the_load_of_a_worker_that_serves_a_study_now_and_then(database, make_spec, monkeypatch):
    study = submit(database, make_spec())
    join(database, "w", "idle")
    assign_worker(database, "w", study.id, 4)
    monkeypatch.setattr(workers_module, "LOAD_SECONDS", 0.1)
    asked = []

    def measure() -> LoadSample:
        asked.append(1)
        return LoadSample(cpu_percent=100.0 * len(asked), memory_mb=512.0)

    with Heartbeat(database, "w", every=0.02, measure=measure), Heartbeat(database, "idle", 0.02, measure=measure):
        wait_for(lambda: len(loads(database)) == 3)
    found = loads(database)
    assert {(load.worker_id, load.study_id, load.memory_mb) for load in found} == {("w", study.id, 512.0)}
    assert all(after.sampled_at - before.sampled_at >= 0.09 for before, after in pairwise(found))
    assert len({load.cpu_percent for load in found}) == len(found)


def loads(database: Database) -> list[Load]:
    with database.read() as session:
        return list(session.scalars(sa.select(Load).order_by(Load.sampled_at)))


def test_what_a_study_learns_from_is_noted_once(database, make_spec):
    study = submit(database, make_spec())
    assert note_data(database, study.id, {"name": "digits", "digest": "abc"}) == {"name": "digits", "digest": "abc"}
    assert note_data(database, study.id, {"name": "digits", "digest": "def"})["digest"] == "abc"
    for digest in ("abc", "def", "ghi", "def"):
        note_data(database, study.id, {"name": "digits", "digest": digest})
    with database.read() as session:
        assert session.get_one(Study, study.id).data == {"name": "digits", "digest": "abc", "others": ["def", "ghi"]}


def test_a_heartbeat_goes_on_after_errors_and_says_so_once(database, monkeypatch, caplog):
    join(database, "w")
    age_heartbeat(database, "w", 1000.0)
    failures = []
    write = database.write

    def broken():
        failures.append(1)
        if len(failures) <= 2:
            raise RuntimeError("a bug, of postgresql://u:hunter2@host/db")
        if len(failures) <= 5:
            raise StorageError("the database does not answer")
        return write()

    monkeypatch.setattr(database, "write", broken)
    outage = Outage()
    with caplog.at_level(logging.WARNING), Heartbeat(database, "w", every=0.02, outage=outage):
        wait_for(lambda: heartbeat_of(database, "w") > time.time() - 100)
    assert len(failures) > 5
    assert not outage.over_for(60.0)
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("heartbeat")]
    assert len(said) == 1
    assert "RuntimeError: a bug, of postgresql://***@host/db" in said[0]


def test_a_heartbeat_survives_a_server_that_drops_its_connections(postgresql_database, postgresql):
    join(postgresql_database, "w")
    name = postgresql_database.url.database

    def heartbeat() -> float:
        with contextlib.closing(Database(postgresql_database.text)) as fresh:
            return heartbeat_of(fresh, "w")

    with Heartbeat(postgresql_database, "w", every=0.02):
        for _ in range(3):
            before = heartbeat()
            postgresql.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
            wait_for(lambda before=before: heartbeat() > before)
