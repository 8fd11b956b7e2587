"""The files of a Modal Volume from outside any container, with our errors. Knows nothing of what the files mean.

Whatever is done twice, because an answer was lost, is as if it were done once.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from claas.adapters.modal_errors import is_blip, modal_errors

if TYPE_CHECKING:
    import modal
    from modal.types import FileEntry

_TRIES = 3
_PAUSE_S = 0.3


class Entry(NamedTuple):
    """A file as it is listed; `changed_at` in seconds since 1970."""

    size: int
    changed_at: float


class VolumeFiles:
    """Files by their path from the Volume's root. Each method asks Modal, and blocks."""

    def __init__(self, volume: modal.Volume) -> None:
        self._volume = volume

    def listed(self, folder: str) -> dict[str, Entry]:
        """All files in and under a folder, by their path from it; none where there is no such folder."""
        from modal.exception import NotFoundError
        from modal.types import FileEntryType

        try:
            entries = self._entries(folder)
        except (NotFoundError, FileNotFoundError):
            with modal_errors():
                if not folder:
                    raise  # the root is always there, where there is a Volume
            return {}
        start = f"{folder}/" if folder else ""
        return {
            entry.path.strip("/").removeprefix(start): Entry(entry.size, entry.mtime)
            for entry in entries
            if entry.type == FileEntryType.FILE
        }

    def _entries(self, folder: str) -> list[FileEntry]:
        """The SDK tries everything else again by itself."""
        from modal.exception import NotFoundError

        for tried in range(1, _TRIES + 1):
            try:
                return list(self._volume.listdir(folder or "/", recursive=True))
            except NotFoundError:
                raise
            except Exception as error:
                with modal_errors():
                    if tried == _TRIES or not is_blip(error):
                        raise
                time.sleep(_PAUSE_S * tried)
        raise AssertionError("returned or raised")

    def read(self, path: str) -> bytes | None:
        """A small file's content; None if there is none."""
        into = io.BytesIO()
        return into.getvalue() if self._copy(path, into) else None

    def fetch(self, path: str, to: Path) -> bool:
        """Write a file's content to `to`; False if there is none."""
        with to.open("wb") as file:
            return self._copy(path, file)

    def _copy(self, path: str, to: IO[bytes]) -> bool:
        from modal.exception import ExecutionError

        with modal_errors():
            for tried in range(1, _TRIES + 1):
                to.seek(0)
                to.truncate()
                try:
                    to.writelines(self._volume.read_file(path))
                except FileNotFoundError:
                    return False
                except ExecutionError:  # it was replaced or removed while it was read
                    if tried == _TRIES:
                        raise
                else:
                    return True
        raise AssertionError("returned or raised")

    def write(self, files: Mapping[str, bytes | Path], *, replace: bool = True) -> None:
        """Write files, all or none of them. Raises FileExistsError if `replace` is False and one is there, StorageFull."""
        with modal_errors(storing=True), self._volume.batch_upload(force=replace) as batch:
            for path, content in files.items():
                batch.put_file(io.BytesIO(content) if isinstance(content, bytes) else content, path)

    def remove(self, path: str) -> None:
        """A file, or a folder with all that is in it, if it is there."""
        with modal_errors():
            try:
                self._volume.remove_file(path, recursive=True)
            except FileNotFoundError:
                return
