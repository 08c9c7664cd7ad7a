import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from momentum_tuner import fork_server
from momentum_tuner.fork_server import CHECK, WORKER, ForkServer, early_server, may_fork
from momentum_tuner.launcher import LocalWorkers
from momentum_tuner.launcher.devices import Placement
from momentum_tuner.worker_options import WorkerOptions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks workers")


@pytest.fixture
def server():
    with ForkServer() as server:
        yield server


@pytest.fixture
def fork(server):
    """Fork a process; what is not ended by the test is closed after it."""
    forked = []

    def fork(role):
        forked.append(server.fork(role))
        return forked[-1]

    yield fork
    server.kill()
    for process in forked:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stderr.close()


def started(process):
    """Its process id, once it is there."""
    deadline = time.monotonic() + 60
    while process.pid is None and process.code is None and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.01)
    return process.pid


def gone(pid):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def order(factory):
    task = {"factory": factory, "params": {}, "metrics": ["valid_loss"], "folder": ".", "trusted": []}
    return json.dumps({**task, "storage": "sqlite:///none.db", "log_level": 30}) + "\n"


def test_a_task_is_checked_in_a_process_of_its_own(fork):
    process = fork(CHECK)
    process.stdin.write(order("momentum_tuner.tasks:digits_mlp"))
    process.stdin.flush()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


def test_what_is_wrong_with_a_task_is_said(fork):
    process = fork(CHECK)
    process.stdin.write(order("momentum_tuner.tasks:digits_nothing"))
    process.stdin.flush()
    assert process.wait(60) == 2
    assert process.stderr.read().startswith("Error: ")


def test_the_server_has_one_thread_when_it_forks_workers(server, fork):
    assert started(fork(WORKER))
    assert psutil.Process(server.process.pid).num_threads() == 1
    assert Path(f"/proc/{server.process.pid}/maps").read_text().count("libtorch_cpu") > 0


def test_a_forked_process_leads_a_session_and_ends_with_its_orders(fork):
    process = fork(WORKER)
    assert os.getsid(started(process)) == process.pid
    process.stdin.close()
    assert process.wait(10) == 0


def test_the_signal_that_ended_a_process_is_its_code(fork):
    process = fork(WORKER)
    os.kill(started(process), signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL


def test_a_signal_for_a_process_that_is_not_there_yet_reaches_it(fork):
    process = fork(WORKER)
    process.send_signal(signal.SIGTERM)
    assert process.pid is None
    assert process.wait(60) == -signal.SIGTERM


def test_the_server_leaves_signals_to_its_parent_and_its_forks_do_not(server, fork):
    first = fork(WORKER)
    assert started(first)
    for number in (signal.SIGTERM, signal.SIGINT):
        server.process.send_signal(number)
    second = fork(WORKER)
    assert started(second)
    assert server.alive and first.poll() is None
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == -signal.SIGTERM


def test_to_wait_has_an_end(fork):
    process = fork(WORKER)
    started(process)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)


def test_what_a_server_forked_ends_with_it(server, fork):
    before, later = fork(WORKER), None
    pid = started(before)
    server.process.kill()
    server.process.wait()
    later = fork(WORKER)
    assert not server.alive
    assert before.wait(10) == -signal.SIGKILL
    assert gone(pid)
    assert later.wait(10) == -signal.SIGKILL
    assert later.pid is None


PARENT = """
import os, time
from momentum_tuner.fork_server import ForkServer
server = ForkServer()
process = server.fork("worker")
while process.pid is None:
    process.poll()
print(server.process.pid, process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_server_and_forks_end_when_their_parent_is_killed():
    parent = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=60, check=False)
    pids = [int(pid) for pid in parent.stdout.split()]
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_only_workers_on_the_cpu_are_forked(monkeypatch):
    assert may_fork("cpu")
    assert not may_fork("cuda:0")
    monkeypatch.setattr(fork_server, "may_have_gpu", lambda: True)
    assert early_server("auto") is None
    assert early_server("cuda") is None


def test_a_server_for_workers_that_cannot_be_forked_is_ended(sqlite_database, server):
    workers = LocalWorkers(sqlite_database, WorkerOptions(), [Placement("cuda:0", 1, None)], print, server=server)
    workers.prepare(publish=False)
    try:
        assert not server.alive
    finally:
        workers.kill()
        workers.watch()
