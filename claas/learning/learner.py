"""The product in one screen: a person said what was wrong with a reply, and the model learns it.

resolve → lock → rollouts → update (distill, check) → publish → journal. Whatever breaks, the version before keeps serving and the
feedback is kept.
"""

from __future__ import annotations

import asyncio
from itertools import chain

from claas.core.types import DistillBatchItem, DistillBatchRequestPayload, DistillResponse, LoraRuntimeRef
from claas.core.usage import charging, metered
from claas.inference.base import InferenceBackend
from claas.learning.hindsight_rollouts import hindsight_rollouts
from claas.learning.imagined_prompts import imagined_rollouts
from claas.learning.ledger import Ledger
from claas.learning.locks import AdapterLocks
from claas.learning.resolve import ResolvedLesson, resolve
from claas.learning.show import show
from claas.learning.stopwatch import Stopwatch
from claas.learning.types import LessonRequest, LessonResult
from claas.learning.updater import Updater
from claas.rollouts.store import RolloutStore
from claas.training.engine.base import TrainingEngine

REPLIES_AT_ONCE = 2
"""Of one lesson, whose rollouts are sampled at the same time: all at once would overflow the queue that they wait in."""


class Learner:
    """Teaches adapters, one lesson at a time each."""

    def __init__(
        self,
        engine: TrainingEngine,
        inference: InferenceBackend,
        rollouts: RolloutStore,
        updater: Updater,
        ledger: Ledger,
        locks: AdapterLocks,
        base_model_id: str,
    ) -> None:
        self._engine = engine
        self._inference = inference
        self._rollouts = rollouts
        self._updater = updater
        self._ledger = ledger
        self._locks = locks
        self._base_model_id = base_model_id
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
        watch, published = Stopwatch(), False
        try:
            async with self._locks.hold(lesson.lora_id):
                await self._ledger.begin(feedback_ids)
                parent = await self._engine.lora_runtime_ref(lesson.lora_id)
                with charging(lesson.lora_id), metered() as usage:
                    with watch.phase("rollouts"):
                        payload = await self._with_rollouts(lesson.payload(feedback_ids), parent)
                    step = await self._updater.update(payload, parent, watch, lesson.request.room)
                if usage.anything:
                    step = step.model_copy(update={"metadata": step.metadata | {"usage": usage.told()}})
                with watch.phase("save"):
                    published = await self._publish(step)
                version = await self._engine.lora_runtime_ref(lesson.lora_id)
                shown = await show(lesson, version, self._inference) if lesson.request.show else ()
                return await self._ledger.record(lesson, payload, feedback_ids, step, watch.timing_ms(), shown)
        except BaseException as error:
            if not published:  # else it is learnt, and recovery writes it down
                await self._ledger.fail(feedback_ids, error)
            raise

    async def _with_rollouts(self, payload: DistillBatchRequestPayload, parent: LoraRuntimeRef) -> DistillBatchRequestPayload:
        """The replies, their hindsight rollouts and those of imagined prompts: what this lesson teaches. If it has nothing to teach, the
        replies measure that."""
        training = payload.training
        learnt = parent if parent.version else None  # version 0 has had no lesson
        keep = max(1, training.hindsight_keep // len(payload.samples))
        at_once = asyncio.Semaphore(REPLIES_AT_ONCE)

        async def rollouts_of(number: int, item: DistillBatchItem) -> list[DistillBatchItem]:
            imagined = len(range(number, training.imagined_prompts, len(payload.samples)))  # dealt out in turn
            async with at_once:
                good = await hindsight_rollouts(item, self._inference, training, keep)
                if not good:
                    return []
                return [*good, *(await imagined_rollouts(item, self._inference, training, imagined, own=good, learnt=learnt))]

        found = await asyncio.gather(*(rollouts_of(number, item) for number, item in enumerate(payload.samples)))
        alone = not (training.needs_rollouts and any(found))
        own = [
            item.model_copy(update={"taught": training.own_replies or (alone and not good)})
            for item, good in zip(payload.samples, found, strict=True)
        ]
        return payload.model_copy(update={"samples": [*own, *chain.from_iterable(found)]})

    async def _publish(self, step: DistillResponse) -> bool:
        """From here on the new version serves, if there is one."""
        if step.metadata["version"] is None:
            return False
        await self._engine.promote(step.lora_id, step.metadata["version"])
        return True
