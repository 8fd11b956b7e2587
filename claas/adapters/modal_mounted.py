"""Adapter versions on a Modal Volume, inside a container that mounts it: a disk whose changes others see once they are committed.

A version is written beside the Volume and copied in when it is whole, since Modal may commit whatever lies there at any time.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from claas.adapters.filesystem import FilesystemAdapterStore, read_adapter, write_manifest
from claas.adapters.layout import STAGING, Adapter, unique, version_folder
from claas.adapters.modal_errors import modal_errors
from claas.adapters.store import Staging
from claas.core.errors import BackendUnavailable, NotFound
from claas.core.types import AdapterVersion
from claas.storage.files import disk_errors


class VolumeMount(Protocol):
    """What a container does with a Volume that it mounts: `modal.Volume` is one."""

    def reload(self) -> None:
        """Show what others have committed."""

    def commit(self) -> None:
        """Let others see what was written here."""


class MountedVolumeStore(FilesystemAdapterStore):
    """Adapters under a mount of the Volume at `root`. `mount` None: a plain folder that nobody else writes to."""

    def __init__(
        self,
        root: Path,
        mount: VolumeMount | None,
        *,
        keep_versions: int,
        in_use: Callable[[str, int], bool] = lambda lora_id, version: False,
    ) -> None:
        super().__init__(root, keep_versions=keep_versions, in_use=in_use)
        self._mount = mount
        self._depth = 0

    @contextmanager
    def _fresh(self) -> Iterator[None]:
        """What others have committed is seen; asked for once for calls within calls."""
        with self._lock:
            if self._mount is not None and self._depth == 0:
                with _volume_errors():
                    self._mount.reload()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """What the block changed is committed, if it ends well."""
        with self._fresh():
            yield
            if self._mount is not None:
                with _volume_errors():
                    self._mount.commit()

    def create(self, lora_id: str, base_model: str) -> None:
        with self._changing():
            super().create(lora_id, base_model)

    @contextmanager
    def stage(self, manifest: AdapterVersion) -> Iterator[Staging]:
        with self._changing():
            adapter = self._take_number(self._folder(manifest.lora_id))
        with disk_errors(), tempfile.TemporaryDirectory(prefix=STAGING) as scratch:
            staging = Staging(Path(scratch), adapter.next_version)
            yield staging
            write_manifest(manifest, staging)
            self._appear(staging, adapter)

    def _appear(self, staging: Staging, adapter: Adapter) -> None:
        """Copy a whole version into the mount and commit it; if that fails it is gone from the mount too."""
        beside = placed = None
        try:
            with self._changing():
                folder = self._still(adapter)
                beside, placed = folder / unique(STAGING), folder / version_folder(staging.version)
                shutil.copytree(staging.path, beside)
                beside.rename(placed)
        except BaseException:
            for left in (beside, placed):
                if left is not None:
                    shutil.rmtree(left, ignore_errors=True)
            raise

    def _still(self, adapter: Adapter) -> Path:
        """The folder of the adapter that the version was begun for. Raises NotFound."""
        try:
            folder = self._folder(adapter.lora_id)
            if read_adapter(folder).created_at == adapter.created_at:
                return folder
        except NotFound:
            pass
        raise NotFound(f"the adapter {adapter.lora_id!r} was deleted meanwhile", param="lora_id")

    def set_latest(self, lora_id: str, version: int) -> None:
        with self._changing():
            super().set_latest(lora_id, version)

    def discard(self, lora_id: str, version: int) -> None:
        with self._changing():
            super().discard(lora_id, version)

    def delete(self, lora_id: str) -> bool:
        with self._changing():
            return super().delete(lora_id)

    def recover(self) -> Iterator[str]:
        with self._changing():
            return super().recover()

    def latest(self, lora_id: str) -> int:
        with self._fresh():
            return super().latest(lora_id)

    def versions(self, lora_id: str) -> list[AdapterVersion]:
        with self._fresh():
            return super().versions(lora_id)

    def version(self, lora_id: str, version: int) -> AdapterVersion:
        with self._fresh():
            return super().version(lora_id, version)

    def path(self, lora_id: str, version: int) -> Path:
        with self._fresh():
            return super().path(lora_id, version)

    def adapters(self, prefix: str = "") -> list[str]:
        with self._fresh():
            return super().adapters(prefix)

    def exists(self, lora_id: str) -> bool:
        with self._fresh():
            return super().exists(lora_id)


@contextmanager
def _volume_errors() -> Iterator[None]:
    try:
        with modal_errors(storing=True):
            yield
    except RuntimeError as error:  # how the SDK says that files are open, or that the Volume is gone
        raise BackendUnavailable("the Volume on Modal could not be reloaded or committed: nothing was published; try again") from error
