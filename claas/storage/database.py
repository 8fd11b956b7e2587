"""One database: its engine, its schema, and the threads that wait for it, so that the event loop never does.

Tested on SQLite and PostgreSQL. Knows no table; what the rows mean is said above this room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Engine, StaticPool, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session

from claas.core.errors import BackendUnavailable, ConfigurationError
from claas.storage.columns import to_json
from claas.storage.errors import database_errors
from claas.storage.files import disk_errors

_THREADS = 8
_OPTIONS: dict[str, Any] = {"json_serializer": to_json, "hide_parameters": True}  # parameters hold chats, which no traceback may show
T = TypeVar("T")


class Database:
    """Opens any SQLAlchemy URL; `sqlite://` is a database in memory, gone when closed.

    Raises ConfigurationError for a URL that cannot be used.
    """

    def __init__(self, url: str) -> None:
        self.engine = _open(url)
        # SQLite has one writer anyway: one thread queues fairly, where several would poll the lock.
        self._threads = ThreadPoolExecutor(1 if self.engine.dialect.name == "sqlite" else _THREADS, thread_name_prefix="claas-database")
        self._closed = False

    def migrate(self, revision: Literal["head", "base"] = "head") -> None:
        """Bring the schema up to "head", or down to "base", which is the empty database; whole or not at all.

        Raises ConfigurationError if a newer CLaaS wrote this database, StorageFull, BackendUnavailable.
        """
        config = Config()
        config.set_main_option("script_location", "claas.storage:migrations")
        with database_errors(), self.engine.begin() as connection:
            config.attributes["connection"] = connection
            try:
                (command.downgrade if revision == "base" else command.upgrade)(config, revision)
            except CommandError as error:
                raise ConfigurationError("the database was written by a newer CLaaS: update CLaaS, or use another database") from error

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction: committed when the body ends, rolled back if it raises. Blocks. Raises StorageFull, BackendUnavailable."""
        with database_errors(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    async def run(self, fn: Callable[[Session], T]) -> T:
        """`fn` in a transaction of its own, on a thread. A caller that is cancelled does not undo it. Raises like `session`."""
        if self._closed:
            raise BackendUnavailable("the service is closing")
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._in_session, fn)

    def _in_session(self, fn: Callable[[Session], T]) -> T:
        with self.session() as session:
            return fn(session)

    def close(self) -> None:
        """Wait for what runs, then free all connections. Safe to call twice."""
        self._closed = True
        self._threads.shutdown(wait=True)
        self.engine.dispose()


def _open(text: str) -> Engine:
    try:
        url = make_url(text)
        if url.get_backend_name() == "sqlite":
            return _open_sqlite(url)
        return create_engine(url, pool_size=_THREADS, pool_pre_ping=True, **_OPTIONS)
    except ArgumentError as error:
        raise ConfigurationError(
            "database_url: write sqlite:///FILE, postgresql://USER:PASSWORD@HOST/NAME or another SQLAlchemy URL"
        ) from error
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"database_url needs a driver that is not installed: pip install {error.name}") from error


def _open_sqlite(url: URL) -> Engine:
    options = _OPTIONS
    if url.database in (None, "", ":memory:"):
        options = _OPTIONS | {
            "poolclass": StaticPool,
            "connect_args": {"check_same_thread": False},
        }  # each connection would be a database of its own
    elif not url.query.get("uri"):
        with disk_errors():
            Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, **options)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver begins late and commits around DDL; the "begin" event does it right
    for pragma in (
        "busy_timeout = 30000",
        "journal_mode = WAL",
        "synchronous = FULL",  # a commit that was answered survives a power cut, not only a kill
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")
