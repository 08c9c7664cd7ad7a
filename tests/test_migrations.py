from __future__ import annotations

import threading
import time

import optuna
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from momentum_tuner.database import Base, Database, Study, Ticket, migrate
from momentum_tuner.database.migrate import CURRENT, VERSION_TABLE
from momentum_tuner.errors import StorageError
from momentum_tuner.search import open_storage

OURS = {"tuner_studies", "tickets", "epochs", "workers", "loads", "calibrations"}


@pytest.fixture
def empty(empty_url):
    database = Database(empty_url)
    yield database
    database.close()


def tables(database: Database) -> set[str]:
    with database.read() as session:
        return set(sa.inspect(session.connection()).get_table_names())


def value(database: Database, statement: str):
    with database.read() as session:
        return session.scalar(sa.text(statement))


def optuna_tables() -> set[str]:
    storage = optuna.storages.RDBStorage("sqlite:///:memory:")
    with storage.engine.connect() as connection:
        found = set(sa.inspect(connection).get_table_names())
    storage.remove_session()
    storage.engine.dispose()
    return found


def differences_from_the_models(database: Database) -> list[object]:
    with database.engine.connect() as connection:

        def ours(thing: object, name: str, kind: str, *_: object) -> bool:
            return kind != "table" or name in Base.metadata.tables

        context = MigrationContext.configure(
            connection, opts={"include_object": ours, "compare_type": True, "version_table": VERSION_TABLE}
        )
        return compare_metadata(context, Base.metadata)


def alembic(connection: sa.Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", "momentum_tuner:database/migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def test_migrating_an_empty_database_gives_the_tables_of_the_models_and_optunas(empty):
    assert tables(empty) == set()
    migrate(empty)
    assert tables(empty) == OURS | {VERSION_TABLE} | optuna_tables()
    assert set(Base.metadata.tables) == OURS
    assert differences_from_the_models(empty) == []
    assert value(empty, f"SELECT version_num FROM {VERSION_TABLE}") == CURRENT


def test_the_comparison_with_the_models_sees_a_difference(empty):
    migrate(empty)
    with empty.write() as session:
        session.execute(sa.text("ALTER TABLE tickets ADD COLUMN surplus INTEGER"))
        session.execute(sa.text("DROP INDEX ix_tickets_worker_id"))
    found = differences_from_the_models(empty)
    assert sorted(change[0] for change in found) == ["add_index", "remove_column"]


def test_the_current_version_is_the_newest_migration():
    script = ScriptDirectory.from_config(alembic(None))  # type: ignore[arg-type]
    assert script.get_heads() == [CURRENT]
    assert [revision.revision for revision in script.walk_revisions()] == ["0003", "0002", "0001"]


def test_a_database_of_the_first_version_keeps_its_rows(empty):
    with empty.write() as session:
        command.upgrade(alembic(session.connection()), "0001")
        session.execute(
            sa.text(
                "INSERT INTO tuner_studies (id, name, spec, spec_hash, phase, created_at) "
                "VALUES (1, 'old', '{}', 'h', 'search', 1.0)"
            )
        )
        session.execute(
            sa.text(
                "INSERT INTO tickets (id, study_id, optimizer, kind, position, queue_order, seed, state, generation, "
                "attempts, published_epoch, value) VALUES (7, 1, 'sgd', 'search', 0, 0, 0, 'done', 1, 1, -1, 0.25)"
            )
        )
    migrate(empty)
    assert differences_from_the_models(empty) == []
    with empty.read() as session:
        assert session.execute(sa.text("SELECT id, value, second_value FROM tickets")).all() == [(7, 0.25, None)]
        study, ticket = session.get_one(Study, 1), session.get_one(Ticket, 7)
        assert (study.name, study.parent_trials, study.data, ticket.traceback) == ("old", 0, None, None)


def test_migrating_twice_is_harmless(empty):
    migrate(empty)
    with empty.write() as session:
        session.add(Study(name="s", spec="{}", spec_hash="", created_at=1.0))
    migrate(empty)
    assert value(empty, "SELECT name FROM tuner_studies") == "s"
    assert value(empty, f"SELECT count(*) FROM {VERSION_TABLE}") == 1


MIGRATE = """
optuna.logging.set_verbosity(optuna.logging.WARNING)
database = Database(argument)
migrate(database)
with database.write() as session:
    session.add(Study(name=f"s{number}", spec="{}", spec_hash="", created_at=1.0))
database.close()
storage = optuna.storages.RDBStorage(argument)
study_id = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], f"s{number}/sgd")
storage.create_new_trial(study_id)
storage.remove_session()
storage.engine.dispose()
print(json.dumps(number))
"""


def test_eight_processes_at_once_migrate_once(empty, race):
    imports = "import optuna\nfrom momentum_tuner.database import Database, Study, migrate"
    assert race(imports, MIGRATE, 8, empty.text) == list(range(8))
    assert tables(empty) == OURS | {VERSION_TABLE} | optuna_tables()
    assert differences_from_the_models(empty) == []
    assert value(empty, f"SELECT count(*) FROM {VERSION_TABLE}") == 1
    assert value(empty, "SELECT count(*) FROM alembic_version") == 1
    assert value(empty, "SELECT count(*) FROM version_info") == 1
    assert value(empty, "SELECT count(*) FROM tuner_studies") == 8
    assert value(empty, "SELECT count(*) FROM trials") == 8


def test_who_waits_for_another_ones_migration_has_more_patience_than_for_an_answer(postgresql, monkeypatch):
    monkeypatch.setattr("momentum_tuner.database.engine._deadlines.seconds", 0.5)
    url = postgresql.url(postgresql.create())
    first, second = Database(url), Database(url)
    with first.write() as session:
        session.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": 0x6D6F6D656E74})
        waiting = threading.Thread(target=migrate, args=(second,))
        waiting.start()
        for _ in range(10):
            time.sleep(0.2)
            session.execute(sa.text("SELECT 1"))
        assert waiting.is_alive()
        assert tables(first) == set()
    waiting.join()
    assert tables(first) >= OURS
    for database in (first, second):
        database.close()


def test_optunas_own_version_is_not_touched(empty):
    migrate(empty)
    fresh = optuna.storages.RDBStorage(empty.text)
    assert value(empty, "SELECT version_num FROM alembic_version") == fresh.get_head_version()
    fresh.remove_session()
    fresh.engine.dispose()


def test_a_database_that_optuna_already_uses_keeps_its_studies(empty):
    storage = optuna.storages.RDBStorage(empty.text)
    before = optuna.create_study(storage=storage, study_name="mine")
    before.add_trial(optuna.trial.create_trial(value=0.5))
    storage.remove_session()
    storage.engine.dispose()
    version = value(empty, "SELECT version_num FROM alembic_version")
    migrate(empty)
    assert value(empty, "SELECT version_num FROM alembic_version") == version
    assert value(empty, "SELECT study_name FROM studies") == "mine"
    assert value(empty, "SELECT count(*) FROM trials") == 1
    assert differences_from_the_models(empty) == []


def test_tables_of_another_optuna_are_refused_in_one_line(empty):
    storage = optuna.storages.RDBStorage(empty.text)
    storage.remove_session()
    storage.engine.dispose()
    with empty.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = 'v9.0.0'"))
    with pytest.raises(StorageError) as refused:
        migrate(empty)
    assert "\n" not in str(refused.value)
    assert "Optuna's tables in version v9.0.0, but the Optuna of this machine knows v" in str(refused.value)


def test_an_optuna_that_was_changed_later_is_refused_in_one_line(database):
    with database.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = 'v9.0.0'"))
    with pytest.raises(StorageError, match=r"holds Optuna's tables in version v9\.0\.0"):
        open_storage(database)


@pytest.mark.parametrize("done", ["nothing", "ours", "optuna's tables without their version"])
def test_what_a_process_left_half_done_is_completed(empty, done):
    if done != "nothing":
        migrate(empty)
        with empty.write() as session:
            names = optuna_tables() if done == "ours" else {"alembic_version"}
            for name in names - {"alembic_version"}:
                cascade = " CASCADE" if empty.dialect == "postgresql" else ""
                session.execute(sa.text(f"DROP TABLE {name}{cascade}"))
            session.execute(sa.text("DELETE FROM alembic_version"))
    migrate(empty)
    assert tables(empty) == OURS | {VERSION_TABLE} | optuna_tables()
    assert value(empty, "SELECT count(*) FROM alembic_version") == 1


def test_a_migration_that_fails_leaves_nothing_behind(empty, monkeypatch):
    from alembic.operations import Operations

    create_table = Operations.create_table

    def broken(self, name, *columns, **options):
        if name == "epochs":
            raise ZeroDivisionError
        return create_table(self, name, *columns, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Operations, "create_table", broken)
        import alembic.op

        patch.setattr(alembic.op, "create_table", lambda *a, **k: broken(alembic.op._proxy, *a, **k))
        with pytest.raises(ZeroDivisionError):
            migrate(empty)
    assert tables(empty) == set()
    migrate(empty)
    assert differences_from_the_models(empty) == []


def test_a_newer_version_is_refused_in_one_line_and_not_touched(empty):
    migrate(empty)
    with empty.write() as session:
        session.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '0999'"))
    with pytest.raises(StorageError) as refused:
        migrate(empty)
    text = str(refused.value)
    assert text == (
        f"the database {empty.shown} was written by a newer momentum-tuner (version 0999); "
        "upgrade this one: pip install -U momentum-tuner"
    )
    assert value(empty, f"SELECT version_num FROM {VERSION_TABLE}") == "0999"


def test_the_downgrade_drops_our_tables_and_only_those(empty):
    migrate(empty)
    with empty.write() as session:
        command.downgrade(alembic(session.connection()), "base")
    assert tables(empty) == {VERSION_TABLE} | optuna_tables()
    assert value(empty, f"SELECT count(*) FROM {VERSION_TABLE}") == 0
    migrate(empty)
    assert differences_from_the_models(empty) == []
