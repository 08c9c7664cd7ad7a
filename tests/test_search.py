from __future__ import annotations

import math
import time
import warnings
from statistics import median

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from momentum_tuner.database import Database
from momentum_tuner.search import (
    TICKET,
    Search,
    TrialLostError,
    delete_optuna_studies,
    design,
    make_pruner,
    make_samplers,
    study_name,
)
from momentum_tuner.space import distributions, params_of

pytestmark = pytest.mark.filterwarnings("error::optuna.exceptions.ExperimentalWarning")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The Gaussian process is small: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


EVERYTHING = {
    "learning_rate": {"low": 1e-4, "high": 1.0},
    "momentum": {"low": 0.0, "high": 0.999},
    "weight_decay": [0.0, 1e-4, 1e-3],
    "clip_norm": [1.0, math.inf],
    "batch_size": {"low": 16, "high": 256, "log": True},
}
SPACE = {"learning_rate": {"low": 1e-4, "high": 1.0}, "momentum": {"low": 0.0, "high": 0.999}}
SAMPLERS = ("tpe", "random", "qmc", "gp", "cmaes", "grid")
ASKED = ("tpe", "random", "gp", "cmaes")


@pytest.fixture
def search(sqlite_database):
    """A function that opens the search of a study; each is closed at the end."""
    opened = []

    def open_search(spec, worker_seed: int = 0, database: Database | None = None) -> Search:
        opened.append(Search(database or sqlite_database, spec, worker_seed))
        return opened[-1]

    yield open_search
    for one in opened:
        one.close()


def load(database: Database, name: str) -> optuna.Study:
    storage = optuna.storages.RDBStorage(database.text)
    study = optuna.load_study(study_name=name, storage=storage)
    study.trials  # noqa: B018  read while the storage is open
    return study


def trials(database: Database, name: str = "digits-mlp/nesterov") -> list[optuna.trial.FrozenTrial]:
    """The trials as Optuna's own client reads them."""
    study = load(database, name)
    found = study.trials
    backend = study._storage._backend
    backend.remove_session()
    backend.engine.dispose()
    return found


def loss(settings) -> float:
    """A valley: the best learning rate falls as the momentum rises, as it does in training."""
    effective = math.log10(settings["learning_rate"] / (1.0 - settings["momentum"]))
    return (effective + 1.0) ** 2 + 0.1 * (settings["momentum"] - 0.9) ** 2


# Samplers


@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband", "median", "none"])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "cmaes"])
def test_every_sampler_but_cmaes_goes_on_past_its_first_draws_with_two_aims(
    sqlite_database, make_spec, search, sampler, pruner
):
    spec = make_spec(
        optimizers=["nesterov"],
        space=SPACE,
        objective=["valid_loss", "oscillation"],
        budget={"trials": 14, "epochs": 9},
        sampler={"name": sampler},
        pruner={"name": pruner},
    )
    one, planned = search(spec), design(spec, "nesterov")
    for ticket in range(14):
        trial = one.ask("nesterov", ticket, None if planned is None else planned[ticket])
        for epoch in spec.rungs():
            one.report("nesterov", trial.trial_id, epoch, loss(trial.settings))
            one.should_prune("nesterov", trial.trial_id)
        outcome = "diverged" if ticket == 3 else "complete"
        one.tell("nesterov", trial.trial_id, outcome, loss(trial.settings), 1.0 - trial.settings["momentum"])
    assert [len(t.values) for t in trials(sqlite_database)] == [2] * 14


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sampler_asks_inside_the_space_and_optuna_sees_it(sqlite_database, make_spec, search, sampler):
    points = {"points": 3} if sampler == "grid" else {}
    spec = make_spec(
        optimizers=["nesterov"],
        space=EVERYTHING,
        budget={"trials": 16, "epochs": 4},
        sampler={"name": sampler, **points},
    )
    one = search(spec)
    planned = design(spec, "nesterov")
    assert (planned is None) == (sampler in ASKED)
    asked = []
    for ticket in range(12):
        trial = one.ask("nesterov", ticket, None if planned is None else planned[ticket])
        asked.append(trial)
        assert one.should_prune("nesterov", trial.trial_id) is False
        one.report("nesterov", trial.trial_id, 1, 2.0 * loss(trial.settings))
        one.tell("nesterov", trial.trial_id, "complete", loss(trial.settings))
    found = trials(sqlite_database)
    assert [t.number for t in found] == [t.number for t in asked] == list(range(12))
    for frozen, trial in zip(found, asked, strict=True):
        settings = trial.settings
        assert frozen.state == TrialState.COMPLETE
        assert frozen.value == loss(settings)
        assert frozen.intermediate_values == {1: 2.0 * loss(settings)}
        assert frozen.distributions == {
            "learning_rate": FloatDistribution(1e-4, 1.0, log=True),
            "one_minus_momentum": FloatDistribution(1.0 - 0.999, 1.0, log=True),
            "weight_decay": CategoricalDistribution((0.0, 1e-4, 1e-3)),
            "clip_norm": CategoricalDistribution((1.0, math.inf)),
            "batch_size": IntDistribution(16, 256, log=True),
        }
        assert set(settings) == {"learning_rate", "momentum", "weight_decay", "clip_norm", "batch_size"}
        assert 1e-4 <= settings["learning_rate"] <= 1.0
        assert 0.0 <= settings["momentum"] <= 0.999
        assert settings["weight_decay"] in (0.0, 1e-4, 1e-3)
        assert settings["clip_norm"] in (1.0, math.inf)
        assert isinstance(settings["batch_size"], int)
        assert 16 <= settings["batch_size"] <= 256
        assert frozen.params == pytest.approx(params_of(spec, "nesterov", settings), rel=1e-12)
    assert len({tuple(sorted(t.settings.items())) for t in asked}) == 12
    assert len({t.settings["weight_decay"] for t in asked}) > 1
    assert len({t.settings["clip_norm"] for t in asked}) > 1


@pytest.mark.parametrize(("sampler", "count"), [("tpe", 50), ("gp", 16), ("cmaes", 50)])
def test_a_sampler_learns_from_what_it_is_told(make_spec, search, sampler, count):
    """At random, half of the points lose more than 1.5."""
    spec = make_spec(
        optimizers=["nesterov"], space=SPACE, budget={"trials": 64, "epochs": 4}, sampler={"name": sampler}, seed=1
    )
    one = search(spec)
    losses = []
    for ticket in range(count):
        trial = one.ask("nesterov", ticket)
        losses.append(loss(trial.settings))
        one.tell("nesterov", trial.trial_id, "complete", losses[-1])
    assert median(losses[-count // 3 :]) < 0.5


def test_each_of_many_trials_asked_in_a_row_is_drawn_from_all_that_was_told_before(make_spec, search, monkeypatch):
    """Optuna's study keeps the trials that it has seen until its own next ask or tell."""
    seen: list[tuple[int, int]] = []

    class Recorder(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, name, distribution):
            if name == "learning_rate":
                past = study._get_trials(deepcopy=False, use_cache=True)  # what TPE looks at
                states = [t.state for t in past]
                seen.append((states.count(TrialState.COMPLETE), states.count(TrialState.RUNNING)))
            return super().sample_independent(study, trial, name, distribution)

    monkeypatch.setattr("momentum_tuner.search.make_samplers", lambda *_: lambda number: Recorder(seed=number))
    asking, other = search(make_spec(space=SPACE)), search(make_spec(space=SPACE))
    for ticket in range(3):
        asking.ask("nesterov", ticket)
    assert seen == [(0, 1), (0, 2), (0, 3)]
    told = other.ask("nesterov", 10)
    other.tell("nesterov", told.trial_id, "complete", 1.0)
    asking.ask("nesterov", 20)
    assert seen[-1] == (1, 4)


@pytest.mark.parametrize("sampler", ASKED)
@pytest.mark.parametrize("told", [0, 12])
def test_a_batch_of_trials_asked_at_once_has_no_two_alike(make_spec, search, sampler, told):
    spec = make_spec(
        optimizers=["nesterov"], space=SPACE, budget={"trials": 64, "epochs": 4}, sampler={"name": sampler}
    )
    one = search(spec)
    for ticket in range(told):
        trial = one.ask("nesterov", ticket)
        one.tell("nesterov", trial.trial_id, "complete", loss(trial.settings))
    batch = [one.ask("nesterov", 100 + n).settings for n in range(6)]
    points = np.array([[math.log10(s["learning_rate"]), math.log10(1.0 - s["momentum"])] for s in batch])
    distances = [np.abs(a - b).max() for n, a in enumerate(points) for b in points[:n]]
    assert min(distances) > 1e-3


@pytest.mark.parametrize("sampler", ASKED)
def test_a_seed_fixes_the_points_and_another_workers_seed_draws_others(
    make_spec, sqlite_database, migrated_sqlite, tmp_path, search, sampler
):
    space = SPACE if sampler == "gp" else EVERYTHING  # mixed spaces take it seconds
    spec = make_spec(
        optimizers=["nesterov"], space=space, budget={"trials": 12, "epochs": 4}, sampler={"name": sampler}
    )

    def draw(worker_seed: int, study_seed: int, name: str):
        path = tmp_path / f"{name}.db"
        path.write_bytes(migrated_sqlite.read_bytes())
        database = Database(f"sqlite:///{path}")
        one = search(spec.model_copy(update={"seed": study_seed}), worker_seed, database)
        found = []
        for ticket in range(12):  # past the first ten, which TPE and GP draw at random
            trial = one.ask("nesterov", ticket)
            found.append(trial.settings)
            one.tell("nesterov", trial.trial_id, "complete", loss({"momentum": 0.0, **trial.settings}))
        database.close()
        return found

    first = draw(0, 0, "first")
    assert first == draw(0, 0, "again")
    rates = {s["learning_rate"] for s in first[:10]}  # the later ones may meet at a bound
    assert not rates & {s["learning_rate"] for s in draw(1, 0, "other worker")[:10]}
    assert not rates & {s["learning_rate"] for s in draw(0, 1, "other study")[:10]}


@pytest.mark.parametrize("sampler", ASKED)
def test_a_worker_that_starts_again_does_not_draw_its_first_points_again(make_spec, search, sampler):
    spec = make_spec(
        optimizers=["nesterov"], space=SPACE, budget={"trials": 64, "epochs": 4}, sampler={"name": sampler}
    )
    rates = [search(spec, 0).ask("nesterov", ticket).settings["learning_rate"] for ticket in range(5)]
    assert len(set(rates)) == 5


def test_cmaes_searches_a_space_of_one_dimension_with_tpe(make_spec, search, caplog):
    space = {"learning_rate": {"low": 1e-4, "high": 1.0}}
    spec = make_spec(optimizers=["sgd"], space=space, budget={"trials": 40, "epochs": 4}, sampler={"name": "cmaes"})
    one = search(spec)
    rates = []
    for ticket in range(30):
        trial = one.ask("sgd", ticket)
        rates.append(math.log10(trial.settings["learning_rate"]))
        one.tell("sgd", trial.trial_id, "complete", abs(rates[-1] + 2.0))
    assert median(abs(r + 2.0) for r in rates[-10:]) < 0.5
    assert caplog.records == []


def test_nothing_to_search_works(sqlite_database, make_spec, search):
    fixed = {"learning_rate": 0.1, "momentum": 0.9}
    spec = make_spec(fixed=fixed, budget={"trials": 3, "epochs": 4})
    assert [distributions(spec, o) for o in spec.optimizers] == [{}, {}, {}]
    assert design(spec, "nesterov") == [{}, {}, {}]
    one = search(spec)
    for ticket in range(3):
        trial = one.ask("nesterov", ticket, {})
        assert trial.settings == {**fixed, "weight_decay": 0.0, "clip_norm": math.inf, "batch_size": 64}
        one.report("nesterov", trial.trial_id, 1, 1.0)
        assert one.should_prune("nesterov", trial.trial_id) is False
        one.tell("nesterov", trial.trial_id, "complete", 0.5)
    assert [(t.params, t.state) for t in trials(sqlite_database)] == [({}, TrialState.COMPLETE)] * 3


def test_the_optimizers_of_a_study_have_studies_of_their_own(sqlite_database, make_spec, search):
    spec = make_spec(space=SPACE)
    one = search(spec)
    for optimizer, name in (("sgd", {"learning_rate"}), ("nesterov", {"learning_rate", "one_minus_momentum"})):
        trial = one.ask(optimizer, 1)
        assert trial.number == 0
        (frozen,) = trials(sqlite_database, study_name("digits-mlp", optimizer))
        assert set(frozen.params) == name
    assert trials(sqlite_database, "digits-mlp/momentum") == []


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_direction_is_optunas(sqlite_database, make_spec, search, direction):
    spec = make_spec(optimizers=["nesterov"], objective={"metric": "valid_loss", "direction": direction})
    one = search(spec)
    for ticket, value in enumerate([3.0, 1.0, 2.0]):
        one.tell("nesterov", one.ask("nesterov", ticket).trial_id, "complete", value)
    study = load(sqlite_database, "digits-mlp/nesterov")
    assert study.direction.name.lower() == direction
    assert study.best_value == (1.0 if direction == "minimize" else 3.0)
    study._storage._backend.engine.dispose()


def test_optunas_own_client_reads_the_trials_by_the_url(sqlite_database, make_spec, search):
    one = search(make_spec(space=SPACE))
    trial = one.ask("nesterov", 7)
    one.tell("nesterov", trial.trial_id, "complete", 0.25)
    study = optuna.load_study(study_name="digits-mlp/nesterov", storage=sqlite_database.text)
    (frozen,) = study.trials
    assert (frozen.value, frozen.user_attrs) == (0.25, {"ticket": 7})
    assert study.best_params["learning_rate"] == trial.settings["learning_rate"]
    study._storage._backend.remove_session()
    study._storage._backend.engine.dispose()


# Designs


def test_a_qmc_design_has_no_point_twice_fills_the_space_and_keeps_its_beginning(make_spec):
    small = make_spec(space=SPACE, budget={"trials": 32, "epochs": 4}, sampler={"name": "qmc"})
    large = make_spec(space=SPACE, budget={"trials": 128, "epochs": 4}, sampler={"name": "qmc"})
    first, grown = design(small, "nesterov"), design(large, "nesterov")
    assert grown[:32] == first
    assert len({tuple(p.items()) for p in grown}) == 128
    assert design(small, "nesterov") == first
    assert design(make_spec(space=SPACE, budget=small.budget, sampler={"name": "qmc"}, seed=1), "nesterov") != first
    for trials_, points in ((32, first), (128, grown)):
        for name, (low, high) in {"learning_rate": (1e-4, 1.0), "one_minus_momentum": (1.0 - 0.999, 1.0)}.items():
            unit = [math.log(p[name] / low) / math.log(high / low) for p in points]
            counts = np.histogram(unit, bins=trials_, range=(0.0, 1.0))[0]
            assert (counts == 1).all(), "a Sobol sequence has one point in each of 2^k equal parts"


def test_a_qmc_design_covers_choices_and_whole_numbers(make_spec):
    spec = make_spec(
        optimizers=["nesterov"], space=EVERYTHING, budget={"trials": 64, "epochs": 4}, sampler={"name": "qmc"}
    )
    points = design(spec, "nesterov")
    assert len({tuple(p.items()) for p in points}) == 64
    decays = [p["weight_decay"] for p in points]
    assert all(15 <= decays.count(choice) <= 28 for choice in (0.0, 1e-4, 1e-3))
    assert {p["clip_norm"] for p in points} == {1.0, math.inf}
    assert all(isinstance(p["batch_size"], int) and 16 <= p["batch_size"] <= 256 for p in points)


def test_a_large_design_is_drawn_in_seconds(make_spec):
    spec = make_spec(space=SPACE, budget={"trials": 2000, "epochs": 4}, sampler={"name": "qmc"})
    start = time.monotonic()
    assert len(design(spec, "nesterov")) == 2000
    assert time.monotonic() - start < 10.0


def test_a_grid_design_has_each_point_once_and_keeps_its_beginning(make_spec):
    def points(count: int):
        sections = {"space": SPACE, "budget": {"trials": count, "epochs": 4}, "sampler": {"name": "grid", "points": 5}}
        return design(make_spec(optimizers=["nesterov"], **sections), "nesterov")

    assert points(25)[:7] == points(7)[:7]
    assert len({tuple(p.items()) for p in points(25)}) == 25


def test_a_design_is_drawn_without_a_warning(make_spec):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(design(make_spec(budget={"trials": 3, "epochs": 4}, sampler={"name": "qmc"}), "sgd")) == 3


# The ticket of a trial


def test_a_trial_carries_its_ticket_from_its_creation(sqlite_database, make_spec, search, monkeypatch):
    one = search(make_spec(space=SPACE))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one, "_suggest", die)
        with pytest.raises(KeyboardInterrupt):
            one.ask("nesterov", 42, {"learning_rate": 0.5})
    (frozen,) = trials(sqlite_database)
    assert frozen.user_attrs == {TICKET: 42}
    assert frozen.params == {"learning_rate": 0.5}
    assert frozen.state == TrialState.RUNNING
    found = search(make_spec(space=SPACE)).recall("nesterov", 42)
    assert found is not None
    assert (found.trial_id, found.settings["learning_rate"]) == (frozen._trial_id, 0.5)


def test_recall_finds_the_trial_of_a_worker_that_died_before_it_noted_it(sqlite_database, make_spec, search):
    spec = make_spec(space=SPACE)
    dead, heir = search(spec, 1), search(spec, 2)
    dead.ask("nesterov", 41)
    asked = dead.ask("nesterov", 42)
    assert heir.recall("nesterov", 42) == asked
    assert heir.recall("nesterov", 43) is None
    assert heir.recall("sgd", 42) is None
    heir.report("nesterov", asked.trial_id, 1, 0.5)
    assert heir.should_prune("nesterov", asked.trial_id) is False
    heir.tell("nesterov", asked.trial_id, "complete", 0.5)
    assert heir.recall("nesterov", 42) is None
    assert dead.recall("nesterov", 42) is None
    assert [t.state for t in trials(sqlite_database)] == [TrialState.RUNNING, TrialState.COMPLETE]


def test_leftovers_are_failed_and_nothing_else(sqlite_database, make_spec, search):
    one = search(make_spec(space=SPACE))
    noted, ghost, asking, done, unknown = (one.ask("nesterov", ticket) for ticket in (1, 1, 2, 3, 4))
    other = one.ask("sgd", 3)
    tickets = {1: (noted.trial_id, False), 2: (None, False), 3: (done.trial_id, True)}
    assert one.fail_leftovers(lambda: tickets) == 4
    states = {t._trial_id: t.state for t in trials(sqlite_database)}
    assert states == {
        noted.trial_id: TrialState.RUNNING,
        ghost.trial_id: TrialState.FAIL,
        asking.trial_id: TrialState.RUNNING,
        done.trial_id: TrialState.FAIL,
        unknown.trial_id: TrialState.FAIL,
    }
    assert [(t._trial_id, t.state) for t in trials(sqlite_database, "digits-mlp/sgd")] == [
        (other.trial_id, TrialState.FAIL)
    ]
    assert one.fail_leftovers(lambda: tickets) == 0


def test_a_trial_that_begins_while_leftovers_are_looked_for_is_none(sqlite_database, make_spec, search):
    """As when another worker opens the confirmation between two looks at the database."""
    looking, other = search(make_spec(space=SPACE)), search(make_spec(space=SPACE))
    done = other.ask("nesterov", 1)
    other.tell("nesterov", done.trial_id, "complete", 0.5)
    left = other.ask("nesterov", 1)

    def read_late():
        new = other.ask("nesterov", 2)
        return {1: (done.trial_id, True), 2: (new.trial_id, False)}

    assert looking.fail_leftovers(read_late) == 1
    states = [trial.state for trial in trials(sqlite_database)]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING]
    assert left.number == 1


def test_who_lost_a_trial_that_was_ended_elsewhere_is_not_stopped_by_it(search, make_spec):
    for sections in ({}, {"objective": ["valid_loss", "oscillation"]}):
        spec = make_spec(space=SPACE, name=f"two-{len(sections)}", **sections)
        zombie, heir = search(spec), search(spec)
        trial = zombie.ask("nesterov", 1)
        zombie.report("nesterov", trial.trial_id, 1, 0.5)
        heir.tell("nesterov", trial.trial_id, "complete", 0.25, 0.5)
        zombie.report("nesterov", trial.trial_id, 3, 0.125)
        assert zombie.should_prune("nesterov", trial.trial_id) is False
        zombie.tell("nesterov", trial.trial_id, "diverged", 9.0, 1.0)
        told = zombie._storage.get_trial(trial.trial_id)
        assert told.values == ([0.25] if not sections else [0.25, 0.5])
        assert 3 not in told.intermediate_values
        assert not told.constraints


def test_a_trial_that_is_ended_while_it_is_asked_for_is_lost(search, make_spec, monkeypatch):
    spec = make_spec(space=SPACE)
    zombie, heir = search(spec), search(spec)
    suggest = zombie._suggest

    def late(trial_ids):
        assert heir.fail_leftovers(dict) == 1
        return suggest(trial_ids)

    monkeypatch.setattr(zombie, "_suggest", late)
    with pytest.raises(TrialLostError, match="the trial of ticket 1 was ended by another worker"):
        zombie.ask("nesterov", 1)


# Telling


@pytest.mark.parametrize(
    ("outcome", "value", "state", "seen"),
    [
        ("complete", 0.5, TrialState.COMPLETE, 0.5),
        ("diverged", 2.3, TrialState.COMPLETE, 2.3),
        ("pruned", 0.9, TrialState.PRUNED, 0.75),
        ("failed", None, TrialState.FAIL, None),
        ("failed", 0.5, TrialState.FAIL, None),
        ("complete", None, TrialState.PRUNED, 0.75),
        ("diverged", None, TrialState.PRUNED, 0.75),
        ("complete", math.nan, TrialState.PRUNED, 0.75),
        ("complete", math.inf, TrialState.PRUNED, 0.75),
    ],
)
def test_what_optuna_sees_of_an_outcome(sqlite_database, make_spec, search, outcome, value, state, seen):
    one = search(make_spec(space=SPACE))
    trial = one.ask("nesterov", 1)
    one.report("nesterov", trial.trial_id, 1, 1.0)
    one.report("nesterov", trial.trial_id, 3, 0.75)
    one.tell("nesterov", trial.trial_id, outcome, value)
    (frozen,) = trials(sqlite_database)
    assert (frozen.state, frozen.value) == (state, seen)
    assert frozen.intermediate_values == {1: 1.0, 3: 0.75}
    assert frozen.datetime_complete is not None


def test_telling_again_changes_nothing(sqlite_database, make_spec, search):
    spec = make_spec(space=SPACE)
    first, second = search(spec), search(spec)
    trial = first.ask("nesterov", 1)
    first.tell("nesterov", trial.trial_id, "complete", 0.5)
    before = trials(sqlite_database)
    for one in (first, second):
        for outcome, value in (("complete", 0.5), ("complete", 0.1), ("pruned", 0.1), ("failed", None)):
            one.tell("nesterov", trial.trial_id, outcome, value)
    assert trials(sqlite_database) == before


def test_a_trial_pruned_before_it_reported_has_no_value(sqlite_database, make_spec, search):
    one = search(make_spec(space=SPACE))
    one.tell("nesterov", one.ask("nesterov", 1).trial_id, "pruned", 0.5)
    (frozen,) = trials(sqlite_database)
    assert (frozen.state, frozen.value) == (TrialState.PRUNED, None)


def test_reporting_a_rung_again_keeps_one_value(sqlite_database, make_spec, search):
    one = search(make_spec(space=SPACE))
    trial = one.ask("nesterov", 1)
    one.report("nesterov", trial.trial_id, 1, 1.0)
    one.report("nesterov", trial.trial_id, 1, 1.0)
    assert trials(sqlite_database)[0].intermediate_values == {1: 1.0}


# Pruners


def curve(quality: float, epoch: int, maximize: bool) -> float:
    """A plausible learning curve: the smaller the quality, the better at every epoch."""
    falling = quality + 2.0 * math.exp(-epoch / 4.0)
    return -falling if maximize else falling


def train(one: Search, spec, quality: float, ticket: int) -> int | None:
    """Run a trial through the rungs; returns the epoch at which it was pruned, None if it ran its budget."""
    maximize = spec.objective.direction == "maximize"
    trial = one.ask("nesterov", ticket)
    for epoch in spec.rungs():
        one.report("nesterov", trial.trial_id, epoch, curve(quality, epoch, maximize))
        if one.should_prune("nesterov", trial.trial_id):
            one.tell("nesterov", trial.trial_id, "pruned", curve(quality, epoch, maximize))
            return epoch
    one.tell("nesterov", trial.trial_id, "complete", curve(quality, spec.budget.epochs, maximize))
    return None


RUNGS = {
    "successive_halving": {1, 3, 9},
    "hyperband": {1, 3, 9},
    "median": {2, 4, 6, 8, 10, 12, 14, 16, 18},
    "none": set(),
}


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("pruner", RUNGS)
def test_each_pruner_stops_bad_trials_at_rungs_and_lets_good_ones_run(
    sqlite_database, make_spec, search, pruner, direction
):
    objective = {"metric": "valid_loss", "direction": direction}
    spec = make_spec(
        optimizers=["nesterov"],
        space=SPACE,
        budget={"trials": 64, "epochs": 20},
        sampler={"name": "random"},
        pruner={"name": pruner},
        objective=objective,
    )
    assert set(spec.rungs()) == RUNGS[pruner]
    one = search(spec)
    qualities = [1.0, 0.8, 1.2, 0.9, 1.1, 0.7, 1.3, 1.05]
    for ticket, quality in enumerate(qualities):
        train(one, spec, quality, ticket)
    bad = [train(one, spec, 3.0 + n, 100 + n) for n in range(4)]
    good = [train(one, spec, 0.5 - 0.05 * n, 200 + n) for n in range(4)]
    assert good == [None] * 4
    if pruner == "none":
        assert bad == [None] * 4
    else:
        assert all(epoch in RUNGS[pruner] for epoch in bad), bad
    if pruner == "successive_halving":
        assert bad == [1] * 4
    if pruner == "median":
        assert bad == [2] * 4
    found = trials(sqlite_database)
    for number, epoch in enumerate(bad, start=len(qualities)):
        expected = TrialState.COMPLETE if epoch is None else TrialState.PRUNED
        assert found[number].state == expected
        if epoch is not None:
            assert found[number].last_step == epoch
            assert found[number].value == found[number].intermediate_values[epoch]


def test_hyperband_has_brackets_that_begin_at_different_rungs(make_spec, search):
    spec = make_spec(
        optimizers=["nesterov"],
        space=SPACE,
        budget={"trials": 64, "epochs": 20},
        sampler={"name": "random"},
        pruner={"name": "hyperband"},
    )
    one = search(spec)
    for ticket in range(20):
        train(one, spec, 1.0 + 0.01 * ticket, ticket)
    stopped = {train(one, spec, 5.0 + n, 100 + n) for n in range(16)}
    assert stopped == {1, 3, 9}


def test_successive_halving_keeps_the_best_third_at_each_rung(make_spec, search):
    spec = make_spec(
        optimizers=["nesterov"],
        space=SPACE,
        budget={"trials": 64, "epochs": 20},
        sampler={"name": "random"},
        pruner={"name": "successive_halving", "reduction_factor": 3, "min_epochs": 2},
    )
    assert spec.rungs() == (2, 6, 18)
    one = search(spec)
    running = [one.ask("nesterov", ticket) for ticket in range(27)]
    order = np.random.default_rng(0).permutation(27).tolist()
    quality = {trial.trial_id: 1.0 + q for trial, q in zip(running, order, strict=True)}
    for rung in spec.rungs():  # all 27 trials train side by side, as they do in slots
        for trial in running:
            one.report("nesterov", trial.trial_id, rung, quality[trial.trial_id])
        running = [trial for trial in running if not one.should_prune("nesterov", trial.trial_id)]
        assert 1 in {quality[t.trial_id] for t in running}, "the best one survives"
    assert len(running) <= 9


def test_median_waits_for_five_complete_trials(make_spec, search):
    spec = make_spec(
        optimizers=["nesterov"],
        space=SPACE,
        budget={"trials": 64, "epochs": 20},
        sampler={"name": "random"},
        pruner={"name": "median", "min_epochs": 5},
    )
    assert spec.rungs() == (5, 10, 15)
    one = search(spec)
    assert [train(one, spec, 1.0 + n, n) for n in range(5)] == [None] * 5
    assert train(one, spec, 3.5, 10) == 5
    assert train(one, spec, 2.5, 11) is None


def test_median_lets_diverged_trials_without_reports_count_for_nothing(make_spec, search):
    spec = make_spec(optimizers=["nesterov"], space=SPACE, sampler={"name": "random"}, pruner={"name": "median"})
    one = search(spec)
    for ticket in range(6):
        one.tell("nesterov", one.ask("nesterov", ticket).trial_id, "diverged", 9.0)
    assert train(one, spec, 5.0, 10) is None


def test_a_trial_that_repeats_a_rung_after_its_worker_died_is_judged_like_others(make_spec, search):
    spec = make_spec(
        optimizers=["nesterov"],
        space=SPACE,
        budget={"trials": 64, "epochs": 20},
        sampler={"name": "random"},
        pruner={"name": "median"},
    )
    dead = search(spec)
    for ticket in range(5):
        train(dead, spec, 1.0, ticket)
    trial = dead.ask("nesterov", 50)
    dead.report("nesterov", trial.trial_id, 2, 9.0)
    heir = search(spec, 1)
    heir.report("nesterov", trial.trial_id, 2, 9.0)
    assert heir.should_prune("nesterov", trial.trial_id) is True


def test_the_pruners_are_made_from_the_study(make_spec):
    def made(name: str, **options: int):
        return make_pruner(make_spec(pruner={"name": name, **options}, budget={"trials": 1, "epochs": 27}))

    assert isinstance(made("none"), optuna.pruners.NopPruner)
    assert isinstance(made("median"), optuna.pruners.MedianPruner)
    assert isinstance(made("successive_halving"), optuna.pruners.SuccessiveHalvingPruner)
    assert isinstance(made("hyperband"), optuna.pruners.HyperbandPruner)


def test_the_samplers_are_made_from_the_study(make_spec):
    classes = {
        "tpe": optuna.samplers.TPESampler,
        "gp": optuna.samplers.GPSampler,
        "cmaes": optuna.samplers.CmaEsSampler,
        "random": optuna.samplers.RandomSampler,
    }
    for name, expected in classes.items():
        assert isinstance(make_samplers(make_spec(sampler={"name": name}), {}, 0)(0), expected)


# PostgreSQL, several processes, deletion


def test_the_same_on_postgresql(postgresql_database, make_spec, search):
    spec = make_spec(
        optimizers=["nesterov"],
        space=EVERYTHING,
        budget={"trials": 8, "epochs": 20},
        pruner={"name": "successive_halving"},
    )
    one, two = search(spec, 0, postgresql_database), search(spec, 1, postgresql_database)
    space = {**EVERYTHING}
    assert set(space) == set(one.ask("nesterov", 0).settings)
    asked = one.ask("nesterov", 1, {"clip_norm": math.inf})
    assert two.recall("nesterov", 1) == asked
    assert asked.settings["clip_norm"] == math.inf
    two.report("nesterov", asked.trial_id, 1, 1.0)
    assert two.should_prune("nesterov", asked.trial_id) is False
    two.tell("nesterov", asked.trial_id, "complete", 0.5)
    worse = one.ask("nesterov", 2)
    one.report("nesterov", worse.trial_id, 1, 2.0)
    assert one.should_prune("nesterov", worse.trial_id) is True
    one.tell("nesterov", worse.trial_id, "pruned", 2.0)
    states = [t.state for t in trials(postgresql_database)]
    assert states == [TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED]


SEARCH = """
from momentum_tuner.spec import StudySpec
spec = StudySpec.model_validate(
    {"name": "s", "task": {"factory": "a:b"}, "optimizers": ["nesterov"], "budget": {"trials": 8, "epochs": 20},
     "confirm": {"seeds": 0}}
)
database = Database(argument)
search = Search(database, spec, number)
mine = []
for ticket in range(8):
    trial = search.ask("nesterov", 100 * number + ticket)
    search.report("nesterov", trial.trial_id, 1, 1.0 + trial.number)
    search.should_prune("nesterov", trial.trial_id)
    search.tell("nesterov", trial.trial_id, "complete", 1.0)
    mine.append([trial.number, trial.settings["learning_rate"]])
search.close()
database.close()
print(json.dumps(mine))
"""


def test_processes_that_search_at_once_get_numbers_and_points_of_their_own(database, race):
    imports = "from momentum_tuner.database import Database\nfrom momentum_tuner.search import Search"
    found = [tuple(trial) for mine in race(imports, SEARCH, 3, database.text) for trial in mine]
    assert sorted(number for number, _ in found) == list(range(24))
    assert len({rate for _, rate in found}) == 24
    attributes = [t.user_attrs[TICKET] for t in trials(database, "s/nesterov")]
    assert sorted(attributes) == [100 * n + t for n in range(3) for t in range(8)]


def test_deleting_removes_the_studies_of_this_name_only(database, make_spec, search):
    for name in ("digits", "digits-mlp"):
        one = search(make_spec(name=name, space=SPACE), 0, database)
        trial = one.ask("nesterov", 1)
        one.report("nesterov", trial.trial_id, 1, 1.0)
        one.tell("nesterov", trial.trial_id, "complete", 1.0)
        one.close()
    delete_optuna_studies(database, make_spec(name="digits"))
    with database.read() as session:
        names = session.scalars(sa.text("SELECT study_name FROM studies ORDER BY study_name")).all()
        assert names == ["digits-mlp/momentum", "digits-mlp/nesterov", "digits-mlp/sgd"]
        for table in ("trials", "trial_values", "trial_intermediate_values", "trial_user_attributes"):
            assert session.scalar(sa.text(f"SELECT count(*) FROM {table}")) == 1
    delete_optuna_studies(database, make_spec(name="digits"))
