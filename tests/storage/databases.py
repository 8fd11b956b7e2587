"""Empty, migrated databases of both kinds, for every test of a store over `Database`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from claas.storage.database import Database
from tests.storage.postgres import postgres_server

KINDS = ("sqlite", pytest.param("postgresql", marks=pytest.mark.integration))


def new_url(kind: str, folder: Path, config: pytest.Config) -> str:
    """The URL of a database that does not exist yet, or is empty."""
    return f"sqlite:///{folder / 'claas.db'}" if kind == "sqlite" else postgres_server(config).new_database()


@contextmanager
def migrated(kind: str, folder: Path, config: pytest.Config) -> Iterator[Database]:
    database = Database(new_url(kind, folder, config))
    try:
        database.migrate()
        yield database
    finally:
        database.close()
