"""The pruners of a batch decide as Optuna's own."""

import numpy as np
import optuna
import pytest

from momentum_tuner.halving import BatchHalvingPruner, BatchHyperbandPruner
from momentum_tuner.search import Search, make_pruner

SLOTS, EPOCHS, ROUNDS = 8, 27, 6


def values(turn, slot, epoch):
    """Learning curves that cross, some with ties, some that become NaN."""
    generator = np.random.default_rng((turn, slot))
    begin, rate = generator.integers(1, 6) / 2.0, generator.uniform(0.0, 0.3)
    return float("nan") if generator.random() < 0.05 and epoch > 3 else float(begin * np.exp(-rate * epoch) + begin / 4)


def with_optuna(pruner, rungs, direction):
    study = optuna.create_study(pruner=pruner, direction=direction, study_name="digits-mlp/momentum")
    stopped = []
    for turn in range(ROUNDS):
        asked = [study.ask() for _ in range(SLOTS)]
        left = dict(enumerate(asked))
        for rung in rungs:
            for slot, trial in list(left.items()):
                trial.report(values(turn, slot, rung), rung)
                if trial.should_prune():
                    stopped.append((trial.number, rung))
                    study.tell(left.pop(slot), state=optuna.trial.TrialState.PRUNED)
        for slot, trial in left.items():
            study.tell(trial, values(turn, slot, 1))
    return stopped, [t.system_attrs for t in study.get_trials(deepcopy=False)]


def with_search(search, rungs):
    stopped = []
    for turn in range(ROUNDS):
        asked = search.ask_all([("momentum", turn * SLOTS + slot, None) for slot in range(SLOTS)])
        left = dict(enumerate(asked))
        for rung in rungs:
            with search.batch():
                for slot, trial in list(left.items()):
                    search.report("momentum", trial.trial_id, rung, values(turn, slot, rung))
                    if search.should_prune("momentum", trial.trial_id):
                        stopped.append((trial.number, rung))
                        search.tell("momentum", left.pop(slot).trial_id, "pruned", None)
        with search.batch():
            for slot, trial in left.items():
                search.tell("momentum", trial.trial_id, "complete", values(turn, slot, 1))
    return stopped, [t.system_attrs for t in search._study("momentum").get_trials(deepcopy=False)]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("name", ["successive_halving", "hyperband", "median"])
def test_a_batch_is_pruned_as_optuna_prunes(sqlite_database, make_spec, name, direction):
    metric = "valid_loss" if direction == "minimize" else "valid_accuracy"
    spec = make_spec(
        optimizers=["momentum"],
        budget={"trials": 64, "epochs": EPOCHS},
        pruner={"name": name},
        sampler={"name": "random"},
        objective={"metric": metric, "direction": direction},
    )
    own = {
        "successive_halving": lambda: optuna.pruners.SuccessiveHalvingPruner(spec.pruner.min_epochs, 3),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(spec.pruner.min_epochs, EPOCHS, 3),
        "median": lambda: optuna.pruners.MedianPruner(5, 0),
    }[name]()
    search = Search(sqlite_database, spec)
    stopped, marks = with_search(search, spec.rungs())
    search.close()
    assert (stopped, marks) == with_optuna(own, spec.rungs(), direction)
    assert stopped
    if name != "median":
        assert len({rung for _, rung in stopped}) > 1
        assert isinstance(make_pruner(spec), BatchHalvingPruner | BatchHyperbandPruner)


@pytest.mark.parametrize("name", ["successive_halving", "hyperband"])
def test_a_decision_whose_worker_died_is_made_again(sqlite_database, make_spec, name):
    """The marks say that trials have reached a rung, but nobody has ended those that the pruner stopped there."""
    spec = make_spec(
        optimizers=["momentum"],
        budget={"trials": 64, "epochs": EPOCHS},
        pruner={"name": name},
        sampler={"name": "random"},
    )
    searches = Search(sqlite_database, spec, 1), Search(sqlite_database, spec, 2)
    asked = searches[0].ask_all([("momentum", ticket, None) for ticket in range(24)])
    stopped, marks = [], []
    for search in searches:
        with search.batch():
            for trial in asked:
                search.report("momentum", trial.trial_id, 1, float(trial.number))
            stopped.append({t.number for t in asked if search.should_prune("momentum", t.trial_id)})
        marks.append([t.system_attrs for t in search._study("momentum").get_trials(deepcopy=False)])
        search.close()
    assert marks[0] == marks[1]
    assert stopped[1] <= stopped[0]
    assert max(stopped[0]) in stopped[1]
    assert len(stopped[1]) > len(stopped[0]) / 2
