"""Studies put into the database, and workers on them as local processes."""

from momentum_tuner.launcher.devices import plan_workers
from momentum_tuner.launcher.local import KEEP_MEMORY, LocalWorkers, WorkerFailure
from momentum_tuner.launcher.running import Page, RunOutcome, Workplace, run_study, serve_studies
from momentum_tuner.launcher.submitting import (
    join_study,
    known_study,
    load_checked_task,
    own_trust,
    put_study,
    read_study,
)

__all__ = [
    "KEEP_MEMORY",
    "LocalWorkers",
    "Page",
    "RunOutcome",
    "WorkerFailure",
    "Workplace",
    "join_study",
    "known_study",
    "load_checked_task",
    "own_trust",
    "plan_workers",
    "put_study",
    "read_study",
    "run_study",
    "serve_studies",
]
