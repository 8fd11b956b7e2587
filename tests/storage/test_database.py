"""Transactions, threads, and what a full, read-only, absent or killed database looks like from above."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from claas.core.errors import BackendUnavailable, ConfigurationError, StorageFull
from claas.core.types import utc_now
from claas.storage.database import Database
from claas.storage.models import AdapterVersionRow
from tests.storage.postgres import postgres_server


def _version(lora_id: str, base_model: str = "base") -> AdapterVersionRow:
    return AdapterVersionRow(
        lora_id=lora_id, version=0, base_model=base_model, feedback_ids=[], metrics={}, size_bytes=1, created_at=utc_now()
    )


def _ids(session: Session) -> list[str]:
    return list(session.scalars(select(AdapterVersionRow.lora_id).order_by(AdapterVersionRow.lora_id)))


async def test_run_commits_and_gives_back_the_result(database: Database) -> None:
    def write(session: Session) -> str:
        session.add(_version("a"))
        return "done"

    assert await database.run(write) == "done"
    assert await database.run(_ids) == ["a"]


async def test_an_error_rolls_all_of_the_transaction_back(database: Database) -> None:
    def write(session: Session) -> None:
        session.add(_version("a"))
        session.flush()
        raise LookupError("the caller's own")

    with pytest.raises(LookupError):
        await database.run(write)
    assert await database.run(_ids) == []


async def test_the_event_loop_goes_on_while_the_database_works(database: Database) -> None:
    go_on = threading.Event()
    working = asyncio.create_task(database.run(lambda session: go_on.wait(30)))
    await asyncio.sleep(0)
    go_on.set()  # reached only if the loop was not blocked
    assert await working is True


async def test_many_writers_at_once_lose_nothing(database: Database) -> None:
    async def write(number: int) -> None:
        await database.run(lambda session: session.add(_version(f"a{number:03}")))

    await asyncio.gather(*map(write, range(100)))
    assert await database.run(_ids) == [f"a{number:03}" for number in range(100)]


async def test_a_read_then_write_is_not_interleaved_with_another(tmp_path: Path) -> None:
    """Two services must not share a folder, but if they do, neither loses an update: SQLite's transactions begin as writers."""
    url = f"sqlite:///{tmp_path / 'claas.db'}"
    first, second = Database(url), Database(url)
    first.migrate()
    with first.session() as session:
        session.add(_version("a"))

    def count(session: Session) -> None:
        row = session.get_one(AdapterVersionRow, ("a", 0))
        row.size_bytes += 1

    await asyncio.gather(*(database.run(count) for _ in range(20) for database in (first, second)))
    with first.session() as session:
        assert session.get_one(AdapterVersionRow, ("a", 0)).size_bytes == 41
    first.close()
    second.close()


async def test_a_closed_database_says_so_and_closes_twice(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'claas.db'}")
    database.close()
    database.close()
    with pytest.raises(BackendUnavailable, match="closing"):
        await database.run(_ids)


def test_sqlite_is_opened_so_that_answered_commits_are_kept(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'made' / 'on the way' / 'claas.db'}")
    with database.engine.connect() as connection:
        pragmas = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous", "foreign_keys")}
        assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000
    database.close()


async def test_a_database_in_memory_is_one_database_for_all_threads() -> None:
    database = Database("sqlite://")
    database.migrate()
    await database.run(lambda session: session.add(_version("a")))
    with database.session() as session:
        assert _ids(session) == ["a"]
    database.close()


@pytest.mark.parametrize("url", ["nonsense", "nosuchdatabase://user:hunter2@host/name", "oracle://user:hunter2@host/name"])
def test_a_url_that_cannot_be_used_is_told_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Database(url)
    assert "hunter2" not in caught.value.message
    assert "database_url" in caught.value.message


async def test_a_full_sqlite_disk_is_storage_full_and_keeps_what_was_there(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'claas.db'}")
    database.migrate()
    await database.run(lambda session: session.add(_version("a")))

    def fill(session: Session) -> None:
        session.execute(text("PRAGMA max_page_count = 1"))  # SQLite takes the pages there are: no more fit
        session.add(_version("b", base_model="x" * 1_000_000))

    with pytest.raises(StorageFull) as caught:
        await database.run(fill)
    assert str(tmp_path) not in caught.value.message
    assert await database.run(_ids) == ["a"]
    database.close()


def test_a_file_size_limit_is_storage_full(tmp_path: Path) -> None:
    """The write itself fails here, as it does on a disk that fills up under SQLite."""
    script = f"""
import resource
from claas.core.errors import StorageFull
from claas.storage.database import Database
from sqlalchemy import text
database = Database("sqlite:///{tmp_path / "claas.db"}")
database.migrate()
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    with database.session() as session:
        values = f"('a', 0, NULL, '{{'x' * 2_000_000}}', '[]', '{{{{}}}}', 1, '2026-01-01 00:00:00')"
        session.execute(text(f"INSERT INTO adapter_versions VALUES {{values}}"))
except StorageFull:
    with database.session() as session:
        print("full", session.execute(text("SELECT count(*) FROM adapter_versions")).scalar())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "full 0\n", done.stderr


async def test_a_read_only_sqlite_file_is_storage_full(tmp_path: Path) -> None:
    file = tmp_path / "claas.db"
    database = Database(f"sqlite:///{file}")
    database.migrate()
    database.close()
    read_only = Database(f"sqlite:///file:{file}?mode=ro&uri=true")
    with pytest.raises(StorageFull):
        await read_only.run(lambda session: session.add(_version("a")))
    read_only.close()


@pytest.mark.integration
async def test_a_read_only_postgresql_is_storage_full(pytestconfig: pytest.Config) -> None:
    server = postgres_server(pytestconfig)
    url = server.new_database()
    database = Database(url)
    database.migrate()
    name = str(database.engine.url.database)
    database.close()
    server.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    database = Database(url)
    with pytest.raises(StorageFull):
        await database.run(lambda session: session.add(_version("a")))
    database.close()


async def test_a_database_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    database = Database(f"postgresql+psycopg://user:hunter2@/name?host={tmp_path}")
    with pytest.raises(BackendUnavailable) as caught:
        await database.run(_ids)
    assert "hunter2" not in caught.value.message
    database.close()


@pytest.mark.integration
async def test_connections_that_postgresql_dropped_are_opened_again(pytestconfig: pytest.Config) -> None:
    server = postgres_server(pytestconfig)
    database = Database(server.new_database())
    database.migrate()
    await database.run(lambda session: session.add(_version("a")))
    server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database.engine.url.database}'")
    assert await database.run(_ids) == ["a"]
    database.close()


@pytest.mark.parametrize("round_", range(3))
def test_what_was_committed_survives_kill_9(tmp_path: Path, round_: int) -> None:
    script = f"""
import itertools
from claas.core.types import utc_now
from claas.storage.database import Database
from claas.storage.models import AdapterVersionRow
database = Database("sqlite:///{tmp_path / "claas.db"}")
database.migrate()
for number in itertools.count():
    with database.session() as session:
        values = {{"feedback_ids": [], "metrics": {{}}, "size_bytes": 0, "created_at": utc_now()}}
        session.add(AdapterVersionRow(lora_id="a", version=number, base_model="b", **values))
    print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(20 + 30 * round_)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    told = [int(line) for line in lines if line.endswith("\n")]
    database = Database(f"sqlite:///{tmp_path / 'claas.db'}")
    database.migrate()
    with database.session() as session:
        kept = set(session.scalars(select(AdapterVersionRow.version)))
        assert session.execute(text("PRAGMA integrity_check")).scalar() == "ok"
    assert kept >= set(told)
    assert len(told) >= 20
    database.close()


async def test_an_error_shows_nothing_of_what_was_to_be_stored(database: Database) -> None:
    with pytest.raises(SQLAlchemyError) as caught:
        await database.run(lambda session: session.execute(text("INSERT INTO nowhere VALUES (:chat)"), {"chat": "a secret"}))
    assert "nowhere" in str(caught.value)
    assert "a secret" not in str(caught.value)
