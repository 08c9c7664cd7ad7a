"""A worker: claim, admit, train, record, report, prune, refill, until nothing is left or it is asked to stop."""

from momentum_tuner.worker.serving import Worker, run_worker
from momentum_tuner.worker.signals import StopSignal
from momentum_tuner.worker.study import StudyWorker

__all__ = ["StopSignal", "StudyWorker", "Worker", "run_worker"]
