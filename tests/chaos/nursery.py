"""A process that imports what a worker needs once, and forks workers when it is told to: they start in no time.

Each is a process of its own that runs what `python -m momentum_tuner.launcher.process` runs: it gets its order on its
standard input, which ends when the nursery does, and a SIGKILL ends it as it would any other.

Run as `python nursery.py`. Standard input has a line of JSON for each process to start, standard output one for each
that started and for each that ended. When standard input ends, all processes are killed.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # a process with threads cannot be forked safely, and the processes share two cores


class Nursery:
    def __init__(self) -> None:
        self._lines: dict[int, int] = {}  # the end of each living process's standard input that we hold
        self._wake, self._woken = os.pipe()
        os.set_blocking(self._woken, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)

    def run(self) -> None:
        """Start processes and tell of their ends, until standard input ends."""
        said = b""
        while True:
            ready, _, _ = select.select([0, self._wake], [], [])
            if self._wake in ready:
                os.read(self._wake, 4096)
                self._bury()
            if 0 in ready:
                part = os.read(0, 65536)
                if not part:
                    break
                *lines, said = (said + part).split(b"\n")
                for line in lines:
                    self._start(json.loads(line))
        for pid in self._lines:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _start(self, wanted: dict[str, Any]) -> None:
        """Fork a process: `run` is the module and function, `log` its output, `order` its standard input."""
        theirs, ours = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._be_born(wanted, theirs)
        os.close(theirs)
        os.write(ours, json.dumps(wanted["order"]).encode() + b"\n")
        self._lines[pid] = ours
        say({"started": pid, "key": wanted["key"]})

    def _be_born(self, wanted: dict[str, Any], order: int) -> NoReturn:
        """What the forked process does."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for source, target in ((order, 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            for number in (order, log, self._wake, self._woken, *self._lines.values()):
                os.close(number)
            os.environ.update(wanted["environment"])
            module, _, function = wanted["run"].partition(":")
            sys.argv = [module, "worker"]
            code = getattr(import_module(module), function)()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _bury(self) -> None:
        """Tell of those that ended."""
        while self._lines:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            os.close(self._lines.pop(pid))
            say({"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def say(what: dict[str, Any]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def warm_up() -> None:
    """Import all that a worker needs, and run one on a tiny study: much is imported and compiled at its first use."""
    for module in ("momentum_tuner.launcher.process", "sqlalchemy.dialects.postgresql.psycopg"):
        import_module(module)
    from momentum_tuner.database import Database, migrate
    from momentum_tuner.search import design
    from momentum_tuner.spec import StudySpec
    from momentum_tuner.tickets import submit_study
    from momentum_tuner.worker import StopSignal, run_worker
    from momentum_tuner.worker_options import WorkerOptions

    spec = StudySpec.model_validate(
        {
            "name": "warm",
            "task": {"factory": "momentum_tuner.tasks:digits_mlp", "params": {"hidden": 8}},
            "optimizers": ["sgd", "momentum"],
            "budget": {"trials": 1, "epochs": 2},
            "confirm": {"seeds": 0},
            "fixed": {"batch_size": 512},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        database = Database(f"sqlite:///{folder}/warm.db")
        migrate(database)
        submit_study(database, spec, None, lambda optimizer: design(spec, optimizer))
        database.close()
        run_worker(database.text, WorkerOptions(slots=2, threads=1, checkpoints=folder), StopSignal())
    gc.freeze()  # what is never collected stays shared with the forks


def threads() -> set[str]:
    """Names of this process's threads, as the system knows them (Linux)."""
    return {(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")}


if __name__ == "__main__":
    main_thread = threads()
    warm_up()
    if odd := threads() - main_thread - {"jemalloc_bg_thd"}:  # jemalloc sees to its own in a fork
        sys.exit(f"the nursery has threads and must not fork: {odd}")
    say({"ready": os.getpid()})
    Nursery().run()
