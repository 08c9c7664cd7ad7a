"""What workers measured of a task on a device, kept in the database for the next run."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import sqlalchemy as sa
import torch

from momentum_tuner.database import Calibration as Row
from momentum_tuner.database import Database, database_now, insert_new
from momentum_tuner.errors import StorageError
from momentum_tuner.tickets import StudyRecord
from momentum_tuner.trainer import Calibration, Way

logger = logging.getLogger(__name__)

COMPILING = "compiling"
"""The mode of the row that says what compiling took."""


class Calibrations:
    """The rows of one task on one device, under these versions.

    A database that does not answer is no reason to stop: then the worker measures anew, or keeps it to itself.

    Args:
        database: where they are.
        study: whose task it is.
        batch_size: with which it was measured.
        device: as torch calls it.
        most: the greatest width that was measured.
    """

    def __init__(self, database: Database, study: StudyRecord, batch_size: int, device: str, most: int) -> None:
        self._database = database
        self._key = {
            "task": _describe_task(study, batch_size),
            "device": _describe_device(device, most)[:128],
            "version": f"{version('momentum-tuner')}, torch {torch.__version__}"[:64],
        }
        self._known: Calibration | None = None

    def read(self) -> Calibration | None:
        """What is known, if anything is."""
        try:
            with self._database.read() as session:
                rows = list(session.scalars(sa.select(Row).filter_by(**self._key)))
        except StorageError as error:
            logger.warning("%s; the fastest way of training is measured anew", error)
            return None
        seconds = {way: row.step_seconds for row in rows if (way := _way(row)) is not None}
        compiling = [row.step_seconds for row in rows if row.mode == COMPILING]
        self._known = Calibration(seconds, compiling[0] if compiling else None) if seconds else None
        return self._known

    def write(self, found: Calibration) -> None:
        """Add what is new; what another worker wrote meanwhile stays."""
        if found == self._known or not found.seconds:
            return
        measured = [(_mode(way), way.width, seconds) for way, seconds in found.seconds.items()]
        if found.compile_seconds is not None:
            measured.append((COMPILING, 0, found.compile_seconds))
        rows = [
            {**self._key, "mode": mode, "width": width, "step_seconds": seconds} for mode, width, seconds in measured
        ]
        try:
            with self._database.write() as session:
                insert = insert_new(self._database.dialect, Row)
                session.execute(insert.values([{**row, "measured_at": database_now()} for row in rows]))
        except StorageError as error:
            logger.warning("%s; what was measured of the ways of training is not kept", error)
            return
        self._known = found


def _mode(way: Way) -> str:
    return way.mode if way.threads == 1 else f"{way.mode} x{way.threads}"


def _way(row: Row) -> Way | None:
    """The way that a row is about, None for `COMPILING`."""
    mode, _, threads = row.mode.partition(" x")
    return None if mode == COMPILING else Way(mode, row.width, int(threads or 1))


def _describe_task(study: StudyRecord, batch_size: int) -> str:
    """A digest of all that tells the arithmetic of a step."""
    spec = study.spec
    described = [spec.task.factory, dict(spec.task.params), spec.precision, batch_size]
    file = Path(study.folder or ".") / spec.task.factory.partition(":")[0]
    if file.suffix == ".py" and file.is_file():
        described += [str(file.parent), hashlib.sha256(file.read_bytes()).hexdigest()]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def _describe_device(device: str, most: int) -> str:
    """The hardware, and the part of it that a worker has."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, {most} slots"
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(models, platform.processor() or platform.machine())
    return f"{processor}, {torch.get_num_threads()} of {psutil.cpu_count() or 1} cores, {most} slots"
