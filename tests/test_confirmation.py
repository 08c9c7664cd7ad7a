"""The confirmation: who is trained again, with which settings, on which seeds; and studies with two aims."""

from __future__ import annotations

import io
import math
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState
from rich.console import Console

from momentum_tuner.cli.comparison_tables import print_comparison
from momentum_tuner.comparison import compare_study
from momentum_tuner.database import Database, Ticket
from momentum_tuner.search import design
from momentum_tuner.tickets import (
    Claim,
    Result,
    WorkerIdentity,
    begin_finish,
    best_settings,
    claim,
    confirmation_seeds,
    end_finish,
    find_study,
    finish_study,
    is_confirmation_of,
    open_confirmation,
    read_epochs,
    register_worker,
    set_trials,
    study_progress,
    submit_study,
    with_trial,
)
from momentum_tuner.worker import StopSignal, run_worker
from momentum_tuner.worker_options import WorkerOptions

SPACE = {"learning_rate": {"low": 1e-4, "high": 1.0, "log": True}, "momentum": {"low": 0.0, "high": 0.999}}
QUADRATIC = {"factory": "momentum_tuner.tasks:quadratic", "params": {"dim": 4, "kappa": 10.0, "start": "random"}}


@pytest.fixture(autouse=True)
def worker(request):
    """A worker of the name `w`, for the tests that claim by themselves."""
    if "database" in request.fixturenames:
        register_worker(request.getfixturevalue("database"), WorkerIdentity("w", "host", 1), "cpu")


def submit(database, spec):
    return submit_study(database, spec, None, lambda optimizer: None)


def search(database: Database, study, losses, first: int = 0) -> None:
    """Take all open tickets of the search, from that number on, and end them with these losses; None: diverged."""
    numbers: dict[str, int] = {}
    while claims := claim(database, study.id, "w", 100, max_attempts=3):
        assert {c.kind for c in claims} <= {"search", "reference"}
        asked, results = [], []
        for c in claims:
            number = numbers[c.optimizer] = numbers.get(c.optimizer, first - 1) + 1
            settings = {"learning_rate": 0.01 * (1 + number), "weight_decay": 0.0, "clip_norm": math.inf}
            if c.optimizer in ("momentum", "nesterov"):
                settings["momentum"] = 0.1 + number / 7
            asked.append(with_trial(c, 1000 + c.ticket_id, number, {**settings, "batch_size": 64}))
            loss = losses[c.optimizer][number - first]
            results.append(Result("diverged", 2.3) if loss is None else Result("complete", loss))
        end(database, set_trials(database, asked, list(range(len(asked)))), results)


def end(database: Database, claims: list[Claim], results: list[Result]) -> None:
    kept = begin_finish(database, list(zip(claims, results, strict=True)))
    assert len(kept) == len(claims)
    end_finish(database, claims)


def confirmations(database: Database) -> list[Ticket]:
    with database.read() as session:
        return list(session.scalars(sa.select(Ticket).where(Ticket.kind == "confirm").order_by(Ticket.queue_order)))


LOSSES = {"sgd": [0.5, 0.4], "momentum": [0.2, 0.3], "nesterov": [0.3, 0.3], "momentum_0.9": [0.9, 0.25]}


@pytest.fixture
def spec(make_spec):
    return make_spec(space=SPACE, budget={"trials": 2, "epochs": 3}, confirm={"seeds": 3})


def test_seeds_are_fresh_distinct_and_stay_when_more_are_asked_for(make_spec):
    few = confirmation_seeds(make_spec(confirm={"seeds": 10}, seed=4))
    many = confirmation_seeds(make_spec(confirm={"seeds": 500}, seed=4))
    assert many[:10] == few
    assert len(set(many)) == 500
    assert 4 not in many
    assert all(0 <= seed < 2**32 for seed in many)
    assert not set(few) & set(confirmation_seeds(make_spec(confirm={"seeds": 10}, seed=5)))


def test_the_reference_has_tickets_of_its_own_after_those_of_the_search(database, spec):
    submit(database, spec)
    with database.read() as session:
        found = session.execute(sa.select(Ticket.kind, Ticket.optimizer).order_by(Ticket.queue_order)).all()
    searched = [("search", o) for _ in range(2) for o in ("sgd", "momentum", "nesterov")]
    assert [tuple(row) for row in found] == [*searched, *[("reference", "momentum_0.9")] * 2]


def test_a_complete_search_is_confirmed_at_each_best_setting_on_the_same_seeds(database, spec):
    study = submit(database, spec)
    assert open_confirmation(database, study.id) is True
    assert confirmations(database) == [], "the search is not complete"
    search(database, study, LOSSES)
    assert open_confirmation(database, study.id) is True
    found = confirmations(database)
    best = {b.optimizer: b for b in best_settings(database, study, contestants=True)}
    assert {o: b.trial for o, b in best.items()} == {"sgd": 1, "momentum": 0, "nesterov": 0, "momentum_0.9": 1}
    assert [(t.seed, t.optimizer) for t in found] == [
        (seed, optimizer) for seed in confirmation_seeds(spec) for optimizer in spec.contestants
    ]
    assert all(is_confirmation_of(t, best[t.optimizer]) for t in found)
    assert [t.position for t in found if t.optimizer == "sgd"] == [0, 1, 2]
    assert found[1].fixed == {"learning_rate": 0.01, "one_minus_momentum": 0.9}
    assert found[1].settings["momentum"] == 0.1
    progress = study_progress(database, study)
    assert (progress.phase, progress.confirm.tickets, progress.reference.done) == ("confirm", 12, 2)
    assert (progress.tickets, progress.done) == (20, 8)


def test_a_confirmation_is_opened_once_whoever_looks(database, spec):
    study = submit(database, spec)
    search(database, study, LOSSES)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: open_confirmation(database, study.id), range(8))) == [True] * 8
    assert len(confirmations(database)) == 12
    assert finish_study(database, study.id) is False


def confirm(database: Database, study) -> None:
    claims = claim(database, study.id, "w", 1000, max_attempts=3)
    assert {c.kind for c in claims} == {"confirm"}
    assert all(c.settings is not None for c in claims)
    end(database, claims, [Result("complete", 0.5)] * len(claims))


def test_a_confirmed_study_is_done_and_more_seeds_add_only_those(database, spec, make_spec):
    study = submit(database, spec)
    search(database, study, LOSSES)
    open_confirmation(database, study.id)
    confirm(database, study)
    assert open_confirmation(database, study.id) is False
    assert finish_study(database, study.id) is True
    assert open_confirmation(database, study.id) is False
    before = [t.id for t in confirmations(database)]
    more = make_spec(space=SPACE, budget={"trials": 2, "epochs": 3}, confirm={"seeds": 5})
    assert submit(database, more).phase == "search"
    assert open_confirmation(database, study.id) is True
    added = [t for t in confirmations(database) if t.id not in before]
    assert [(t.seed, t.optimizer) for t in added] == [
        (seed, o) for seed in confirmation_seeds(more)[3:] for o in more.contestants
    ]
    assert [t.position for t in added if t.optimizer == "sgd"] == [3, 4]


def test_a_grown_search_confirms_anew_only_whose_best_setting_is_another_one(database, spec, make_spec):
    study = submit(database, spec)
    search(database, study, LOSSES)
    open_confirmation(database, study.id)
    confirm(database, study)
    before = [t.id for t in confirmations(database)]
    grown = make_spec(space=SPACE, budget={"trials": 3, "epochs": 3}, confirm={"seeds": 3})
    study = submit(database, grown)
    search(database, study, {o: [0.1 if o == "nesterov" else 0.6] for o in spec.contestants}, first=2)
    open_confirmation(database, study.id)
    added = [t for t in confirmations(database) if t.id not in before]
    assert [(t.seed, t.optimizer) for t in added] == [(seed, "nesterov") for seed in confirmation_seeds(spec)]
    assert [t.position for t in added] == [3, 4, 5]


def test_who_has_no_completed_trial_is_not_confirmed(database, spec):
    study = submit(database, spec)
    search(database, study, {**LOSSES, "sgd": [None, None]})
    open_confirmation(database, study.id)
    assert {t.optimizer for t in confirmations(database)} == {"momentum", "nesterov", "momentum_0.9"}


def test_without_seeds_nothing_is_confirmed_and_there_is_no_reference(database, make_spec):
    study = submit(database, make_spec(space=SPACE, budget={"trials": 2, "epochs": 3}))
    search(database, study, LOSSES)
    assert open_confirmation(database, study.id) is False
    assert finish_study(database, study.id) is True


# Two aims


def test_with_two_aims_the_best_settings_are_the_front(database, make_spec):
    spec = make_spec(
        optimizers=["sgd"],
        objective=["mean_valid_loss", {"metric": "valid_accuracy", "direction": "maximize"}],
        budget={"trials": 6, "epochs": 3},
    )
    study = submit(database, spec)
    claims = claim(database, study.id, "w", 6, max_attempts=3)
    asked = [with_trial(c, c.ticket_id, i, {"learning_rate": 0.1 + i}) for i, c in enumerate(claims)]
    values = [(0.3, 0.9), (0.2, 0.8), (0.3, 0.95), (0.4, 0.95), (0.25, 0.7), (None, 0.99)]
    set_trials(database, asked, list(range(6)))
    end(database, asked, [Result("complete", a, second_value=b) for a, b in values])
    found = best_settings(database, study)
    assert [(b.trial, b.objective, b.second_objective) for b in found] == [(1, 0.2, 0.8), (2, 0.3, 0.95)]
    assert found[0].flat()["second_objective"] == 0.8
    assert study_progress(database, study).optimizers[0].best == 0.2


def run(database: Database, spec) -> None:
    submit_study(database, spec, None, lambda optimizer: design(spec, optimizer))
    run_worker(database.text, WorkerOptions(studies=(spec.name,), slots=16), StopSignal())


def test_a_study_with_two_aims_is_pruned_by_the_validation_loss_and_ends(database, make_spec):
    spec = make_spec(
        task=QUADRATIC,
        optimizers=["momentum"],
        space={"learning_rate": {"low": 1e-4, "high": 1.0, "log": True}, "momentum": {"low": 0.0, "high": 0.99}},
        objective=["steps_to_target", "oscillation"],
        target=0.01,
        budget={"trials": 24, "epochs": 9},
        confirm={"seeds": 2},
    )
    run(database, spec)
    study = find_study(database, spec.name)
    progress = study_progress(database, study)
    (momentum,) = progress.optimizers
    assert (progress.phase, momentum.done, momentum.failed) == ("done", 24, 0)
    assert momentum.pruned > 5 and momentum.diverged > 0 and momentum.complete > 0
    front = best_settings(database, study)
    assert front
    assert all(0 < b.objective <= 900 and 0 <= b.second_objective <= 1 for b in front)
    compared = compare_study(database, study)
    points = [point for point in compared.front if point.optimizer == "momentum"]
    assert [(p.trial, p.values) for p in points] == [
        (b.trial, {"steps_to_target": b.objective, "oscillation": b.second_objective}) for b in front
    ]
    with io.StringIO() as page:
        print_comparison(Console(file=page, width=80), compared)
        shown = page.getvalue().partition("its front in the search")[2].partition("stability,")[0]
    assert max(map(len, shown.splitlines())) <= 80
    lines = [line.split() for line in shown.splitlines() if line.strip().startswith("momentum ")]
    assert [int(line[-1]) for line in lines] == [b.trial for b in front]
    storage = optuna.storages.RDBStorage(database.text)
    found = optuna.load_study(study_name="digits-mlp/momentum", storage=storage)
    assert len(found.directions) == 2
    by_state = {state: [t for t in found.trials if t.state is state] for state in TrialState}
    assert len(by_state[TrialState.PRUNED]) == momentum.pruned
    assert len(by_state[TrialState.COMPLETE]) == momentum.complete + momentum.diverged
    assert sorted(tuple(t.values) for t in found.best_trials) == sorted(
        (b.objective, b.second_objective) for b in front
    )
    diverged = [t for t in found.trials if any(c > 0 for c in t.constraints.values())]
    assert len(diverged) == momentum.diverged
    assert {tuple(t.values) for t in diverged} == {(900.0, 1.0)}
    rungs = optuna.load_study(study_name="digits-mlp/momentum/rungs", storage=storage)
    assert len(rungs.directions) == 1
    assert TrialState.RUNNING not in {t.state for t in rungs.trials}
    assert {step for t in rungs.trials for step in t.intermediate_values} == {1, 3}
    confirmed = optuna.load_study(study_name="digits-mlp/momentum/confirm", storage=storage).trials
    assert [t.state for t in confirmed] == [TrialState.COMPLETE] * 2
    assert {t.params["learning_rate"] for t in confirmed} == {front[0].settings["learning_rate"]}
    storage.remove_session()
    storage.engine.dispose()


def test_a_confirmation_trains_the_best_setting_itself_and_is_never_pruned(sqlite_database, make_spec):
    spec = make_spec(
        task=QUADRATIC, optimizers=["nesterov"], space=SPACE, budget={"trials": 8, "epochs": 4}, confirm={"seeds": 6}
    )
    run(sqlite_database, spec)
    study = find_study(sqlite_database, spec.name)
    assert study.phase == "done"
    found = confirmations(sqlite_database)
    assert len(found) == 12
    best = {b.optimizer: dict(b.settings) for b in best_settings(sqlite_database, study, contestants=True)}
    assert all(t.settings == best[t.optimizer] and t.outcome in ("complete", "diverged") for t in found)
    curves = read_epochs(sqlite_database, [t.id for t in found])
    assert all(len(curves[t.id]) == 5 for t in found if t.outcome == "complete")
    starts = {t.seed: set() for t in found}
    for t in found:
        starts[t.seed].add(curves[t.id][0].valid_loss)
    assert all(len(losses) == 1 for losses in starts.values()), "a seed is one start, whoever begins there"
    assert len({losses.pop() for losses in starts.values()}) == 6
