"""`database`: empty and migrated, once on SQLite and once on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from claas.storage.database import Database
from tests.storage.databases import KINDS, migrated, new_url


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(kind: str, tmp_path: Path, pytestconfig: pytest.Config) -> str:
    return new_url(kind, tmp_path, pytestconfig)


@pytest.fixture
def database(kind: str, tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Database]:
    with migrated(kind, tmp_path, pytestconfig) as database:
        yield database
