"""The migrations make exactly the tables that the models describe, and take them away again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, select, text
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

from claas.core.errors import ConfigurationError
from claas.storage.database import Database
from claas.storage.models import Base, LessonRow

TABLES = {"rollouts", "feedback", "adapter_versions", "steps", "lessons", "tinker_adapters", "tinker_versions"}


@pytest.fixture
def empty(url: str) -> Iterator[Database]:
    database = Database(url)
    yield database
    database.close()


@contextmanager
def _at_revision(database: Database, revision: str) -> Iterator[Connection]:
    """A connection to the database as that revision of CLaaS left it; commits at the end."""
    config = Config()
    config.set_main_option("script_location", "claas.storage:migrations")
    with database.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        yield connection


def _differences(database: Database) -> list[object]:
    with database.engine.connect() as connection:
        return list(compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), Base.metadata))


def _tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def test_an_empty_database_gets_the_schema_of_the_models(empty: Database) -> None:
    assert len(_differences(empty)) >= 4
    empty.migrate()
    assert _differences(empty) == []
    assert _tables(empty) == TABLES


def test_the_comparison_sees_a_missing_column_and_a_missing_index(empty: Database) -> None:
    empty.migrate()
    with empty.engine.begin() as connection:
        connection.execute(text("ALTER TABLE steps DROP COLUMN reason"))
        connection.execute(text("DROP INDEX ix_rollouts_lookup"))
    assert {difference[0] for difference in _differences(empty) if isinstance(difference, tuple)} == {"add_column", "add_index"}


def test_migrating_again_changes_nothing(empty: Database) -> None:
    empty.migrate()
    with empty.session() as session:
        session.execute(text("INSERT INTO adapter_versions VALUES ('me/a', 0, NULL, 'base', '[]', '{}', 1, '2026-01-01 00:00:00')"))
    empty.migrate()
    with empty.session() as session:
        assert session.execute(text("SELECT lora_id FROM adapter_versions")).scalar_one() == "me/a"


def test_feedback_from_before_ratings_is_kept(empty: Database) -> None:
    with _at_revision(empty, "0001") as connection:
        connection.execute(
            text(
                "INSERT INTO feedback (id, request_id, lora_id, completion_id, feedback, metadata, state, created_at)"
                " VALUES ('fb-1', 'req-1', 'me/a', 'chatcmpl-1', 'Be Kuro.', '{}', 'applied', '2026-01-01 00:00:00')"
            )
        )
    empty.migrate()
    with empty.session() as session:
        row = session.execute(text("SELECT feedback, rating, demonstration FROM feedback")).one()
    assert tuple(row) == ("Be Kuro.", None, None)


def test_lessons_from_before_contradictions_contradict_nothing(empty: Database) -> None:
    with _at_revision(empty, "0003") as connection:
        connection.execute(
            text("INSERT INTO lessons (lora_id, version, parent, feedback_ids, training, samples) VALUES ('me/a', 1, 0, '[]', '{}', '[]')")
        )
    empty.migrate()
    with empty.session() as session:
        assert session.scalars(select(LessonRow)).one().contradicts == []


def test_a_downgrade_leaves_no_table_and_can_be_undone(empty: Database) -> None:
    empty.migrate()
    empty.migrate("base")
    assert _tables(empty) == set()
    empty.migrate()
    assert _differences(empty) == []


def test_a_migration_that_fails_half_way_leaves_nothing(empty: Database) -> None:
    with empty.engine.begin() as connection:
        connection.execute(text("CREATE TABLE steps (mine INTEGER)"))  # the last table of the migration: the others come first
    with pytest.raises((SQLAlchemyError, ProgrammingError), match="already exists"):
        empty.migrate()
    assert _tables(empty) == {"steps"}
    assert not inspect(empty.engine).has_table("alembic_version")


def test_a_database_of_a_newer_claas_is_refused_and_left_alone(empty: Database) -> None:
    empty.migrate()
    with empty.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigurationError, match="newer CLaaS"):
        empty.migrate()
    assert _tables(empty) == TABLES
