"""Studies, tickets and records in SQL: SQLite by default, PostgreSQL for many workers."""

from momentum_tuner.database.engine import (
    DEFAULT_URL,
    Database,
    engine_options,
    insert_new,
    tune_sqlite,
)
from momentum_tuner.database.migrate import migrate
from momentum_tuner.database.models import Base, Calibration, Epoch, Study, Ticket, Worker, database_now

__all__ = [
    "DEFAULT_URL",
    "Base",
    "Calibration",
    "Database",
    "Epoch",
    "Study",
    "Ticket",
    "Worker",
    "database_now",
    "engine_options",
    "insert_new",
    "migrate",
    "tune_sqlite",
]
