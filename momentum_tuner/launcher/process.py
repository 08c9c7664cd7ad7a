"""What runs in a child process, in one of some roles: one line of JSON on standard input says what to do.

Standard input stays open as long as the parent lives; when it ends, the child drains and goes. Secrets come this way
too, so that no process list shows them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import threading
import traceback
import uuid
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from momentum_tuner.errors import MomentumTunerError, describe_failure, redact
from momentum_tuner.fork_server import CHECK, NEEDED, WORKER
from momentum_tuner.leaving import leave

_LESS = 10
_LEAST_PRIORITY = 19


def main() -> int:
    """Run in the role that the first argument names; returns the exit code.

    What takes long to import is imported before the order comes, while the parent checks the study.
    """
    role = sys.argv[1]
    gc.disable()  # it would look through all that is imported again and again, for a third of the time
    if role == WORKER:
        prepare_worker()
    else:
        _prepare_publisher()
    gc.freeze()  # it stays: to look through it later takes as long
    gc.enable()
    return follow_order(role)


def follow_order(role: str) -> int:
    """Do what the line on standard input says, as `worker`, `publisher` or `check`; returns the exit code."""
    line = sys.stdin.readline()
    if not line:
        return 0
    order = json.loads(line)
    logging.basicConfig(level=order["log_level"], format="%(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    work = {WORKER: _work, "publisher": _publish, CHECK: _check}[role]
    code, message = attempt(lambda: work(order))
    if message:
        print(f"Error: {message}", file=sys.stderr)
    return code


def attempt(work: Callable[[], int]) -> tuple[int, str]:
    """Do something that returns an exit code; returns it, or that of the error that came, with its message."""
    try:
        return work(), ""
    except MomentumTunerError as error:
        return error.exit_code, str(error)
    except Exception as error:
        logging.getLogger(__name__).info("%s", redact(traceback.format_exc()))
        return 1, describe_failure(error)


def prepare_worker() -> None:
    """Import what takes long."""
    for module in NEEDED:
        import_module(module)


def _prepare_publisher() -> None:
    from momentum_tuner.tracking import quiet_mlflow

    if hasattr(os, "nice"):
        os.nice(_LESS)  # workers on the CPU come first
    quiet_mlflow()
    import_module("mlflow.tracking")


def _prepare_report() -> None:
    """Import what the report takes, which is made when the last trial has ended, in time that nobody else wants."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
    with contextlib.suppress(Exception):  # whoever makes the report finds out
        import_module("momentum_tuner.report").prepare()


def _work(order: dict[str, Any]) -> int:
    from pydantic import TypeAdapter

    from momentum_tuner.worker import StopSignal, run_worker
    from momentum_tuner.worker_options import WorkerOptions

    stop = StopSignal()
    stop.install()

    _watch_parent(lambda: setattr(stop, "asked", True))
    options = TypeAdapter(WorkerOptions).validate_python(order["options"])
    run_worker(str(order["storage"]), options, stop)
    return 0


def _check(order: dict[str, Any]) -> int:
    """See that a task can be trained, and measures what is asked for."""
    from momentum_tuner.tasks import load_usable_task

    folder = Path(order["folder"])
    load_usable_task(order["factory"], order["params"], order["metrics"], base=folder, trusted=order["trusted"])
    return 0


def _watch_parent(gone: Callable[[], None]) -> None:
    """Say in a thread when standard input ends."""

    def watch() -> None:
        # Not by `sys.stdin`, whose lock a read holds: a process that forks off meanwhile, as a DataLoader's workers do,
        # would wait for it for ever when it closes its own.
        while os.read(0, 4096):
            pass
        gone()

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _publish(order: dict[str, Any]) -> int:
    import signal

    from momentum_tuner.database import Database
    from momentum_tuner.tracking import PublisherLoop

    # The parent decides when publishing ends: it closes standard input, also when it dies.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    finishing = threading.Event()

    _watch_parent(finishing.set)
    threading.Thread(target=_prepare_report, name="report", daemon=True).start()
    database = Database(str(order["storage"]))
    name = f"publisher-{uuid.uuid4().hex[:12]}"
    whole = PublisherLoop(database, order["studies"], str(order["tracking_uri"]), name).run(finishing)
    database.close()
    return 0 if whole else 3


if __name__ == "__main__":
    leave(main())
