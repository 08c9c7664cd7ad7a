"""What a worker left when it was killed, read from outside: its checkpoints, and the times of its training steps."""

from __future__ import annotations

import json
import struct
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class File:
    """A checkpoint of a worker, whole or half written.

    Attributes:
        name: of the file.
        number: the worker's first is 1.
        written: when its content was, as far as there is one.
        epochs: that the trials in it have behind them, by ticket.
    """

    name: str
    number: int
    written: float
    epochs: dict[int, int]


@dataclass(frozen=True)
class Traces:
    """What a killed worker left.

    Attributes:
        files: its checkpoints, in their order.
        steps: when it trained each of its steps.
    """

    files: list[File]
    steps: list[float]

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
    found = []
    for path in folder.glob(f"*{worker_id}-*"):
        number = int(path.name.removeprefix(".").removeprefix(f"{worker_id}-").split(".")[0])
        epochs = {} if path.name.startswith(".") else read_epochs(path)
        found.append(File(path.name, number, path.stat().st_mtime, epochs))
    content = notes.read_bytes() if notes.exists() else b""
    steps = [moment for (moment,) in struct.iter_unpack("d", content[: len(content) // 8 * 8])]
    return Traces(sorted(found, key=lambda file: file.number), steps)


def read_epochs(path: Path) -> dict[int, int]:
    """How many epochs the trials in a checkpoint have behind them, by ticket; without the package's own reader."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        headers = json.loads(file.read(length))["__metadata__"]
    return {int(ticket): json.loads(text)["epoch"] for ticket, text in headers.items()}


def newest_file(checkpoint: str | None) -> str | None:
    """The name of the newest checkpoint that a ticket refers to."""
    return json.loads(checkpoint)[0]["file"].rpartition("/")[2] if checkpoint else None
