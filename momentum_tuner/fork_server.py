"""A process that imports once what workers need and forks them off, so that each starts in a tenth of a second.

For workers on the CPU under Linux only: what a process has touched of CUDA does not survive a fork, nor do some of
macOS's own libraries. The server itself trains nothing and loads no task, so that it has no threads to lose. This
module imports nothing heavy, so that a command can start the server before it does anything else.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import IO, NoReturn, Self

from momentum_tuner.leaving import leave

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(512 << 20)}
"""Environment of what trains: glibc keeps the memory of freed tensors for the next step; else each step pays for the
same pages again."""
_FOR_CHECKS = (
    "momentum_tuner.launcher.process",
    "torch",
    "momentum_tuner.tasks.digits",  # with what any task needs
)
NEEDED = (
    *_FOR_CHECKS,
    "momentum_tuner.worker",
    "torch._dynamo",  # torch.func imports it at its first call
    "alembic.command",  # as Optuna's storage does when it is opened
)
"""What takes long to import and every worker needs; a task can be checked with the first of it."""
CHECK, WORKER = "check", "worker"
"""The roles of forked processes, as `launcher.process` knows them."""
_RUN = "momentum_tuner.launcher.process:follow_order"
"""What a forked process calls with its role; it returns the exit code."""
_LEFT_TO_PARENT = (signal.SIGTERM, signal.SIGINT)
"""Signals that the server ignores: they may be sent to all processes of a service, and its forks would end with it."""
_MESSAGE = 4096
"""Bytes of the longest message."""


def may_fork(device: str) -> bool:
    """Whether workers on a device, `cpu` or another one, can be forked."""
    return sys.platform == "linux" and device == "cpu"


def may_have_gpu() -> bool:
    """Whether it is worth the second that importing torch takes to ask it."""
    return any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")) or os.name == "nt"


def early_server(device: str) -> ForkServer | None:
    """A fork server for the workers of a command, begun before the command itself has imported anything.

    Args:
        device: what the command was given; `auto` is the CPU where there can be no GPU.
    """
    return ForkServer() if may_fork("cpu" if device == "auto" and not may_have_gpu() else device) else None


class ForkedProcess:
    """A child of the fork server, with what `subprocess.Popen` has of one of our own.

    Attributes:
        pid: its process, which leads a session of its own; None until the server has forked it.
        stdin: to write to it.
        stderr: to read what it says.
    """

    def __init__(self, server: ForkServer, stdin: IO[str], stderr: IO[str]) -> None:
        self.pid: int | None = None
        self.stdin = stdin
        self.stderr = stderr
        self.code: int | None = None
        self.waiting: list[int] = []
        """Signals for it, from before it was there."""
        self._server = server

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        self._server.listen()
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has one.

        Raises:
            subprocess.TimeoutExpired: it has none in this time.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while self.code is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
            self._server.listen(0.1)
        return self.code

    def send_signal(self, number: int) -> None:
        """Send it a signal, now or as soon as it is there."""
        if self.pid is None:
            self.waiting.append(number)
        elif self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class ForkServer:
    """The server, as its parent sees it: it begins to import at once.

    Its libraries have one thread each; how many torch shall have is said to it in the forks.
    """

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._forked: dict[int, ForkedProcess] = {}
        self._count = 0
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "momentum_tuner.fork_server", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**KEEP_MEMORY, **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self.process.stderr is not None
        self.process.stderr.close()

    @property
    def alive(self) -> bool:
        """Whether it can fork."""
        return self.process.poll() is None

    def fork(self, role: str) -> ForkedProcess:
        """A new process in a role of `launcher.process`, which is there as soon as the server comes to it.

        A `check` need not wait until all is imported that a worker needs.
        """
        reads_order, writes_order = os.pipe()
        reads_errors, writes_errors = os.pipe()
        forked = ForkedProcess(self, os.fdopen(writes_order, "w"), os.fdopen(reads_errors))
        self._count += 1
        self._forked[self._count] = forked
        wanted = json.dumps({"role": role, "key": self._count}).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died, as `listen` will see
            socket.send_fds(self._socket, [wanted], [reads_order, writes_errors])
        os.close(reads_order)
        os.close(writes_errors)
        return forked

    def listen(self, seconds: float = 0.0) -> None:
        """Take in what it says, waiting for so long at most."""
        if self._socket.fileno() < 0:
            return
        select.select([self._socket], [], [], seconds)
        while True:
            try:
                said = self._socket.recv(_MESSAGE)
            except BlockingIOError:
                return
            except ConnectionResetError:
                said = b""
            if not said:
                self._lose()
                return
            self._note(json.loads(said))

    def kill(self) -> None:
        """End it and those it has forked at once."""
        if self.process.poll() is None:
            self.process.kill()
        self._lose()

    def _note(self, news: dict[str, int]) -> None:
        forked = self._forked.get(news["key"])
        if forked is None:  # its end is known
            return
        if "started" in news:
            forked.pid = news["started"]
            for number in forked.waiting:
                forked.send_signal(number)
        else:
            forked.code = news["code"]
            del self._forked[news["key"]]

    def _lose(self) -> None:
        """It is gone, and nobody will say how those end that it forked: they end with it."""
        self._socket.close()
        code = self.process.wait()
        for forked in self._forked.values():
            if forked.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(forked.pid, signal.SIGKILL)
            forked.code = code if forked.pid is None else -signal.SIGKILL
        self._forked.clear()


# In the server.


def main() -> None:
    """Import what is needed, and fork off processes until the parent is gone."""
    for number in _LEFT_TO_PARENT:
        signal.signal(number, signal.SIG_IGN)
    server = _Server(socket.socket(fileno=int(sys.argv[1])))
    gc.disable()  # which takes a quarter of the time of an import
    for count, module in enumerate(NEEDED, start=1):
        import_module(module)
        if not server.work({CHECK} if count >= len(_FOR_CHECKS) else set(), 0.0):
            return
    gc.freeze()  # what is not looked at stays shared with the forks
    while server.work({CHECK, WORKER}, None):
        pass


class _Server:
    """Forks, and tells of those that ended."""

    def __init__(self, parent: socket.socket) -> None:
        self._parent = parent
        self._wanted: list[tuple[dict[str, str | int], list[int]]] = []
        self._keys: dict[int, int] = {}
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def work(self, roles: Collection[str], seconds: float | None) -> bool:
        """Do what there is to do; False once the parent is gone.

        Args:
            roles: that can be forked; what wants others waits.
            seconds: to wait for something to do; None for as long as it takes.
        """
        while True:
            for wanted, pipes in [entry for entry in self._wanted if entry[0]["role"] in roles]:
                self._wanted.remove((wanted, pipes))
                self._fork(wanted, *pipes)
            parent = self._parent.fileno()
            ready, _, _ = select.select([parent, self._woken], [], [], seconds)
            if self._woken in ready:
                os.read(self._woken, 4096)
            self._bury()
            if parent not in ready:
                return True
            said, pipes, _, _ = socket.recv_fds(self._parent, _MESSAGE, 2)
            if not said:
                return False
            self._wanted.append((json.loads(said), pipes))
            seconds = 0.0

    def _fork(self, wanted: dict[str, str | int], order: int, errors: int) -> None:
        key = int(wanted["key"])
        try:
            pid = os.fork()
        except OSError as error:
            os.write(errors, f"Error: no new process can be started: {error}\n".encode())
            self._tell(code=1, key=key)
        else:
            if pid == 0:
                self._become(str(wanted["role"]), key, order, errors)
            self._keys[pid] = key
        os.close(order)
        os.close(errors)

    def _become(self, role: str, key: int, order: int, errors: int) -> NoReturn:
        """What a forked process does."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for sent in (signal.SIGCHLD, *_LEFT_TO_PARENT):
                signal.signal(sent, signal.SIG_DFL)
            os.setsid()
            os.dup2(order, 0)
            os.dup2(errors, 2)
            for number in (order, errors, self._woken, self._wake):
                os.close(number)
            for _, pipes in self._wanted:
                for number in pipes:
                    os.close(number)
            self._tell(started=os.getpid(), key=key)
            if role != CHECK:
                self._parent.close()
            gc.enable()
            where, _, name = _RUN.partition(":")
            code = getattr(import_module(where), name)(role)
            if role == CHECK:  # whose end the server may see late, as it goes on importing
                self._tell(code=code, key=key)
            leave(code)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _bury(self) -> None:
        while self._keys:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if (key := self._keys.pop(pid, None)) is not None:
                self._tell(code=os.waitstatus_to_exitcode(status), key=key)

    def _tell(self, **news: int) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._parent.send(json.dumps(news).encode())


if __name__ == "__main__":
    main()
