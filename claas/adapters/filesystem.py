"""Adapter versions in a folder of this machine. A kill or a power cut at any moment leaves whole versions and a valid `latest`.

Laid out as `claas.adapters.layout` says; versions are written elsewhere and renamed into place. Two processes must not write to one root.
Knows nothing of what is in a version.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from claas.adapters.layout import ADAPTER, LATEST, LEFTOVERS, NEW, STAGING, TRASH, Adapter, unique, version_folder, version_number
from claas.adapters.store import MANIFEST, AdapterStore, Staging
from claas.core.adapter_id import flat_name, parse_adapter_id
from claas.core.errors import Conflict, NotFound
from claas.core.types import AdapterVersion, utc_now
from claas.storage.files import disk_errors, sync_file, sync_folder, write_atomically


class FilesystemAdapterStore(AdapterStore):
    """Keeps `keep_versions` versions of each adapter: the oldest go first, never the latest, the one it was trained from, or one in use."""

    def __init__(self, root: Path, *, keep_versions: int, in_use: Callable[[str, int], bool] = lambda lora_id, version: False) -> None:
        self._root = root
        self._keep_versions = keep_versions
        self._in_use = in_use
        self._lock = threading.RLock()
        with disk_errors():
            root.mkdir(parents=True, exist_ok=True)

    def create(self, lora_id: str, base_model: str) -> None:
        folder = self._root / flat_name(parse_adapter_id(lora_id))
        with self._lock, disk_errors():
            if (folder / ADAPTER).exists():
                taken = read_adapter(folder).lora_id
                alike = "" if taken == lora_id else f": on this disk it is the same name as {taken!r}"
                raise Conflict(f"the adapter id {lora_id!r} is taken{alike}", param="lora_id")
            if folder.exists():  # what is left of one whose deletion broke off
                _remove(folder)
            new = self._root / unique(NEW)
            new.mkdir()
            try:
                _write_adapter(new, Adapter(lora_id=lora_id, base_model=base_model, created_at=utc_now()))
                new.rename(folder)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            sync_folder(self._root)

    @contextmanager
    def stage(self, manifest: AdapterVersion) -> Iterator[Staging]:
        with disk_errors():
            staging = self._begin(manifest.lora_id)
            try:
                yield staging
                self._publish(manifest, staging)
            except BaseException:
                shutil.rmtree(staging.path, ignore_errors=True)
                raise

    def _begin(self, lora_id: str) -> Staging:
        with self._lock:
            folder = self._folder(lora_id)
            adapter = self._take_number(folder)
            path = folder / unique(STAGING)
            path.mkdir()
        return Staging(path, adapter.next_version)

    def _take_number(self, folder: Path) -> Adapter:
        """The adapter as it was. Its next number is on disk as taken before it is used: whatever happens next, nobody gets it again."""
        adapter = read_adapter(folder)
        _write_adapter(folder, adapter.model_copy(update={"next_version": adapter.next_version + 1}))
        return adapter

    def _publish(self, manifest: AdapterVersion, staging: Staging) -> None:
        if not staging.path.is_dir():
            raise NotFound(f"the adapter {manifest.lora_id!r} was deleted meanwhile", param="lora_id")
        write_manifest(manifest, staging)
        with self._lock:
            staging.path.rename(staging.path.parent / version_folder(staging.version))
            sync_folder(staging.path.parent)

    def set_latest(self, lora_id: str, version: int) -> None:
        with self._lock:
            folder = self.path(lora_id, version).parent
            write_atomically(folder / LATEST, str(version).encode())
            self._retain(lora_id, version)

    def _retain(self, lora_id: str, latest: int) -> None:
        folder = self._folder(lora_id)
        numbers = _numbers(folder)
        protected = {latest, self.version(lora_id, latest).parent}
        droppable = [number for number in numbers if number not in protected and not self._in_use(lora_id, number)]
        for number in droppable[: max(0, len(numbers) - self._keep_versions)]:
            _remove(folder / version_folder(number))

    def latest(self, lora_id: str) -> int:
        with self._lock:
            number = _read_latest(self._folder(lora_id))
        if number is None:
            raise NotFound(f"the adapter {lora_id!r} has no version yet", param="lora_id")
        return number

    def versions(self, lora_id: str) -> list[AdapterVersion]:
        with self._lock:
            return [self.version(lora_id, number) for number in _numbers(self._folder(lora_id))]

    def version(self, lora_id: str, version: int) -> AdapterVersion:
        with self._lock:
            return AdapterVersion.model_validate_json((self.path(lora_id, version) / MANIFEST).read_bytes())

    def path(self, lora_id: str, version: int) -> Path:
        with self._lock:
            path = self._folder(lora_id) / version_folder(version)
            if not path.is_dir():
                raise NotFound(f"the adapter {lora_id!r} has no version {version}", param="version")
            return path

    def discard(self, lora_id: str, version: int) -> None:
        with self._lock:
            path = self.path(lora_id, version)
            if _read_latest(path.parent) == version:
                raise Conflict(f"version {version} of {lora_id!r} is the one that serves: roll back to another first", param="version")
            _remove(path)

    def adapters(self, prefix: str = "") -> list[str]:
        with self._lock:
            ids = [read_adapter(folder).lora_id for folder in self._folders() if _read_latest(folder) is not None]
        return sorted(lora_id for lora_id in ids if lora_id.startswith(prefix))

    def exists(self, lora_id: str) -> bool:
        with self._lock:
            try:
                return _read_latest(self._folder(lora_id)) is not None
            except NotFound:
                return False

    def delete(self, lora_id: str) -> bool:
        with self._lock:
            try:
                _remove(self._folder(lora_id))
            except NotFound:
                return False
            return True

    def recover(self) -> Iterator[str]:
        removed = []
        with self._lock:
            for path in [*self._root.iterdir(), *(path for folder in self._folders() for path in folder.iterdir())]:
                if path.name.startswith(LEFTOVERS):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                    removed.append(f"half-written {path.relative_to(self._root)}")
            for folder in self._folders():
                if _read_latest(folder) is None:
                    removed.append(f"adapter {read_adapter(folder).lora_id!r}, which never got a version to serve")
                    _remove(folder)
        return iter(removed)

    def _folder(self, lora_id: str) -> Path:
        """The adapter's folder. A disk that ignores case shows it under another id too, so the id on record decides."""
        folder = self._root / flat_name(parse_adapter_id(lora_id))
        if not (folder / ADAPTER).exists() or read_adapter(folder).lora_id != lora_id:
            raise NotFound(f"there is no adapter {lora_id!r}", param="lora_id")
        return folder

    def _folders(self) -> list[Path]:
        return [path for path in self._root.iterdir() if not path.name.startswith(".") and (path / ADAPTER).exists()]


def write_manifest(manifest: AdapterVersion, staging: Staging) -> AdapterVersion:
    """Complete a staged version by its manifest, with its own number and size; all of it is then safe from a power cut."""
    files = [path for path in staging.path.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    published = manifest.model_copy(update={"version": staging.version, "size_bytes": size})
    for file in files:
        sync_file(file)
    write_atomically(staging.path / MANIFEST, published.model_dump_json(indent=2).encode())
    return published


def read_adapter(folder: Path) -> Adapter:
    """What is on record of the adapter in this folder."""
    return Adapter.model_validate_json((folder / ADAPTER).read_bytes())


def _write_adapter(folder: Path, adapter: Adapter) -> None:
    write_atomically(folder / ADAPTER, adapter.model_dump_json().encode())


def _read_latest(folder: Path) -> int | None:
    path = folder / LATEST
    return int(path.read_bytes()) if path.exists() else None


def _numbers(folder: Path) -> list[int]:
    return sorted(number for path in folder.iterdir() if (number := version_number(path.name)) is not None)


def _remove(path: Path) -> None:
    """Out of sight in one move, for good; the deleting may then be interrupted."""
    trash = path.parent / unique(TRASH)
    path.rename(trash)
    sync_folder(path.parent)
    shutil.rmtree(trash, ignore_errors=True)
