"""Adapter versions on a Modal Volume, from outside: read and written through Modal's file API, so that no container need run.

Laid out as `claas.adapters.layout` says. Others write too, containers among them, and a commit may come to light file by file: a version
counts when its manifest is there, which is written last, and its files have the size that the manifest says. Whoever writes holds the
adapter's lease: what was begun by somebody else and has no end is a leftover.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from claas.adapters.filesystem import write_manifest
from claas.adapters.layout import ADAPTER, LATEST, LEFTOVERS, STAGING, Adapter, unique, version_folder, version_number
from claas.adapters.modal_files import Entry, VolumeFiles
from claas.adapters.store import CONFIG, MANIFEST, AdapterStore, Staging
from claas.core.adapter_id import flat_name, parse_adapter_id
from claas.core.errors import ClaasError, Conflict, NotFound
from claas.core.types import AdapterVersion, utc_now
from claas.storage.files import disk_errors

if TYPE_CHECKING:
    import modal

LEFT_OVER_S = 3600.0
"""Half-written things of this age are nobody's any more."""

SETTLED_S = 120.0
"""A manifest of this age is remembered. Files are dated by the second: within one, an adapter may be deleted and made anew."""


class ModalVolumeStore(AdapterStore):
    """Keeps `keep_versions` versions of each adapter, as the store on disk does. What was read lies in `cache`: no other store's."""

    def __init__(
        self,
        volume: modal.Volume,
        cache: Path,
        *,
        keep_versions: int,
        in_use: Callable[[str, int], bool] = lambda lora_id, version: False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._files = VolumeFiles(volume)
        self._cache = cache
        self._keep_versions = keep_versions
        self._in_use = in_use
        self._now = now
        self._lock = threading.Lock()
        self._manifests: dict[tuple[str, Entry], AdapterVersion] = {}

    def create(self, lora_id: str, base_model: str) -> None:
        folder = flat_name(parse_adapter_id(lora_id))
        there = self._files.listed(folder)
        taken = Conflict(f"the adapter id {lora_id!r} is taken", param="lora_id")
        if ADAPTER in there and LATEST in there:
            raise taken
        if there:
            self._files.remove(folder)
        self._forget(lora_id)
        content = Adapter(lora_id=lora_id, base_model=base_model, created_at=utc_now()).model_dump_json().encode()
        try:
            self._files.write({f"{folder}/{ADAPTER}": content}, replace=False)
        except FileExistsError:
            if self._files.read(f"{folder}/{ADAPTER}") != content:  # else it was this one, and the answer was lost
                raise taken from None

    @contextmanager
    def stage(self, manifest: AdapterVersion) -> Iterator[Staging]:
        adapter = self._take_number(manifest.lora_id)
        staging = Staging(self._cache / unique(STAGING), adapter.next_version)
        with disk_errors():
            staging.path.mkdir(parents=True)
            try:
                yield staging
                self._publish(manifest, staging, adapter)
            finally:
                shutil.rmtree(staging.path, ignore_errors=True)

    def _take_number(self, lora_id: str) -> Adapter:
        """The adapter as it was. Its next number is on the Volume as taken before it is used."""
        with self._lock:
            adapter = self._adapter(lora_id)
            taken = adapter.model_copy(update={"next_version": adapter.next_version + 1})
            self._files.write({f"{flat_name(lora_id)}/{ADAPTER}": taken.model_dump_json().encode()})
        return adapter

    def _publish(self, manifest: AdapterVersion, staging: Staging, adapter: Adapter) -> None:
        published = write_manifest(manifest, staging)
        folder = _folder(published.lora_id, published.version)
        files = {f"{folder}/{path.relative_to(staging.path).as_posix()}": path for path in staging.path.rglob("*") if path.is_file()}
        last = {f"{folder}/{MANIFEST}": files.pop(f"{folder}/{MANIFEST}")}
        self._check_still_there(adapter)
        try:
            self._files.write(files)
            self._check_still_there(adapter)
            self._files.write(last)
        except BaseException:
            with suppress(ClaasError):  # then it is a leftover, and the first error says more
                self._files.remove(folder)
            raise
        _keep(staging.path, self._cached(published))

    def _check_still_there(self, adapter: Adapter) -> None:
        """Raises NotFound if it was deleted, even if it was made anew."""
        content = self._files.read(f"{flat_name(adapter.lora_id)}/{ADAPTER}")
        if content is None or Adapter.model_validate_json(content).created_at != adapter.created_at:
            raise NotFound(f"the adapter {adapter.lora_id!r} was deleted meanwhile", param="lora_id")

    def set_latest(self, lora_id: str, version: int) -> None:
        with self._lock:
            manifest = self.version(lora_id, version)
            self._files.write({f"{flat_name(lora_id)}/{LATEST}": str(version).encode()})
            self._retain(manifest)

    def _retain(self, latest: AdapterVersion) -> None:
        there = self._list(latest.lora_id)
        numbers = _numbers(there)
        protected = {latest.version, latest.parent}
        droppable = [number for number in numbers if number not in protected and not self._in_use(latest.lora_id, number)]
        for number in droppable[: max(0, len(numbers) - self._keep_versions)]:
            self._remove(latest.lora_id, number)

    def _remove(self, lora_id: str, version: int) -> None:
        """Without its manifest it is gone; the rest may then be interrupted."""
        self._files.remove(f"{_folder(lora_id, version)}/{MANIFEST}")
        self._files.remove(_folder(lora_id, version))
        for cached in self._cached_of(lora_id).glob(f"{version_folder(version)}-*"):
            shutil.rmtree(cached, ignore_errors=True)

    def latest(self, lora_id: str) -> int:
        number = self._latest(lora_id, self._list(lora_id))
        if number is None:
            raise NotFound(f"the adapter {lora_id!r} has no version yet", param="lora_id")
        return number

    def _latest(self, lora_id: str, there: Mapping[str, Entry]) -> int | None:
        content = self._files.read(f"{flat_name(lora_id)}/{LATEST}") if LATEST in there else None
        return None if content is None else int(content)

    def versions(self, lora_id: str) -> list[AdapterVersion]:
        there = self._list(lora_id)
        found = (self._manifest(lora_id, number, there) for number in _numbers(there))
        return [manifest for manifest in found if manifest is not None]

    def version(self, lora_id: str, version: int) -> AdapterVersion:
        manifest = self._manifest(lora_id, version, self._list(lora_id))
        if manifest is None:
            raise NotFound(f"the adapter {lora_id!r} has no version {version}", param="version")
        return manifest

    def _manifest(self, lora_id: str, version: int, there: Mapping[str, Entry]) -> AdapterVersion | None:
        """None unless the version is there as a whole."""
        start = f"{version_folder(version)}/"
        files = {path.removeprefix(start): entry for path, entry in there.items() if path.startswith(start)}
        own = files.pop(MANIFEST, None)
        if own is None:
            return None
        path = f"{_folder(lora_id, version)}/{MANIFEST}"
        manifest = self._manifests.get((path, own))
        if manifest is None:
            content = self._files.read(path)
            if content is None:
                return None
            manifest = AdapterVersion.model_validate_json(content)
            if self._now() - own.changed_at > SETTLED_S:
                self._manifests[path, own] = manifest
        return manifest if sum(entry.size for entry in files.values()) == manifest.size_bytes else None

    def path(self, lora_id: str, version: int) -> Path:
        there = self._list(lora_id)
        manifest = self._manifest(lora_id, version, there)
        if manifest is None:
            raise NotFound(f"the adapter {lora_id!r} has no version {version}", param="version")
        folder = self._cached(manifest)
        if not folder.is_dir():
            start = f"{version_folder(version)}/"
            self._fetch(manifest, folder, [path.removeprefix(start) for path in there if path.startswith(start)])
            self._prune(lora_id, _numbers(there))
        return folder

    def config_path(self, lora_id: str, version: int) -> Path:
        """A folder with only the version's manifest and `adapter_config.json`, for engines that load the rest on Modal. Raises NotFound."""
        manifest = self.version(lora_id, version)
        folder = self._cached(manifest).with_suffix(".config")
        if not folder.is_dir():
            self._fetch(manifest, folder, [MANIFEST, CONFIG])
        return folder

    def _fetch(self, manifest: AdapterVersion, folder: Path, names: Iterable[str]) -> None:
        """Files of the version into `folder`, all or none of them."""
        scratch = self._cache / unique(STAGING)
        with disk_errors():
            try:
                for name in names:
                    to = scratch / name
                    to.parent.mkdir(parents=True, exist_ok=True)
                    if not self._files.fetch(f"{_folder(manifest.lora_id, manifest.version)}/{name}", to):
                        raise NotFound(f"the adapter {manifest.lora_id!r} has no version {manifest.version}", param="version")
                _keep(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _cached(self, manifest: AdapterVersion) -> Path:
        """Where a version is, once it was fetched: one of an adapter that was deleted and made anew is another."""
        return self._cached_of(manifest.lora_id) / f"{version_folder(manifest.version)}-{manifest.created_at:%Y%m%dT%H%M%S%f}"

    def _cached_of(self, lora_id: str) -> Path:
        return self._cache / flat_name(lora_id)

    def _prune(self, lora_id: str, numbers: Iterable[int]) -> None:
        """Forget what was fetched of versions that are no more."""
        kept = set(numbers)
        for folder in self._cached_of(lora_id).glob("v*"):
            number = version_number(folder.name.partition("-")[0])
            if number is not None and number not in kept and not self._in_use(lora_id, number):
                shutil.rmtree(folder, ignore_errors=True)

    def discard(self, lora_id: str, version: int) -> None:
        with self._lock:
            there = self._list(lora_id)
            if version not in _numbers(there):
                raise NotFound(f"the adapter {lora_id!r} has no version {version}", param="version")
            if self._latest(lora_id, there) == version:
                raise Conflict(f"version {version} of {lora_id!r} is the one that serves: roll back to another first", param="version")
            self._remove(lora_id, version)

    def adapters(self, prefix: str = "") -> list[str]:
        ids = [_lora_id(name) for name, there in self._all().items() if ADAPTER in there and LATEST in there]
        return sorted(lora_id for lora_id in ids if lora_id.startswith(prefix))

    def exists(self, lora_id: str) -> bool:
        there = self._files.listed(flat_name(parse_adapter_id(lora_id)))
        return ADAPTER in there and LATEST in there

    def delete(self, lora_id: str) -> bool:
        folder = flat_name(parse_adapter_id(lora_id))
        there = self._files.listed(folder)
        if there:
            self._files.remove(f"{folder}/{ADAPTER}")  # without it there is no adapter; the rest may then be interrupted
            self._files.remove(folder)
        self._forget(lora_id)
        return ADAPTER in there

    def recover(self) -> Iterator[str]:
        """Others may be writing right now: only what is an hour old is left over."""
        for scratch in self._cache.glob(f"{STAGING}*"):
            shutil.rmtree(scratch, ignore_errors=True)
        removed = []
        for name, there in self._all().items():
            if ADAPTER in there and LATEST in there:
                for leftover in _half_written(there):
                    if self._is_old(there, f"{leftover}/"):
                        self._files.remove(f"{name}/{leftover}")
                        removed.append(f"half-written {name}/{leftover}")
            elif self._is_old(there):
                self._files.remove(name)
                what = f"adapter {_lora_id(name)!r}, which never got a version to serve" if ADAPTER in there else f"half-written {name}"
                removed.append(what)
        return iter(removed)

    def _is_old(self, there: Mapping[str, Entry], start: str = "") -> bool:
        """Whether nothing under `start` was written for an hour."""
        newest = max(entry.changed_at for path, entry in there.items() if path.startswith(start))
        return self._now() - newest > LEFT_OVER_S

    def _all(self) -> dict[str, dict[str, Entry]]:
        """The files of every folder of the Volume, by its name."""
        folders: dict[str, dict[str, Entry]] = {}
        for path, entry in self._files.listed("").items():
            name, _, rest = path.partition("/")
            folders.setdefault(name, {})[rest] = entry
        return folders

    def _list(self, lora_id: str) -> dict[str, Entry]:
        """The adapter's files. Raises NotFound."""
        there = self._files.listed(flat_name(parse_adapter_id(lora_id)))
        if ADAPTER not in there:
            raise _no_adapter(lora_id)
        return there

    def _adapter(self, lora_id: str) -> Adapter:
        """What is on record of it. Raises NotFound."""
        content = self._files.read(f"{flat_name(parse_adapter_id(lora_id))}/{ADAPTER}")
        if content is None:
            raise _no_adapter(lora_id)
        return Adapter.model_validate_json(content)

    def _forget(self, lora_id: str) -> None:
        shutil.rmtree(self._cached_of(lora_id), ignore_errors=True)


def _no_adapter(lora_id: str) -> NotFound:
    return NotFound(f"there is no adapter {lora_id!r}", param="lora_id")


def _folder(lora_id: str, version: int) -> str:
    return f"{flat_name(lora_id)}/{version_folder(version)}"


def _lora_id(flat: str) -> str:
    return flat.replace("~", "/")


def _numbers(there: Iterable[str]) -> list[int]:
    """The versions that have a manifest."""
    found = (version_number(path.removesuffix(f"/{MANIFEST}")) for path in there if path.endswith(f"/{MANIFEST}"))
    return sorted(number for number in found if number is not None)


def _half_written(there: Mapping[str, Entry]) -> set[str]:
    """The version folders without a manifest, and what a container wrote beside them."""
    whole = {version_folder(number) for number in _numbers(there)}
    names = {path.partition("/")[0] for path in there if "/" in path}
    return {name for name in names if name not in whole and (version_number(name) is not None or name.startswith(LEFTOVERS))}


def _keep(scratch: Path, folder: Path) -> None:
    """Into place at once. Where another thread was faster, its files are the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
