"""Adapter versions on a Modal Volume: from inside a container that mounts it, and from anywhere else through Modal's file API."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from claas.adapters.filesystem import FilesystemAdapterStore

if TYPE_CHECKING:
    import modal


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


class ModalVolumeStore(FilesystemAdapterStore):
    """Adapters on the Volume, from outside. Files are fetched into `cache`, once."""

    def __init__(
        self,
        volume: modal.Volume,
        cache: Path,
        *,
        keep_versions: int,
        in_use: Callable[[str, int], bool] = lambda lora_id, version: False,
        now: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(cache, keep_versions=keep_versions, in_use=in_use)
        self._volume = volume
        self._now = now

    def config_path(self, lora_id: str, version: int) -> Path:
        """A folder with only the version's manifest and `adapter_config.json`, for engines that load the rest on Modal. Raises NotFound."""
        raise NotImplementedError
