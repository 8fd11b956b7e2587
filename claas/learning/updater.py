"""One update of an adapter, from a lesson's own samples to a version fit to serve, or to the reason why there is none.

Rehearse what must stay, distill, judge the result, write it into the lesson book. It moves no `latest` and knows nothing of feedback.
"""

from __future__ import annotations

from collections.abc import Sequence

from claas.core.types import DistillBatchItem, DistillBatchRequestPayload, DistillResponse, LoraRuntimeRef
from claas.inference.base import InferenceBackend
from claas.learning.anchors import Anchors
from claas.learning.checks import Question, find_collapse, questions
from claas.learning.lesson_book import LessonBook, TaughtLesson, rehearsal
from claas.learning.stopwatch import Stopwatch
from claas.training.engine.base import TrainingEngine

SECOND_TRY = 0.3
"""The share of the learning rate with which an undone lesson is tried again."""


class Updater:
    """Makes new versions, for whoever holds the adapter's lock."""

    def __init__(self, engine: TrainingEngine, inference: InferenceBackend, book: LessonBook) -> None:
        self._engine = engine
        self._inference = inference
        self._book = book
        self._anchors = Anchors(inference)

    async def update(self, payload: DistillBatchRequestPayload, parent: LoraRuntimeRef, watch: Stopwatch) -> DistillResponse:
        """Train `parent` on the lesson's samples, beside earlier lessons' and anchors. What did harm is tried once more, smaller.

        A version in `metadata` is checked, loaded and in the lesson book, and does not serve yet.
        """
        payload = payload.model_copy(update={"parent": parent.version})
        learnt = await self._book.learnt(parent.lora_id, parent.version, await self._engine.versions(parent.lora_id))
        whole = payload.model_copy(update={"samples": [*payload.samples, *await self._beside(payload, parent, learnt)]})
        asked = questions(payload.samples, learnt)
        step = await self._try(whole, parent, asked, watch)
        if step.metadata["outcome"] == "undone":
            training = whole.training.model_copy(update={"learning_rate": whole.training.learning_rate * SECOND_TRY})
            again = await self._try(whole.model_copy(update={"training": training}), parent, asked, watch)
            step = again.model_copy(update={"metadata": again.metadata | {"first_try": step.metadata["reason"]}})
        if (version := step.metadata["version"]) is not None:
            taught = TaughtLesson(
                lora_id=step.lora_id,
                version=version,
                parent=parent.version,
                feedback_ids=payload.feedback_ids,
                training=payload.training,
                samples=tuple(payload.samples),
            )
            await self._book.add(taught)
        return step

    async def _beside(
        self, payload: DistillBatchRequestPayload, parent: LoraRuntimeRef, learnt: Sequence[TaughtLesson]
    ) -> list[DistillBatchItem]:
        """Samples of earlier lessons, and the anchors that the lesson must leave alone; none if there is nothing to teach."""
        if payload.training.needs_rollouts and all(sample.source == "sampled" for sample in payload.samples):
            return []
        anchors = await self._anchors.take(payload.training.anchors, parent.version)
        return [*rehearsal(learnt, payload.training.replay, parent.version), *anchors]

    async def _try(
        self, payload: DistillBatchRequestPayload, parent: LoraRuntimeRef, asked: Sequence[Question], watch: Stopwatch
    ) -> DistillResponse:
        with watch.phase("distill"):
            async with self._inference.paused():
                step = await self._engine.distill(payload)
        with watch.phase("check"):
            return await self._check(step, parent, asked, payload.training.min_reply_logprob)

    async def _check(self, step: DistillResponse, parent: LoraRuntimeRef, asked: Sequence[Question], min_logprob: float) -> DistillResponse:
        """The step as it is if its version is fit to serve; otherwise undone, with the reason, and its version gone."""
        if step.metadata["outcome"] != "applied":
            return step
        candidate = await self._engine.lora_runtime_ref(step.lora_id, step.metadata["version"])
        await self._inference.activate(candidate)
        reason = await find_collapse(self._inference, candidate, parent, asked, min_logprob)
        if reason is None:
            return step
        await self._engine.discard(candidate.lora_id, candidate.version)
        return step.model_copy(update={"metadata": step.metadata | {"outcome": "undone", "reason": reason, "version": None}})
