"""Durable files: what these functions have written is there after a crash, whole. They know nothing of what the files mean."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from claas.core.errors import StorageFull

TEMPORARY = ".tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn "no space left", "over quota" and "read-only file system" into StorageFull; other errors pass."""
    try:
        yield
    except Exception as error:
        if _errno(error) in _FULL:
            raise StorageFull("the data folder's disk is full or read-only: nothing was saved; free some space and try again") from error
        raise


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))  # how libraries written in Rust, safetensors among them, pass it on
    return int(told[1]) if told else None


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: readers, and whoever comes after a crash, see all of the old or all of the new. Raises StorageFull."""
    temporary = path.with_name(TEMPORARY + secrets.token_hex(8))
    with disk_errors():
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Force a written file to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Force a folder's names (new, renamed, deleted) to disk. Windows and some mounts offer no way to, and keep them themselves."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
