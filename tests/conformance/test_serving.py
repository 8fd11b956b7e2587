"""Replies, on every backend: whole and streamed, as many and as long as asked, with the logprobs that they were sampled with."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.api.wire import assert_error, events
from tests.conformance.talk import CHAT, HELLO, body_of, logprobs, said, score, text_of


async def test_a_stream_says_what_a_whole_reply_says_and_who_speaks(client: httpx.AsyncClient) -> None:
    whole = await said(client)
    request = HELLO | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", CHAT, json=request) as response:
        assert response.headers["x-claas-adapter"] == "assistant@0"
        chunks = [event async for event in events(response)]
    assert chunks.pop() == "[DONE]"
    pieces: list[dict[str, Any]] = [chunk for chunk in chunks if isinstance(chunk, dict)]
    choices = [choice for piece in pieces for choice in piece["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == text_of(whole)
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [whole["choices"][0]["finish_reason"]]
    assert pieces[-1]["usage"] == whole["usage"]


async def test_seeds(client: httpx.AsyncClient) -> None:
    def texts(reply: dict[str, Any]) -> list[str]:
        return [choice["message"]["content"] for choice in reply["choices"]]

    first, again, other = [texts(await said(client, temperature=1.0, n=2, seed=seed)) for seed in (5, 5, 7)]
    assert first == again != other
    assert first[0] != first[1]


async def test_a_reply_ends_at_its_length_or_at_a_stop_string(client: httpx.AsyncClient) -> None:
    whole = await said(client, max_tokens=30)
    short = await said(client, max_tokens=3)
    assert short["choices"][0]["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 3
    stop = text_of(whole)[4:6]
    cut = await said(client, max_tokens=30, stop=[stop])
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert text_of(cut) == text_of(whole).partition(stop)[0]


async def test_a_reply_is_as_likely_as_its_score_says(client: httpx.AsyncClient) -> None:
    compared = 0
    for seed in range(20):
        reply = await said(client, temperature=1.0, seed=seed, logprobs=True, max_tokens=2)
        sampled = reply["choices"][0]["logprobs"]["content"]
        assert len(sampled) == reply["usage"]["completion_tokens"]
        scored = await score(client, text_of(reply))
        if scored["tokens"] == [token["token"] for token in sampled]:  # the same text may be other tokens
            assert [token["logprob"] for token in sampled] == pytest.approx(scored["logprobs"], abs=1e-3)
            compared += 1
    assert compared


async def test_a_score_is_the_same_every_time(client: httpx.AsyncClient) -> None:
    first = await logprobs(client)
    assert all(logprob < 0 for logprob in first)
    assert await logprobs(client) == pytest.approx(first, abs=1e-4)


async def test_plain_text_is_continued(client: httpx.AsyncClient) -> None:
    body = body_of(await client.post("/v1/completions", json={"model": "assistant", "prompt": "and then", "max_tokens": 4}))
    assert body["usage"]["completion_tokens"] <= 4 and isinstance(body["choices"][0]["text"], str)


async def test_models(client: httpx.AsyncClient) -> None:
    ids = [model["id"] for model in body_of(await client.get("/v1/models"))["data"]]
    assert "assistant" in ids and len(ids) == 2
    assert text_of(await said(client, model=next(model for model in ids if model != "assistant")))
    assert_error(await client.post(CHAT, json=HELLO | {"model": "nobody"}), 404, param="model", says="nobody")
    assert_error(await client.post(CHAT, json=HELLO | {"model": "assistant@7"}), 404, param="model")


async def test_more_than_the_context_holds(client: httpx.AsyncClient) -> None:
    long = [{"role": "user", "content": "and then " * 400}]
    assert (
        assert_error(await client.post(CHAT, json=HELLO | {"messages": long}), 400, param="messages")["code"] == "context_length_exceeded"
    )


async def test_many_at_once(client: httpx.AsyncClient) -> None:
    alone = text_of(await said(client))
    together = await asyncio.gather(*(said(client) for _ in range(8)))
    assert {text_of(reply) for reply in together} == {alone}


async def test_health(client: httpx.AsyncClient) -> None:
    health = body_of(await client.get("/v1/health"))
    assert health["status"] == "healthy"


async def test_a_reply_that_never_was_takes_no_feedback(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/feedback", json={"requests": [{"completion_id": "chatcmpl-none", "feedback": "Be kind."}]})
    assert_error(answer, 404, param="completion_id", says="chatcmpl-none")
