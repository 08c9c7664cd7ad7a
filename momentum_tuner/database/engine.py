"""Connections to the database: SQLite and PostgreSQL behind one interface."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.orm import Session

from momentum_tuner.database.deadlines import Deadlines
from momentum_tuner.errors import MissingExtraError, StorageError, redact

BUSY_SECONDS = 30
STATEMENT_SECONDS = 20
"""How long the server may work on one statement."""
ANSWER_SECONDS = 5
"""How long a server may say nothing at all before a connection to it is tried, or kept alive, in vain."""


def storage_url(text: str) -> URL:
    """A database URL, checked, with the driver that momentum-tuner uses.

    Raises:
        StorageError: it is not a URL, or of another database than SQLite and PostgreSQL.
        MissingExtraError: PostgreSQL without psycopg.
    """
    try:
        url = make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        raise StorageError(
            f"--storage {_harmless(text)!r} is not a database URL; write sqlite:///file.db or "
            "postgresql://user:password@host/database"
        ) from None
    backend = url.get_backend_name()
    if backend == "sqlite":
        if not url.database or url.database == ":memory:":
            raise StorageError("--storage: an in-memory SQLite database cannot be shared; write sqlite:///file.db")
        return url.set(drivername="sqlite", database=str(Path(url.database).absolute()))
    if backend in {"postgresql", "postgres"}:
        if "@" in (url.host or ""):  # what follows would be shown as the host
            raise StorageError("--storage: the user or the password holds an '@'; write it as %40")
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise MissingExtraError(
                "PostgreSQL needs the extra 'postgres': pip install 'momentum-tuner[postgres]'"
            ) from None
        return url.set(drivername="postgresql+psycopg")
    raise StorageError(f"--storage: {backend!r} is not supported; use sqlite or postgresql")


def engine_options(url: URL, connections: int) -> dict[str, Any]:
    """Arguments of `create_engine` for our own tables and for Optuna's: timeouts, and a bound on connections.

    What the URL itself says about a connection (as `?connect_timeout=3`) holds.
    """
    if url.get_backend_name() == "sqlite":
        # A pool, as opening a file and closing it (a checkpoint each time) takes ten times as long as a transaction.
        return {
            "pool_size": connections,
            "max_overflow": 10,
            "connect_args": {"timeout": BUSY_SECONDS, "check_same_thread": False},
        }
    limits = (
        f"-c statement_timeout={STATEMENT_SECONDS * 1000}",
        # The server gives up the locks of a client that fell silent before its own TCP would tell it (two hours).
        f"-c idle_in_transaction_session_timeout={STATEMENT_SECONDS * 1000}",
    )
    options = " ".join((*url.normalized_query.get("options", ()), *limits))
    defaults = {
        "connect_timeout": ANSWER_SECONDS,
        "keepalives_idle": ANSWER_SECONDS,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 2 * ANSWER_SECONDS * 1000,
    }
    return {
        "pool_size": connections,
        "max_overflow": 0,
        "pool_timeout": STATEMENT_SECONDS,
        "connect_args": {k: v for k, v in defaults.items() if k not in url.query} | {"options": options},
    }


_deadlines = Deadlines(STATEMENT_SECONDS + ANSWER_SECONDS)


def tune_engine(engine: Engine) -> None:
    """See to every new connection: a bound on waiting for a silent server, and for SQLite write-ahead logging.

    With that, readers never wait for the writer.
    """
    if engine.dialect.name != "sqlite":
        _deadlines.watch(engine)
        return

    @sa.event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        _use_wal(cursor)
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()


def _use_wal(cursor: sqlite3.Cursor) -> None:
    """Switch the file to write-ahead logging; SQLite itself does not wait where several processes do so at once."""
    deadline = time.monotonic() + BUSY_SECONDS
    while cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


class Database:
    """The database of studies, tickets and records.

    Args:
        url: as the user wrote it; see `storage_url`.
        connections: most connections held at once (PostgreSQL).
    """

    def __init__(self, url: str, connections: int = 2) -> None:
        self.url = storage_url(url)
        options = engine_options(self.url, connections)
        if self.dialect == "sqlite":
            folder = Path(self.url.database or "").parent
            if not folder.is_dir():
                raise StorageError(f"--storage: the folder {folder} does not exist; make it first")
            # None hands BEGIN to us: the driver's own would be a deferred one, which can fail half-way as locked.
            options["connect_args"]["isolation_level"] = None
        self.engine = sa.create_engine(self.url, **options)
        tune_engine(self.engine)
        if self.dialect == "sqlite":
            sa.event.listen(self.engine, "begin", _begin_sqlite)

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self.url.get_backend_name()

    def exists(self) -> bool:
        """Whether there is something to connect to: always for a server, a file for SQLite."""
        return self.dialect != "sqlite" or Path(self.url.database or "").exists()

    @property
    def text(self) -> str:
        """The URL with its password, for the libraries and child processes that connect by themselves."""
        return self.url.render_as_string(hide_password=False)

    @property
    def shown(self) -> str:
        """The URL as people may see it."""
        if self.dialect == "sqlite":
            return f"sqlite:///{self.url.database}"
        user = "***@" if self.url.username or self.url.password else ""
        port = f":{self.url.port}" if self.url.port else ""
        return f"postgresql://{user}{self.url.host or ''}{port}/{self.url.database or ''}"

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that only reads."""
        with self.translated(), Session(self.engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that writes; on SQLite it holds the write lock from its start (`BEGIN IMMEDIATE`)."""
        engine = self.engine.execution_options(immediate=True)
        with self.translated(), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn the driver's errors of reaching the database into one line, without secrets.

        Raises:
            StorageError: it does not answer, or is no database.
        """
        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            if is_unreachable(error):
                raise StorageError(f"the database {self.shown} does not answer: {self._first_line(error)}") from error
            if isinstance(error, sa.exc.DatabaseError) and "file is not a database" in str(error):
                raise StorageError(f"--storage: {self.shown} is not an SQLite database") from None
            raise

    def _first_line(self, error: sa.exc.SQLAlchemyError) -> str:
        origin = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        lines = str(origin).strip().splitlines()
        line = redact(lines[0]) if lines else type(origin).__name__
        for secret in (self.url.password, *self.url.normalized_query.get("password", ())):
            if secret:
                line = line.replace(secret, "***")
        return line


def is_unreachable(error: BaseException) -> bool:
    """Whether SQLAlchemy raised this as a database does not answer, or has ended the connection.

    PostgreSQL says of a client that fell silent in a transaction that it is an internal error.
    """
    if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.TimeoutError):
        return True
    return isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("immediate")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _harmless(text: str) -> str:
    """What is no URL, as far as it cannot hold a password."""
    if "@" not in text and "password" not in text:
        return text
    scheme = re.match(r"[a-zA-Z][\w+.-]*://", text)
    return f"{scheme[0] if scheme else ''}***"


def insert_new(dialect: str, table: Any) -> Any:
    """An INSERT into a table, or a mapped class, that passes over rows whose primary key exists."""
    if dialect == "sqlite":
        from sqlalchemy.dialects.sqlite import insert as insert_sqlite

        return insert_sqlite(table).on_conflict_do_nothing()
    from sqlalchemy.dialects.postgresql import insert as insert_postgresql

    return insert_postgresql(table).on_conflict_do_nothing()
