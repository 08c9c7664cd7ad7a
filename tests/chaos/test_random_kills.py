"""Workers are killed at random while a study runs: nothing is lost, nothing is done twice, the budget is exact."""

from __future__ import annotations

import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa

from momentum_tuner.database import Database
from momentum_tuner.search import design
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import submit_study
from momentum_tuner.worker_options import WorkerOptions

from .ledger import Entry, Ledger, check_continuation, check_ledger, open_ledger
from .processes import Nursery, Process
from .traces import File, Traces, newest_file, read_traces

HERE = Path(__file__).parent
WORKERS = 8
SLOTS = 4
TRIALS_AT_ONCE = 8
"""By so many trials of each optimizer the budget grows whenever less than two of three of them are left to claim."""
GRACE_SECONDS = 3.0
CHECKPOINT_SECONDS = 1.5
STEP_SECONDS = 0.15
STEPS = 22  # of an epoch, which so is more than two checkpoint intervals long
STEPS_BETWEEN_CHECKPOINTS = CHECKPOINT_SECONDS / STEP_SECONDS
"""More steps than that cannot be trained in an interval, on any machine, as each sleeps so long."""
KILLS_FOR_A_STOP = 10
"""Once in so many kills a worker is stopped for longer than the grace, loses its tickets, and goes on."""


@dataclass(frozen=True)
class Kill:
    """A worker that was killed, when, and what it left; `seconds` is how long it took to read that."""

    worker_id: str
    at: float
    traces: Traces
    seconds: float


@dataclass
class Chaos:
    """A study with eight workers, of which some are killed and replaced."""

    database: Database
    nursery: Nursery
    folder: Path
    chance: random.Random
    spec: StudySpec = field(init=False)
    workers: list[Process] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    stopped: dict[str, float] = field(default_factory=dict)
    """Until when a worker stands still, by its process's key."""
    started: int = 0

    def __post_init__(self) -> None:
        (self.folder / "notes").mkdir()
        params = {"notes": str(self.folder / "notes"), "step_seconds": STEP_SECONDS, "steps": STEPS}
        self.spec = StudySpec.model_validate(
            {
                "name": "chaos",
                "task": {"factory": "patient_task.py:build", "params": params},
                "optimizers": ["sgd", "momentum", "nesterov"],
                "budget": {"trials": TRIALS_AT_ONCE, "epochs": 3},
                "confirm": {"seeds": 0},
                "fixed": {"batch_size": 32},
                "max_attempts": 100,  # a ticket that is killed three times in a row by chance shall not fail
            }
        )
        self.submit()
        open_ledger(self.database)

    def submit(self) -> None:
        self.study = submit_study(self.database, self.spec, str(HERE), lambda o: design(self.spec, o))

    def grow(self) -> None:
        """Raise the budget when little is left, so that the study lasts as long as the kills, on any machine."""
        if self.ask("SELECT count(*) FROM tickets WHERE state = 'open'")[0][0] < 2 * TRIALS_AT_ONCE:
            budget = self.spec.budget.model_copy(update={"trials": self.spec.budget.trials + TRIALS_AT_ONCE})
            self.spec = self.spec.model_copy(update={"budget": budget})
            self.submit()

    def start(self) -> None:
        options = WorkerOptions(
            studies=("chaos",),
            slots=SLOTS,
            threads=1,
            compiles="off",
            ordinal=self.started,
            grace_seconds=GRACE_SECONDS,
            checkpoints=str(self.folder / "checkpoints"),
            checkpoint_seconds=CHECKPOINT_SECONDS,
            trust=(str(HERE / "patient_task.py"),),
        )
        self.workers.append(self.nursery.start_worker(self.database.text, options))
        self.started += 1

    def kill(self) -> None:
        """Kill a worker, read what it left before others clear it away, and start another one."""
        worker_ids = self.worker_ids()
        victim = self.chance.choice([p for p in self.workers if p.key in worker_ids and p.key not in self.stopped])
        killed = time.time()
        victim.kill()
        self.nursery.ended(victim, 60)
        self.workers.remove(victim)
        worker_id = worker_ids[victim.key]
        checkpoints = self.folder / "checkpoints" / self.study.checkpoint_folder
        traces = read_traces(worker_id, checkpoints, self.folder / "notes" / str(victim.pid))
        self.kills.append(Kill(worker_id, killed, traces, time.time() - killed))
        self.start()

    def stop(self) -> None:
        """Let a worker that holds tickets stand still beyond the grace."""
        holders = {worker_id for (worker_id,) in self.ask("SELECT worker_id FROM tickets WHERE state = 'running'")}
        worker_ids = self.worker_ids()
        if able := [p for p in self.workers if worker_ids.get(p.key) in holders]:
            victim = self.chance.choice(able)
            victim.kill(signal.SIGSTOP)
            self.stopped[victim.key] = time.monotonic() + 2 * GRACE_SECONDS

    def wake(self, now: float) -> None:
        """Let those go on that have stood still long enough."""
        for worker in self.workers:
            if self.stopped.get(worker.key, now) < now:
                worker.kill(signal.SIGCONT)
                del self.stopped[worker.key]

    def ask(self, query: str) -> list[sa.Row]:
        with self.database.engine.connect() as connection:
            return list(connection.execute(sa.text(query)))

    def worker_ids(self) -> dict[str, str]:
        """The ids of the workers that have come, by their processes' keys."""
        return {key: worker_id for key, worker_id in self.ask("SELECT writer, worker_id FROM ledger WHERE what='born'")}


@pytest.mark.timeout(0)  # it lasts as long as the kills that are asked for; what could hang has a bound of its own
def test_nothing_is_lost_or_done_twice_while_workers_are_killed(postgresql_database, nursery, kills, tmp_path, capsys):
    seed = random.randrange(2**32)
    with capsys.disabled():
        print(f"\n{kills} kills at random, seed {seed}", file=sys.stderr)  # pytest-xdist shows that of its processes
    chaos = Chaos(postgresql_database, nursery, tmp_path, random.Random(seed))
    for _ in range(WORKERS):
        chaos.start()
    nursery.wait_until(lambda: len(chaos.worker_ids()) == WORKERS, "not all workers came", 120)
    started = time.monotonic()
    while len(chaos.kills) < kills:
        if len(chaos.kills) % KILLS_FOR_A_STOP == KILLS_FOR_A_STOP // 2 and not chaos.stopped:
            chaos.stop()
        chaos.grow()
        time.sleep(chaos.chance.uniform(0.7, 2.1))
        chaos.wake(time.monotonic())
        nursery.listen()
        assert all(p.code is None for p in chaos.workers), f"a worker ended by itself\n{nursery.last_words()}"
        chaos.kill()
    while chaos.stopped:
        time.sleep(0.1)
        chaos.wake(time.monotonic())
    killing = time.monotonic() - started
    for worker in chaos.workers:
        assert nursery.ended(worker, 300) == 0, worker.said()
        assert "Traceback" not in worker.said()
    seconds = time.monotonic() - started
    killed = {kill.worker_id: kill.at for kill in chaos.kills}
    ledger = check_ledger(chaos.database, chaos.spec, GRACE_SECONDS, killed)
    epochs = {file.name: file.epochs for kill in chaos.kills for file in kill.traces.files if file.epochs}
    check_continuation(ledger, [a for a in ledger.adoptions if a.old_worker_id in killed], epochs)
    repeated = [check_repeated_work(ledger, kill) for kill in chaos.kills if kill.seconds < GRACE_SECONDS / 2]
    assert len(repeated) > kills / 2  # the others: the machine stood still, and files may have been cleared away
    brought = sum(map(len, ledger.brought.values()))
    recorded = sum(entry.what == "recorded" for entry in ledger.entries)
    alive = len(ledger.adopted_from_living(killed))
    with capsys.disabled():
        print(
            f"{kills} kills in {killing:.0f} s, study complete after {seconds:.0f} s\n"
            f"{len(ledger.by_ticket)} tickets, {len(ledger.claims)} claims, {len(ledger.results)} results; "
            f"{len(ledger.adoptions)} adoptions, {alive} of them from workers that stood still\n"
            f"0 lost, 0 doubled; {recorded} records, {brought - recorded} brought twice\n"
            f"steps repeated after a kill: {sum(repeated) / len(repeated):.1f} on average, {max(repeated)} at most; "
            f"a checkpoint interval has {STEPS_BETWEEN_CHECKPOINTS:.0f}, an epoch {STEPS}",
            file=sys.stderr,
        )


def check_repeated_work(ledger: Ledger, kill: Kill) -> int:
    """See that a kill cost at most one checkpoint interval of work; returns how many steps are trained again.

    The tickets that the worker held go on from the newest checkpoint that they knew of. What is trained again are the
    steps that the worker took after that was written, or after it claimed the ticket, if it wrote none for it. The
    steps are counted by the task itself, and each takes a known time at least. So many fit into an interval, and a few
    more until the next checkpoint begins. Those taken while that is written, until the tickets know of it, are counted
    by themselves: on a machine that has other things to do this may take a while, but hardly another interval.
    """
    most = 0
    for adoption in ledger.adoptions:
        held_when_killed = adoption.old_worker_id == kill.worker_id and adoption.at > kill.at
        if held_when_killed and adoption.old_state == "running":
            origin, later = last_saved(ledger, kill, adoption)
            saved = min((file.written for file in later), default=float("inf"))
            before, after = kill.traces.steps_between(origin, saved), kill.traces.steps_between(saved, float("inf"))
            assert before <= 1.25 * STEPS_BETWEEN_CHECKPOINTS + 3, (before, after, adoption)
            assert after <= STEPS_BETWEEN_CHECKPOINTS, (before, after, adoption)
            most = max(most, before + after)
    return most


def last_saved(ledger: Ledger, kill: Kill, adoption: Entry) -> tuple[float, list[File]]:
    """From when on the work for a ticket was lost, and the checkpoints of that time that it does not know of."""
    claim = next(
        e for e in ledger.by_ticket[adoption.ticket_id] if e.is_claim and e.generation == adoption.old_generation
    )
    known = newest_file(adoption.checkpoint)
    saved = [file for file in kill.traces.files if file.name == known]
    origin = max([claim.at, *(file.written for file in saved)])
    return origin, [file for file in kill.traces.files if file.written > origin]
