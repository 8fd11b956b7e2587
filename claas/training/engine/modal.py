"""The Modal engine: lessons are trained by a worker on Modal, adapters are on its Volume. Nothing is computed here.

Other services may change the same adapters: what serves is looked up again every other moment, and changes are made under a lease.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from pydantic import JsonValue

from claas.adapters.layout import version_folder
from claas.adapters.store import AdapterStore
from claas.core.adapter_id import flat_name
from claas.core.errors import BackendUnavailable, ClaasError, NotFound
from claas.core.types import (
    DistillBatchRequestPayload,
    DistillResponse,
    LoraDeleteResponse,
    LoraRuntimeRef,
    ServiceHealth,
)
from claas.core.usage import count_machine
from claas.models.base_model import BaseModel
from claas.training.engine.modal_calls import Phase
from claas.training.engine.modal_wire import LessonCall, WorkerFacts, encode, raised, read_answer
from claas.training.engine.stored import StoredEngine, refuse_in_place
from claas.training.report import StepReport

FRESH_S = 2.0
"""How long the latest version is taken to be what it was."""
USABLE_S = 60.0
"""How old it may be where it is looked up behind the request that asks."""
CHECKED_S = 10.0
TRIES, PAUSE_S = 4, 0.5

T = TypeVar("T")
log = logging.getLogger(__name__)


class Calls(Protocol):
    """Who takes a lesson to the worker: `ModalCalls`."""

    async def check(self) -> None: ...

    async def distill(self, call: str, request: str, phase: Callable[[Phase], None]) -> str: ...

    async def aclose(self) -> None: ...


class Lease(Protocol):
    """Who keeps other services from an adapter: `ModalLease`."""

    def hold(self, lora_id: str) -> AbstractAsyncContextManager[None]: ...

    def check(self, lora_id: str) -> None: ...


@dataclass(slots=True)
class _Lesson:
    """A lesson under way, and since when it is in this phase."""

    lora_id: str
    phase: Phase = "waiting for a container"
    since: float = field(default_factory=time.monotonic)

    def enter(self, phase: Phase) -> None:
        self.phase, self.since = phase, time.monotonic()

    def told(self) -> dict[str, JsonValue]:
        return {"lora_id": self.lora_id, "phase": self.phase, "seconds": round(time.monotonic() - self.since, 1)}


class ModalEngine(StoredEngine):
    """Trains through `calls`. `mount`: where whoever serves sees the Volume; None: it serves here, from files that are fetched.

    `price` tells what a second of a GPU costs, in dollars.
    """

    def __init__(
        self,
        store: AdapterStore,
        base: BaseModel,
        calls: Calls,
        lease: Lease,
        *,
        price: Callable[[str], float | None],
        mount: PurePosixPath | None = None,
        allowed_base_models: tuple[str, ...] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(store, base, allowed_base_models)
        self._calls = calls
        self._lease = lease
        self._price = price
        self._mount = mount
        self._now = now
        self._lessons: dict[str, _Lesson] = {}
        self._tasks: set[asyncio.Task[str]] = set()
        self._looked_at: dict[str, float] = {}
        self._refreshing: dict[str, asyncio.Task[None]] = {}
        self._worker: WorkerFacts | None = None
        self._checked_at = float("-inf")
        self._closing = False

    # --- a lesson ---

    async def distill(self, payload: DistillBatchRequestPayload) -> DistillResponse:
        refuse_in_place(payload)
        self._stop_if_closing()
        self._lease.check(payload.lora_id)
        parent = await asyncio.to_thread(self._parent, payload)
        call, lesson = uuid.uuid4().hex, _Lesson(payload.lora_id)
        request = encode(LessonCall(call=call, base_model=self._base.id, payload=payload.model_copy(update={"parent": parent})))
        self._lessons[call] = lesson
        began = time.monotonic()
        task = asyncio.create_task(self._calls.distill(call, request, lesson.enter))
        self._tasks.add(task)
        try:
            answer = read_answer(await task)
        except asyncio.CancelledError:
            task.cancel()
            self._stop_if_closing()
            raise
        finally:
            self._tasks.discard(task)
            del self._lessons[call]
        self._worker = answer.worker
        count_machine(answer.worker.gpu, answer.worker.seconds, self._price(answer.worker.gpu))
        if answer.error is not None:
            raise raised(answer.error)
        report = StepReport.model_validate(answer.report)
        waited = max(0.0, time.monotonic() - began - answer.worker.seconds)
        seconds = report.cost.seconds | {"container": round(waited, 4)}
        report = report.model_copy(update={"cost": report.cost.model_copy(update={"seconds": seconds})})
        return DistillResponse(lora_id=payload.lora_id, metadata=report.model_dump(mode="json"))

    def _parent(self, payload: DistillBatchRequestPayload) -> int:
        """The version to train from. Raises NotFound, before a container is asked for."""
        number = self._store.latest(payload.lora_id) if payload.parent is None else payload.parent
        return self._store.version(payload.lora_id, number).version

    # --- the adapters' life ---

    @asynccontextmanager
    async def exclusive(self, lora_id: str) -> AsyncIterator[None]:
        """Whatever begins now begins from the true latest version, and nobody else moves it."""
        async with self._lease.hold(lora_id):
            self._forget(lora_id)
            yield

    async def promote(self, lora_id: str, version: int) -> None:
        async def work(_: bool) -> None:
            await super(ModalEngine, self).promote(lora_id, version)

        await self._until_answered(lora_id, work)

    async def discard(self, lora_id: str, version: int) -> None:
        async def work(again: bool) -> None:
            try:
                await super(ModalEngine, self).discard(lora_id, version)
            except NotFound:
                if not again:  # else it was the answer that was lost
                    raise

        await self._until_answered(lora_id, work)

    async def delete_lora(self, lora_id: str) -> LoraDeleteResponse:
        async def work(again: bool) -> LoraDeleteResponse:
            done = await super(ModalEngine, self).delete_lora(lora_id)
            return LoraDeleteResponse(deleted=done.deleted or again)

        return await self._until_answered(lora_id, work)

    async def _until_answered(self, lora_id: str, work: Callable[[bool], Awaitable[T]]) -> T:
        """Do what is the same when done twice until Modal says that it is done. `work` is told whether it may have been done already."""
        for tried in range(TRIES):
            self._lease.check(lora_id)
            try:
                return await work(tried > 0)
            except BackendUnavailable as error:
                if error.retry_after_s is None or tried == TRIES - 1:
                    raise
            await asyncio.sleep(PAUSE_S * 2**tried)
        raise AssertionError("returned or raised")

    def _create(self, lora_id: str, fill: Callable[[Path], None]) -> None:
        self._lease.check(lora_id)
        super()._create(lora_id, fill)

    # --- what serves ---

    async def lora_runtime_ref(self, lora_id: str, version: int | None = None) -> LoraRuntimeRef:
        """The latest is remembered for a moment; then once more, while it is looked up behind the request."""
        known = self._latest.get(lora_id)
        if version is not None or known is None:
            return await super().lora_runtime_ref(lora_id, version)
        age = self._now() - self._looked_at[lora_id]
        if age < FRESH_S:
            return known
        if age > USABLE_S:
            return await self._look(lora_id)
        if lora_id not in self._refreshing:
            self._refreshing[lora_id] = asyncio.create_task(self._refresh(lora_id))
        return known

    async def _look(self, lora_id: str) -> LoraRuntimeRef:
        now = self._now()
        try:
            found = await super()._look(lora_id)
        except NotFound:
            self._forget(lora_id)
            raise
        self._looked_at[lora_id] = now
        return found

    async def _refresh(self, lora_id: str) -> None:
        try:
            await self._look(lora_id)
        except ClaasError as error:
            log.info("which version of %r is the latest could not be looked up: %s", lora_id, error.message)
        finally:
            del self._refreshing[lora_id]

    def _place(self, lora_id: str, number: int) -> str:
        if self._mount is None:
            return super()._place(lora_id, number)
        return str(self._mount / flat_name(lora_id) / version_folder(number))

    # --- how it is ---

    async def health(self) -> ServiceHealth:
        """Asks Modal whether the app is there, not the worker: that would start a container."""
        detail: dict[str, JsonValue] = {"engine": "modal", "lessons": [lesson.told() for lesson in self._lessons.values()]}
        if self._worker is not None:
            detail |= {"gpu": self._worker.gpu, "device": self._worker.device}
        if self._closing:
            return ServiceHealth(status="unhealthy", error="the service is closing", detail=detail)
        try:
            if time.monotonic() - self._checked_at > CHECKED_S:
                await self._calls.check()
                self._checked_at = time.monotonic()
        except BackendUnavailable as error:
            return ServiceHealth(status="unhealthy", error=error.message, detail=detail)
        return ServiceHealth(status="healthy", detail=detail)

    async def aclose(self) -> None:
        """Running lessons are stopped on Modal too, and publish nothing."""
        self._closing = True
        for task in (*self._tasks, *self._refreshing.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._refreshing.values(), return_exceptions=True)
        await self._calls.aclose()

    def _stop_if_closing(self) -> None:
        if self._closing:
            raise BackendUnavailable("the service is closing: the lesson was not learnt, send the feedback again later")
