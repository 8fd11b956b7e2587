"""The AdapterStore seam: what every place that keeps adapter versions promises.

A version is a folder of files that PEFT loads (`adapter_config.json`, `adapter_model.safetensors`), with the optimizer's moments
(`optimizer.safetensors`), the teachers that outlive a lesson, if it has any, and a manifest. It is written once, appears whole or not
at all, and its number is never used again, not even after it was discarded: serving engines cache by name.

Methods block on disk or network: call them off the event loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from claas.core.types import AdapterVersion

MANIFEST = "manifest.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
OPTIMIZER = "optimizer.safetensors"
TEACHER = "teacher_{kind}.safetensors"


class Staging:
    """A version being written: put the files under `path`, then call `commit` of the store's context."""

    def __init__(self, path: Path, version: int) -> None:
        self.path = path
        self.version = version


class AdapterStore(ABC):
    """Immutable adapter versions and one `latest` pointer for each adapter."""

    @abstractmethod
    def create(self, lora_id: str, base_model: str) -> None:
        """Register an adapter without any version. Raises Conflict if the id is taken."""

    @abstractmethod
    def stage(self, manifest: AdapterVersion) -> AbstractContextManager[Staging]:
        """Write one version: the body fills `Staging.path`; leaving it without an error publishes the version, whole.

        `manifest.version` is ignored: the store takes the next number, never used before. `size_bytes` is measured.
        An error in the body leaves nothing behind. Does not move `latest`. Raises NotFound, StorageFull.
        """

    @abstractmethod
    def set_latest(self, lora_id: str, version: int) -> None:
        """Point `latest` at a published version, atomically. Raises NotFound."""

    @abstractmethod
    def latest(self, lora_id: str) -> int:
        """The version that serves. Raises NotFound for an unknown adapter or one whose first version is not published yet."""

    @abstractmethod
    def versions(self, lora_id: str) -> list[AdapterVersion]:
        """All published versions, oldest first. Raises NotFound."""

    @abstractmethod
    def version(self, lora_id: str, version: int) -> AdapterVersion:
        """One published version's manifest. Raises NotFound."""

    @abstractmethod
    def path(self, lora_id: str, version: int) -> Path:
        """The version's folder, readable here. Raises NotFound."""

    @abstractmethod
    def discard(self, lora_id: str, version: int) -> None:
        """Delete one version that is not `latest`. Raises NotFound, Conflict."""

    @abstractmethod
    def adapters(self, prefix: str = "") -> list[str]:
        """Ids of all adapters that have a `latest`, sorted."""

    @abstractmethod
    def exists(self, lora_id: str) -> bool:
        """Whether the adapter has a `latest`."""

    @abstractmethod
    def delete(self, lora_id: str) -> bool:
        """Remove the adapter with all versions; False if there was none."""

    @abstractmethod
    def recover(self) -> Iterator[str]:
        """Remove what an interrupted process left half written; yields a line for each thing removed."""
