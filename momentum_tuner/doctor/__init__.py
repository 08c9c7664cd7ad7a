"""What this machine has, what is wrong with it, and how to mend that."""

from __future__ import annotations

from momentum_tuner.doctor.finding import Finding, checked
from momentum_tuner.doctor.machine import (
    check_cores,
    check_devices,
    check_disks,
    check_extras,
    check_memory,
    check_packages,
    check_python,
)
from momentum_tuner.doctor.stores import check_checkpoints, check_database, check_tracking, local_folders

__all__ = ["Finding", "examine"]


def examine(storage: str, tracking_uri: str, checkpoints: str | None) -> list[Finding]:
    """Look at everything that a run needs; nothing is changed.

    Args:
        storage: URL of the database.
        tracking_uri: where MLflow is; `none` for nowhere.
        checkpoints: folder or URL of the checkpoints; None for the folder beside the database, `none` for nowhere.
    """
    return [
        *checked("Python", check_python),
        *checked("packages", check_packages),
        *checked("devices", check_devices),
        *checked("CPU", check_cores),
        *checked("memory", check_memory),
        *checked("database", lambda: check_database(storage)),
        *checked("MLflow", lambda: check_tracking(tracking_uri)),
        *checked("checkpoints", lambda: check_checkpoints(checkpoints, storage)),
        *checked("disk", lambda: check_disks(local_folders(storage, tracking_uri, checkpoints))),
        *checked("extras", check_extras),
    ]
