"""The database, MLflow and the place of checkpoints: reachable, of the right version, writable."""

from __future__ import annotations

import re
import sqlite3
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import sqlalchemy as sa

from momentum_tuner.checkpoints import CheckpointStore, default_checkpoints
from momentum_tuner.database import Database, Worker, database_now, is_current, storage_url
from momentum_tuner.doctor.finding import Finding, refused
from momentum_tuner.errors import InputError, StorageError, describe_failure, redact
from momentum_tuner.search import check_optuna
from momentum_tuner.tracking import check_tracking_uri, quiet_mlflow

PATIENCE_SECONDS = 5.0
NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "ceph", "glusterfs", "lustre"}
_OTHER_STORAGE = "start the server, or name another one with --storage"


class _UndoneError(Exception):
    """Ends a transaction that was only to see whether it could be."""


def check_database(storage: str) -> Iterator[Finding]:
    """Whether the database answers, is of this version, and can be written; an SQLite file is not made."""
    try:
        database = Database(storage)
    except InputError as error:
        yield refused("database", error, _OTHER_STORAGE)
        return
    try:
        yield from _look_at(database)
    except StorageError as error:
        mend = _OTHER_STORAGE
        if database.dialect == "sqlite":
            mend = f"make {database.url.database} and its folder writable, or name another one with --storage"
        yield refused("database", error, mend)
    finally:
        database.close()


def _look_at(database: Database) -> Iterator[Finding]:
    if not database.exists():
        folder = Path(database.url.database or "").parent
        if reason := _cannot_write(folder):
            mend = f"make {folder} writable, or name another place with --storage"
            yield Finding("database", "fail", f"{database.shown}: its folder cannot be written: {reason}", mend)
        else:
            yield Finding("database", "ok", f"{database.shown}: not there yet, the first study makes it")
            yield from _journal(database, None)
        return
    current = is_current(database)
    if current:
        check_optuna(database)
    try:
        _try_writing(database, current)
    except sa.exc.DatabaseError as error:  # a right that this user has not
        reason = str(error.orig).splitlines()[0]
        yield Finding(
            "database", "fail", f"{database.shown} cannot be written: {reason}", "ask its administrator for that right"
        )
        return
    with database.read() as session:
        if database.dialect == "sqlite":
            kind, journal = f"SQLite {sqlite3.sqlite_version}", session.scalar(sa.text("PRAGMA journal_mode"))
        else:
            kind, journal = f"PostgreSQL {session.scalar(sa.text('SHOW server_version'))}", None
    tables = (
        "its tables are of this version" if current else "the next command makes its tables, or brings them up to date"
    )
    yield Finding("database", "ok", f"{database.shown}: {kind}, can be written; {tables}")
    yield from _journal(database, journal)


def _try_writing(database: Database, current: bool) -> None:
    """Write a row, or make a table where there is none yet, and take it back."""
    with suppress(_UndoneError), database.write() as session:
        if current:
            now = database_now()
            row = {"host": "", "node": "", "pid": 0, "device": "", "slots": 0, "state": "stopped"}
            session.execute(sa.insert(Worker).values(id="doctor", started_at=now, heartbeat=now, **row))
        else:
            session.execute(sa.text("CREATE TABLE momentum_tuner_doctor (id INTEGER)"))
        raise _UndoneError


def _journal(database: Database, journal: str | None) -> Iterator[Finding]:
    """Whether workers can share an SQLite file: that takes write-ahead logging, and so a disk of this machine."""
    if database.dialect != "sqlite":
        return
    file = Path(database.url.database or "")
    mend = "put it on a disk of this machine, or use PostgreSQL"
    if (system := file_system(file.parent)) in NETWORK_FILE_SYSTEMS:
        yield Finding(
            "database", "warn", f"{file.parent} is on a network drive ({system}), where SQLite can break", mend
        )
    if journal not in (None, "wal"):
        found = f"{file} takes no write-ahead logging (journal mode {journal}); workers wait for each other"
        yield Finding("database", "warn", found, mend)


def check_tracking(uri: str) -> Iterator[Finding]:
    """Whether MLflow answers, lets us in, and is of a version that is known here."""
    if uri == "none":
        yield Finding("MLflow", "ok", "not used")
        return
    quiet_mlflow()
    try:
        check_tracking_uri(uri)
    except InputError as error:
        yield refused("MLflow", error, "name another --tracking-uri")
        return
    if uri.startswith("sqlite:///"):
        yield _tracking_file(uri, Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute())
    else:
        yield _tracking_server(uri)


def _tracking_file(uri: str, file: Path) -> Finding:
    """MLflow's own SQLite file."""
    elsewhere = "or name another --tracking-uri"
    if not file.exists():
        if reason := _cannot_write(file.parent):
            found = f"{uri}: its folder cannot be written: {reason}"
            return Finding("MLflow", "fail", found, f"make {file.parent} writable, {elsewhere}")
        return Finding("MLflow", "ok", f"{uri}: not there yet, the first study makes it")
    from mlflow.store.db.utils import _verify_schema

    try:
        with closing(sqlite3.connect(f"file:{file}?mode=rw", uri=True, timeout=PATIENCE_SECONDS)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("CREATE TABLE momentum_tuner_doctor (id INTEGER)")
            connection.rollback()
    except sqlite3.Error as error:
        return Finding("MLflow", "fail", f"{uri} cannot be written: {error}", f"make {file} writable, {elsewhere}")
    engine = sa.create_engine(f"sqlite:///{file}")
    try:
        _verify_schema(engine)
    except Exception as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        return Finding("MLflow", "fail", f"{uri}: {reason}", f"mlflow db upgrade {uri} (keep a copy), {elsewhere}")
    finally:
        engine.dispose()
    return Finding("MLflow", "ok", f"{uri}: can be written; its tables are of MLflow {_own_version()}")


def _tracking_server(uri: str) -> Finding:
    """An MLflow server, or a store in a database that MLflow itself opens."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    shown = redact(uri)
    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except MlflowException as error:
        return _refusal(shown, str(error))
    except Exception as error:  # of the database behind it
        return Finding("MLflow", "fail", f"{shown} does not answer: {describe_failure(error)}", _OTHER_TRACKING)
    theirs = _server_version(uri) if uri.startswith(("http://", "https://")) else None
    if theirs is not None and theirs.split(".")[0] != _own_version().split(".")[0]:
        mend = f"run a server of MLflow {_own_version()}, or of the same first number"
        return Finding("MLflow", "warn", f"{shown} is MLflow {theirs}, but {_own_version()} is here", mend)
    return Finding("MLflow", "ok", f"{shown} answers" + (f": MLflow {theirs}" if theirs else ""))


_OTHER_TRACKING = "start it (momentum-tuner ui), name another --tracking-uri, or `none`; studies run without it"


def _refusal(shown: str, message: str) -> Finding:
    """What an MLflow server says in place of an answer."""
    if "error code 403" in message or "Invalid Host header" in message:
        mend = "start the server with --allowed-hosts and the name by which it is reached here; see its own log"
        return Finding("MLflow", "fail", f"{shown} refuses requests from here (403 Forbidden)", mend)
    if "error code 401" in message:
        mend = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return Finding("MLflow", "fail", f"{shown} wants to know who asks (401 Unauthorized)", mend)
    if "error code 404" in message:
        return Finding("MLflow", "fail", f"{shown} answers, but not as MLflow does", "name another --tracking-uri")
    reason = re.search(r"\[Errno -?\d+\] ([\w ]+)|(timed out)", message)
    said = next(filter(None, reason.groups())) if reason else redact(message.splitlines()[0])[:200]
    return Finding("MLflow", "fail", f"{shown} does not answer: {said}", _OTHER_TRACKING)


def _server_version(uri: str) -> str | None:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=PATIENCE_SECONDS) as answer:
            return str(answer.read(100).decode()).strip()
    except (urllib.error.URLError, OSError, ValueError):  # behind a proxy that wants more than MLflow's own client says
        return None


def _own_version() -> str:
    from importlib.metadata import version

    return version("mlflow")


def check_checkpoints(url: str | None, storage: str) -> Iterator[Finding]:
    """Whether the states of running trials can be kept; a folder that is not there is not made.

    Where they are kept beside a database whose URL is wrong, there is nothing to say but that.
    """
    if url == "none":
        yield Finding("checkpoints", "ok", "none are kept: a trial whose worker dies begins anew")
        return
    folder = _checkpoint_folder(url, storage)
    if url is None and folder is None:
        return
    try:
        if folder is not None and not folder.exists():
            if reason := _cannot_write(_existing(folder)):
                mend = f"make {_existing(folder)} writable, or name another place with --checkpoints"
                yield Finding("checkpoints", "fail", f"{folder} cannot be made: {reason}", mend)
            else:
                yield Finding("checkpoints", "ok", f"{folder}: not there yet, the first study makes it")
            return
        store = CheckpointStore(str(folder) if folder is not None else str(url))
        store.prepare()
        yield Finding("checkpoints", "ok", f"{store.shown}: can be written")
    except InputError as error:
        yield refused("checkpoints", error, "make it writable, or name another place with --checkpoints")


def local_folders(storage: str, tracking_uri: str, checkpoints: str | None) -> dict[str, Path]:
    """The folders of this machine that a study writes to, by what is in them."""
    places: dict[str, Path | None] = {
        "database": _sqlite_folder(storage),
        "MLflow": _sqlite_folder(tracking_uri),
        "checkpoints": None if checkpoints == "none" else _checkpoint_folder(checkpoints, storage),
    }
    return {what: _existing(folder) for what, folder in places.items() if folder is not None}


def _sqlite_folder(url: str) -> Path | None:
    if not url.startswith("sqlite:///"):
        return None
    return Path(url.removeprefix("sqlite:///").partition("?")[0]).absolute().parent


def _checkpoint_folder(url: str | None, storage: str) -> Path | None:
    """Where checkpoints are kept, if that is a folder of this machine and known."""
    if url is None:
        try:
            place = storage_url(storage)
        except InputError:
            return None
        return Path(default_checkpoints(place.get_backend_name(), place.database))
    return None if "://" in url else Path(url).absolute()


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _cannot_write(folder: Path) -> str | None:
    """Why no file can be made in a folder; None if one can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, such as `ext4`; empty if it is not known."""
    import psutil

    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    place = folder.resolve()
    return next((mounts[above] for above in (place, *place.parents) if above in mounts), "")
