"""Within a batch trials are asked for and pruned as they would be one by one, but read once."""

import math
from contextlib import nullcontext

import optuna
import pytest

from momentum_tuner.database import Database, migrate
from momentum_tuner.search import Search

SLOTS, EPOCHS = 8, 9


@pytest.fixture
def open_search(tmp_path):
    """A function that opens the search of a study in a database of its own; each is closed at the end."""
    opened = []

    def open_it(name, spec):
        database = Database(f"sqlite:///{tmp_path / name}.db")
        migrate(database)
        search = Search(database, spec)
        opened.append((search, database))
        return search

    yield open_it
    for search, database in opened:
        search.close()
        database.close()


def study(make_spec, **sections):
    return make_spec(optimizers=["momentum"], budget={"trials": 64, "epochs": EPOCHS}, **sections)


def valley(settings, epoch):
    effective = math.log10(settings["learning_rate"] / (1.0 - settings["momentum"]))
    return (effective + 1.0) ** 2 + 1.0 / (1 + epoch)


def rounds(search, spec, count, batched):
    """Settings, and who was pruned where, of rounds of trials that train side by side as a worker's slots do."""

    def batch():
        return search.batch() if batched else nullcontext()

    seen = []
    for turn in range(count):
        with batch():
            asked = [search.ask("momentum", turn * SLOTS + i) for i in range(SLOTS)]
        seen += [trial.settings for trial in asked]
        left = list(asked)
        for rung in spec.rungs():
            with batch():
                for trial in list(left):
                    search.report("momentum", trial.trial_id, rung, valley(trial.settings, rung))
                    if search.should_prune("momentum", trial.trial_id):
                        seen.append((rung, trial.number))
                        left.remove(trial)
                        search.tell("momentum", trial.trial_id, "pruned", None)
        for trial in left:
            search.tell("momentum", trial.trial_id, "complete", valley(trial.settings, EPOCHS))
    return seen


@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband", "median"])
def test_a_batch_gives_the_same_trials_and_prunes_the_same_as_one_by_one(make_spec, open_search, pruner):
    spec = study(make_spec, pruner={"name": pruner})
    one_by_one = rounds(open_search("single", spec), spec, 4, batched=False)
    assert rounds(open_search("batch", spec), spec, 4, batched=True) == one_by_one
    assert any(isinstance(entry, tuple) for entry in one_by_one)


def test_a_batch_reads_the_trials_of_others_once_and_the_next_batch_sees_what_they_wrote(
    make_spec, open_search, monkeypatch
):
    spec = study(make_spec)
    search = open_search("one", spec)
    other = Search(search._database, spec, worker_seed=1)
    reads = []
    read = optuna.storages.RDBStorage._get_trials
    monkeypatch.setattr(
        optuna.storages.RDBStorage,
        "_get_trials",
        lambda *args, **options: reads.append(options) or read(*args, **options),
    )
    first = search.ask("momentum", 1)
    reads.clear()

    def others():
        return {t.number: t.state for t in search._study("momentum").get_trials(deepcopy=False)}

    with search.batch():
        before = others()
        asked = other.ask("momentum", 2)
        count = len(reads)
        search.report("momentum", first.trial_id, 1, 0.5)
        search.should_prune("momentum", first.trial_id)
        assert others() == before and len(reads) == count
    with search.batch():
        assert set(others()) == {first.number, asked.number}
    other.tell("momentum", asked.trial_id, "complete", 0.1)
    assert others()[asked.number] is optuna.trial.TrialState.COMPLETE
    other.close()
