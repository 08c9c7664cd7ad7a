"""Workers, and the publisher beside them, as child processes of this one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from momentum_tuner.database import Database, Ticket, Worker
from momentum_tuner.errors import StorageError, StudyFailedError, TaskError
from momentum_tuner.fork_server import CHECK, KEEP_MEMORY, WORKER, ForkedProcess, ForkServer, may_fork
from momentum_tuner.launcher.devices import Placement
from momentum_tuner.launcher.submitting import load_checked_task
from momentum_tuner.spec import StudySpec
from momentum_tuner.worker_options import WorkerOptions

RESTARTS = 5
"""How often a worker that died is replaced before any trial ends; one that kills its workers has failed before."""
DRAIN_SECONDS = 8.0
"""How long workers have to give their trials back."""
STOP_SECONDS = 9.0
"""How long all has to end, with what is still shown to MLflow: whoever stops a worker gives it 10 s."""
LEAST_PUBLISH_SECONDS = 0.5
_POLL_SECONDS = 0.1
_PUBLISHER_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class WorkerFailure:
    """A worker that ended in an error."""

    exit_code: int
    message: str


@dataclass
class _Child:
    """A child process, with the last line it wrote."""

    process: subprocess.Popen[str] | ForkedProcess
    restarts: int = 0
    done_before: int = 0
    last_error: str = ""
    reader: threading.Thread | None = None
    options: WorkerOptions | None = None
    draining: bool = False


class LocalWorkers:
    """Starts workers, watches them, replaces those that die, and passes on the wish to stop.

    Args:
        database: where they find their work.
        options: what each serves; device, threads and ordinal are set for each.
        placements: one for each worker.
        say: gets each line that a child writes.
        log_level: of the children.
        server: a fork server that has begun to import; None: one is started if these workers can be forked.
    """

    def __init__(
        self,
        database: Database,
        options: WorkerOptions,
        placements: Sequence[Placement],
        say: Callable[[str], None],
        log_level: int = logging.WARNING,
        server: ForkServer | None = None,
    ) -> None:
        self.database = database
        self.failures: list[WorkerFailure] = []
        self._say = say
        self._said: set[str] = set()
        self._log_level = log_level
        self._started = False
        self._stopping = False
        self._drain_until: float | None = None
        self._stop_until: float | None = None
        self._publisher: _Child | None = None
        self._server = server
        self._server_child: _Child | None = None
        self._workers: list[_Child] = []
        self._plan = [
            replace(options, device=p.device, sharing=p.sharing, threads=p.threads, ordinal=options.ordinal + i)
            for i, p in enumerate(placements)
        ]

    def prepare(self, publish: bool) -> None:
        """Start the processes, so that they import what they need while the study is still being checked."""
        if not all(may_fork(options.device) for options in self._plan):
            self._end_server()
        elif self._plan and self._server is None:
            self._server = ForkServer()
        if self._server is None:
            self._workers = [self._start_worker(options) for options in self._plan]
        else:
            self._server_child = self._read_from(_Child(self._server.process))
        if publish:
            self._publisher = self._start_process("publisher", None)

    def check_task(self, spec: StudySpec, folder: Path, trusted: Sequence[str]) -> None:
        """As `load_checked_task`, where everything is imported that this takes.

        Raises:
            TaskError: the task cannot be loaded, or trained.
            StudyFailedError: the process that checked it ended otherwise.
            KeyboardInterrupt: `kill` ended it.
        """
        if self._server is None:
            load_checked_task(spec, folder, trusted)
            return
        child = self._fork(CHECK, None)
        self._write(
            child,
            {
                "factory": spec.task.factory,
                "params": dict(spec.task.params),
                "metrics": [aim.metric for aim in spec.objective.aims],
                "folder": str(folder),
                "trusted": list(trusted),
            },
        )
        while (code := child.process.poll()) is None:
            self.rest(_POLL_SECONDS)
            if self._late():
                self._end_server()
        _kill_group(child.process)
        self._finish_reading(child)
        if code == 2:
            raise TaskError(child.last_error)
        if code != 0:
            if self._stopping:
                raise KeyboardInterrupt
            raise StudyFailedError(child.last_error or f"the process that checked the task {_ended(code)}")

    def start(self, studies: Sequence[str], tracking_uri: str | None) -> None:
        """Let the prepared processes begin: workers on their studies, the publisher on these.

        Args:
            studies: what the publisher shows, empty for every study.
            tracking_uri: where to; None if there is no publisher.
        """
        self._started = True
        if self._server is not None and not self._stopping:
            self._workers = [self._start_worker(options) for options in self._plan]
        for child in self._workers:
            self._order(child)
        if self._publisher is not None:
            self._write(self._publisher, {"studies": list(studies), "tracking_uri": tracking_uri})

    def watch(self) -> bool:
        """Look after the workers once; True while any of them runs. Those asked to stop have 8 s."""
        if self._stopping:
            for child in self._workers:
                _drain(child)
        if self._late():
            self._end_server()
            for child in self._workers:
                _kill_group(child.process)
                child.process.wait()
        for child in list(self._workers):
            code = child.process.poll()
            if code is None:
                continue
            self._workers.remove(child)
            _kill_group(child.process)  # a DataLoader's processes notice only after seconds that theirs is gone
            self._finish_reading(child)
            if code == 0:
                continue
            if self._started and child.process.pid is not None:
                self._mark_stopped(child.process.pid)
            if self._stopping:
                continue
            done = trials_done(self.database)
            restarts = child.restarts if done == child.done_before else 0
            if code in (1, 2) or restarts >= RESTARTS:
                self.failures.append(WorkerFailure(code if code > 0 else 1, child.last_error or _ended(code)))
            else:
                self._say(f"a worker {_ended(code)}; another one takes over its trials")
                assert child.options is not None
                again = self._start_worker(child.options)
                again.restarts, again.done_before = restarts + 1, done
                self._order(again)
                self._workers.append(again)
        if not self._workers and (self._started or self._stopping):
            self._end_server()
        return bool(self._workers)

    def rest(self, seconds: float) -> None:
        """Wait for so long at most: to the next time that there may be something to see to."""
        if self._server is not None and self._server.alive:
            self._server.listen(seconds)
        else:
            time.sleep(seconds)

    def drain(self) -> None:
        """Ask the workers to give their trials back and end; `watch` passes it on and gives them 8 s.

        A signal may come in the middle of anything, so that nothing is called here.
        """
        if self._stopping:
            return
        self._stopping = True
        self._drain_until = time.monotonic() + DRAIN_SECONDS
        self._stop_until = time.monotonic() + STOP_SECONDS

    def stop(self) -> None:
        """Drain, and wait for the end."""
        self.drain()
        while self.watch():
            self.rest(0.05)

    def kill(self) -> None:
        """End all workers at the next `watch`, as a second Ctrl-C does."""
        self._stopping, self._drain_until, self._stop_until = True, 0.0, 0.0

    def finish_publishing(self, seconds: float) -> bool:
        """Let the publisher show the rest, for so long at most; returns whether MLflow shows everything.

        After a drain, which may come meanwhile, it has what is left of the time to stop.
        """
        child, self._publisher = self._publisher, None
        if child is None:
            return True
        _drain(child)
        least = time.monotonic() + LEAST_PUBLISH_SECONDS
        until = time.monotonic() + seconds
        while (code := child.process.poll()) is None:
            if time.monotonic() > max(least, until if self._stop_until is None else min(until, self._stop_until)):
                _kill_group(child.process)
                code = child.process.wait()
                break
            time.sleep(_PUBLISHER_POLL_SECONDS)
        self._finish_reading(child)
        return code == 0

    def _late(self) -> bool:
        """Whether those that were asked to stop have had their time."""
        return self._drain_until is not None and time.monotonic() > self._drain_until

    def _start_worker(self, options: WorkerOptions) -> _Child:
        if self._server is not None and self._server.alive:
            return self._fork(WORKER, options)
        return self._start_process(WORKER, options)

    def _fork(self, role: str, options: WorkerOptions | None) -> _Child:
        assert self._server is not None
        return self._read_from(_Child(self._server.fork(role), options=options))

    def _end_server(self) -> None:
        """End the fork server, with what it has forked."""
        if self._server is not None:
            self._server.kill()
            self._server = None
        if self._server_child is not None:
            self._finish_reading(self._server_child)
            self._server_child = None

    def _start_process(self, role: str, options: WorkerOptions | None) -> _Child:
        process = subprocess.Popen(
            [sys.executable, "-m", "momentum_tuner.launcher.process", role],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(options),
            start_new_session=True,  # a Ctrl-C in the terminal reaches this process only, which passes it on
        )
        return self._read_from(_Child(process, options=options))

    def _read_from(self, child: _Child) -> _Child:
        child.reader = threading.Thread(target=self._read, args=(child,), daemon=True)
        child.reader.start()
        return child

    def _order(self, child: _Child) -> None:
        assert child.options is not None
        self._write(child, {"options": asdict(child.options)})

    def _write(self, child: _Child, order: dict[str, Any]) -> None:
        assert child.process.stdin is not None
        order = {**order, "storage": self.database.text, "log_level": self._log_level}
        with contextlib.suppress(BrokenPipeError):  # it died; `watch` will see it
            child.process.stdin.write(json.dumps(order) + "\n")
            child.process.stdin.flush()

    def _read(self, child: _Child) -> None:
        assert child.process.stderr is not None
        for line in child.process.stderr:
            text = line.rstrip()
            if text.startswith("Error: "):
                child.last_error = text.removeprefix("Error: ")
            elif child.last_error and text.startswith("  "):
                child.last_error += "\n" + text
            elif text and text not in self._said:  # workers of one study have the same to say
                self._said.add(text)
                self._say(text)

    def _finish_reading(self, child: _Child) -> None:
        if child.reader is not None:
            child.reader.join(timeout=5)
            if child.reader.is_alive():  # something holds the other end, and to close this one would wait for that
                return
        _drain(child)
        if child.process.stderr is not None:
            child.process.stderr.close()

    def _mark_stopped(self, pid: int) -> None:
        """Note at once that a child is gone; others need not wait for its heartbeat to grow old."""
        from momentum_tuner.tickets import WorkerIdentity

        host = WorkerIdentity.of_this_process().host
        with contextlib.suppress(StorageError), self.database.write() as session:
            session.execute(sa.update(Worker).where(Worker.host == host, Worker.pid == pid).values(state="stopped"))


def _environment(options: WorkerOptions | None) -> dict[str, str]:
    """Of a child; those that serve no study have one thread."""
    environment = {**KEEP_MEMORY, **os.environ}
    threads = options.threads if options is not None else 1
    if threads is not None:
        environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(threads)
    return environment


def _drain(child: _Child) -> None:
    """Ask a child to end what it does: its standard input ends.

    Not by a signal: who stops a service signals all its processes, and a second signal ends a worker at once.
    """
    if not child.draining:
        child.draining = True
        with contextlib.suppress(BrokenPipeError):  # it died with its order unread
            if child.process.stdin is not None:
                child.process.stdin.close()


def _kill_group(process: subprocess.Popen[str] | ForkedProcess) -> None:
    """End a child at once, with all that it has started and that did not leave its session."""
    if process.pid is None:
        process.send_signal(signal.SIGKILL)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def trials_done(database: Database) -> int:
    """How many trials have ended, as far as the database answers."""
    with contextlib.suppress(StorageError), database.read() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(Ticket).where(Ticket.state == "done")) or 0
    return 0


def _ended(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
