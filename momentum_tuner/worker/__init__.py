"""A worker: claim, admit, train, record, report, prune, refill, until nothing is left or it is asked to stop."""

from momentum_tuner.worker.machine import describe_machine
from momentum_tuner.worker.results import study_trainer, trial_settings
from momentum_tuner.worker.serving import Worker, run_worker
from momentum_tuner.worker.signals import StopSignal
from momentum_tuner.worker.study import StudyWorker

__all__ = ["StopSignal", "StudyWorker", "Worker", "describe_machine", "run_worker", "study_trainer", "trial_settings"]
