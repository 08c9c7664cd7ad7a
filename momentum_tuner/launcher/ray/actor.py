"""A worker inside a Ray actor."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import ray

from momentum_tuner.errors import DeviceError
from momentum_tuner.launcher.devices import visible_gpus
from momentum_tuner.launcher.process import attempt, prepare_worker
from momentum_tuner.worker_options import WorkerOptions


@dataclass(frozen=True)
class Place:
    """Where an actor was placed: Ray's name of the node, and the process on it."""

    node_id: str
    pid: int


@dataclass(frozen=True)
class Ended:
    """How a worker ended: with exit code 0, or in an error."""

    exit_code: int
    message: str


class WorkerActor:
    """Runs one worker, beside which Ray can still call `drain`.

    The package must be installed on the node, and a user's own task must lie there at the same path: no code is sent.

    Args:
        log_level: of the lines that are passed on.
        folder: the command's working directory, to work in where the node has it.
    """

    def __init__(self, log_level: int, folder: str) -> None:
        prepare_worker()
        from momentum_tuner.worker import StopSignal

        if Path(folder).is_dir():
            os.chdir(folder)
        self._stop = StopSignal()
        self._said: SimpleQueue[logging.LogRecord | Ended] = SimpleQueue()
        logging.basicConfig(level=log_level, handlers=[QueueHandler(self._said)])
        logging.captureWarnings(True)
        logging.getLogger("alembic").setLevel(logging.WARNING)

    def place(self) -> Place:
        """Where it is."""
        return Place(ray.get_runtime_context().get_node_id(), os.getpid())

    def work(self, storage: str, options: WorkerOptions) -> Iterator[str | Ended]:
        """Run the worker; yields each line that it logs as it comes, and last how it ended."""
        Thread(target=self._run, args=(storage, options), name="worker", daemon=True).start()
        while not isinstance(said := self._said.get(), Ended):
            yield said.getMessage()
        yield said

    def drain(self) -> None:
        """Ask the worker to give its trials back and end."""
        self._stop.asked = True

    def _run(self, storage: str, options: WorkerOptions) -> None:
        from momentum_tuner.worker import run_worker

        def work() -> int:
            if options.device != "cpu" and not visible_gpus():
                raise DeviceError(f"Ray gives a GPU of {options.node}, but torch sees none there; use --device cpu")
            run_worker(storage, options, self._stop)
            return 0

        self._said.put(Ended(*attempt(work)))
