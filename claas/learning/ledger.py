"""What was said and what came of it: feedback rows and the journal, kept in step. The learner's only way to the database."""

from __future__ import annotations

import logging
import uuid

from pydantic import JsonValue

from claas.core.errors import ClaasError, Conflict, StorageFull
from claas.core.types import AdapterVersion, DistillBatchRequestPayload, DistillResponse, Feedback, StepRecord
from claas.learning.feedback_store import FeedbackStore
from claas.learning.journal import Journal
from claas.learning.resolve import ResolvedLesson
from claas.learning.types import LessonResult, Shown
from claas.training.engine.base import TrainingEngine

log = logging.getLogger(__name__)


class Ledger:
    """Feedback from acceptance to its end, and one journal line for each step."""

    def __init__(self, feedback: FeedbackStore, journal: Journal, engine: TrainingEngine) -> None:
        self._feedback = feedback
        self._journal = journal
        self._engine = engine

    async def repeated(self, lesson: ResolvedLesson) -> LessonResult | None:
        """The result of the lesson that these idempotency keys already taught; None if it is new (a failed one gave its keys back).

        Raises:
            Conflict: it is being learnt right now, or only some of its items were sent before.
        """
        keys = [item.idempotency_key for item in lesson.request.items if item.idempotency_key is not None]
        found = [row for key in keys if (row := await self._feedback.by_key(lesson.lora_id, key)) is not None]
        if not found:
            return None
        if any(row.state in ("queued", "training") for row in found):
            raise Conflict(
                "feedback with this idempotency_key is being learnt right now: ask again when it is done", param="idempotency_key"
            )
        request_ids = {row.request_id for row in found}
        step = await self._journal.by_request(found[0].request_id)
        if len(found) < len(lesson.request.items) or len(request_ids) > 1 or step is None:
            raise Conflict(
                "some items of this request were sent before, with other ones: send the new items alone", param="idempotency_key"
            )
        rows = await self._feedback.by_request(step.request_id)
        return _result(lesson, step, tuple(row.id for row in rows), self._journal.log_path(step), ())

    async def accept(self, lesson: ResolvedLesson) -> tuple[str, ...]:
        """Store the feedback, durably, before anything else happens. Returns its ids, one for each item."""
        rows = [
            Feedback(
                id=f"fb-{uuid.uuid4().hex}",
                request_id=lesson.request.request_id,
                lora_id=lesson.lora_id,
                completion_id=rollout.id,
                feedback=item.feedback,
                rating=item.rating,
                demonstration=item.demonstration,
                metadata=item.metadata,
                idempotency_key=item.idempotency_key,
            )
            for item, rollout in zip(lesson.request.items, lesson.rollouts, strict=True)
        ]
        await self._feedback.add(rows)
        return tuple(row.id for row in rows)

    async def begin(self, feedback_ids: tuple[str, ...]) -> None:
        await self._feedback.set_state(feedback_ids, "training")

    async def record(
        self,
        lesson: ResolvedLesson,
        payload: DistillBatchRequestPayload,
        feedback_ids: tuple[str, ...],
        step: DistillResponse,
        timing_ms: dict[str, int],
        shown: tuple[Shown, ...],
    ) -> LessonResult:
        """Write the step down and settle its feedback. Of a version that serves nothing is raised: what is missing, recovery writes."""
        record = StepRecord(
            id=f"step-{uuid.uuid4().hex}",
            request_id=lesson.request.request_id,
            lora_id=lesson.lora_id,
            parent=step.metadata["parent"],
            version=step.metadata["version"],
            outcome=step.metadata["outcome"],
            reason=step.metadata["reason"],
            metrics=step.metadata,
            timing_ms=timing_ms,
        )
        detail: dict[str, JsonValue] = {
            "step": record.model_dump(mode="json"),
            "samples": [sample.model_dump(mode="json") for sample in payload.samples],
        }
        log_path = ""
        try:
            log_path = await self._write(record, detail)
            await self._feedback.set_state(feedback_ids, record.outcome, reason=record.reason, version=record.version)
        except Exception:
            if record.version is None:
                raise
            log.exception("version %d of %r serves, and is written down at the next start", record.version, record.lora_id)
        return _result(lesson, record, feedback_ids, log_path, shown)

    async def _write(self, record: StepRecord, detail: dict[str, JsonValue]) -> str:
        """The log file's path; "" if the step is on record without its details, where those of a version that serves find no room."""
        version = await self._version(record)
        try:
            return await self._journal.record(record, detail, version_record=version)
        except (StorageFull, OSError):
            if version is None:
                raise
            log.warning("no room for the details of version %d of %r", version.version, record.lora_id)
            return await self._journal.record(record, version_record=version)

    async def fail(self, feedback_ids: tuple[str, ...], error: BaseException) -> None:
        """The lesson broke: say so on the feedback, which stays stored."""
        reason = error.message if isinstance(error, ClaasError) else f"the lesson was interrupted ({type(error).__name__})"
        await self._feedback.set_state(feedback_ids, "failed", reason=reason)

    async def _version(self, record: StepRecord) -> AdapterVersion | None:
        if record.version is None:
            return None
        return next(v for v in await self._engine.versions(record.lora_id) if v.version == record.version)


def _result(
    lesson: ResolvedLesson, step: StepRecord, feedback_ids: tuple[str, ...], log_path: str, shown: tuple[Shown, ...]
) -> LessonResult:
    assert step.outcome != "failed"
    return LessonResult(
        request_id=step.request_id,
        lora_id=step.lora_id,
        outcome=step.outcome,
        reason=step.reason,
        parent=step.parent,
        version=step.parent if step.version is None else step.version,
        feedback_ids=feedback_ids,
        distill_result=DistillResponse(lora_id=step.lora_id, metadata=step.metrics),
        timing_ms=step.timing_ms,
        batch_size=len(lesson.request.items),
        log_path=log_path,
        shown=shown,
    )
