"""A bound on how long a connection may wait for a server that says nothing.

Server-side statement timeouts and TCP's own do not help where something between the two keeps the connection alive and
passes nothing on (a proxy, a firewall): libpq then waits for ever. A thread shuts such a connection's socket, which
turns the wait into the error of a lost connection.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

PATIENCE = "patience"
"""An execution option of a connection whose statements may take longer: how many seconds."""
_EVERY = 0.5


class Deadlines:
    """Watches the connections of engines that are in use.

    Args:
        seconds: how long a connection may be in use after its last statement began.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._until: dict[int, tuple[float, Any]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, engine: Engine) -> None:
        """Watch all connections that the engine opens from now on, and see that each lives before it is used.

        SQLAlchemy's own `pool_pre_ping` comes before any event, where a silent server would stop it for ever.
        """
        dialect: Any = engine.dialect
        sa.event.listen(engine, "connect", lambda connection, _: self._begin(connection), insert=True)

        @sa.event.listens_for(engine, "checkout")
        def begin(connection: Any, *_: Any) -> None:
            self._begin(connection)
            try:
                dialect.do_ping(connection)
            except dialect.loaded_dbapi.Error:
                raise sa.exc.DisconnectionError from None  # SQLAlchemy makes a new one

        sa.event.listen(engine, "checkin", lambda connection, _: self._end(connection))
        sa.event.listen(engine, "close", lambda connection, _: self._end(connection))

        @sa.event.listens_for(engine, "before_cursor_execute")
        def renew(connection: sa.Connection, *_: Any) -> None:
            self._begin(connection.connection.dbapi_connection, connection.get_execution_options().get(PATIENCE))

    def _begin(self, connection: Any, seconds: float | None = None) -> None:
        with self._lock:
            self._until[id(connection)] = time.monotonic() + (seconds or self.seconds), connection
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._watch, name="database deadlines", daemon=True)
                self._thread.start()

    def _end(self, connection: Any) -> None:
        with self._lock:
            self._until.pop(id(connection), None)

    def _watch(self) -> None:
        while True:
            time.sleep(_EVERY)
            now = time.monotonic()
            with self._lock:
                late = [connection for until, connection in self._until.values() if until < now]
                for connection in late:
                    del self._until[id(connection)]
                    _shut(connection)


def _shut(connection: Any) -> None:
    """Shut the socket under a psycopg connection; whoever reads from it gets an error."""
    with contextlib.suppress(Exception):  # it may be closed already
        copy = os.dup(connection.fileno())
        with socket.socket(fileno=copy) as end:
            end.shutdown(socket.SHUT_RDWR)
