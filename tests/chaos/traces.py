"""What a worker left when it was killed, read from outside: its checkpoints, and the times of its training steps."""

from __future__ import annotations

import json
import struct
import time
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, order=True)
class Position:
    """How far a trial is in a checkpoint: epochs, and steps of the next one."""

    epoch: int
    epoch_steps: int


@dataclass(frozen=True)
class File:
    """A checkpoint of a worker, whole or half written.

    Attributes:
        number: the worker's first is 1.
        written: when its content was.
        appeared: when it got its name; None if it did not.
        positions: of the trials in it, by ticket.
    """

    number: int
    written: float
    appeared: float | None
    positions: dict[int, Position]


@dataclass(frozen=True)
class Traces:
    """What a killed worker left.

    Attributes:
        files: its checkpoints, in their order.
        steps: when it trained each of its steps.
        seconds: how long it took to read them.
    """

    files: list[File]
    steps: list[float]
    seconds: float

    def steps_between(self, start: float, end: float) -> int:
        """How many steps it trained then."""
        return bisect_right(self.steps, end) - bisect_right(self.steps, start)


def read_traces(worker_id: str, folder: Path, notes: Path) -> Traces:
    """Read what a worker that is dead left.

    Args:
        worker_id: whose.
        folder: of its study's checkpoints.
        notes: the file of its steps' times.
    """
    started = time.monotonic()
    found = []
    for path in folder.glob(f"*{worker_id}-*"):
        whole = not path.name.startswith(".")
        number = int(path.name.removeprefix(".").removeprefix(f"{worker_id}-").split(".")[0])
        about = path.stat()
        found.append(
            File(number, about.st_mtime, about.st_ctime if whole else None, read_positions(path) if whole else {})
        )
    content = notes.read_bytes() if notes.exists() else b""
    steps = [moment for (moment,) in struct.iter_unpack("d", content[: len(content) // 8 * 8])]
    return Traces(sorted(found, key=lambda file: file.number), steps, time.monotonic() - started)


def read_positions(path: Path) -> dict[int, Position]:
    """How far the trials in a checkpoint are, by ticket; read without the package's own reader."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        headers = json.loads(file.read(length))["__metadata__"]
    read = {int(ticket): json.loads(text) for ticket, text in headers.items()}
    return {ticket: Position(header["epoch"], header["epoch_steps"]) for ticket, header in read.items()}


def newest_file(checkpoint: str | None) -> str | None:
    """The name of the newest checkpoint that a ticket refers to."""
    return json.loads(checkpoint)[0]["file"].rpartition("/")[2] if checkpoint else None
