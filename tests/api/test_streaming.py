"""Streams and clients that leave, over a real socket; and the stock OpenAI client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from starlette.types import Message

from claas.api.formats import ChatFormat
from claas.api.serving import Ask
from claas.api.streaming import Answer, UnlessLeft
from claas.core.errors import StorageFull
from claas.core.types import ChatMessage, Rollout, SamplingParams
from tests.api.wire import CHAT, HELLO, assert_error, events
from tests.doubles.inference import EOS_TEXT, Steps
from tests.doubles.services import ADAPTER, World
from tests.inference.vllm_serving import when

REPLY = f"[{ADAPTER}@0] Hello"
STREAM = HELLO | {"stream": True}
SOON = 10  # seconds after which a test is stuck


@pytest.fixture
async def socket_client(live: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=live, timeout=SOON) as client:
        yield client


async def collect(client: httpx.AsyncClient, body: dict[str, Any], path: str = CHAT) -> list[Any]:
    async with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        return [event async for event in events(response)]


async def stored(world: World) -> Rollout:
    return await asyncio.wait_for(world.rollouts.arrivals.get(), SOON)


async def test_the_events_of_a_chat(socket_client: httpx.AsyncClient, world: World) -> None:
    *chunks, done = await collect(socket_client, STREAM)
    assert done == "[DONE]"
    assert {(c["object"], c["model"], c["id"]) for c in chunks} == {("chat.completion.chunk", ADAPTER, chunks[0]["id"])}
    assert all("usage" not in chunk for chunk in chunks)
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first == {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    assert "".join(choice["delta"]["content"] for choice in middle) == REPLY
    assert last == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert (await stored(world)).id == chunks[0]["id"]


async def test_each_token_is_sent_when_it_is_sampled(socket_client: httpx.AsyncClient, world: World) -> None:
    world.inference.steps = steps = Steps()
    async with socket_client.stream("POST", CHAT, json=STREAM) as response:
        arriving = events(response)
        await asyncio.wait_for(anext(arriving), SOON)  # the role: before anything was sampled
        for expected in REPLY:
            steps.release()
            event = await asyncio.wait_for(anext(arriving), SOON)
            assert isinstance(event, dict)
            assert event["choices"][0]["delta"]["content"] == expected
        assert not world.rollouts.kept
        steps.release()
        finish = await asyncio.wait_for(anext(arriving), SOON)
        assert isinstance(finish, dict)
        assert finish["choices"][0]["finish_reason"] == "stop"
        assert finish["id"] in world.rollouts.kept  # before the stream has ended, its reply takes feedback


async def test_the_end_of_a_stream_is_sent_with_its_last_token(world: World) -> None:
    """Each piece is a system call: where many streams get their tokens at one moment, the last of them waits for all the others'."""
    sent: list[Message] = []

    async def receive() -> Message:
        stays: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await stays

    async def send(message: Message) -> None:
        sent.append(message)

    ask = Ask(model=ADAPTER, sampling=SamplingParams(max_tokens=40), messages=(ChatMessage(role="user", content="Hello"),))
    wording = ChatFormat(ask, world.inference.token_text, logprobs=False, include_usage=True)
    await Answer(world.services, ask, wording, stream=True)({"type": "http"}, receive, send)
    *_, last, end = [message["body"] for message in sent if message["type"] == "http.response.body"]
    assert b'"finish_reason":"stop"' in last and b'"usage":{' in last and last.endswith(b"data: [DONE]\n\n")
    assert end == b""


async def test_usage_comes_last_and_only_if_asked_for(socket_client: httpx.AsyncClient) -> None:
    *chunks, usage, done = await collect(socket_client, STREAM | {"stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    prompt, completion = len("user:Hello\n"), len(REPLY) + 1
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def test_logprobs_in_a_stream_cover_every_token(socket_client: httpx.AsyncClient) -> None:
    *chunks, _ = await collect(socket_client, STREAM | {"logprobs": True, "top_logprobs": 1})
    entries = [entry for chunk in chunks for choice in chunk["choices"] if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in entries] == [*REPLY, EOS_TEXT]
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in entries)


async def test_n_choices_interleave(socket_client: httpx.AsyncClient, world: World) -> None:
    *chunks, _ = await collect(socket_client, STREAM | {"n": 3})
    for index in range(3):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == REPLY
        assert own[-1]["finish_reason"] == "stop"
    assert set(world.rollouts.kept) == {chunks[0]["id"] + suffix for suffix in ("", ":1", ":2")}
    order = [chunk["choices"][0]["index"] for chunk in chunks[3:]]
    assert order != sorted(order)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_slots(socket_client: httpx.AsyncClient, world: World, stream: bool) -> None:
    world.inference.steps = steps = Steps(6)
    request = socket_client.build_request("POST", CHAT, json=STREAM | {"n": 2, "stream": stream})
    asking = asyncio.create_task(socket_client.send(request, stream=True))
    await asyncio.wait_for(steps.blocked.wait(), SOON)  # all six tokens were taken
    if stream:
        await (await asking).aclose()
    else:
        asking.cancel()
    replies = [await stored(world), await stored(world)]
    assert {reply.finish_reason for reply in replies} == {"abort"}
    assert sum(len(reply.response_token_ids) for reply in replies) == 6
    assert all(reply.text == REPLY[: len(reply.response_token_ids)] for reply in replies)
    assert not world.inference.running


async def test_of_a_reply_whose_prompt_was_not_read_nothing_is_stored(
    socket_client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.inference.steps = steps = Steps(0)
    monkeypatch.setattr("tests.doubles.inference.prompt_ids", lambda _: ())
    async with socket_client.stream("POST", CHAT, json=STREAM) as response:
        assert response.status_code == 200, "the answer begins before the first token"
        await asyncio.wait_for(steps.blocked.wait(), SOON)
    monkeypatch.undo()
    await when(lambda: not world.inference.running)
    steps.release_many(100)
    await collect(socket_client, STREAM)
    assert (await stored(world)).finish_reason == "stop", "the reply before it left nothing"


@pytest.mark.parametrize("service_ends", [False, True])
async def test_a_block_ends_when_the_client_leaves_and_its_cleaning_up_is_awaited(service_ends: bool) -> None:
    leave, cleaned = asyncio.Event(), list[str]()

    async def receive() -> Message:
        await leave.wait()
        return {"type": "http.disconnect"}

    async def work() -> bool:
        async with UnlessLeft(receive) as client:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                cleaned.append("up")
        return client.left

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    leave.set()
    if service_ends:
        await asyncio.sleep(0)
        task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    assert cleaned == ["up"]
    assert isinstance(outcome, asyncio.CancelledError) if service_ends else outcome is True
    assert task.cancelling() == (1 if service_ends else 0)


async def test_a_block_that_ends_by_itself_is_left_alone() -> None:
    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError("nobody leaves")

    async with UnlessLeft(receive) as client:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not client.left
    with pytest.raises(ValueError, match="its own"):
        async with UnlessLeft(receive):
            raise ValueError("its own")


async def test_an_error_in_a_stream_is_its_last_event(socket_client: httpx.AsyncClient, world: World) -> None:
    world.inference.broken_after = 2
    *_, last = await collect(socket_client, STREAM)
    assert last["error"]["code"] == "backend_unavailable"
    assert last["error"]["message"] == "the engine broke"
    assert (await stored(world)).finish_reason == "abort"


async def test_an_unforeseen_error_in_a_stream_says_nothing_of_itself(
    socket_client: httpx.AsyncClient, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.inference.broken_after, world.inference.breakage = 2, RuntimeError("secret detail")
    *_, last = await collect(socket_client, STREAM)
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(last)
    assert "secret detail" in caplog.text


async def test_a_reply_that_cannot_be_stored_ends_in_an_error(socket_client: httpx.AsyncClient, world: World) -> None:
    world.rollouts.failure = StorageFull("no space is left")
    *chunks, last = await collect(socket_client, STREAM)
    assert last["error"]["code"] == "storage_full"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert not world.inference.running


async def test_what_is_refused_before_the_stream_has_its_status(socket_client: httpx.AsyncClient, world: World) -> None:
    world.inference.max_running = 0
    assert_error(await socket_client.post(CHAT, json=STREAM), 429, says="slots")
    assert_error(await socket_client.post(CHAT, json=STREAM | {"model": "nobody"}), 404, param="model")


async def test_a_service_that_closes_ends_its_replies_with_abort(socket_client: httpx.AsyncClient, world: World) -> None:
    world.inference.steps = steps = Steps(3)
    asking = asyncio.create_task(collect(socket_client, STREAM))
    await asyncio.wait_for(steps.blocked.wait(), SOON)
    await world.inference.aclose()
    *chunks, done = await asking
    assert (chunks[-1]["choices"][0]["finish_reason"], done) == ("abort", "[DONE]")
    assert (await stored(world)).finish_reason == "abort"


async def test_the_stock_client_chats_and_its_id_takes_feedback(live: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="none") as client:
        assert [model.id async for model in client.models.list()] == ["tiny/base", ADAPTER]
        assert (await client.models.retrieve(ADAPTER)).id == ADAPTER
        whole = await client.chat.completions.create(model=ADAPTER, messages=[{"role": "user", "content": "Hello"}], logprobs=True)
        assert whole.choices[0].message.content == REPLY
        assert whole.usage is not None
        assert whole.choices[0].logprobs is not None
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model=ADAPTER,
                messages=[{"role": "user", "content": "Hello"}],
                stream=True,
                stream_options={"include_usage": True},
                user="ann",
                metadata={"chat": "7"},
            )
        ]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == REPLY
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
        text = await client.completions.create(model=ADAPTER, prompt="Once")
        assert text.choices[0].text == f"[{ADAPTER}@0] Once"
    async with httpx.AsyncClient(base_url=live) as plain:
        for completion_id in (whole.id, chunks[0].id):
            body = {"requests": [{"completion_id": completion_id, "feedback": "Say good day."}]}
            response = await plain.post("/v1/feedback", json=body)
            assert response.status_code == 200, response.text
            assert response.json()["status"] == "ok"


async def test_the_stock_client_raises_its_own_errors(live: str, world: World) -> None:
    async with openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "Hello"}])
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model=ADAPTER, messages=[{"role": "user", "content": "Hello"}], presence_penalty=1)
        assert refused.value.param == "presence_penalty"
        world.inference.broken_after = 2
        with pytest.raises(openai.APIError, match="the engine broke"):
            async for _ in await client.chat.completions.create(
                model=ADAPTER, messages=[{"role": "user", "content": "Hello"}], stream=True
            ):
                pass


async def test_the_stock_blocking_client(live: str) -> None:
    def chat() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=f"{live}/v1", api_key="none") as client:
            whole = client.chat.completions.create(model=ADAPTER, messages=[{"role": "user", "content": "Hello"}])
            pieces = client.chat.completions.create(model=ADAPTER, messages=[{"role": "user", "content": "Hello"}], stream=True)
            return whole.choices[0].message.content, "".join(piece.choices[0].delta.content or "" for piece in pieces)

    assert await asyncio.to_thread(chat) == (REPLY, REPLY)
