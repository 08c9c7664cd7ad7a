"""Which worker runs on which device, with how many CPU threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from momentum_tuner.errors import DeviceError, InputError
from momentum_tuner.fork_server import may_have_gpu

MOST_CPU_WORKERS = 8
MOST_WORKERS = 256
"""On one machine: each is a process with a copy of the task, and an answer from the database to wait for."""


@dataclass(frozen=True)
class Placement:
    """Where one worker runs."""

    device: str
    sharing: int
    threads: int | None


def plan_workers(workers: str, device: str) -> list[Placement]:
    """A placement for each worker.

    `--workers auto` is one worker per GPU, or one per CPU core up to 8: a worker with several threads waits at every
    operation for the slowest of them, and any other busy process makes that wait long. Several workers share the
    devices in turn, and those on the CPU divide its cores among them.

    Args:
        workers: `auto` or a number.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `cuda:0,2`.

    Raises:
        InputError: `workers` is not a number from 1 to 256.
        DeviceError: the device is unknown or not on this machine.
    """
    devices = resolve_devices(device)
    cores = available_cores()
    if workers == "auto":
        count = min(cores, MOST_CPU_WORKERS) if devices == ["cpu"] else len(devices)
    elif workers.isdecimal() and int(workers) > 0:
        count = int(workers)
        if count > MOST_WORKERS:
            raise InputError(f"--workers {workers}: write {MOST_WORKERS} or less, or auto; more run on other machines")
    else:
        raise InputError(f"--workers {workers!r}: write a number above 0, or auto")
    chosen = [devices[i % len(devices)] for i in range(count)]
    return [Placement(name, chosen.count(name), max(1, cores // count) if name == "cpu" else None) for name in chosen]


def check_placing(
    workers: str, device: str, engine: str, ray_address: str | None, gpus_per_worker: float | None
) -> None:
    """See that options of workers can be meant, for a study that may need none; Ray sees to its own.

    Args:
        workers: `--workers`.
        device: `--device`; torch is asked only where it names a GPU.
        engine: `--engine`.
        ray_address: `--ray-address`.
        gpus_per_worker: `--gpus-per-worker`.

    Raises:
        InputError: they cannot.
    """
    if engine == "ray":
        return
    if ray_address is not None or gpus_per_worker is not None:
        raise InputError("--ray-address and --gpus-per-worker need --engine ray")
    plan_workers(workers, "cpu" if device == "auto" else device)


def resolve_devices(device: str) -> list[str]:
    """The devices that `--device` names, each as torch calls it."""
    if device == "cpu":
        return ["cpu"]
    if device == "auto" and not may_have_gpu():
        return ["cpu"]
    found = visible_gpus()
    if device == "auto":
        return [f"cuda:{i}" for i in range(found)] or ["cpu"]
    name, _, numbers = device.partition(":")
    if name != "cuda" or (numbers and not all(n.strip().isdecimal() for n in numbers.split(","))):
        raise DeviceError(f"--device {device!r}: write auto, cpu, cuda, cuda:1 or cuda:0,2")
    if not found:
        raise DeviceError(f"--device {device}: torch sees no GPU here; use --device cpu, or see `nvidia-smi`")
    chosen: Sequence[int] = [int(n) for n in numbers.split(",")] if numbers else range(found)
    absent = [n for n in chosen if n >= found]
    if absent:
        raise DeviceError(
            f"--device {device}: this machine has {found} GPU(s), numbered from 0; there is no {absent[0]}"
        )
    return [f"cuda:{n}" for n in chosen]


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus() -> int:
    """How many GPUs torch sees."""
    import torch

    return torch.cuda.device_count()
