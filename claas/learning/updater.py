"""One update of an adapter, from a lesson's own samples to a version fit to serve, or to the reason why there is none.

Notice what is contradicted, rehearse what must stay, distill, judge the result, write it into the lesson book. It moves no `latest` and
knows nothing of feedback.
"""

from __future__ import annotations

from collections.abc import Sequence

from claas.core.types import (
    MAX_GRADIENT_STEPS,
    DistillBatchItem,
    DistillBatchRequestPayload,
    DistillResponse,
    LoraRuntimeRef,
    RoomPlan,
    TrainingConfig,
)
from claas.inference.base import InferenceBackend
from claas.learning.anchors import Anchors
from claas.learning.checks import Question, find_collapse, questions
from claas.learning.contradictions import claims, contradicted
from claas.learning.lesson_book import LessonBook, TaughtLesson, rehearsal, standing, taught_samples
from claas.learning.stopwatch import Stopwatch
from claas.training.engine.base import TrainingEngine

SECOND_TRY = 0.3
"""The share of the learning rate with which an undone lesson is tried again."""
MOST_TIMES = 3
"""How many times its own gradient steps a lesson takes at most, however much it rehearses."""
BOOK_TOKENS = 256
"""How much of the book a `book` teacher reads."""
_ROOM = RoomPlan()


class Updater:
    """Makes new versions, for whoever holds the adapter's lock."""

    def __init__(self, engine: TrainingEngine, inference: InferenceBackend, book: LessonBook) -> None:
        self._engine = engine
        self._inference = inference
        self._book = book
        self._anchors = Anchors(inference)

    async def update(
        self, payload: DistillBatchRequestPayload, parent: LoraRuntimeRef, watch: Stopwatch, plan: RoomPlan = _ROOM
    ) -> DistillResponse:
        """Train `parent` on the lesson's samples, beside earlier lessons' and anchors. What did harm is tried once more, smaller.

        A version in `metadata` is checked, loaded and in the lesson book, and does not serve yet. Its `contradicts` are the versions that
        were taught what the lesson overrules, and what is no longer rehearsed.
        """
        payload = payload.model_copy(update={"parent": parent.version})
        learnt = standing(await self._book.learnt(parent.lora_id, parent.version, await self._engine.versions(parent.lora_id)))
        with watch.phase("contradictions"):
            overruled = await contradicted(claims(taught_samples(learnt)), payload.samples, self._inference)
        earlier = standing(learnt, overruled)
        whole = await self._with_earlier(payload, parent, earlier)
        asked = questions(payload.samples, earlier)
        step = await self._try(whole, parent, asked, watch, plan)
        if step.metadata["outcome"] == "undone":
            training = whole.training.model_copy(update={"learning_rate": whole.training.learning_rate * SECOND_TRY})
            again = await self._try(whole.model_copy(update={"training": training}), parent, asked, watch, plan)
            step = again.model_copy(update={"metadata": again.metadata | {"first_try": step.metadata["reason"]}})
        if (version := step.metadata["version"]) is not None:
            taught = TaughtLesson(
                lora_id=step.lora_id,
                version=version,
                parent=parent.version,
                feedback_ids=payload.feedback_ids,
                training=payload.training,
                samples=tuple(payload.samples),
                contradicts=tuple(sorted(overruled)),
            )
            await self._book.add(taught)
            versions = sorted({lesson.version for lesson in learnt for sample in lesson.samples if sample.feedback_id in overruled})
            step = step.model_copy(update={"metadata": step.metadata | {"contradicts": versions}})
        return step

    async def _with_earlier(
        self, payload: DistillBatchRequestPayload, parent: LoraRuntimeRef, earlier: Sequence[TaughtLesson]
    ) -> DistillBatchRequestPayload:
        """With samples of earlier lessons, anchors, and the gradient steps that this takes; as it is, if it has nothing to teach.

        More steps take as many more anchors: where few are seen often, they stay and other replies do not.
        """
        training = payload.training
        if training.needs_rollouts and all(sample.source == "sampled" for sample in payload.samples):
            return payload
        judged = [*payload.samples, *rehearsal(earlier, training.replay, parent.version)]
        if "book" in (training.teacher, training.hindsight_teacher):
            book = await self._newest_feedback(earlier)
            judged = [s.model_copy(update={"book": tuple(text for text in book if text != s.feedback)}) for s in judged]
        steps = _gradient_steps(training, judged)
        anchors = await self._anchors.take(training.anchors * steps // training.gradient_steps, parent.version)
        longer = training.model_copy(update={"gradient_steps": steps})
        return payload.model_copy(update={"samples": [*judged, *anchors], "training": longer})

    async def _newest_feedback(self, lessons: Sequence[TaughtLesson]) -> list[str]:
        """What the lessons said in words, oldest first; of more than `BOOK_TOKENS` tokens the newest."""
        newest_first = [claim.feedback for claim in reversed(claims(taught_samples(lessons))) if claim.in_words]
        kept: list[str] = []
        left = BOOK_TOKENS
        for text in newest_first:
            left -= len(await self._inference.reply_tokens(text))
            if left < 0:
                break
            kept.append(text)
        return kept[::-1]

    async def _try(
        self, payload: DistillBatchRequestPayload, parent: LoraRuntimeRef, asked: Sequence[Question], watch: Stopwatch, plan: RoomPlan
    ) -> DistillResponse:
        async with self._inference.paused(plan) as room:
            with watch.phase("distill"):
                step = await self._engine.distill(payload)
            if (version := step.metadata["version"]) is not None:
                room.next = await self._engine.lora_runtime_ref(step.lora_id, version)
        watch.add(room.seconds)
        step = step.model_copy(update={"metadata": step.metadata | {"room": {"slept": room.slept, "woke": room.woke}}})
        with watch.phase("check"):
            return await self._check(step, parent, asked, payload.training.min_reply_logprob)

    async def _check(self, step: DistillResponse, parent: LoraRuntimeRef, asked: Sequence[Question], min_logprob: float) -> DistillResponse:
        """The step as it is if its version is fit to serve; otherwise undone, with the reason, and its version gone."""
        if step.metadata["outcome"] != "applied":
            return step
        candidate = await self._engine.lora_runtime_ref(step.lora_id, step.metadata["version"])
        fit = False
        try:
            await self._inference.activate(candidate)
            reason = await find_collapse(self._inference, candidate, parent, asked, min_logprob)
            fit = reason is None
        finally:
            if not fit:
                await self._engine.discard(candidate.lora_id, candidate.version)
        if fit:
            return step
        return step.model_copy(update={"metadata": step.metadata | {"outcome": "undone", "reason": reason, "version": None}})


def _gradient_steps(training: TrainingConfig, samples: Sequence[DistillBatchItem]) -> int:
    """Those that a lesson takes for itself, and more for each feedback that these samples rehearse."""
    rehearsed = {(sample.feedback, sample.demonstration) for sample in samples if sample.replayed}
    wanted = training.gradient_steps + training.replay_steps * len(rehearsed)
    return min(wanted, MOST_TIMES * training.gradient_steps, MAX_GRADIENT_STEPS)
