"""Studies put into the database, and workers on them as local processes."""

from momentum_tuner.launcher.devices import check_placing, plan_workers, resolve_devices
from momentum_tuner.launcher.local import LocalWorkers, WorkerFailure
from momentum_tuner.launcher.running import Page, RunOutcome, Workplace, run_study, serve_studies
from momentum_tuner.launcher.submitting import (
    TaskCheck,
    join_study,
    known_study,
    load_checked_task,
    own_trust,
    put_study,
    read_study,
)

__all__ = [
    "LocalWorkers",
    "Page",
    "RunOutcome",
    "TaskCheck",
    "WorkerFailure",
    "Workplace",
    "check_placing",
    "join_study",
    "known_study",
    "load_checked_task",
    "own_trust",
    "plan_workers",
    "put_study",
    "read_study",
    "resolve_devices",
    "run_study",
    "serve_studies",
]
