"""Which earlier lessons a new one rehearses, and how much longer it takes for that."""

from __future__ import annotations

from claas.core.types import DistillBatchRequestPayload
from claas.learning.types import FeedbackItem
from tests.learning.conftest import LORA, School, lesson


async def test_earlier_lessons_are_rehearsed_until_a_rollback_leaves_them_behind(school: School) -> None:
    async def teach(n: int) -> DistillBatchRequestPayload:
        await school.rollout(f"chatcmpl-{n}")
        item = FeedbackItem(feedback=f"Lesson {n}.", completion_id=f"chatcmpl-{n}", training={"replay": 4, "anchors": 1})
        await school.learner.learn(lesson(item, request_id=f"lesson-{n}"))
        return school.engine.lessons[-1]

    def rehearsed(payload: DistillBatchRequestPayload) -> list[str]:
        return sorted(sample.feedback for sample in payload.samples if sample.replayed)

    assert rehearsed(await teach(1)) == []
    assert rehearsed(await teach(2)) == ["Lesson 1."]
    third = await teach(3)
    assert rehearsed(third) == ["Lesson 1.", "Lesson 2."]
    assert [(s.feedback, s.replayed) for s in third.samples if s.source == "sampled" and not s.replayed] == [("Lesson 3.", False)]
    await school.lifecycle.rollback(LORA, 1)
    assert rehearsed(await teach(4)) == ["Lesson 1."]
    await school.lifecycle.delete(LORA)
    assert await school.book.learnt(LORA, 4) == []


async def test_a_lesson_takes_more_steps_and_anchors_the_more_it_rehearses(school: School) -> None:
    training = {"replay": 8, "replay_steps": 2, "gradient_steps": 3, "anchors": 3}
    for n, feedback in enumerate(["One.", "Two.", "Two.", "Three.", "Four.", "Five.", "Six."]):
        await school.rollout(f"chatcmpl-{n}")
        item = FeedbackItem(feedback=feedback, completion_id=f"chatcmpl-{n}", training=training)
        await school.learner.learn(lesson(item, request_id=f"lesson-{n}"))
    assert [payload.training.gradient_steps for payload in school.engine.lessons] == [3, 5, 7, 7, 9, 9, 9], "three times its own at most"
    anchors = [[sample.prompt for sample in payload.samples if sample.source == "anchor"] for payload in school.engine.lessons]
    assert [len(set(prompts)) for prompts in anchors] == [3, 5, 7, 7, 9, 9, 9], "none is seen more often"
    assert {taught.training.gradient_steps for taught in await school.book.learnt(LORA, 7)} == {3}, "learnt anew, it is counted anew"
