"""A batch of trials is read once and written once, and is what Optuna's own storage would have made of it."""

import math

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from momentum_tuner import trial_cache
from momentum_tuner.errors import StorageError
from momentum_tuner.search import TICKET, Search
from momentum_tuner.trial_tables import read_trials

SPACE = {
    "learning_rate": FloatDistribution(1e-4, 1.0, log=True),
    "batch_size": IntDistribution(16, 256, log=True),
    "clip_norm": CategoricalDistribution((1.0, math.inf)),
}


@pytest.fixture
def search(database, make_spec):
    """The search of a study."""
    one = Search(database, make_spec(optimizers=["momentum"], budget={"trials": 64, "epochs": 9}))
    yield one
    one.close()


def same(found, expected):
    """Whether trials are equal; NaN equals NaN."""
    return [repr(sorted(vars(t).items())) for t in found] == [repr(sorted(vars(t).items())) for t in expected]


def test_trials_are_read_as_optuna_reads_them(search, database):
    """Every kind of value, state and attribute; some trials by their ids, the others as newer than one."""
    study = search._study("momentum")
    backend = search._backend
    for n in range(12):
        trial = study.ask(SPACE if n % 3 else {"learning_rate": SPACE["learning_rate"]})
        for step, value in enumerate((0.5, math.inf, -math.inf, math.nan)[: n % 5]):
            trial.report(value, step)
        trial.set_user_attr(TICKET, n)
        trial.set_constraint("diverged", float(n % 2))
        if n % 4:
            values = {1: {"values": 0.1 * n}, 2: {"state": TrialState.PRUNED}, 3: {"state": TrialState.FAIL}}[n % 4]
            study.tell(trial, **values)
    everything = backend._get_trials(study._study_id, None, set(), -1)
    with database.read() as session:
        assert same(read_trials(session, {study._study_id: -1})[study._study_id], everything)
        known = {everything[2]._trial_id, everything[9]._trial_id}
        but = {everything[2]._trial_id, everything[10]._trial_id}
        found = read_trials(session, {study._study_id: everything[6]._trial_id}, known, but)
    assert same(found[study._study_id], [everything[2], *everything[7:10], everything[11]])


def test_a_batch_leaves_what_single_calls_leave(search, database):
    """The same calls on Optuna's cache, and in a batch; only ids, numbers and times differ."""
    study = search._study("momentum")
    left = []
    for batched in (False, True):
        storage = search._storage if batched else optuna.storages._cached_storage._CachedStorage(search._backend)
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params={"learning_rate": 0.5},
            distributions={"learning_rate": SPACE["learning_rate"]},
            user_attrs={TICKET: 7},
        )

        def write(storage, ids):
            for n, trial_id in enumerate(ids):
                storage.set_trial_param(trial_id, "batch_size", 32, SPACE["batch_size"])
                storage.set_trial_param(trial_id, "clip_norm", 1, SPACE["clip_norm"])
                for step, value in enumerate((0.5, math.inf, -math.inf, math.nan)):
                    storage.set_trial_intermediate_value(trial_id, step, 9.0)
                    storage.set_trial_intermediate_value(trial_id, step, value)
                storage.set_trial_system_attr(trial_id, "completed_rung_0", 0.25)
                storage.set_trial_user_attr(trial_id, "note", {"a": [1, None]})
                state = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, None)[n]
                if state is not None:
                    storage.set_trial_state_values(trial_id, state, [0.5] if n < 2 else None)

        if batched:
            ids = [trial._trial_id for trial in storage.create_trials([(study._study_id, template)] * 4)]
            with storage.batch():
                write(storage, ids)
        else:
            ids = [storage.create_new_trial(study._study_id, template) for _ in range(4)]
            write(storage, ids)
        left.append([search._backend.get_trial(trial_id) for trial_id in ids])
    single, batch = left
    assert [t.number for t in single + batch] == list(range(8))
    assert [t.state for t in batch] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING]
    for one, other in zip(single, batch, strict=True):
        assert (one.datetime_complete is None) == (other.datetime_complete is None)
        if other.datetime_start is not None and other.datetime_complete is not None:
            assert other.datetime_complete >= other.datetime_start
        for name in ("number", "_trial_id", "datetime_start", "datetime_complete"):
            for trial in (one, other):
                setattr(trial, name, None) if name != "number" else vars(trial).update(_number=0)
    assert same(single, batch)


def test_a_trial_that_another_finished_is_left_as_it_is_and_the_rest_of_the_batch_is_written(search, database):
    other = Search(database, search.spec, worker_seed=1)
    mine, lost = (search.ask("momentum", ticket) for ticket in (1, 2))
    with search.batch():
        for trial in (mine, lost):
            search.report("momentum", trial.trial_id, 1, 0.5)
        other.tell("momentum", lost.trial_id, "failed", None)
        search.tell("momentum", mine.trial_id, "complete", 0.5)
        search.tell("momentum", lost.trial_id, "complete", 0.25)
    left = {t._trial_id: t for t in search._backend._get_trials(search._study("momentum")._study_id, None, set(), -1)}
    assert (left[mine.trial_id].state, left[mine.trial_id].values) == (TrialState.COMPLETE, [0.5])
    assert left[mine.trial_id].intermediate_values == {1: 0.5}
    assert (left[lost.trial_id].state, left[lost.trial_id].values) == (TrialState.FAIL, None)
    assert left[lost.trial_id].intermediate_values == {}
    other.close()


def test_a_batch_that_ends_by_an_error_writes_nothing_and_the_next_one_sees_nothing_of_it(search):
    trial = search.ask("momentum", 1)

    def half():
        with search.batch():
            search.report("momentum", trial.trial_id, 1, 0.5)
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert search.reported("momentum", trial.trial_id) == set()
    search.report("momentum", trial.trial_id, 3, 0.5)
    assert search.reported("momentum", trial.trial_id) == {3}


def test_a_batch_reads_once_and_the_next_batch_sees_what_others_wrote(search, database, monkeypatch):
    other = Search(database, search.spec, worker_seed=1)
    reads = []
    monkeypatch.setattr(trial_cache, "read_trials", lambda *args: reads.append(args) or read_trials(*args))
    first = search.ask("momentum", 1)

    def others():
        return {t.number: t.state for t in search._study("momentum").get_trials(deepcopy=False)}

    reads.clear()
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
    assert others()[asked.number] is TrialState.COMPLETE
    other.close()


def test_to_read_one_trial_again_hides_none_that_others_made_before_it(search, database):
    other = Search(database, search.spec, worker_seed=1)
    first = search.ask("momentum", 1)
    theirs = other.ask("momentum", 2)
    study = search._study("momentum")
    template = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={TICKET: 3})
    (mine,) = search._storage.create_trials([(study._study_id, template)])
    assert search._storage.read_again(mine._trial_id).user_attrs == {TICKET: 3}
    assert [t.number for t in study.get_trials(deepcopy=False)] == [first.number, theirs.number, mine.number]
    other.close()


def test_a_batch_has_a_number_of_statements_that_does_not_grow_with_it(search, database):
    statements = []
    sa.event.listen(database.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    sa.event.listen(search._backend.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    counts = []
    for size in (2, 16):
        statements.clear()
        asked = search.ask_all([("momentum", ticket, None) for ticket in range(size)])
        with search.batch():
            for trial in asked:
                search.report("momentum", trial.trial_id, 1, 0.5)
                search.should_prune("momentum", trial.trial_id)
        with search.batch():
            for trial in asked:
                search.tell("momentum", trial.trial_id, "complete", 0.5)
        counts.append(len(statements))
    assert counts[0] == counts[1] < 60


def test_trials_of_several_places_are_asked_for_at_once_and_returned_in_order(database, make_spec, monkeypatch):
    """Each place counts its own trials, also those that another worker made; the statements are as many as for one."""
    spec = make_spec(optimizers=["sgd", "momentum", "nesterov"], budget={"trials": 64, "epochs": 9})
    search, other = Search(database, spec), Search(database, spec, worker_seed=1)
    other.ask_all([("momentum", 1, None), ("nesterov", 2, None), ("momentum", 3, None)])
    wanted = [("nesterov", 4, None), ("sgd", 5, None), ("momentum", 6, None), ("nesterov", 7, {"learning_rate": 0.5})]
    asked = search.ask_all(wanted)
    assert [trial.number for trial in asked] == [1, 0, 2, 2]
    assert asked[3].settings["learning_rate"] == 0.5 != asked[0].settings["learning_rate"]
    for (place, ticket, _), trial in zip(wanted, asked, strict=True):
        stored = search._backend.get_trial(trial.trial_id)
        assert stored.user_attrs == {TICKET: ticket} and stored.number == trial.number
        assert stored in search._backend.get_all_trials(search._study(place)._study_id)
        assert stored.params["learning_rate"] == trial.settings["learning_rate"]
    assert search.ask_all([]) == []

    monkeypatch.setattr(trial_cache, "_SHARE", 0.0)  # trials of others are read each time, however long that took
    statements, counts = [], []
    for engine in (database.engine, search._backend.engine):
        sa.event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    for places in (["momentum"], ["momentum", "nesterov"], ["momentum", "nesterov", "sgd"]):
        statements.clear()
        with search.batch(False):
            asked = search.ask_all([(place, 10, None) for place in places])
            for place, trial in zip(places, asked, strict=True):
                search.report(place, trial.trial_id, 1, 0.5)
                search.should_prune(place, trial.trial_id)
                search.tell(place, trial.trial_id, "complete", 0.5)
        counts.append(len(statements))
    assert counts[0] == counts[1] == counts[2]
    search.close()
    other.close()


def test_what_this_process_made_it_knows_until_it_lets_go_of_it(search, database, monkeypatch):
    """The trials of its own are not read while it has them, nor once they have ended; what others wrote after, is."""
    other = Search(database, search.spec, worker_seed=1)
    read = set()

    def reading(*args):
        found = read_trials(*args)
        read.update(trial._trial_id for trials in found.values() for trial in trials)
        return found

    def trials():
        read.clear()
        with search.batch(False):
            return {t._trial_id: t for t in search._study("momentum").get_trials(deepcopy=False)}

    monkeypatch.setattr(trial_cache, "read_trials", reading)
    monkeypatch.setattr(trial_cache, "_SHARE", 0.0)
    with search.batch(False):
        kept, left, ended = (t.trial_id for t in search.ask_all([("momentum", ticket, None) for ticket in range(3)]))
    assert read == set()
    theirs = other.ask("momentum", 3).trial_id
    read.clear()
    with search.batch(False):
        search.report("momentum", kept, 1, 0.5)
        search.tell("momentum", ended, "complete", 0.25)
    assert read == {theirs}
    assert trials().keys() == {kept, left, ended, theirs} and read == {theirs}
    search.let_go([left, ended])
    other.report("momentum", left, 1, 0.125)
    found = trials()
    assert read == {left, theirs}
    assert found[left].intermediate_values == {1: 0.125} and found[kept].intermediate_values == {1: 0.5}
    assert found[ended].values == [0.25]
    other.tell("momentum", left, "complete", 0.125)
    assert trials()[left].values == [0.125] and left in read
    assert trials()[left].values == [0.125] and read == {theirs}
    other.close()


def test_after_a_batch_that_was_not_written_what_the_database_has_is_read_again(search):
    trial_id = search.ask("momentum", 1).trial_id

    def half():
        with search.batch(False):
            search.report("momentum", trial_id, 1, 0.5)
            raise KeyError

    with pytest.raises(KeyError):
        half()
    with search.batch(False):
        (trial,) = search._study("momentum").get_trials(deepcopy=False)
    assert trial.intermediate_values == {}


def test_what_was_told_of_an_adopted_trial_is_told_again_if_it_was_not_committed(search, database, monkeypatch):
    other = Search(database, search.spec, worker_seed=1)
    adopted = other.ask("momentum", 1).trial_id
    other.close()
    assert search.recall("momentum", 1).trial_id == adopted
    commit = database.engine.dialect.do_commit

    def lose(connection):
        monkeypatch.setattr(database.engine.dialect, "do_commit", commit)
        raise sa.exc.OperationalError("COMMIT", {}, OSError("the connection is lost"))

    monkeypatch.setattr(database.engine.dialect, "do_commit", lose)
    with pytest.raises(StorageError):
        search.tell("momentum", adopted, "complete", 0.25)
    assert search._backend.get_trial(adopted).state is TrialState.RUNNING
    search.tell("momentum", adopted, "complete", 0.25)
    told = search._backend.get_trial(adopted)
    assert (told.state, told.values) == (TrialState.COMPLETE, [0.25])


def test_a_batch_within_a_batch_is_written_at_its_own_end_and_what_it_told_is_seen_as_told(search):
    first, second = search.ask_all([("momentum", 1, None), ("momentum", 2, None)])
    study_id = search._study("momentum")._study_id
    with search.batch():
        with search.batch():
            search.report("momentum", first.trial_id, 1, 0.5)
            search.tell("momentum", first.trial_id, "complete", 0.5)
        assert search._backend.get_trial(first.trial_id).values == [0.5]
        states = {t.number: t.state for t in search._study("momentum").get_trials(deepcopy=False)}
        assert states == {first.number: TrialState.COMPLETE, second.number: TrialState.RUNNING}
        search.report("momentum", second.trial_id, 1, 0.25)
        assert search._backend.get_trial(second.trial_id).intermediate_values == {}
    assert search._backend._get_trials(study_id, None, set(), -1)[1].intermediate_values == {1: 0.25}


def test_what_has_ended_is_kept_as_the_database_has_it(search, database):
    """Of trials of its own a cache knows what it wrote; those that others wrote to, it reads again."""
    other = Search(database, search.spec, worker_seed=1)
    asked = search.ask_all([("momentum", ticket, None) for ticket in range(5)])
    theirs = other.ask("momentum", 5)
    other.report("momentum", asked[3].trial_id, 1, 0.7)
    other.tell("momentum", asked[4].trial_id, "complete", 0.6)
    with search.batch():
        search.reported("momentum", asked[3].trial_id)
    with search.batch(False):
        for trial in (*asked, theirs):
            search.report("momentum", trial.trial_id, 3, 0.5)
            search.should_prune("momentum", trial.trial_id)
        search.tell("momentum", asked[0].trial_id, "complete", 0.5)
        search.tell("momentum", asked[1].trial_id, "pruned", 0.5)
        search.tell("momentum", asked[2].trial_id, "diverged", 2.3)
        search.tell("momentum", asked[3].trial_id, "failed", None)
        search.tell("momentum", asked[4].trial_id, "complete", 0.5)
        search.tell("momentum", theirs.trial_id, "complete", 0.5)
    study = search._study("momentum")
    kept = study.get_trials(deepcopy=False)
    assert [t.state.name for t in kept] == ["COMPLETE", "PRUNED", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert kept == search._backend.get_all_trials(study._study_id)
    assert kept[3].intermediate_values == {1: 0.7, 3: 0.5} and kept[4].values == [0.6]
    other.close()


def test_running_trials_of_others_are_read_again_only_now_and_then_if_that_is_enough(search, database, monkeypatch):
    other = Search(database, search.spec, worker_seed=1)
    asked = other.ask("momentum", 1)

    def state(fresh):
        with search.batch(fresh):
            (trial,) = search._study("momentum").get_trials(deepcopy=False)
            return trial.state

    monkeypatch.setattr(trial_cache, "_SHARE", 1e9)
    assert state(False) is TrialState.RUNNING
    other.tell("momentum", asked.trial_id, "complete", 0.1)
    assert state(False) is TrialState.RUNNING
    assert state(True) is TrialState.COMPLETE
    again = other.ask("momentum", 2)
    other.report("momentum", again.trial_id, 1, 0.5)
    with search.batch(False):
        search._study("momentum").get_trials(deepcopy=False)
    other.report("momentum", again.trial_id, 3, 0.25)
    with search.batch(False):
        assert search.reported("momentum", again.trial_id) == {1, 3}, "as who adopts a trial must know"
    with search.batch(False):
        assert len(search._study("momentum").get_trials(deepcopy=False)) == 2, "new ones are always read"
    assert again.number == 1
    other.close()
