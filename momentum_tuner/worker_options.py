"""How a worker runs: what crosses from the launcher to the worker's process. Free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass

GRACE_SECONDS = 30.0
"""A worker whose heartbeat is older than this is given up, and its tickets are adopted."""


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker runs; plain JSON values.

    Attributes:
        studies: names of the studies to serve; empty: every open study.
        device: `cpu`, `cuda:1`, ...
        slots: trials at once, None for the trainer's choice.
        sharing: how many workers share the device; a worker that chooses its slots takes its part.
        threads: CPU threads, None for torch's choice.
        trust: packages and task files that may be imported.
        forever: wait for new studies instead of ending.
        ordinal: makes the samplers of several workers draw different points.
        grace_seconds: after how long a silent worker is given up.
    """

    studies: tuple[str, ...] = ()
    device: str = "cpu"
    slots: int | None = None
    sharing: int = 1
    threads: int | None = None
    trust: tuple[str, ...] = ()
    forever: bool = False
    ordinal: int = 0
    grace_seconds: float = GRACE_SECONDS
