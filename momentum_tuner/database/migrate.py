"""Bring the tables to the current version; any number of processes may try at once."""

from __future__ import annotations

import time
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from momentum_tuner.database.engine import Database
from momentum_tuner.errors import StorageError

VERSION_TABLE = "momentum_tuner_version"
CURRENT = "0001"
_LOCK = 0x6D6F6D656E74  # "moment", the key of PostgreSQL's advisory lock around migrations


def migrate(database: Database) -> None:
    """Create or upgrade our tables, then Optuna's. One process does it, others wait.

    Raises:
        StorageError: the database is not reachable, or of a newer momentum-tuner.
    """
    with database.read() as session:
        found = version(session.connection())
        ready = found == CURRENT and sa.inspect(session.connection()).has_table("alembic_version")
    if ready:
        return
    if found is not None and found > CURRENT:
        raise StorageError(
            f"the database {database.shown} was written by a newer momentum-tuner (version {found}); "
            "upgrade this one: pip install -U momentum-tuner"
        )
    if database.dialect == "postgresql":
        with database.write() as session:
            session.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            _upgrade(session.connection())
            create_optuna_tables(database)
    else:
        with database.write() as session:
            _upgrade(session.connection())
        create_optuna_tables(database)


def version(connection: Connection) -> str | None:
    """The version of our tables in the database, None before the first migration."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
    return found


def create_optuna_tables(database: Database, tries: int = 20) -> None:
    """Let Optuna create its tables. Two processes that do so at once collide: the loser tries again."""
    import optuna

    from momentum_tuner.database.engine import engine_options

    for attempt in range(tries):
        try:
            options = engine_options(database.url, 1)
            storage = optuna.storages.RDBStorage(database.text, engine_kwargs=options)
        except (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError):
            if attempt == tries - 1:
                raise
            time.sleep(0.1 * (attempt + 1))
        else:
            storage.engine.dispose()
            return


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
