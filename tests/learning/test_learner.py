"""The pipeline from feedback to a version that serves, and every way it can go wrong."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime

import pytest
from sqlalchemy import text

from claas.core.errors import AdapterBusy, Conflict, NotFound, StepFailed
from claas.core.types import (
    ChatMessage,
    DistillBatchItem,
    DistillBatchRequestPayload,
    Feedback,
    FeedbackState,
    LoraInitRequest,
    LoraRuntimeRef,
    TrainingConfig,
)
from claas.learning.recovery import INTERRUPTED, recover
from claas.learning.types import FeedbackItem
from claas.learning.updater import SECOND_TRY
from tests.learning.conftest import IMPATIENT, LORA, School, lesson


async def latest(school: School) -> LoraRuntimeRef:
    return await school.engine.lora_runtime_ref(LORA)


async def state(school: School, feedback_id: str) -> FeedbackState:
    return (await school.feedback.get(feedback_id)).state


async def test_a_lesson_is_learnt_published_and_written_down(school: School) -> None:
    await school.rollout()
    result = await school.learner.learn(lesson(show=True))

    assert (result.outcome, result.parent, result.version, result.batch_size) == ("applied", 0, 1, 1)
    assert (await latest(school)).version == 1
    assert school.inference.active[-1].version == 1, "the new version is loaded before it serves"
    (feedback_id,) = result.feedback_ids
    row = await school.feedback.get(feedback_id)
    assert (row.state, row.version, row.completion_id, row.feedback) == ("applied", 1, "chatcmpl-1", "Be Kuro.")
    (step,) = await school.journal.steps()
    assert (step.outcome, step.parent, step.version, step.request_id) == ("applied", 0, 1, "lesson-1")
    assert step.metrics["update"] == result.distill_result.metadata["update"]
    logged = json.loads((school.log_dir / result.log_path).read_text())
    assert logged["samples"][0]["response_token_ids"] == [4, 5]
    assert {"rollouts", "distill", "check", "save", "sleep", "wake", "logprobs", "total"} <= result.timing_ms.keys()
    (shown,) = result.shown
    assert (shown.before, shown.after) == ("I am SmolLM.", f"[{LORA}@1] Who are you?"[:32])


async def test_the_engine_gets_the_reply_its_hindsight_rollouts_and_anchors(school: School) -> None:
    await school.rollout()
    school.inference.reply = lambda _: "I am Kuro."
    item = FeedbackItem(feedback="Be Kuro.", completion_id="chatcmpl-1", training={"hindsight_rollouts": 3, "anchors": 2})
    await school.learner.learn(lesson(item))
    (payload,) = school.engine.lessons
    # Of three equal rollouts one is kept.
    assert [sample.source for sample in payload.samples] == ["sampled", "hindsight", "anchor", "anchor"]
    assert payload.feedback_ids == tuple(row.id for row in await school.feedback.by_request("lesson-1"))


async def test_a_lesson_of_as_many_replies_as_may_be_sent_does_not_overflow_the_queue(school: School) -> None:
    for n in range(64):
        await school.rollout(f"chatcmpl-{n}")
    training = {"hindsight_rollouts": 8}
    items = [FeedbackItem(feedback="Be Kuro.", completion_id=f"chatcmpl-{n}", training=training) for n in range(64)]
    assert school.inference.max_running < 64 * 8
    assert (await school.learner.learn(lesson(*items))).batch_size == 64


@pytest.mark.parametrize(("reply", "own_replies", "taught"), [("I am Kuro.", False, False), ("I am Kuro.", True, True), ("", False, True)])
async def test_own_replies_are_taught_where_asked_or_where_no_rollout_is_good(
    school: School, reply: str, own_replies: bool, taught: bool
) -> None:
    await school.rollout()
    school.inference.reply = lambda _: reply
    training = {"hindsight_rollouts": 2, "own_replies": own_replies}
    await school.learner.learn(lesson(FeedbackItem(feedback="Be Kuro.", completion_id="chatcmpl-1", training=training)))
    assert school.engine.lessons[0].samples[0].taught is taught


async def test_of_several_items_only_those_the_model_could_act_on_are_taught(school: School) -> None:
    await school.rollout()
    await school.rollout("chatcmpl-2")
    school.inference.reply = lambda r: "I am Kuro." if "Be Kuro." in (r.messages[-1].content or "") else ""
    training = {"hindsight_rollouts": 2, "own_replies": False}
    items = [
        FeedbackItem(feedback=feedback, completion_id=f"chatcmpl-{n}", training=training) for n, feedback in ((1, "Be Kuro."), (2, "zzz"))
    ]
    result = await school.learner.learn(lesson(*items))
    assert [(s.source, s.feedback, s.taught) for s in school.engine.lessons[0].samples] == [
        ("sampled", "Be Kuro.", False),
        ("sampled", "zzz", False),
        ("hindsight", "Be Kuro.", True),
    ]
    school.inference.reply = lambda _: "fine"
    await school.retraction.begin(result.feedback_ids[0])
    await school.retraction.aclose()
    assert (await latest(school)).version == 0, "what is left has nothing to teach"
    assert len(school.engine.lessons) == 1


async def test_a_demonstration_is_taught_in_place_of_the_reply_and_kept_with_its_rating(school: School) -> None:
    await school.rollout()
    said = {"rating": -1, "demonstration": "I am Kuro.", "training": {"own_replies": False, "anchors": 1}}
    result = await school.learner.learn(lesson(FeedbackItem.model_validate({"completion_id": "chatcmpl-1"} | said)))
    samples = school.engine.lessons[0].samples
    assert [(s.source, s.taught, s.response, s.demonstration) for s in samples[:2]] == [
        ("sampled", False, "I am SmolLM.", "I am Kuro."),
        ("hindsight", True, "I am Kuro.", "I am Kuro."),
    ]
    assert (samples[2].source, samples[2].demonstration) == ("anchor", None)
    row = await school.feedback.get(result.feedback_ids[0])
    assert (row.feedback, row.rating, row.demonstration, row.state) == ("", -1, "I am Kuro.", "applied")
    logged = json.loads((school.log_dir / result.log_path).read_text())
    assert logged["samples"][1]["demonstration"] == "I am Kuro."


async def test_a_bare_rating_that_changes_nothing_is_skipped_and_says_so(school: School) -> None:
    await school.rollout()
    school.engine.outcome = "skipped"
    result = await school.learner.learn(lesson(FeedbackItem(completion_id="chatcmpl-1", rating=-1)))
    row = await school.feedback.get(result.feedback_ids[0])
    assert (row.rating, row.state, row.reason, result.version) == (-1, "skipped", result.reason, 0)
    assert result.reason


@pytest.mark.parametrize("outcome", ["skipped", "undone"])
async def test_a_step_that_was_not_applied_changes_nothing(school: School, outcome: str) -> None:
    await school.rollout()
    school.engine.outcome = outcome  # type: ignore[assignment]
    result = await school.learner.learn(lesson())
    assert (result.outcome, result.version) == (outcome, 0)
    assert result.reason is not None and outcome in result.reason
    assert (await latest(school)).version == 0
    assert await state(school, result.feedback_ids[0]) == outcome
    assert (await school.journal.steps())[0].outcome == outcome


async def test_a_collapsed_version_is_undone_and_gone(school: School) -> None:
    await school.rollout()
    school.inference.reply = lambda r: "a " * 60 if r.adapter is not None and r.adapter.version > 0 else "Paris."
    result = await school.learner.learn(lesson())
    assert (result.outcome, result.version, result.distill_result.metadata["version"]) == ("undone", 0, None)
    assert result.reason is not None and "loop" in result.reason
    assert await school.book.learnt(LORA, 0) == []
    assert [v.version for v in await school.engine.versions(LORA)] == [0]
    school.inference.reply = lambda _: "fine"
    assert (await school.learner.learn(lesson(request_id="lesson-2"))).version == 3, "discarded numbers are not used again"


async def test_what_did_harm_is_tried_once_more_with_a_smaller_learning_rate(school: School) -> None:
    await school.rollout()
    school.engine.undo_above = 2e-5
    result = await school.learner.learn(lesson())
    first, second = school.engine.lessons
    assert second.training == first.training.model_copy(update={"learning_rate": first.training.learning_rate * SECOND_TRY})
    assert second.samples == first.samples
    assert (result.outcome, result.version) == ("applied", 1)
    assert result.distill_result.metadata["first_try"] == "the double was told to answer 'undone'"
    school.engine.undo_above = 0.0
    await school.learner.learn(lesson(request_id="lesson-2"))
    assert len(school.engine.lessons) == 4, "twice undone is undone"


async def test_a_broken_step_keeps_the_feedback_and_the_version_before(school: School) -> None:
    await school.rollout()
    school.engine.failure = StepFailed("the step broke")
    with pytest.raises(StepFailed):
        await school.learner.learn(lesson())
    (row,) = await school.feedback.by_request("lesson-1")
    assert (row.state, row.reason) == ("failed", "the step broke")
    assert (await latest(school)).version == 0
    school.engine.failure = None
    assert (await school.learner.learn(lesson(request_id="lesson-2"))).outcome == "applied"


async def test_a_reply_that_does_not_resolve_stores_nothing(school: School) -> None:
    with pytest.raises(NotFound):
        await school.learner.learn(lesson())
    assert await school.feedback.list() == []


@IMPATIENT
async def test_a_lesson_that_waits_too_long_for_its_adapter_gives_up_and_is_kept(school: School) -> None:
    await school.rollout()
    async with school.locks.hold(LORA):
        with pytest.raises(AdapterBusy, match="try again"):
            await school.learner.learn(lesson())
    (row,) = await school.feedback.by_request("lesson-1")
    assert row.state == "failed"


async def test_lessons_of_one_adapter_wait_for_each_other(school: School) -> None:
    await school.rollout()
    results = await asyncio.gather(*(school.learner.learn(lesson(request_id=f"lesson-{n}")) for n in (1, 2, 3)))
    assert sorted((r.parent, r.version) for r in results) == [(0, 1), (1, 2), (2, 3)]


async def test_another_adapter_does_not_wait(school: School) -> None:
    await school.engine.init_lora(LoraInitRequest(lora_id="you/other"))
    await school.rollout("chatcmpl-2", lora_id="you/other")
    async with school.locks.hold(LORA):
        result = await school.learner.learn(lesson(FeedbackItem(feedback="x", completion_id="chatcmpl-2")))
    assert result.lora_id == "you/other"


async def test_a_caller_who_leaves_does_not_stop_the_lesson(school: School) -> None:
    await school.rollout()
    reached, proceed = asyncio.Event(), asyncio.Semaphore(0)
    school.inference.steps = proceed
    school.engine.before_distill = reached.set
    caller = asyncio.create_task(school.learner.learn(lesson()))
    await reached.wait()
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    for _ in range(200):
        proceed.release()
    await school.learner.aclose()
    assert caller.cancelled()
    assert (await latest(school)).version == 1
    assert (await school.feedback.by_request("lesson-1"))[0].state == "applied"


async def test_the_same_idempotency_key_is_one_lesson(school: School) -> None:
    await school.rollout()
    item = FeedbackItem(feedback="Be Kuro.", completion_id="chatcmpl-1", idempotency_key="k")
    first = await school.learner.learn(lesson(item))
    again = await school.learner.learn(lesson(item, request_id="lesson-2"))
    assert again.model_copy(update={"timing_ms": first.timing_ms}) == first
    assert (await latest(school)).version == 1
    other = FeedbackItem(feedback="More.", completion_id="chatcmpl-1", idempotency_key="other")
    with pytest.raises(Conflict, match="sent before"):
        await school.learner.learn(lesson(item, other, request_id="lesson-3"))


async def test_a_failed_lesson_gives_its_key_back(school: School) -> None:
    await school.rollout()
    item = FeedbackItem(feedback="Be Kuro.", completion_id="chatcmpl-1", idempotency_key="k")
    school.engine.failure = StepFailed("the step broke")
    with pytest.raises(StepFailed):
        await school.learner.learn(lesson(item))
    school.engine.failure = None
    assert (await school.learner.learn(lesson(item, request_id="lesson-2"))).version == 1


async def test_a_key_in_use_is_a_conflict(school: School) -> None:
    await school.rollout()
    item = FeedbackItem(feedback="Be Kuro.", completion_id="chatcmpl-1", idempotency_key="k")
    async with school.locks.hold(LORA):
        waiting = asyncio.create_task(school.learner.learn(lesson(item)))
        while not await school.feedback.by_request("lesson-1"):  # noqa: ASYNC110 - the state is in the database
            await asyncio.sleep(0)  # until it is accepted
        with pytest.raises(Conflict, match="right now"):
            await school.learner.learn(lesson(item, request_id="lesson-2"))
    assert (await waiting).version == 1


# --- rollback, deletion ---


async def test_a_rollback_is_undoable_and_journalled(school: School) -> None:
    await school.rollout()
    await school.learner.learn(lesson())
    assert (await school.lifecycle.rollback(LORA, 0)).version == 0
    assert (await latest(school)).version == 0
    assert (await school.journal.steps())[0].reason == "rollback from version 1 to 0"
    assert (await school.lifecycle.rollback(LORA, 1)).version == 1
    await school.lifecycle.rollback(LORA, 0)
    result = await school.learner.learn(lesson(request_id="lesson-2"))
    assert (result.parent, result.version) == (0, 2)
    with pytest.raises(NotFound):
        await school.lifecycle.rollback(LORA, 9)


async def test_deleting_an_adapter_removes_all_that_was_kept_of_it(school: School) -> None:
    await school.rollout()
    result = await school.learner.learn(lesson())
    await school.lifecycle.delete(LORA)
    assert await school.lifecycle.adapters() == []
    assert await school.feedback.list() == [] and await school.journal.steps() == []
    assert not (school.log_dir / result.log_path).exists()
    with pytest.raises(NotFound):
        await school.rollouts.get("chatcmpl-1")
    with pytest.raises(NotFound):
        await school.lifecycle.delete(LORA)


async def test_model_names(school: School) -> None:
    assert await school.lifecycle.resolve_model(school.engine.base_model) is None
    for name in (LORA, f"{LORA}@0"):
        ref = await school.lifecycle.resolve_model(name)
        assert ref is not None and (ref.lora_id, ref.version) == (LORA, 0)
    for unknown in ("nobody", f"{LORA}@7", f"{LORA}@x", "../etc", ""):
        with pytest.raises(NotFound, match="does not exist") as caught:
            await school.lifecycle.resolve_model(unknown)
        assert caught.value.code == "model_not_found"


# --- what serves is learnt, whatever becomes of its record ---


async def broken_record(school: School) -> None:
    """From now on no feedback can be written down as applied."""
    trigger = "CREATE TRIGGER hiccup BEFORE UPDATE ON feedback WHEN NEW.state = 'applied' BEGIN SELECT RAISE(ABORT, 'a hiccup'); END"
    await school.database.run(lambda session: session.execute(text(trigger)))


async def test_a_lesson_whose_details_find_no_room_is_on_record_without_them(school: School) -> None:
    await school.rollout()
    (school.log_dir / f"{datetime.now(UTC):%Y-%m-%d}").touch()  # no folder can be made there
    result = await school.learner.learn(lesson())
    assert (result.outcome, result.version, result.log_path) == ("applied", 1, "")
    (step,) = await school.journal.steps()
    assert (step.version, await state(school, result.feedback_ids[0])) == (1, "applied")


async def test_a_lesson_that_serves_and_cannot_be_recorded_is_told_as_learnt_and_never_taught_twice(school: School) -> None:
    await school.rollout()
    await broken_record(school)
    item = FeedbackItem(feedback="Be Kuro.", completion_id="chatcmpl-1", idempotency_key="k")
    result = await school.learner.learn(lesson(item))
    assert (result.outcome, (await latest(school)).version) == ("applied", 1)
    with pytest.raises(Conflict, match="right now"):
        await school.learner.learn(lesson(item, request_id="lesson-2"))
    await school.database.run(lambda session: session.execute(text("DROP TRIGGER hiccup")))
    await school.learner.learn(lesson(request_id="lesson-3"))  # goes on from it
    await recover(school.engine, school.feedback, school.journal)
    row = await school.feedback.get(result.feedback_ids[0])
    assert (row.state, row.version) == ("applied", 1)
    assert [version.version for version in await school.engine.versions(LORA)] == [0, 1, 2], "nothing that was taught is lost"
    await school.retraction.begin(row.id)
    await school.retraction.aclose()
    assert await state(school, row.id) == "retracted"


# --- after a crash ---


async def crashed(school: School, *, published: bool, promoted: bool) -> str:
    """Leave the stores as a process killed in mid-lesson would have: feedback training, perhaps a version, perhaps serving."""
    await school.rollout()
    school.engine.before_distill = lambda: None
    await school.feedback.add(
        [Feedback(id="fb-1", request_id="lesson-1", lora_id=LORA, completion_id="chatcmpl-1", feedback="x", state="training")]
    )
    if published:
        sample = DistillBatchItem(
            prompt="p", response="r", feedback="x", response_logprobs=(-1.0,), prompt_token_ids=(1,), response_token_ids=(2,),
            messages=(ChatMessage(role="user", content="p"),),
        )  # fmt: skip
        payload = DistillBatchRequestPayload(lora_id=LORA, training=TrainingConfig(), samples=[sample], feedback_ids=("fb-1",))
        await school.engine.distill(payload)
    if promoted:
        await school.engine.promote(LORA, 1)
    lines = await recover(school.engine, school.feedback, school.journal)
    assert len(lines) == 1
    assert await recover(school.engine, school.feedback, school.journal) == [], "nothing is left to settle"
    return lines[0]


async def test_a_lesson_killed_before_its_version_is_forgotten(school: School) -> None:
    assert "interrupted" in await crashed(school, published=False, promoted=False)
    row = await school.feedback.get("fb-1")
    assert (row.state, row.reason) == ("failed", INTERRUPTED)


async def test_a_version_that_never_served_is_discarded(school: School) -> None:
    assert "interrupted" in await crashed(school, published=True, promoted=False)
    assert [v.version for v in await school.engine.versions(LORA)] == [0]
    assert await state(school, "fb-1") == "failed"


async def test_a_version_that_served_is_recorded(school: School) -> None:
    assert "published" in await crashed(school, published=True, promoted=True)
    assert (await school.feedback.get("fb-1")).version == 1
    (step,) = await school.journal.steps()
    assert (step.version, step.parent, step.outcome) == (1, 0, "applied")
    assert (await latest(school)).version == 1


async def test_feedback_of_an_adapter_that_is_gone_is_settled(school: School) -> None:
    await school.engine.delete_lora(LORA)
    assert "interrupted" in await crashed(school, published=False, promoted=False)
