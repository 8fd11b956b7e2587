"""Taking a lesson back, and only that one: the adapter as it would be without it.

From the last version before the lesson, everything learnt since is taught again in order. The version in service serves on until the
rebuilt one is done; if the rebuilding breaks, it goes on serving. What was asked for is stored before it is answered: it waits as long as
another lesson takes, and what a stop of the service cuts short is done after the next start.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence

from claas.core.errors import BackendUnavailable, ClaasError, Conflict
from claas.core.types import DistillBatchRequestPayload, Feedback, LoraRuntimeRef, StepRecord
from claas.core.usage import charging
from claas.learning.feedback_store import FeedbackStore
from claas.learning.journal import Journal
from claas.learning.lesson_book import LessonBook, TaughtLesson
from claas.learning.locks import AdapterLocks
from claas.learning.stopwatch import Stopwatch
from claas.learning.updater import Updater
from claas.training.engine.base import TrainingEngine

log = logging.getLogger(__name__)


class Retraction:
    """Retracts lessons in the background, one at a time for each adapter."""

    def __init__(
        self, engine: TrainingEngine, updater: Updater, feedback: FeedbackStore, journal: Journal, book: LessonBook, locks: AdapterLocks
    ) -> None:
        self._engine = engine
        self._updater = updater
        self._feedback = feedback
        self._journal = journal
        self._book = book
        self._locks = locks
        self._running: dict[str, asyncio.Task[None]] = {}

    async def begin(self, feedback_id: str) -> Feedback:
        """Start to retract a feedback item, and return where it stands; its state says when it is "retracted".

        Asking again while it runs, or after, changes nothing.

        Raises:
            NotFound: no such feedback.
            Conflict: nothing was learnt from it.
        """
        row = await self._feedback.get(feedback_id)
        if row.state == "retracted" or feedback_id in self._running:
            return row
        if row.state != "applied":
            raise Conflict(f"nothing was learnt from feedback {feedback_id!r}: it is {row.state!r}", param="id")
        await self._feedback.set_state((row.id,), "applied", retracting=True)  # and no trouble of an earlier try
        row = row.model_copy(update={"reason": None, "retracting": True})
        self._start(row)
        return row

    async def resume(self) -> None:
        """Go on with what was asked for before the service stopped."""
        for row in await self._feedback.being_retracted():
            self._start(row)

    async def aclose(self) -> None:
        """Let what runs come to its end."""
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _start(self, row: Feedback) -> None:
        if row.id not in self._running:
            task = self._running[row.id] = asyncio.create_task(self._retract(row))
            task.add_done_callback(lambda _: self._running.pop(row.id))

    async def _retract(self, row: Feedback) -> None:
        try:
            async with self._locks.hold(row.lora_id, patient=True):
                with charging(row.lora_id):
                    await self._rebuild(row)
        except BackendUnavailable as error:
            log.warning("feedback %r is not retracted yet: %s", row.id, error.message)
            reason = f"not retracted yet, it is tried again at the next start or when asked again: {error.message}"
            await self._feedback.set_state((row.id,), "applied", reason=reason, retracting=True)
        except Exception as error:
            reason = error.message if isinstance(error, ClaasError) else type(error).__name__
            log.warning("feedback %r could not be retracted", row.id, exc_info=not isinstance(error, ClaasError))
            await self._feedback.set_state((row.id,), "applied", reason=f"could not be retracted, ask again: {reason}")

    async def _rebuild(self, row: Feedback) -> None:
        watch, before = Stopwatch(), await self._engine.lora_runtime_ref(row.lora_id)
        learnt = await self._book.learnt(row.lora_id, before.version, await self._engine.versions(row.lora_id))
        at = next((n for n, lesson in enumerate(learnt) if row.id in lesson.feedback_ids), None)
        if at is None:  # a rollback has left the lesson behind: what serves does not know it
            await self._feedback.set_state((row.id,), "retracted")
            return
        version, left_out = await self._teach_again(row, await self._version_before(learnt[at]), learnt[at:], watch)
        await self._engine.promote(row.lora_id, version.version)
        reason = f"retracted feedback {row.id}" + (f"; not learnt again: {', '.join(left_out)}" if left_out else "")
        await self._journal.record(
            StepRecord(
                id=f"step-{uuid.uuid4().hex}",
                request_id=f"retract-{uuid.uuid4().hex}",
                lora_id=row.lora_id,
                parent=before.version,
                version=version.version,
                outcome="applied",
                reason=reason,
                timing_ms=watch.timing_ms(),
            )
        )
        await self._feedback.set_state((row.id,), "retracted", reason=reason)

    async def _version_before(self, lesson: TaughtLesson) -> LoraRuntimeRef:
        stored = {version.version for version in await self._engine.versions(lesson.lora_id)}
        if lesson.parent not in stored:
            raise Conflict(f"version {lesson.parent} of {lesson.lora_id!r}, the last before this lesson, is no longer kept", param="id")
        return await self._engine.lora_runtime_ref(lesson.lora_id, lesson.parent)

    async def _teach_again(
        self, row: Feedback, version: LoraRuntimeRef, lessons: Sequence[TaughtLesson], watch: Stopwatch
    ) -> tuple[LoraRuntimeRef, list[str]]:
        """All lessons but the one sample; the last version, and the feedback ids of lessons that could not be applied again."""
        left_out: list[str] = []
        for lesson in lessons:
            remaining = [sample for sample in lesson.samples if sample.feedback_id != row.id]
            feedback_ids = tuple(other for other in lesson.feedback_ids if other != row.id)
            if not any(sample.taught for sample in remaining):
                continue
            payload = DistillBatchRequestPayload(
                lora_id=row.lora_id, training=lesson.training, samples=remaining, feedback_ids=feedback_ids
            )
            step = await self._updater.update(payload, version, watch)
            if step.metadata["version"] is None:
                left_out += feedback_ids
            else:
                version = await self._engine.lora_runtime_ref(row.lora_id, step.metadata["version"])
        return version, left_out
