"""Connections to a server that says nothing are given up; all others are left alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from momentum_tuner.database import Database
from momentum_tuner.database.deadlines import Deadlines
from momentum_tuner.errors import StorageError


@pytest.fixture
def watched(postgresql) -> Iterator[Callable[..., Engine]]:
    """A function that makes an engine whose connections these deadlines watch."""
    name = postgresql.create()
    url = sa.make_url(postgresql.url(name)).set(drivername="postgresql+psycopg")
    engines: list[Engine] = []

    def make(deadlines: Deadlines) -> Engine:
        engines.append(sa.create_engine(url, pool_size=2))
        deadlines.watch(engines[-1])
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()
    postgresql.drop(name)


def backend(connection: sa.Connection) -> int:
    return connection.scalar(sa.text("SELECT pg_backend_pid()"))


def watchers() -> int:
    return sum(thread.name == "database deadlines" for thread in threading.enumerate())


def test_a_statement_without_an_answer_ends_in_an_error_and_the_next_connection_is_a_new_one(watched):
    engine = watched(Deadlines(1.0))
    started = time.monotonic()
    with pytest.raises(sa.exc.OperationalError) as lost, engine.connect() as connection:
        first = backend(connection)
        connection.execute(sa.text("SELECT pg_sleep(60)"))
    assert 1.0 <= time.monotonic() - started < 5.0
    assert lost.value.connection_invalidated
    with engine.connect() as connection:
        assert backend(connection) != first


def test_a_transaction_that_gets_an_answer_to_each_statement_may_last_longer(watched):
    engine = watched(Deadlines(1.0))
    started = time.monotonic()
    with engine.begin() as connection:
        first = backend(connection)
        while time.monotonic() - started < 2.5:
            connection.execute(sa.text("SELECT pg_sleep(0.3)"))
        assert backend(connection) == first


def test_a_connection_that_is_used_again_has_its_time_anew(watched):
    engine = watched(Deadlines(1.0))
    backends = set()
    for _ in range(4):
        with engine.connect() as connection:
            backends.add(backend(connection))
            connection.execute(sa.text("SELECT pg_sleep(0.6)"))
    assert len(backends) == 1


def test_idle_connections_in_the_pool_are_left_alone(watched):
    engine = watched(Deadlines(0.5))
    with engine.connect() as one, engine.connect() as other:
        before = {backend(one), backend(other)}
    time.sleep(1.6)
    with engine.connect() as one, engine.connect() as other:
        assert {backend(one), backend(other)} == before


def test_a_commit_without_an_answer_is_ended_too(watched):
    engine = watched(Deadlines(1.0))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE slow (n int)"))
        connection.execute(
            sa.text(
                "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
                "'BEGIN PERFORM pg_sleep(60); RETURN NULL; END'"
            )
        )
        connection.execute(
            sa.text(
                "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION wait()"
            )
        )
    started = time.monotonic()
    with pytest.raises(sa.exc.OperationalError), engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO slow VALUES (1)"))
    assert time.monotonic() - started < 5.0


def test_one_thread_watches_all_connections_however_many_there_were(watched):
    deadlines = Deadlines(1.0)
    before = watchers()
    for _ in range(3):
        engine = watched(deadlines)
        for _ in range(5):
            with engine.connect() as one, engine.connect() as other:
                assert backend(one) != backend(other)
        engine.dispose()
    assert watchers() == before + 1
    assert not deadlines._until, "nothing of closed connections is kept"


def test_many_connections_that_stick_at_once_are_all_ended(watched):
    engine = watched(Deadlines(1.0))
    lost: list[Exception] = []

    def stick() -> None:
        try:
            with engine.connect() as connection:
                connection.execute(sa.text("SELECT pg_sleep(60)"))
        except sa.exc.OperationalError as error:
            lost.append(error)

    threads = [threading.Thread(target=stick) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(lost) == 2


def test_our_own_databases_have_a_deadline(postgresql_database, monkeypatch):
    monkeypatch.setattr("momentum_tuner.database.engine._deadlines.seconds", 1.0)
    again = Database(postgresql_database.text)
    started = time.monotonic()
    with pytest.raises(StorageError, match="does not answer"), again.read() as session:
        session.execute(sa.text("SELECT pg_sleep(15)"))
    assert time.monotonic() - started < 5.0
    with again.read() as session:
        assert session.scalar(sa.text("SELECT 1")) == 1
    again.close()
