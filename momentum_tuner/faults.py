"""Crash points: places where a test can end the process as SIGKILL would (RELIABILITY.md 2 and 3).

`MOMENTUM_TUNER_CRASH=<point>:<file>` ends the process that reaches the point and finds the file empty; the file is
removed, so that this happens once. Each byte in it lets a process pass the point before. Only tests set the variable.
"""

import os
import signal

CRASH_POINTS = (
    "claimed",  # a ticket is ours, Optuna was not asked
    "asking",  # Optuna's trial exists, its settings are not all drawn
    "asked",  # it has its settings, the ticket does not know of it
    "noted",  # the ticket knows its trial, no epoch is recorded
    "recorded",  # an epoch is recorded
    "reported",  # a rung is reported to Optuna
    "checkpoint-writing",  # a checkpoint's file is written under a temporary name
    "checkpoint-written",  # the file is whole, the tickets do not know of it
    "checkpoint-noted",  # they do, and the one before is not removed
    "fenced",  # the result is in the ticket, Optuna is not told
    "told",  # Optuna is told, the ticket is not done
    "done",  # the ticket is done
    "opened",  # the search is complete, and the confirmation has its tickets
)


def crash_point(name: str) -> None:
    """Die here, if a test asks for it."""
    wanted = os.environ.get("MOMENTUM_TUNER_CRASH")
    if wanted is None or not wanted.startswith(f"{name}:"):
        return
    file = wanted.partition(":")[2]
    try:
        if passes := os.path.getsize(file):
            os.truncate(file, passes - 1)
            return
        os.unlink(file)
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
