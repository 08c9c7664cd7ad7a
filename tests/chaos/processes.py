"""Real processes that start at once, as they are forked by a nursery: see nursery.py."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from momentum_tuner.worker_options import WorkerOptions

WORKER = "momentum_tuner.launcher.process:main"


@dataclass
class Process:
    """A process of the nursery; `key` is its name, also as PostgreSQL's `application_name`."""

    key: str
    log: Path
    pid: int = 0
    code: int | None = None

    def kill(self, sent: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, sent)

    def said(self) -> str:
        """What it wrote to its standard output and error."""
        return self.log.read_text() if self.log.exists() else ""


@dataclass
class Nursery:
    """Starts processes. May be used from several threads."""

    folder: Path
    """Where the processes' output goes."""
    processes: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._said = b""
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nursery.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def start(self, run: str, order: dict[str, Any], **environment: str) -> Process:
        """Start a process.

        Args:
            run: `module:function`, which takes its order from standard input and returns the exit code.
            order: what to do.
            environment: of the process, beside the nursery's own.
        """
        with self._lock:
            key = f"chaos-{len(self.processes)}"
            process = Process(key, self.folder / f"{key}.log")
            self.processes.append(process)
            wanted = {
                "key": key,
                "run": run,
                "log": str(process.log),
                "order": order,
                "environment": {"PGAPPNAME": key, **environment},
            }
            assert self._server.stdin is not None
            self._server.stdin.write(json.dumps(wanted).encode() + b"\n")
        self.wait_until(lambda: process.pid != 0, f"{key} did not start", 120)
        return process

    def start_worker(self, storage: str, options: WorkerOptions, **environment: str) -> Process:
        """Start a real worker, as the launcher does."""
        return self.start(WORKER, {"storage": storage, "options": asdict(options), "log_level": 20}, **environment)

    def ended(self, process: Process, seconds: float) -> int:
        """Wait for the end of a process; returns its exit code, negative for a signal."""
        self.wait_until(lambda: process.code is not None, f"{process.key} does not end", seconds)
        assert process.code is not None
        return process.code

    def living(self) -> list[Process]:
        self.listen()
        return [process for process in self.processes if process.pid and process.code is None]

    def wait_until(self, holds: Any, otherwise: str, seconds: float) -> None:
        """Wait until something holds, while processes start and end."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"{otherwise} within {seconds} s\n{self.last_words()}"
            self.listen(0.05)

    def listen(self, seconds: float = 0.0) -> None:
        """Take in what the nursery says."""
        with self._lock:
            said = self._server.stdout
            assert said is not None
            while select.select([said], [], [], seconds)[0]:
                part = os.read(said.fileno(), 65536)
                assert part, f"the nursery ended: {self._server.wait(10)}"
                *lines, self._said = (self._said + part).split(b"\n")
                for line in lines:
                    self._note(json.loads(line))
                seconds = 0.0

    def last_words(self) -> str:
        """The ends of the processes' output, for people who look for what went wrong."""
        return "\n".join(f"--- {p.key} {p.pid} {p.code}\n{p.said()[-2000:]}" for p in self.processes[-20:])

    def clear(self) -> None:
        """Kill all processes."""
        for process in self.living():
            process.kill()
        for process in self.living():
            self.ended(process, 60)
        self.processes.clear()

    def close(self) -> None:
        """End the nursery, and with it all processes."""
        for pipe in (self._server.stdin, self._server.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._server.wait(30)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def _note(self, news: dict[str, Any]) -> None:
        if "started" in news:
            next(p for p in self.processes if p.key == news["key"]).pid = news["started"]
        elif "ended" in news:
            for process in self.processes:
                if process.pid == news["ended"] and process.code is None:
                    process.code = news["code"]
