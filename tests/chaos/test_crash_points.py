"""A worker dies at each step of claim, ask, record, checkpoint, finish: another one completes the study."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import momentum_tuner
from momentum_tuner.database import Database
from momentum_tuner.faults import CRASH_POINTS
from momentum_tuner.search import design
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import submit_study
from momentum_tuner.worker_options import WorkerOptions

from .ledger import Ledger, check_continuation, check_ledger, open_ledger, read_ledger
from .processes import Nursery
from .traces import newest_file, read_epochs

HERE = Path(__file__).parent
PLACES = {
    "claimed": ("worker/study.py", "_claim"),
    "asking": ("search.py", "ask_all"),
    "asked": ("worker/study.py", "_ask"),
    "noted": ("worker/study.py", "_note_trials"),
    "recorded": ("worker/study.py", "_take_recorded"),
    "reported": ("worker/study.py", "_judge"),
    "checkpoint-writing": ("checkpoints.py", "_write"),
    "checkpoint-written": ("checkpoints.py", "save"),
    "checkpoint-noted": ("worker/saving.py", "note"),
    "fenced": ("worker/study.py", "_finish"),
    "told": ("worker/study.py", "_finish"),
    "done": ("worker/study.py", "_finish"),
    "opened": ("worker/study.py", "_is_over"),
}
"""Where in the package each crash point is: file and function."""
GRACE_SECONDS = 1.0
AT_ONCE = 4


@dataclass(frozen=True)
class Crash:
    """A study in which a worker died at a crash point and another one did the rest.

    Attributes:
        code: how the first worker ended.
        struck: whether it had come to the crash point.
        left: names of the files in the study's folder of checkpoints when it was dead.
        epochs: that the trials in those that were whole had behind them, by file and ticket.
        cleared: whether that folder was gone at the end.
        ledger: of the study, checked.
        said: by the second worker.
    """

    code: int
    struck: bool
    left: list[str]
    epochs: dict[str, dict[int, int]]
    cleared: bool
    ledger: Ledger
    said: str


def crash_and_complete(nursery: Nursery, database: Database, point: str, folder: Path) -> Crash:
    """Let a worker die at a crash point, then another one complete the study, and check the ledger.

    A crash point in a checkpoint strikes at the second one, so that there is one to fall back on.
    """
    notes, token = folder / "notes", folder / "token"
    notes.mkdir()
    late = point.startswith("checkpoint")
    spec = StudySpec.model_validate(
        {
            "name": point,
            "task": {
                "factory": "patient_task.py:build",
                "params": {"notes": str(notes), "step_seconds": 0.12, "steps": 8 if late else 4},
            },
            "optimizers": ["momentum_0.9"],
            "budget": {"trials": 4, "epochs": 3},
            "confirm": {"seeds": 2 if point == "opened" else 0},
            "fixed": {"batch_size": 32},
        }
    )
    study = submit_study(database, spec, str(HERE), lambda optimizer: design(spec, optimizer))
    open_ledger(database)
    options = WorkerOptions(
        studies=(point,),
        slots=3,
        threads=1,
        compiles="off",
        grace_seconds=GRACE_SECONDS,
        checkpoints=str(folder / "checkpoints"),
        checkpoint_seconds=0.3,
        trust=(str(HERE / "patient_task.py"),),
    )
    checkpoints = folder / "checkpoints" / study.checkpoint_folder

    token.write_text("." if late else "")
    worker = nursery.start_worker(database.text, options, MOMENTUM_TUNER_CRASH=f"{point}:{token}")
    code = nursery.ended(worker, 60)
    killed = dict.fromkeys(read_ledger(database).beats, 0.0)
    left = sorted(path.name for path in checkpoints.glob("*"))
    epochs = {name: read_epochs(checkpoints / name) for name in left if not name.startswith(".")}
    other = nursery.start_worker(database.text, options)
    assert nursery.ended(other, 120) == 0, other.said()
    ledger = check_ledger(database, spec, GRACE_SECONDS, killed)
    return Crash(code, not token.exists(), left, epochs, not checkpoints.exists(), ledger, other.said())


Crashes = dict[str, "Future[Crash]"]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def crashes(request, warm_nursery, tmp_path_factory) -> Iterator[Crashes]:
    """A crash at each point, a few at once, as a study mostly waits for the grace to pass."""
    folder: Path = tmp_path_factory.mktemp(f"crashes-{request.param}")
    warm_nursery.folder = folder
    databases = [make_database(request, folder, number) for number in range(len(CRASH_POINTS))]

    def run(point: str, database: Database) -> Crash:
        (folder / point).mkdir()
        return crash_and_complete(warm_nursery, database, point, folder / point)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        yield {p: threads.submit(run, p, d) for p, d in zip(CRASH_POINTS, databases, strict=True)}
    warm_nursery.clear()
    for database in databases:
        database.close()


def make_database(request: pytest.FixtureRequest, folder: Path, number: int) -> Database:
    """A migrated database."""
    if request.param == "sqlite":
        path = folder / f"{number}.db"
        shutil.copy(request.getfixturevalue("migrated_sqlite"), path)
        return Database(f"sqlite:///{path}")
    server = request.getfixturevalue("postgresql")
    name = server.create(request.getfixturevalue("migrated_postgresql"))
    return Database(server.url(name))


def test_every_crash_point_is_in_the_package_exactly_where_it_is_meant():
    package = Path(momentum_tuner.__file__).parent
    found = {}
    for path in sorted(package.rglob("*.py")):
        function = ""
        for line in path.read_text().splitlines():
            if defined := re.match(r"\s*def (\w+)", line):
                function = defined[1]
            if used := re.search(r'crash_point\("([^"]*)"\)', line):
                assert used[1] not in found
                found[used[1]] = (path.relative_to(package).as_posix(), function)
    assert found == PLACES
    assert tuple(PLACES) == CRASH_POINTS


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_study_completes_though_a_worker_died_there(point, crashes):
    crash = crashes[point].result()
    assert (crash.code, crash.struck) == (-signal.SIGKILL, True)
    assert "Traceback" not in crash.said
    first, second = crash.ledger.beats
    adoptions = crash.ledger.adoptions
    assert {(e.old_worker_id, e.worker_id) for e in adoptions} <= {(first, second)}
    check_how_far_it_was(point, crash)
    check_continuation(crash.ledger, adoptions, crash.epochs)
    assert crash.cleared


def check_how_far_it_was(point: str, crash: Crash) -> None:
    """What the worker that died had done for the tickets that were adopted."""
    adoptions = crash.ledger.adoptions
    before = [[e for e in crash.ledger.by_ticket[a.ticket_id] if e.id < a.id] for a in adoptions]
    brought = [len(crash.ledger.brought[a.ticket_id, a.old_generation]) for a in adoptions]
    files = [newest_file(a.checkpoint) for a in adoptions]
    match point:
        case "claimed" | "asking" | "asked":
            assert [len(changes) for changes in before] == [1, 1, 1]  # the claim
        case "noted":
            assert [len(changes) for changes in before] == [2, 2, 2]
            assert brought == [0, 0, 0]
        case "recorded":
            assert brought == [1, 1, 1]  # the untrained models
        case "reported":
            assert min(brought) >= 1  # that of the rung may be on its way
        case "checkpoint-writing":
            assert [name for name in crash.left if name.endswith(".tmp")]
            assert any(files)
        case "checkpoint-written":
            assert any(files)
            assert set(crash.epochs) - set(files)
        case "checkpoint-noted":
            assert sorted(crash.epochs, key=number_of)[-1] in files
            assert len(crash.epochs) > 1
        case "fenced" | "told":
            assert "finishing" in {a.old_state for a in adoptions}
        case "done":
            done = {e.ticket_id for e in crash.ledger.results} - {a.ticket_id for a in adoptions}
            assert any(e.state == "done" and e.generation == 1 for t in done for e in crash.ledger.by_ticket[t])
        case "opened":
            assert adoptions == []
            first, second = crash.ledger.beats
            assert [e.worker_id for e in crash.ledger.results] == [first] * 4 + [second] * 2


def number_of(file: str) -> int:
    """Which of its worker's checkpoints a file is."""
    return int(file.rpartition("-")[2].removesuffix(".safetensors"))
