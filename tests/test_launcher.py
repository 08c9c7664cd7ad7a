import os
import sys
import time

import psutil
import pytest

from momentum_tuner.errors import DeviceError, InputError
from momentum_tuner.launcher import LocalWorkers, devices, plan_workers
from momentum_tuner.launcher.devices import Placement
from momentum_tuner.worker_options import WorkerOptions


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs and cores, as the launcher sees it."""

    def machine(gpus: int, cores: int = 8) -> None:
        monkeypatch.setattr(devices, "may_have_gpu", lambda: gpus > 0)
        monkeypatch.setattr(devices, "visible_gpus", lambda: gpus)
        monkeypatch.setattr(devices, "available_cores", lambda: cores)

    return machine


def test_auto_without_a_gpu_is_one_worker_with_one_thread_per_core(machine):
    machine(gpus=0, cores=4)
    plan = plan_workers("auto", "auto")
    assert [(p.device, p.threads, p.sharing) for p in plan] == [("cpu", 1, 4)] * 4


def test_auto_on_many_cores_divides_them_among_eight_workers(machine):
    machine(gpus=0, cores=32)
    plan = plan_workers("auto", "cpu")
    assert [p.threads for p in plan] == [4] * 8


def test_auto_with_gpus_is_one_worker_for_each(machine):
    machine(gpus=3)
    assert [(p.device, p.threads, p.sharing) for p in plan_workers("auto", "auto")] == [
        ("cuda:0", None, 1),
        ("cuda:1", None, 1),
        ("cuda:2", None, 1),
    ]


def test_several_workers_take_the_chosen_gpus_in_turn(machine):
    machine(gpus=3)
    plan = plan_workers("3", "cuda:0,2")
    assert [p.device for p in plan] == ["cuda:0", "cuda:2", "cuda:0"]
    assert [p.sharing for p in plan] == [2, 1, 2]


def test_threads_are_divided_among_cpu_workers_and_never_below_one(machine):
    machine(gpus=0, cores=8)
    assert [p.threads for p in plan_workers("3", "cpu")] == [2, 2, 2]
    machine(gpus=0, cores=2)
    assert [p.threads for p in plan_workers("4", "cpu")] == [1] * 4


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:0;1", "0"])
def test_an_unknown_device_is_refused(machine, device):
    machine(gpus=2)
    with pytest.raises(DeviceError, match="write auto, cpu, cuda, cuda:1 or cuda:0,2"):
        plan_workers("auto", device)


def test_a_gpu_that_is_not_there_is_refused_naming_how_many_there_are(machine):
    machine(gpus=2)
    with pytest.raises(DeviceError, match=r"has 2 GPU.*there is no 5"):
        plan_workers("auto", "cuda:0,5")
    machine(gpus=0)
    with pytest.raises(DeviceError, match="sees no GPU"):
        plan_workers("auto", "cuda")


@pytest.mark.parametrize("workers", ["0", "-1", "two", "1.5", ""])
def test_a_number_of_workers_that_is_none_is_refused(machine, workers):
    machine(gpus=0)
    with pytest.raises(InputError, match="write a number above 0, or auto"):
        plan_workers(workers, "cpu")


def test_more_workers_than_a_machine_bears_are_refused(machine):
    machine(gpus=0)
    assert len(plan_workers("256", "cpu")) == 256
    for number in ("257", "100000"):
        with pytest.raises(InputError, match=f"--workers {number}: write 256 or less, or auto"):
            plan_workers(number, "cpu")


def test_cores_are_those_this_process_may_use():
    assert devices.available_cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("ending", ["exit 0", "sleep 60"])
def test_what_a_worker_started_ends_with_it(sqlite_database, tmp_path, monkeypatch, ending):
    # As the processes of a DataLoader, whose parent is killed, hold what the worker wrote its messages to.
    program = tmp_path / "worker"
    program.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/new\nmv {tmp_path}/new {tmp_path}/pid\n{ending}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    said = []
    workers = LocalWorkers(sqlite_database, WorkerOptions(), [Placement("cuda:0", 1, 1)], said.append)
    workers.prepare(publish=False)
    while not (tmp_path / "pid").exists():
        workers.watch()
    workers.kill()
    assert not workers.watch()
    pid = int((tmp_path / "pid").read_text())

    def ended() -> bool:
        return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    deadline = time.monotonic() + 10  # it was sent its signal; the kernel takes its time where the cores are busy
    while not ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended()
