"""A database's failures, told in CLaaS's own errors. The only place that knows a driver's error codes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, OperationalError

from claas.core.errors import BackendUnavailable, StorageFull

_SQLITE_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY}
_SQLITE_CANNOT_WRITE = {
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_DIR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
}
_POSTGRES_FULL = {"53100", "25006"}  # disk full, read-only


@contextmanager
def database_errors() -> Iterator[None]:
    """Turn a full or read-only database into StorageFull, one that does not answer into BackendUnavailable; other errors pass."""
    try:
        yield
    except DBAPIError as error:
        if _is_full(error.orig):
            raise StorageFull("the database's disk is full or read-only: nothing was saved; free some space and try again") from error
        if isinstance(error, OperationalError) and not _is_sql(error.orig):
            raise BackendUnavailable("the database does not answer: nothing was saved; try again later") from error
        raise


def _is_full(error: BaseException | None) -> bool:
    if isinstance(error, sqlite3.Error):
        code = error.sqlite_errorcode
        return code & 0xFF in _SQLITE_FULL or code in _SQLITE_CANNOT_WRITE
    return getattr(error, "sqlstate", None) in _POSTGRES_FULL  # psycopg's name; the driver is optional, so its classes cannot be named


def _is_sql(error: BaseException | None) -> bool:
    """SQLite's driver calls a wrong statement "operational" too."""
    return isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_ERROR
