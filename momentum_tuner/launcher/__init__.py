"""Workers as local processes."""

from momentum_tuner.launcher.devices import plan_workers
from momentum_tuner.launcher.local import LocalWorkers, WorkerFailure

__all__ = ["LocalWorkers", "WorkerFailure", "plan_workers"]
