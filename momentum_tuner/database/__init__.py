"""Studies, tickets and records in SQL: SQLite by default, PostgreSQL for many workers."""

from momentum_tuner.database.engine import (
    Database,
    engine_options,
    insert_new,
    is_unreachable,
    storage_url,
    tune_engine,
)
from momentum_tuner.database.migrate import is_current, migrate, prepare_migration, refuse_other_optuna
from momentum_tuner.database.models import (
    Base,
    Calibration,
    Epoch,
    Load,
    Study,
    Ticket,
    Worker,
    database_now,
    plain_number,
)

__all__ = [
    "Base",
    "Calibration",
    "Database",
    "Epoch",
    "Load",
    "Study",
    "Ticket",
    "Worker",
    "database_now",
    "engine_options",
    "insert_new",
    "is_current",
    "is_unreachable",
    "migrate",
    "plain_number",
    "prepare_migration",
    "refuse_other_optuna",
    "storage_url",
    "tune_engine",
]
