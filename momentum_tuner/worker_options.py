"""How a worker runs: what crosses from the launcher to the worker's process. Free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass

GRACE_SECONDS = 30.0
"""A worker whose heartbeat is older than this is given up, and its tickets are adopted."""
CHECKPOINT_SECONDS = 30.0
"""How much work a worker that dies may lose at most."""


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker runs; plain JSON values.

    Attributes:
        studies: names of the studies to serve; empty: every open study.
        device: `cpu`, `cuda:1`, ...
        slots: trials at once, None for the fastest by measurement.
        compiles: whether the training step is compiled: `on`, `off`, or `auto`, once that repays.
        sharing: how many workers share the device; a worker that chooses its slots takes its part.
        threads: CPU threads, None for torch's choice.
        trust: packages and task files that may be imported.
        forever: wait for new studies instead of ending.
        ordinal: makes the samplers of several workers draw different points.
        grace_seconds: after how long a silent worker is given up.
        checkpoints: where the states of running trials are kept (a folder or a URL of fsspec); None: nowhere.
        checkpoint_seconds: how often.
        node: the machine that people see it on; empty for the host's name.
    """

    studies: tuple[str, ...] = ()
    device: str = "cpu"
    slots: int | None = None
    compiles: str = "auto"
    sharing: int = 1
    threads: int | None = None
    trust: tuple[str, ...] = ()
    forever: bool = False
    ordinal: int = 0
    grace_seconds: float = GRACE_SECONDS
    checkpoints: str | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    node: str = ""
