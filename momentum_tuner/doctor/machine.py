"""Python, packages, devices, cores, memory and disks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from momentum_tuner.doctor.finding import Finding
from momentum_tuner.errors import describe_failure
from momentum_tuner.fork_server import may_have_gpu
from momentum_tuner.launcher.devices import MOST_CPU_WORKERS, available_cores, visible_gpus

OURSELVES = "momentum-tuner"
NAMED = ("torch", "optuna", "mlflow", "sqlalchemy")
"""Packages that have a line each; all others share one."""
WORKER_BYTES = 512 << 20
"""What a worker takes beside its model and data. Measured: 504 MB resident in the study of `init`, on a CPU."""
LITTLE_DISK, NO_DISK = 2 << 30, 200 << 20
FOR_TESTS = "test"
"""The extra that people who use this need not have."""


def check_python() -> Iterator[Finding]:
    """Whether this Python is one of those that pyproject.toml asks for."""
    here = f"{platform.python_version()} ({sys.executable})"
    try:
        wanted = importlib.metadata.metadata(OURSELVES)["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        yield Finding(OURSELVES, "warn", "a source tree that is not installed", "pip install . in its folder")
        return
    if SpecifierSet(wanted).contains(Version(platform.python_version()), prereleases=True):
        yield Finding("Python", "ok", here)
    else:
        yield Finding("Python", "fail", f"{here}, but it needs {wanted}", f"install a Python {wanted}, and a new venv")


def check_packages() -> Iterator[Finding]:
    """Whether every package is there in a version that pyproject.toml asks for."""
    others = 0
    for requirement in _requirements():
        finding = _package(requirement)
        if requirement.name in NAMED or finding.status != "ok":
            yield finding
        else:
            others += 1
    if others:
        yield Finding("packages", "ok", f"{others} others are of the versions needed")


def check_extras() -> Iterator[Finding]:
    """Which optional packages are there."""
    for extra, requirements in _extras().items():
        findings = [_package(requirement) for requirement in requirements]
        install = f"pip install '{OURSELVES}[{extra}]'"
        if all(finding.found == NOT_THERE for finding in findings):
            yield Finding(f"extra {extra}", "ok", f"not installed ({install})")
        elif wrong := [finding for finding in findings if finding.status != "ok"]:
            yield Finding(f"extra {extra}", "warn", f"{wrong[0].check}: {wrong[0].found}", install)
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(f"{f.check} {f.found}" for f in findings))


def check_devices() -> Iterator[Finding]:
    """The CPU and every GPU that torch sees, each with the gradient of a few fused slots, whose value is known."""
    try:
        import torch
    except Exception as error:  # a library of the system that is missing, for one
        yield Finding("devices", "fail", f"torch cannot be imported: {describe_failure(error)}", _reinstall())
        return
    yield from _compute("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = visible_gpus()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        yield from _compute(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if count == 0 and may_have_gpu():
        build = torch.version.cuda or torch.version.hip
        if build is None:
            mend = "install torch for this GPU: https://pytorch.org/get-started/locally/"
            yield Finding("GPU", "fail", f"there is one, but torch {torch.__version__} is a CPU build", mend)
        else:
            reason = str(said[0].message).splitlines()[0] if said else f"torch is built for {build}"
            mend = "update the driver, or let the container have the GPU (docker run --gpus all); see nvidia-smi"
            yield Finding("GPU", "fail", f"there is one, but torch cannot use it: {reason}{_driver()}", mend)
    elif count == 0:
        yield Finding("GPU", "ok", "none; studies run on the CPU")


def check_cores() -> Iterator[Finding]:
    """How many cores there are, and how many of them this process gets."""
    cores = available_cores()
    quota = _cpu_quota()
    workers = min(cores, MOST_CPU_WORKERS)
    threads = os.environ.get("OMP_NUM_THREADS")
    shown = f"{cores} cores" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    if quota is not None and quota < workers:
        few = max(1, int(quota))
        yield Finding("CPU", "warn", f"{shown}, but the container may use only {quota:g}", f"run with --workers {few}")
    else:
        yield Finding("CPU", "ok", f"{shown}; --workers auto starts {workers} on the CPU")


def check_memory() -> Iterator[Finding]:
    """Whether memory suffices for the workers that `--workers auto` starts."""
    import psutil

    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    limit = _memory_limit()
    if limit is not None and limit < total:
        free, total = min(free, limit), limit
    shown = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    fit, workers = int(free // WORKER_BYTES), min(available_cores(), MOST_CPU_WORKERS)
    if fit < 1:
        yield Finding("memory", "fail", f"{shown}, too little for one worker", "end other programs, or add memory")
    elif fit < workers:
        yield Finding("memory", "warn", f"{shown}, for {fit} of {workers} workers", f"run with --workers {fit}")
    else:
        yield Finding("memory", "ok", shown)


def check_disks(folders: Mapping[str, Path]) -> Iterator[Finding]:
    """Whether there is room where the database, MLflow and checkpoints write, by what is kept in each folder."""
    kept: dict[tuple[int, int], list[str]] = {}
    for what, folder in folders.items():
        usage = shutil.disk_usage(folder)
        kept.setdefault((usage.free, usage.total), []).append(f"{what} ({folder})")
    for (free, total), places in kept.items():
        shown = f"{_bytes(free)} of {_bytes(total)} free for {', '.join(places)}"
        mend = "make room there, or name another place"
        if free < NO_DISK:
            yield Finding("disk", "fail", shown, mend)
        elif free < LITTLE_DISK:
            yield Finding("disk", "warn", shown, mend)
        else:
            yield Finding("disk", "ok", shown)


NOT_THERE = "not installed"


def _package(requirement: Requirement) -> Finding:
    install = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, "fail", NOT_THERE, install)
    if requirement.specifier.contains(Version(version), prereleases=True):
        return Finding(requirement.name, "ok", version)
    return Finding(requirement.name, "fail", f"{version}, but it needs {requirement.specifier}", install)


def _requirements() -> list[Requirement]:
    """What pyproject.toml asks for on this machine, without extras."""
    found = [Requirement(text) for text in _required()]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def _extras() -> dict[str, list[Requirement]]:
    """What each extra asks for beyond that."""
    if not _required():
        return {}
    names = importlib.metadata.metadata(OURSELVES).get_all("Provides-Extra") or []
    always = _requirements()
    found = [Requirement(text) for text in _required()]
    return {
        extra: [r for r in found if r not in always and r.marker is not None and r.marker.evaluate({"extra": extra})]
        for extra in names
        if extra != FOR_TESTS
    }


def _required() -> list[str]:
    try:
        return importlib.metadata.requires(OURSELVES) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _reinstall() -> str:
    wanted = next((str(r.specifier) for r in _requirements() if r.name == "torch"), "")
    return f"pip install --force-reinstall 'torch{wanted}'"


def _compute(device: str, shown: str) -> Iterator[Finding]:
    """A gradient as workers take it: of the sum of cubes, for several slots at once."""
    import torch

    try:
        slots = torch.arange(8.0, device=device).reshape(4, 2)
        found = torch.func.vmap(torch.func.grad(lambda row: (row**3).sum()))(slots).cpu()
    except Exception as error:
        mend = "see nvidia-smi whether another program has it, or run with --device cpu"
        yield Finding(device, "fail", f"{shown}: {describe_failure(error)}", mend)
        return
    if torch.equal(found, 3 * torch.arange(8.0).reshape(4, 2) ** 2):
        yield Finding(device, "ok", shown)
    else:
        yield Finding(device, "fail", f"{shown}: computes a wrong gradient", f"do not train on it; {_reinstall()}")


def _driver() -> str:
    """The version of NVIDIA's driver, as far as it says."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f" (driver {found[0]})" if found else ""


def _cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the control group of a container may use; None without a bound."""
    older = _words(root / "cpu" / "cpu.cfs_quota_us") + _words(root / "cpu" / "cpu.cfs_period_us")
    words = _words(root / "cpu.max") or older
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return None
    return int(words[0]) / int(words[1])


def _memory_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the control group of a container may use; None without a bound."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        found = _words(root / name)
        if found and found[0].isdecimal():
            return int(found[0])
    return None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _bytes(count: int) -> str:
    return f"{count / 2**30:.0f} GiB" if count >= 10 << 30 else f"{count / 2**20:.0f} MiB"
