"""Lessons, on every backend: what is learnt, what is left as it was, what is said of it, and what is kept when nothing is learnt."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from claas.core.settings import Settings
from claas.training.report import StepReport
from tests.api.wire import assert_error
from tests.conformance.backends import asked
from tests.conformance.talk import body_of, finished, item, logprobs, said, taught, teach, text_of, versions


async def test_a_lesson_makes_a_version_and_leaves_the_others_alone(client: httpx.AsyncClient) -> None:
    body_of(await client.post("/v1/lora/init", json={"lora_id": "you/other"}))
    before, other = await logprobs(client), await logprobs(client, "you/other")
    lesson = await taught(client)
    assert (lesson["version"], lesson["lora_id"]) == (1, "assistant")
    assert await versions(client) == (1, [(0, None), (1, 0)])
    assert await logprobs(client) != pytest.approx(before, abs=1e-5)
    assert await logprobs(client, "assistant@0") == pytest.approx(before, abs=1e-4)
    assert await logprobs(client, "you/other") == pytest.approx(other, abs=1e-4)


async def test_the_record_of_a_lesson(client: httpx.AsyncClient) -> None:
    lesson = await taught(client)
    record = dict(lesson["distill_result"]["metadata"])
    for beside in ("room", "usage"):
        record.pop(beside, None)
    report = StepReport.model_validate(record)
    assert (report.outcome, report.parent, report.version) == ("applied", 0, 1)
    assert report.update.optimizer_steps == 2 and len(report.update.grad_norm) <= 2
    assert report.update.loss_after is not None and report.update.loss_before > 0
    assert report.update.reply_logprob_before != report.update.reply_logprob_after
    assert report.cost.response_tokens > 0 and report.cost.forward_tokens > 0
    assert lesson["timing_ms"]["total"] > 0


async def test_lessons_go_on_from_each_other_and_can_be_gone_back_from(client: httpx.AsyncClient) -> None:
    await taught(client)
    first = await logprobs(client)
    await taught(client)
    assert await versions(client) == (2, [(0, None), (1, 0), (2, 1)])
    second = await logprobs(client)
    assert second != pytest.approx(first, abs=1e-5)
    for version, expected in ((1, first), (2, second)):
        rolled = body_of(await client.post("/v1/lora/rollback", json={"lora_id": "assistant", "version": version}))
        assert rolled["version"] == version
        assert await logprobs(client) == pytest.approx(expected, abs=1e-4)


async def test_all_is_there_after_a_restart(settings: Settings) -> None:
    async with asked(settings) as client:
        reply = await finished(client)
        lesson = await teach(client, item(reply))
        learnt = await logprobs(client)
    async with asked(settings) as client:
        assert await logprobs(client) == pytest.approx(learnt, abs=1e-4)
        state = body_of(await client.get(f"/v1/feedback/{lesson['feedback_ids'][0]}"))
        assert (state["state"], state["version"]) == ("applied", 1)
        assert (await teach(client, item(reply)))["version"] == 2, "a reply of before takes feedback"


async def test_many_replies_in_one_lesson_and_many_adapters_at_once(client: httpx.AsyncClient) -> None:
    body_of(await client.post("/v1/lora/init", json={"lora_id": "you/other"}))
    mine = [await finished(client, messages=[{"role": "user", "content": word}]) for word in ("Hello", "other")]
    yours = await finished(client, model="you/other")
    lessons = await asyncio.gather(teach(client, *map(item, mine)), teach(client, item(yours)))
    assert [(lesson["lora_id"], lesson["version"]) for lesson in lessons] == [("assistant", 1), ("you/other", 1)]
    assert lessons[0]["batch_size"] == 2


async def test_the_reply_can_be_named_by_what_it_says(client: httpx.AsyncClient) -> None:
    reply = await finished(client)
    spelled = item(reply) | {"lora_id": "assistant", "prompt": "Hello", "response": text_of(reply)}
    del spelled["completion_id"]
    assert (await teach(client, spelled))["version"] == 1


async def test_the_same_key_twice_is_one_lesson(client: httpx.AsyncClient) -> None:
    once = item(await finished(client), idempotency_key="k1")
    first, second = await teach(client, once), await teach(client, once)
    assert second["feedback_ids"] == first["feedback_ids"]
    assert await versions(client) == (1, [(0, None), (1, 0)])


@pytest.mark.parametrize(
    ("training", "status", "says"),
    [({"min_signal": 100.0}, "skipped", "already"), ({"max_kl": 1e-9, "learning_rate": 1e-3}, "undone", "max_kl")],
)
async def test_a_lesson_that_is_not_learnt_changes_nothing_and_says_why(
    client: httpx.AsyncClient, training: dict[str, Any], status: str, says: str
) -> None:
    before = await logprobs(client)
    lesson = await teach(client, item(await finished(client), training=training))
    assert (lesson["status"], lesson["version"]) == (status, 0)
    assert says in lesson["reason"]
    assert await versions(client) == (0, [(0, None)])
    assert await logprobs(client) == pytest.approx(before, abs=1e-4)
    state = body_of(await client.get(f"/v1/feedback/{lesson['feedback_ids'][0]}"))
    assert state["state"] == status and state["reason"] == lesson["reason"]


async def test_what_cannot_be_taught(client: httpx.AsyncClient) -> None:
    cut = await said(client, max_tokens=2)
    assert_error(await client.post("/v1/feedback", json={"requests": [item(cut)]}), 422, param="requests.0", says="token limit")
    wrong = item(await finished(client), training={"learning_rate": 0})
    assert_error(await client.post("/v1/feedback", json={"requests": [wrong]}), 400, param="requests.0.training.learning_rate")


async def test_a_lesson_can_be_taken_back(client: httpx.AsyncClient) -> None:
    before = await logprobs(client)
    feedback_id = (await taught(client))["feedback_ids"][0]
    assert (await client.delete(f"/v1/feedback/{feedback_id}")).status_code == 202
    async with asyncio.timeout(60):
        while (state := body_of(await client.get(f"/v1/feedback/{feedback_id}")))["state"] == "applied":  # noqa: ASYNC110 - as clients do
            await asyncio.sleep(0.02)
    assert state["state"] == "retracted"
    assert await logprobs(client) == pytest.approx(before, abs=1e-4)
