"""The product in one screen: a person said what was wrong with a reply, and the model learns it.

resolve → lock → distill → check → publish → activate → journal. Whatever breaks, the version before keeps serving and the feedback is kept.
"""

from __future__ import annotations

import asyncio
from itertools import chain

from claas.core.types import DistillBatchRequestPayload, DistillResponse, LoraRuntimeRef
from claas.inference.base import InferenceBackend
from claas.learning.anchors import Anchors
from claas.learning.checks import find_collapse
from claas.learning.hindsight_rollouts import hindsight_rollouts
from claas.learning.ledger import Ledger
from claas.learning.lesson_book import LessonBook, TaughtLesson, rehearsal
from claas.learning.locks import AdapterLocks
from claas.learning.resolve import ResolvedLesson, resolve
from claas.learning.show import show
from claas.learning.stopwatch import Stopwatch
from claas.learning.types import LessonRequest, LessonResult
from claas.rollouts.store import RolloutStore
from claas.training.engine.base import TrainingEngine

SECOND_TRY = 0.3
"""The share of the learning rate with which an undone lesson is tried again."""


class Learner:
    """Teaches adapters, one lesson at a time each."""

    def __init__(
        self,
        engine: TrainingEngine,
        inference: InferenceBackend,
        rollouts: RolloutStore,
        ledger: Ledger,
        book: LessonBook,
        locks: AdapterLocks,
        base_model_id: str,
    ) -> None:
        self._engine = engine
        self._inference = inference
        self._rollouts = rollouts
        self._ledger = ledger
        self._book = book
        self._locks = locks
        self._base_model_id = base_model_id
        self._anchors = Anchors(inference)
        self._running: set[asyncio.Task[LessonResult]] = set()

    async def learn(self, request: LessonRequest) -> LessonResult:
        """Teach one lesson and return when the new version serves. A caller who leaves does not stop it.

        Raises:
            NotFound, Conflict, BadRequest, Unteachable: the feedback does not fit; nothing was stored. See `resolve`.
            AdapterBusy, StepFailed, StorageFull, BackendUnavailable, Overloaded: the feedback is stored as failed, with the reason.
        """
        lesson = await resolve(request, self._rollouts, self._base_model_id, self._engine.default_training())
        if known := await self._ledger.repeated(lesson):
            return known
        feedback_ids = await self._ledger.accept(lesson)
        teaching = asyncio.create_task(self._teach(lesson, feedback_ids))
        self._running.add(teaching)
        teaching.add_done_callback(self._running.discard)
        return await asyncio.shield(teaching)

    async def aclose(self) -> None:
        """Let running lessons finish."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _teach(self, lesson: ResolvedLesson, feedback_ids: tuple[str, ...]) -> LessonResult:
        watch = Stopwatch()
        try:
            async with self._locks.hold(lesson.lora_id):
                await self._ledger.begin(feedback_ids)
                parent = await self._engine.lora_runtime_ref(lesson.lora_id)
                with watch.phase("rollouts"):
                    payload = await self._prepare(lesson.payload(feedback_ids), parent)
                step = await self._distill(payload, parent, watch)
                with watch.phase("save"):
                    version = await self._publish(step, payload, parent)
                shown = await show(lesson, version, self._inference) if lesson.request.show else ()
                return await self._ledger.record(lesson, payload, feedback_ids, step, watch.timing_ms(), shown)
        except BaseException as error:
            await self._ledger.fail(feedback_ids, error)
            raise

    async def _prepare(self, payload: DistillBatchRequestPayload, parent: LoraRuntimeRef) -> DistillBatchRequestPayload:
        """The lesson with its hindsight rollouts, samples of earlier lessons, and the anchors it must leave alone."""
        training = payload.training
        found = await asyncio.gather(*(hindsight_rollouts(item, self._inference, training) for item in payload.samples))
        own = [
            item.model_copy(update={"taught": training.own_replies or not good}) for item, good in zip(payload.samples, found, strict=True)
        ]
        learnt = await self._book.learnt(parent.lora_id, parent.version, await self._engine.versions(parent.lora_id))
        earlier = rehearsal(learnt, training.replay, parent.version)
        anchors = await self._anchors.take(training.anchors, parent.version)
        return payload.model_copy(update={"samples": [*own, *chain.from_iterable(found), *earlier, *anchors]})

    async def _distill(self, payload: DistillBatchRequestPayload, parent: LoraRuntimeRef, watch: Stopwatch) -> DistillResponse:
        """The step, checked. What did harm is tried once more with smaller updates."""
        step = await self._try(payload, parent, watch)
        if step.metadata["outcome"] != "undone":
            return step
        training = payload.training.model_copy(update={"learning_rate": payload.training.learning_rate * SECOND_TRY})
        again = await self._try(payload.model_copy(update={"training": training}), parent, watch)
        return again.model_copy(update={"metadata": again.metadata | {"first_try": step.metadata["reason"]}})

    async def _try(self, payload: DistillBatchRequestPayload, parent: LoraRuntimeRef, watch: Stopwatch) -> DistillResponse:
        with watch.phase("distill"):
            async with self._inference.paused():
                step = await self._engine.distill(payload)
        with watch.phase("check"):
            return await self._check(step, parent)

    async def _check(self, step: DistillResponse, parent: LoraRuntimeRef) -> DistillResponse:
        """The step as it is if its version is fit to serve; otherwise undone, with the reason, and its version gone."""
        if step.metadata["outcome"] != "applied":
            return step
        candidate = await self._engine.lora_runtime_ref(step.lora_id, step.metadata["version"])
        await self._inference.activate(candidate)
        reason = await find_collapse(self._inference, candidate, parent)
        if reason is None:
            return step
        await self._engine.discard(candidate.lora_id, candidate.version)
        return step.model_copy(update={"metadata": step.metadata | {"outcome": "undone", "reason": reason, "version": None}})

    async def _publish(self, step: DistillResponse, payload: DistillBatchRequestPayload, parent: LoraRuntimeRef) -> LoraRuntimeRef:
        """From here on the new version serves. Returns what serves: the new version, or its parent if there is none."""
        if step.metadata["version"] is None:
            return parent
        taught = tuple(sample for sample in payload.samples if sample.source != "anchor" and not sample.replayed)
        await self._book.add(
            TaughtLesson(
                lora_id=step.lora_id,
                version=step.metadata["version"],
                parent=parent.version,
                feedback_ids=payload.feedback_ids,
                samples=taught,
            )
        )
        await self._engine.promote(step.lora_id, step.metadata["version"])
        return await self._engine.lora_runtime_ref(step.lora_id)
