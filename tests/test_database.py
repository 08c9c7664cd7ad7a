from __future__ import annotations

import math
import socket
import sqlite3
import threading
import time
from contextlib import closing

import pytest
import sqlalchemy as sa

from momentum_tuner.database import Calibration, Database, Study, Worker, database_now, insert_new, migrate
from momentum_tuner.errors import InputError, StorageError
from momentum_tuner.search import open_storage

SECRETS = ("hunter2", "s3cret", "tail")


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert not any(secret in text for secret in SECRETS), text
    return text


def calibration(width: int) -> Calibration:
    return Calibration(
        task="t", device="cpu", version="1", mode="eager", width=width, step_seconds=0.0, measured_at=database_now()
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("momentum.db", "'momentum.db' is not a database URL; write sqlite:///file.db or postgresql://"),
        ("", "'' is not a database URL"),
        ("postgresql://u:hunter2@host:port/db", "'postgresql://***' is not a database URL"),
        ("u:hunter2@host/db", "'***' is not a database URL"),
        ("u:hunter2@host://db", "'***' is not a database URL"),
        ("postgresql://u:hunter2@tail@host/db", "holds an '@'; write it as %40"),
        ("mysql://u:hunter2@host/db", "'mysql' is not supported; use sqlite or postgresql"),
        ("sqlite://", "an in-memory SQLite database cannot be shared; write sqlite:///file.db"),
        ("sqlite:///:memory:", "an in-memory SQLite database cannot be shared; write sqlite:///file.db"),
        ("sqlite:////no/such/folder/file.db", "the folder /no/such/folder does not exist; make it first"),
    ],
)
def test_a_wrong_url_is_refused_in_one_line_without_its_password(url, said):
    with pytest.raises(StorageError) as refused:
        Database(url)
    assert said in one_line(refused.value)
    assert one_line(refused.value).startswith("--storage")
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:hunter2@host:5433/db", "postgresql://***@host:5433/db"),
        ("postgres://u:hunter2@host/db", "postgresql://***@host/db"),
        ("postgresql+psycopg2://u:s3cret%2Ftail@host/db", "postgresql://***@host/db"),
        ("postgresql://u:s3cret/tail@host/db", "postgresql://***@host/db"),
        ("postgresql://host/db?password=hunter2&user=u", "postgresql://host/db"),
        ("postgresql://host/db", "postgresql://host/db"),
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
    ],
)
def test_the_url_is_shown_without_user_and_password(url, shown):
    assert Database(url).shown == shown


def test_the_text_for_children_keeps_the_password_and_opens_the_same_database():
    database = Database("postgresql://u:s3cret%40%2Ftail@host/db?connect_timeout=3")
    again = Database(database.text)
    assert again.url == database.url
    assert again.url.password == "s3cret@/tail"


def test_a_file_is_found_by_its_absolute_path_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my studies, 100% ü #1"
    folder.mkdir()
    with closing(Database(f"sqlite:///{folder.name}/a b.db")) as database:
        migrate(database)
        assert (folder / "a b.db").exists()
        assert database.shown == f"sqlite:///{folder}/a b.db"
        monkeypatch.chdir("/")
        with closing(Database(database.text)) as again, again.read() as session:
            assert session.scalar(sa.select(sa.func.count()).select_from(Study)) == 0


def test_what_the_url_says_about_a_connection_holds(postgresql):
    name = postgresql.create()
    url = f"{postgresql.url(name)}&connect_timeout=3&options=-c%20application_name%3Dmine%20-c%20work_mem%3D5MB"
    with closing(Database(url)) as database, database.read() as session:
        shown = {name: session.scalar(sa.text(f"SHOW {name}")) for name in ("work_mem", "statement_timeout")}
        assert shown == {"work_mem": "5MB", "statement_timeout": "20s"}
        driver = session.connection().connection.driver_connection
        assert driver.info.get_parameters()["connect_timeout"] == "3"
        assert driver.info.get_parameters()["tcp_user_timeout"] == "10000"
    postgresql.drop(name)


def test_a_file_that_is_not_sqlite_is_refused_in_one_line(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database at all\n" * 100)
    with pytest.raises(StorageError) as refused:
        migrate(Database(f"sqlite:///{path}"))
    assert one_line(refused.value) == f"--storage: sqlite:///{path} is not an SQLite database"
    assert path.read_text() == "not a database at all\n" * 100


def test_a_folder_in_place_of_a_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(StorageError) as refused:
        migrate(Database(f"sqlite:///{tmp_path}"))
    assert one_line(refused.value) == f"the database sqlite:///{tmp_path} does not answer: unable to open database file"


def test_no_server_answering_is_one_line_without_password():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        port = taken.getsockname()[1]
        with pytest.raises(StorageError) as refused:
            migrate(Database(f"postgresql://u:hunter2@127.0.0.1:{port}/db"))
    text = one_line(refused.value)
    assert text.startswith(f"the database postgresql://***@127.0.0.1:{port}/db does not answer: ")
    assert "refused" in text


def test_a_server_that_never_says_a_word_is_given_up():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"postgresql://u:hunter2@127.0.0.1:{silent.getsockname()[1]}/db?connect_timeout=2"
        start = time.monotonic()
        with pytest.raises(StorageError) as refused, Database(url).read() as session:
            session.connection()
        assert time.monotonic() - start < 10
    assert "timeout" in one_line(refused.value)


def test_a_password_in_the_drivers_own_words_is_hidden(postgresql):
    url = postgresql.url("hunter2").replace("postgres@", "postgres:hunter2@")
    with pytest.raises(StorageError) as refused, Database(url).read() as session:
        session.connection()
    assert 'database "***" does not exist' in str(refused.value)


def test_an_unknown_database_is_one_line(postgresql):
    with pytest.raises(InputError, match='database "nowhere" does not exist'):
        migrate(Database(postgresql.url("nowhere")))


def test_a_statement_that_never_ends_is_cut_off(postgresql_database, monkeypatch):
    monkeypatch.setattr("momentum_tuner.database.engine.STATEMENT_SECONDS", 1)
    impatient = Database(postgresql_database.text)
    start = time.monotonic()
    with pytest.raises(StorageError, match="statement timeout"), impatient.read() as session:
        session.execute(sa.text("SELECT pg_sleep(30)"))
    impatient.close()
    assert time.monotonic() - start < 5


def test_who_was_silent_in_a_transaction_for_too_long_finds_a_database_that_does_not_answer(
    postgresql_database, monkeypatch
):
    """As a worker that was stopped there, for PostgreSQL an internal error."""
    monkeypatch.setattr("momentum_tuner.database.engine.STATEMENT_SECONDS", 1)
    impatient = Database(postgresql_database.text)
    with pytest.raises(StorageError, match="idle-in-transaction timeout"), impatient.write() as session:
        session.execute(sa.select(1))
        time.sleep(1.5)
        session.execute(sa.select(1))
    with impatient.read() as session:
        assert session.scalar(sa.select(1)) == 1
    impatient.close()


def test_a_connection_that_the_server_dropped_is_made_anew(postgresql_database, postgresql):
    with postgresql_database.write() as session:
        session.add(calibration(1))
    name = postgresql_database.url.database
    postgresql.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    with postgresql_database.write() as session:
        session.add(calibration(2))
    with postgresql_database.read() as session:
        assert session.scalars(sa.select(Calibration.width).order_by(Calibration.width)).all() == [1, 2]


@pytest.mark.parametrize("whose", ["ours", "optuna's"])
def test_sqlite_logs_ahead_waits_when_busy_and_minds_foreign_keys(sqlite_database, whose):
    engine = sqlite_database.engine if whose == "ours" else open_storage(sqlite_database).engine
    with engine.connect() as first, engine.connect() as second:  # on each connection, not the first only
        for connection in (first, second):
            found = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "busy_timeout", "synchronous", "foreign_keys")
            ]
            assert found == ["wal", 30_000, 1, 1]


def test_a_reader_does_not_wait_for_a_writer(sqlite_database):
    with sqlite_database.write() as writing:
        writing.add(calibration(1))
        writing.flush()
        start = time.monotonic()
        with sqlite_database.read() as reading:
            assert reading.scalar(sa.select(sa.func.count()).select_from(Calibration)) == 0
        assert time.monotonic() - start < 1.0


def test_a_write_on_sqlite_takes_the_lock_before_its_first_statement(sqlite_database):
    other = sqlite3.connect(sqlite_database.url.database or "", timeout=0.05, isolation_level=None)
    with sqlite_database.read() as session:
        session.scalar(sa.select(sa.func.count()).select_from(Study))
        other.execute("BEGIN IMMEDIATE")  # a reader holds nothing up
        other.execute("ROLLBACK")
    with sqlite_database.write() as session:
        session.connection()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    other.close()


COUNT_UP = """
database = Database(argument)
for _ in range(50):
    with database.write() as session:
        rows = sa.select(Calibration).with_for_update()
        row = session.scalars(rows).one()
        row.step_seconds += 1.0
database.close()
print(json.dumps(number))
"""


def test_processes_that_read_and_write_back_lose_nothing(database, race):
    with database.write() as session:
        session.add(calibration(1))
    imports = "import sqlalchemy as sa\nfrom momentum_tuner.database import Database, Calibration"
    assert race(imports, COUNT_UP, 4, database.text) == [0, 1, 2, 3]
    with database.read() as session:
        assert session.scalar(sa.select(Calibration.step_seconds)) == 200.0


def test_threads_that_read_and_write_back_lose_nothing(database):
    with database.write() as session:
        session.add(calibration(1))

    def count_up() -> None:
        for _ in range(25):
            with database.write() as session:
                session.scalars(sa.select(Calibration).with_for_update()).one().step_seconds += 1.0

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert session.scalar(sa.select(Calibration.step_seconds)) == 100.0


def test_a_write_that_fails_leaves_nothing(database):
    with pytest.raises(ZeroDivisionError), database.write() as session:
        session.add(calibration(1))
        session.flush()
        _ = 1 / 0
    with database.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Calibration)) == 0


def test_the_databases_clock_is_seconds_since_1970_and_moves_on(database):
    with database.read() as session:
        first = session.scalar(sa.select(database_now()))
        time.sleep(0.05)
        second = session.scalar(sa.select(database_now()))
        assert abs(first - time.time()) < 5.0
        assert 0.03 < second - first < 2.0
        later = session.scalar(sa.select(database_now() + 30.0))
        assert 29.0 < later - second < 32.0


def test_a_clock_that_is_wrong_on_this_machine_changes_nothing(database, monkeypatch):
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real + 3600.0)
    with database.write() as session:
        session.add(
            Worker(
                id="w",
                host="h",
                node="h",
                pid=1,
                device="cpu",
                slots=0,
                state="running",
                started_at=0.0,
                heartbeat=database_now(),
            )
        )
    with database.read() as session:
        assert abs(session.scalar(sa.select(Worker.heartbeat)) - real) < 30.0


def test_inserting_again_leaves_the_first_row(database):
    values = {"id": "w", "host": "first", "node": "n", "pid": 1, "device": "cpu", "slots": 0, "state": "running"}
    for host in ("first", "second"):
        with database.write() as session:
            session.execute(
                insert_new(database.dialect, Worker).values(
                    {**values, "host": host, "started_at": 0.0, "heartbeat": 0.0}
                )
            )
    with database.read() as session:
        assert session.scalars(sa.select(Worker.host)).all() == ["first"]


def test_numbers_that_json_has_not_come_back(database):
    from momentum_tuner.database import Ticket

    settings = {"learning_rate": 0.1 + 0.2, "clip_norm": math.inf, "low": -math.inf, "batch_size": 64}
    with database.write() as session:
        study = Study(name="s", spec="{}", spec_hash="", created_at=0.0)
        session.add(study)
        session.flush()
        session.add(
            Ticket(
                study_id=study.id,
                optimizer="sgd",
                kind="search",
                position=0,
                queue_order=0,
                seed=2**32 - 1,
                settings=settings,
            )
        )
    with database.read() as session:
        row = session.scalars(sa.select(Ticket)).one()
        assert row.settings == settings
        assert row.fixed is None
        assert row.seed == 2**32 - 1
        stored = session.scalar(sa.text("SELECT settings FROM tickets"))
        assert "Infinity" not in str(stored)
        assert session.scalar(sa.text("SELECT count(*) FROM tickets WHERE fixed IS NULL")) == 1
