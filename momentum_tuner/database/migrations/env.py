"""Alembic's entry point: runs the migrations on the connection that `migrate` hands over."""

from alembic import context

from momentum_tuner.database.migrate import VERSION_TABLE
from momentum_tuner.database.models import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, version_table=VERSION_TABLE)
context.run_migrations()
