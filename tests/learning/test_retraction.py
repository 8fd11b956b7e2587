"""A lesson taken back: what is taught again, from where, and what serves meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from claas.core.errors import AdapterBusy, Conflict, NotFound, StepFailed
from claas.core.types import Feedback
from claas.learning.retraction import Retraction
from claas.learning.types import FeedbackItem
from claas.learning.updater import Updater
from tests.learning.conftest import IMPATIENT, LORA, School, lesson


async def taught(school: School, *numbers: int) -> str:
    """One lesson on these replies, each with its own feedback; the first feedback's id."""
    for n in numbers:
        await school.rollout(f"chatcmpl-{n}")
    items = [FeedbackItem(feedback=f"Lesson {n}.", completion_id=f"chatcmpl-{n}", training={"replay": 8}) for n in numbers]
    result = await school.learner.learn(lesson(*items, request_id=f"lesson-{numbers[0]}"))
    return result.feedback_ids[0]


async def retracted(school: School, feedback_id: str) -> Feedback:
    row = await school.retraction.begin(feedback_id)
    await school.retraction.aclose()
    return row if row.state == "retracted" else await school.feedback.get(feedback_id)


async def knows(school: School) -> list[str]:
    """The feedback that the version in service was taught."""
    ref = await school.engine.lora_runtime_ref(LORA)
    return [sample.feedback for learnt in await school.book.learnt(LORA, ref.version) for sample in learnt.samples]


async def test_what_came_after_is_taught_again_from_the_version_before(school: School) -> None:
    await taught(school, 1)
    second = await taught(school, 2)
    await taught(school, 3)
    before = len(school.engine.lessons)
    row = await retracted(school, second)
    assert (row.state, row.reason) == ("retracted", f"retracted feedback {second}")
    (again,) = school.engine.lessons[before:]
    assert again.parent == 1
    assert [(s.feedback, s.replayed) for s in again.samples] == [("Lesson 3.", False), ("Lesson 1.", True)]
    assert again.training.replay == 8
    assert await knows(school) == ["Lesson 1.", "Lesson 3."]
    step = (await school.journal.steps())[0]
    assert (step.outcome, step.parent, step.version) == ("applied", 3, 4)
    assert await retracted(school, second) == row, "asking again changes nothing"
    assert len(school.engine.lessons) == before + 1


async def test_the_last_lesson_is_left_by_going_back(school: School) -> None:
    await taught(school, 1)
    last = await taught(school, 2)
    assert (await retracted(school, last)).state == "retracted"
    assert (await school.engine.lora_runtime_ref(LORA)).version == 1
    assert len(school.engine.lessons) == 2


async def test_other_items_of_the_same_lesson_stay(school: School) -> None:
    first = await taught(school, 1, 2)
    await retracted(school, first)
    assert await knows(school) == ["Lesson 2."]
    assert school.engine.lessons[-1].parent == 0


async def test_two_items_about_the_same_reply_are_told_apart(school: School) -> None:
    await school.rollout("chatcmpl-1")
    items = [FeedbackItem(feedback=f"Lesson {n}.", completion_id="chatcmpl-1") for n in (1, 2)]
    result = await school.learner.learn(lesson(*items))
    await retracted(school, result.feedback_ids[0])
    assert await knows(school) == ["Lesson 2."]


async def test_a_lesson_that_a_rollback_left_behind_needs_no_rebuilding(school: School) -> None:
    await taught(school, 1)
    second = await taught(school, 2)
    await school.lifecycle.rollback(LORA, 1)
    assert (await retracted(school, second)).state == "retracted"
    assert (await school.engine.lora_runtime_ref(LORA)).version == 1
    assert len(school.engine.lessons) == 2


async def test_a_rebuilding_that_breaks_leaves_what_serves_and_says_so(school: School) -> None:
    first = await taught(school, 1)
    await taught(school, 2)
    school.engine.failure = StepFailed("the step broke")
    row = await retracted(school, first)
    assert (row.state, row.reason) == ("applied", "could not be retracted, ask again: the step broke")
    assert (await school.engine.lora_runtime_ref(LORA)).version == 2
    school.engine.failure = None
    assert (await retracted(school, first)).state == "retracted"
    assert await knows(school) == ["Lesson 2."]


async def test_a_lesson_that_cannot_be_applied_again_is_named(school: School) -> None:
    first = await taught(school, 1)
    second = await taught(school, 2)
    school.engine.outcome = "skipped"
    row = await retracted(school, first)
    assert row.state == "retracted" and row.reason is not None and f"not learnt again: {second}" in row.reason
    assert (await school.engine.lora_runtime_ref(LORA)).version == 0


async def test_the_version_in_service_serves_until_the_rebuilt_one_is_done(school: School) -> None:
    first = await taught(school, 1)
    await taught(school, 2)
    async with school.locks.hold(LORA):
        row = await school.retraction.begin(first)
        assert row.state == "applied"
        again = await school.retraction.begin(first)
        assert again.state == "applied", "it runs once"
        await asyncio.sleep(0)
        assert (await school.engine.lora_runtime_ref(LORA)).version == 2
    await school.retraction.aclose()
    assert (await school.feedback.get(first)).state == "retracted"
    assert len(school.engine.lessons) == 3


@IMPATIENT
async def test_it_waits_for_another_lesson_as_long_as_that_takes(school: School) -> None:
    first = await taught(school, 1)
    async with school.locks.hold(LORA):
        await school.retraction.begin(first)
        with pytest.raises(AdapterBusy):  # by now it would have been given up, as any other
            async with school.locks.hold(LORA):
                pass
        assert (await school.feedback.get(first)).retracting
    await school.retraction.aclose()
    row = await school.feedback.get(first)
    assert (row.state, row.retracting) == ("retracted", False)


async def test_what_a_stop_of_the_service_cut_short_is_done_after_the_next_start(school: School) -> None:
    first = await taught(school, 1)
    await taught(school, 2)
    school.engine.closed = True
    row = await retracted(school, first)
    assert (row.state, row.retracting) == ("applied", True)
    assert row.reason is not None and "at the next start" in row.reason
    school.engine.closed = False
    again = Retraction(
        school.engine, Updater(school.engine, school.inference, school.book), school.feedback, school.journal, school.book, school.locks
    )
    await again.resume()
    await again.aclose()
    row = await school.feedback.get(first)
    assert (row.state, row.retracting) == ("retracted", False)
    assert await knows(school) == ["Lesson 2."]
    await again.resume()
    await again.aclose()
    assert len(school.engine.lessons) == 3, "nothing is left to do"


async def test_one_that_is_cancelled_is_done_after_the_next_start(school: School) -> None:
    first = await taught(school, 1)
    async with school.locks.hold(LORA):
        await school.retraction.begin(first)
        await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await school.retraction.aclose()
    assert (await school.feedback.get(first)).state == "applied"
    await school.retraction.resume()
    await school.retraction.aclose()
    assert (await school.feedback.get(first)).state == "retracted"


async def test_what_was_not_learnt_cannot_be_retracted(school: School) -> None:
    school.engine.outcome = "skipped"
    skipped = await taught(school, 1)
    with pytest.raises(Conflict, match="nothing was learnt"):
        await school.retraction.begin(skipped)
    with pytest.raises(NotFound):
        await school.retraction.begin("fb-unknown")


async def test_without_the_version_before_there_is_nothing_to_rebuild_from(school: School) -> None:
    await taught(school, 1)
    second = await taught(school, 2)
    await taught(school, 3)
    await school.engine.discard(LORA, 1)
    row = await retracted(school, second)
    assert row.state == "applied" and row.reason is not None and "version 1 of 'me/assistant'" in row.reason
