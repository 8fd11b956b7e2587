"""The TrainingEngine seam: one lesson in, one new adapter version out, and the adapters' life cycle.

Every engine passes `tests/contracts/test_training_engine.py`. What differs between backends stays in the engine's own file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from claas.core.types import (
    AdapterVersion,
    DistillBatchRequestPayload,
    DistillResponse,
    LoraDeleteResponse,
    LoraExistsPayload,
    LoraExportPayload,
    LoraInitRequest,
    LoraInitResponse,
    LoraListResponse,
    LoraRuntimeRef,
    ServiceHealth,
    TrainingConfig,
)


class TrainingEngine(ABC):
    """Trains adapters and keeps their versions."""

    @abstractmethod
    def default_training(self) -> TrainingConfig:
        """The lesson settings that suit this engine's base model; a request's own fields go over them."""

    @asynccontextmanager
    async def exclusive(self, lora_id: str) -> AsyncIterator[None]:
        """Keep other services from changing the adapter while the block does. By default nobody else can.

        The service's own lock of the adapter is held already. Raises AdapterBusy, BackendUnavailable.
        """
        yield

    @abstractmethod
    async def distill(self, payload: DistillBatchRequestPayload) -> DistillResponse:
        """Train one lesson from `parent`, or else the latest version, and publish the result as a new version, without moving `latest`.

        `metadata` is a `StepReport` as JSON. Its `outcome` is "applied" (then `version` is the new version), "skipped" or "undone"
        (then `version` is None, nothing was written, and `reason` says why).

        Raises:
            NotFound: no such adapter or parent.
            BadRequest: a setting this engine has no counterpart for, named.
            StepFailed, StorageFull, BackendUnavailable: nothing was published.
        """

    @abstractmethod
    async def promote(self, lora_id: str, version: int) -> None:
        """Make a published version the latest. Also how a rollback is done. Raises NotFound."""

    @abstractmethod
    async def discard(self, lora_id: str, version: int) -> None:
        """Delete a published version that is not the latest. Raises NotFound, Conflict."""

    @abstractmethod
    async def versions(self, lora_id: str) -> list[AdapterVersion]:
        """All published versions, oldest first. Raises NotFound."""

    @abstractmethod
    async def init_lora(self, request: LoraInitRequest) -> LoraInitResponse:
        """Create an adapter whose version 0 has no effect. Raises Conflict if it exists, BadRequest for another base model."""

    @abstractmethod
    async def import_lora(self, lora_id: str, archive: bytes) -> LoraInitResponse:
        """Create an adapter from a zip in PEFT's layout. Raises Conflict, BadRequest if it does not fit the base model."""

    @abstractmethod
    async def list_loras(self, prefix: str = "") -> LoraListResponse:
        """Ids of all adapters that begin with `prefix`, sorted."""

    @abstractmethod
    async def export_lora(self, lora_id: str, version: int | None = None) -> LoraExportPayload:
        """A zip that PEFT and vLLM load; the latest version unless one is named. Raises NotFound."""

    @abstractmethod
    async def delete_lora(self, lora_id: str) -> LoraDeleteResponse:
        """Remove the adapter and all its versions."""

    @abstractmethod
    async def lora_exists(self, lora_id: str) -> LoraExistsPayload:
        """Whether the adapter exists."""

    @abstractmethod
    async def lora_runtime_ref(self, lora_id: str, version: int | None = None) -> LoraRuntimeRef:
        """Where a serving engine finds this version (default: the latest). Raises NotFound."""

    @abstractmethod
    async def health(self) -> ServiceHealth:
        """Whether a lesson could be trained now."""

    @abstractmethod
    async def aclose(self) -> None:
        """Finish or abandon what runs, and free what is held."""
