"""Workers as local processes."""

from momentum_tuner.launcher.devices import plan_workers
from momentum_tuner.launcher.local import KEEP_MEMORY, LocalWorkers, WorkerFailure

__all__ = ["KEEP_MEMORY", "LocalWorkers", "WorkerFailure", "plan_workers"]
