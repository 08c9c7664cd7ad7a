"""The Ray cluster: joining it, its nodes, and how many workers have room on each."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray._private.worker as ray_worker

from momentum_tuner.errors import DeviceError, InputError
from momentum_tuner.launcher.devices import available_cores

OBJECT_STORE_BYTES = 80 << 20
"""Next to nothing goes through Ray's object store; Ray itself takes no less than 75 MiB."""
CONNECT_SECONDS = 5.0
SILENCE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns that this will be its default
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else, below `uv run`, it uploads the working directory to all nodes
}


@dataclass(frozen=True)
class Node:
    """A living node of the cluster.

    Attributes:
        id: Ray's name for it, 56 hexadecimal digits.
        address: its IP address.
        host: its machine's name.
        resources: how much it has in all: `CPU`, `GPU`, ...
    """

    id: str
    address: str
    host: str
    resources: Mapping[str, float]

    @property
    def shown(self) -> str:
        """The node as people see it, and unlike every other node."""
        return f"{self.address} ({self.id[:8]})"

    @property
    def gpus(self) -> int:
        """How many GPUs it has."""
        return int(self.resources.get("GPU", 0))


@dataclass(frozen=True)
class Demand:
    """What one worker takes of a node: a CPU core, and a GPU or a part of one.

    Attributes:
        gpus: GPUs, at most 1; 0 for a worker that trains on the CPU.
        address: the only machine that will do; None for any.
    """

    gpus: float = 0.0
    address: str | None = None

    @property
    def device(self) -> str:
        """What the worker trains on: Ray lets it see only the GPU that it is given, so that is the first."""
        return "cuda:0" if self.gpus else "cpu"

    @property
    def sharing_gpu(self) -> int:
        """How many such workers one GPU takes."""
        return int(1 / self.gpus + 1e-9)

    def sharing(self, node: Node) -> int:
        """How many such workers share the device that one of them trains on there."""
        return self.sharing_gpu if self.gpus else self.room(node)

    def room(self, node: Node) -> int:
        """How many such workers the node takes."""
        if self.address is not None and node.address != self.address:
            return 0
        cores = int(node.resources.get("CPU", 0))
        return min(cores, node.gpus * self.sharing_gpu) if self.gpus else cores

    def resources(self) -> dict[str, float]:
        """Ray's own resource of one machine, where only that will do."""
        return {} if self.address is None else {f"node:{self.address}": 0.001}


def check_device(device: str, gpus_per_worker: float | None) -> None:
    """See that Ray can place workers by these.

    Raises:
        DeviceError: the device is unknown, or a GPU by its number.
        InputError: the part of a GPU is none, or for workers on the CPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"--device {device!r}: with --engine ray write auto, cpu or cuda; Ray chooses the GPUs")
    if gpus_per_worker is not None and not 0 < gpus_per_worker <= 1:
        raise InputError(f"--gpus-per-worker {gpus_per_worker:g}: write 1, or a part of a GPU such as 0.5")
    if gpus_per_worker is not None and device == "cpu":
        raise InputError("--gpus-per-worker: workers with --device cpu take no GPU; leave one of them out")


def choose_demand(device: str, gpus_per_worker: float | None, nodes: Sequence[Node], ours: bool) -> Demand:
    """What each worker takes: a GPU if the cluster has any, a part of one if that is asked for, else a CPU core.

    Args:
        device: `auto`, `cpu` or `cuda`.
        gpus_per_worker: as given, None for the choice.
        nodes: of the cluster.
        ours: whether the cluster is this machine only, so that no node with a GPU will ever join.

    Raises:
        DeviceError: there is no GPU and there will be none.
    """
    found = any(node.gpus for node in nodes)
    if device == "cpu" or (device == "auto" and gpus_per_worker is None and not found):
        return Demand()
    if ours and not found:
        raise DeviceError("Ray finds no GPU on this machine; use --device cpu, or see `nvidia-smi`")
    return Demand(gpus=gpus_per_worker or 1.0)


def connect(address: str | None) -> bool:
    """Join the cluster at that address, or start one on this machine; returns whether it is our own.

    Args:
        address: `auto`, `host:port`, or None for what `RAY_ADDRESS` says, else for a Ray of our own.

    Raises:
        InputError: no cluster answers there, or one of another version of Ray.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    ours = address == "local"
    if not ours and address != "auto":
        _check_address(address)
    os.environ.update({name: os.environ.get(name, value) for name, value in SILENCE.items()})
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray_worker.print_to_stdstream = _print_nothing  # what happens to nodes and workers we say ourselves, in one line
    own: dict[str, Any] = {
        "num_cpus": available_cores(),
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    try:
        with _our_sigterm():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **(own if ours else {}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--ray-address {address}: {lines[0]}") from error
    return ours


def nodes() -> list[Node]:
    """The nodes that are alive."""
    return [
        Node(n["NodeID"], n["NodeManagerAddress"], n["NodeManagerHostname"], n["Resources"])
        for n in ray.nodes()  # type: ignore[no-untyped-call]
        if n["Alive"]
    ]


def this_node(found: Sequence[Node]) -> Node:
    """The one among the nodes that this process is on."""
    mine = ray.get_runtime_context().get_node_id()
    return next(node for node in found if node.id == mine)


def only_machine(found: Sequence[Node], here: Node, database: str) -> str:
    """The address of this machine, if all nodes are on it: workers elsewhere do not reach an SQLite file.

    Raises:
        InputError: a node is on another machine.
    """
    elsewhere = next((n for n in found if (n.address, n.host) != (here.address, here.host)), None)
    if elsewhere is not None:
        raise InputError(
            f"--storage: node {elsewhere.address} of the Ray cluster cannot reach {database}, a file on this machine; "
            "use postgresql://user:password@host/database"
        )
    return here.address


def _check_address(address: str) -> None:
    """See quickly whether anything answers there: Ray itself tries for minutes, and says so on every line."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise InputError(f"--ray-address {address!r}: write auto, or host:port as `ray start --head` prints it")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--ray-address {address}: no Ray cluster answers there ({error})") from None


def _print_nothing(*_: object, **__: object) -> None:
    """In place of Ray's own printing."""


@contextlib.contextmanager
def _our_sigterm() -> Iterator[None]:
    """Keep this process's own answer to SIGTERM: Ray sets another one as it starts, which raises SystemExit."""
    before = signal.getsignal(signal.SIGTERM)
    came = False
    try:
        yield
    except SystemExit:
        came = True
    finally:
        signal.signal(signal.SIGTERM, before)
    if came:
        signal.raise_signal(signal.SIGTERM)
