"""Adapters from birth to deletion, as the routes need them: names to versions, rollback, import, export."""

from __future__ import annotations

import uuid

from claas.core.adapter_id import parse_adapter_id, parse_model_name
from claas.core.errors import BadRequest, ClaasError, NotFound
from claas.core.types import AdapterVersion, LoraExportPayload, LoraInitRequest, LoraInitResponse, LoraRuntimeRef, StepRecord
from claas.inference.base import InferenceBackend
from claas.learning.feedback_store import FeedbackStore
from claas.learning.journal import Journal
from claas.learning.lesson_book import LessonBook
from claas.learning.locks import AdapterLocks
from claas.rollouts.store import RolloutStore
from claas.training.engine.base import TrainingEngine


class AdapterLifecycle:
    """Creates, names, moves and removes adapters. Every change of an adapter happens under its lock."""

    def __init__(
        self,
        engine: TrainingEngine,
        inference: InferenceBackend,
        rollouts: RolloutStore,
        feedback: FeedbackStore,
        journal: Journal,
        book: LessonBook,
        locks: AdapterLocks,
        base_model_id: str,
    ) -> None:
        self._engine = engine
        self._inference = inference
        self._rollouts = rollouts
        self._feedback = feedback
        self._journal = journal
        self._book = book
        self._locks = locks
        self._base_model_id = base_model_id

    async def resolve_model(self, model: str) -> LoraRuntimeRef | None:
        """The adapter version that a request's `model` means; None for the base model itself.

        Raises NotFound, in OpenAI's words, for anything unknown.
        """
        if model == self._base_model_id:
            return None
        try:
            name = parse_model_name(model)
            return await self._engine.lora_runtime_ref(name.lora_id, name.version)
        except (BadRequest, NotFound) as error:
            raise NotFound(f"The model {model[:200]!r} does not exist: {error.message}", param="model", code="model_not_found") from error

    async def is_gone(self, lora_id: str) -> bool:
        """Whether the adapter is known not to exist any more. One whose engine does not answer may still be there."""
        try:
            await self._engine.lora_runtime_ref(lora_id)
        except NotFound:
            return True
        except ClaasError:
            return False
        return False

    async def init(self, request: LoraInitRequest) -> LoraInitResponse:
        """Create an adapter with a version 0 of no effect."""
        parse_adapter_id(request.lora_id)
        async with self._locks.hold(request.lora_id):
            return await self._engine.init_lora(request)

    async def import_(self, lora_id: str, archive: bytes) -> LoraInitResponse:
        """Create an adapter from a PEFT zip; refused if it cannot be served."""
        parse_adapter_id(lora_id)
        async with self._locks.hold(lora_id):
            response = await self._engine.import_lora(lora_id, archive)
            await self._inference.activate(await self._engine.lora_runtime_ref(lora_id))
            return response

    async def export(self, lora_id: str, version: int | None) -> LoraExportPayload:
        """A zip that PEFT and vLLM load."""
        return await self._engine.export_lora(parse_adapter_id(lora_id), version)

    async def adapters(self, prefix: str = "") -> list[str]:
        """Ids of all adapters."""
        return (await self._engine.list_loras(prefix)).loras

    async def versions(self, lora_id: str) -> tuple[int, list[AdapterVersion]]:
        """The latest version's number and all versions, oldest first."""
        ref = await self._engine.lora_runtime_ref(parse_adapter_id(lora_id))
        return ref.version, await self._engine.versions(lora_id)

    async def rollback(self, lora_id: str, version: int) -> LoraRuntimeRef:
        """Serve an earlier (or later) version from the next request on. The one left stays, so this too can be undone."""
        parse_adapter_id(lora_id)
        async with self._locks.hold(lora_id):
            before = await self._engine.lora_runtime_ref(lora_id)
            ref = await self._engine.lora_runtime_ref(lora_id, version)
            await self._inference.activate(ref)
            await self._engine.promote(lora_id, version)
            await self._journal.record(
                StepRecord(
                    id=f"step-{uuid.uuid4().hex}",
                    request_id=f"rollback-{uuid.uuid4().hex}",
                    lora_id=lora_id,
                    parent=before.version,
                    version=version,
                    outcome="applied",
                    reason=f"rollback from version {before.version} to {version}",
                )
            )
            return ref

    async def delete(self, lora_id: str) -> None:
        """Remove the adapter and all that was kept of it: versions, rollouts, feedback, steps, lessons. Raises NotFound."""
        parse_adapter_id(lora_id)
        async with self._locks.hold(lora_id):
            async with self._inference.leaving(lora_id):
                if not (await self._engine.delete_lora(lora_id)).deleted:
                    raise NotFound(f"there is no adapter {lora_id!r}", param="lora_id")
            await self._rollouts.delete_adapter(lora_id)
            await self._feedback.delete_adapter(lora_id)
            await self._journal.delete_adapter(lora_id)
            await self._book.delete_adapter(lora_id)
