"""Bring the tables to the current version; any number of processes may try at once."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from momentum_tuner.database.deadlines import PATIENCE
from momentum_tuner.database.engine import Database, engine_options
from momentum_tuner.errors import StorageError

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

VERSION_TABLE = "momentum_tuner_version"
CURRENT = "0003"
_LOCK_SECONDS = 300
_LOCK = 0x6D6F6D656E74  # "moment", the key of PostgreSQL's advisory lock around migrations
_KNOWN: list[str] = []
"""The version of its tables that the Optuna of this process knows, once it was asked: it reads all its migrations."""


def migrate(database: Database) -> None:
    """Create or upgrade our tables, then Optuna's. One process does it, others wait.

    Raises:
        StorageError: the database is not reachable, or of a newer momentum-tuner or another Optuna.
    """
    if is_current(database):
        return
    with database.write() as session:
        connection = session.connection(execution_options={PATIENCE: _LOCK_SECONDS})
        if database.dialect == "postgresql":
            session.execute(sa.text(f"SET LOCAL statement_timeout = {_LOCK_SECONDS * 1000}"))
            session.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        if _complete(connection):  # another process was here before
            return
        _upgrade(connection)
        if database.dialect == "postgresql":
            create_optuna_tables(database)
    if database.dialect == "sqlite":
        create_optuna_tables(database)  # on a connection of its own, which our transaction would keep out


def prepare_migration() -> None:
    """Import what `migrate` and Optuna take to look at versions, in time that nobody else wants."""
    import_module("alembic.command")


def is_current(database: Database) -> bool:
    """Whether the tables are there, and of this version.

    Raises:
        StorageError: they are of a newer momentum-tuner, or the database does not answer.
    """
    with database.read() as session:
        found = version(session.connection())
        if found is not None and found > CURRENT:
            raise StorageError(
                f"the database {database.shown} was written by a newer momentum-tuner (version {found}); "
                "upgrade this one: pip install -U momentum-tuner"
            )
        return _complete(session.connection())


def _complete(connection: Connection) -> bool:
    """Whether our tables are of this version and Optuna's are there: it writes its version last."""
    return bool(
        version(connection) == CURRENT
        and sa.inspect(connection).has_table("alembic_version")
        and connection.execute(sa.text("SELECT count(*) FROM alembic_version")).scalar()
    )


def version(connection: Connection) -> str | None:
    """The version of our tables in the database, None before the first migration."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
    return found


def create_optuna_tables(database: Database, tries: int = 20) -> None:
    """Let Optuna create its tables. Two processes that do so at once collide: the loser tries again.

    Raises:
        StorageError: the tables are there, of another version of Optuna.
    """
    import optuna

    for attempt in range(tries):
        try:
            storage = optuna.storages.RDBStorage(
                database.text, engine_kwargs=engine_options(database.url, 2), skip_compatibility_check=True
            )
        except (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError):
            if attempt == tries - 1:
                raise
            time.sleep(0.1 * (attempt + 1))
        else:
            try:
                refuse_other_optuna(database, storage)
            finally:
                storage.remove_session()
                storage.engine.dispose()
            return


def refuse_other_optuna(database: Database, storage: RDBStorage) -> None:
    """See that Optuna's tables are of the version of the Optuna installed here.

    Args:
        database: where they are.
        storage: Optuna's own on it.

    Raises:
        StorageError: they are of another version.
    """
    held = storage.get_current_version()
    if not _KNOWN:
        _KNOWN.append(storage.get_head_version())
    known = _KNOWN[0]
    if held != known:
        raise StorageError(
            f"the database {database.shown} holds Optuna's tables in version {held}, but the Optuna of this machine "
            f"knows {known}; install the Optuna they are of, or bring them up to date with `optuna storage upgrade`"
        )


def _upgrade(connection: Connection) -> None:
    if version(connection) == CURRENT:
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
