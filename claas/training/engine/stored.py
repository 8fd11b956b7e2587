"""The adapters' life cycle over an AdapterStore, written once for every engine that keeps its adapters in one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from claas.adapters.archive import import_zip
from claas.adapters.export import export_zip
from claas.adapters.initialise import write_initial_adapter
from claas.adapters.store import AdapterStore
from claas.core.adapter_id import flat_name, parse_adapter_id, vllm_name
from claas.core.errors import BadRequest
from claas.core.types import (
    AdapterVersion,
    DistillBatchRequestPayload,
    LoraDeleteResponse,
    LoraExistsPayload,
    LoraExportPayload,
    LoraInitRequest,
    LoraInitResponse,
    LoraListResponse,
    LoraRuntimeRef,
    TrainingConfig,
)
from claas.models.base_model import BaseModel
from claas.training.defaults import default_lora, default_training
from claas.training.engine.base import TrainingEngine

T = TypeVar("T")


class StoredEngine(TrainingEngine):
    """Everything of a TrainingEngine but training."""

    def __init__(self, store: AdapterStore, base: BaseModel, allowed_base_models: tuple[str, ...]) -> None:
        self._store = store
        self._base = base
        self._allowed = allowed_base_models or (base.id,)
        self._latest: dict[str, LoraRuntimeRef] = {}
        self._moves = 0
        self._moving = threading.Lock()

    def default_training(self) -> TrainingConfig:
        return default_training(self._base.n_params)

    async def promote(self, lora_id: str, version: int) -> None:
        await asyncio.to_thread(self._move, lora_id, lambda: self._store.set_latest(lora_id, version))

    async def discard(self, lora_id: str, version: int) -> None:
        await asyncio.to_thread(self._store.discard, lora_id, version)

    async def versions(self, lora_id: str) -> list[AdapterVersion]:
        return await asyncio.to_thread(self._store.versions, lora_id)

    async def init_lora(self, request: LoraInitRequest) -> LoraInitResponse:
        base_model = request.base_model or self._base.id
        if base_model not in self._allowed or base_model != self._base.id:
            raise BadRequest(f"base_model {base_model!r} is not served here: this service trains {self._base.id!r}", param="base_model")
        rank, alpha = default_lora(self._base.n_params)
        rank = request.lora_r or rank

        def fill(folder: Path) -> None:
            write_initial_adapter(
                folder,
                self._base.config,
                base_model=self._base.id,
                rank=rank,
                alpha=request.lora_alpha or (alpha if request.lora_r is None else 2 * rank),
                target_modules=request.target_modules,
            )

        await asyncio.to_thread(self._create, parse_adapter_id(request.lora_id), fill)
        return LoraInitResponse(lora_id=request.lora_id)

    async def import_lora(self, lora_id: str, archive: bytes) -> LoraInitResponse:
        def fill(folder: Path) -> None:
            import_zip(archive, folder, config=self._base.config, base_model=self._base.id)

        await asyncio.to_thread(self._create, parse_adapter_id(lora_id), fill)
        return LoraInitResponse(lora_id=lora_id)

    def _create(self, lora_id: str, fill: Callable[[Path], None]) -> None:
        """Register the adapter and publish its version 0; nothing of it stays if either fails."""
        self._store.create(lora_id, self._base.id)
        try:
            with self._store.stage(AdapterVersion(lora_id=lora_id, version=0, base_model=self._base.id)) as staging:
                fill(staging.path)
            self._move(lora_id, lambda: self._store.set_latest(lora_id, staging.version))
        except BaseException:
            self._store.delete(lora_id)
            raise

    async def list_loras(self, prefix: str = "") -> LoraListResponse:
        return LoraListResponse(loras=await asyncio.to_thread(self._store.adapters, prefix))

    async def export_lora(self, lora_id: str, version: int | None = None) -> LoraExportPayload:
        def export() -> LoraExportPayload:
            number = self._store.latest(lora_id) if version is None else version
            manifest = self._store.version(lora_id, number)
            content = export_zip(self._store.path(lora_id, number), manifest)
            return LoraExportPayload(filename=f"{flat_name(lora_id)}-v{number}.zip", content=content)

        return await asyncio.to_thread(export)

    async def delete_lora(self, lora_id: str) -> LoraDeleteResponse:
        return LoraDeleteResponse(deleted=await asyncio.to_thread(self._move, lora_id, lambda: self._store.delete(lora_id)))

    async def lora_exists(self, lora_id: str) -> LoraExistsPayload:
        return LoraExistsPayload(exists=await asyncio.to_thread(self._store.exists, lora_id))

    async def lora_runtime_ref(self, lora_id: str, version: int | None = None) -> LoraRuntimeRef:
        """Every request to an adapter asks for its latest version: it is remembered until it moves, and costs no thread and no file."""
        if version is not None:
            return await asyncio.to_thread(self._ref, lora_id, version)
        return self._latest.get(lora_id) or await self._look(lora_id)

    async def _look(self, lora_id: str) -> LoraRuntimeRef:
        """Which version is the latest, from the store."""
        moves = self._moves
        found = await asyncio.to_thread(lambda: self._ref(lora_id, self._store.latest(lora_id)))
        with self._moving:
            if moves == self._moves:  # else it may be the one before
                self._latest[lora_id] = found
        return found

    def _ref(self, lora_id: str, number: int) -> LoraRuntimeRef:
        made = self._store.version(lora_id, number).created_at
        name = vllm_name(lora_id, number, made)
        return LoraRuntimeRef(lora_id=lora_id, version=number, vllm_name=name, lora_path=self._place(lora_id, number))

    def _place(self, lora_id: str, number: int) -> str:
        """Where whoever serves finds the version."""
        return str(self._store.path(lora_id, number))

    def _move(self, lora_id: str, work: Callable[[], T]) -> T:
        """`work` changes which version is the latest. In its own thread, so that it is known even if nobody waits for it any more."""
        try:
            return work()
        finally:
            self._forget(lora_id)

    def _forget(self, lora_id: str) -> None:
        """What is remembered of the latest version may be wrong from now on, and what is being looked up as well."""
        with self._moving:
            self._moves += 1
            self._latest.pop(lora_id, None)


def refuse_in_place(payload: DistillBatchRequestPayload) -> None:
    """Raises BadRequest."""
    if payload.save_in_place:
        raise BadRequest("save_in_place is not supported: versions are immutable, and a rollback undoes a lesson", param="save_in_place")
