"""`POST /v1/chat/completions`, answered whole."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from openai.types.chat import completion_create_params as openai_params

from claas.api.schemas.chat import ChatCompletionRequest
from claas.core.errors import StorageFull
from claas.core.types import ChatMessage
from tests.api.wire import CHAT, HELLO, assert_error, chat
from tests.doubles.inference import EOS_TEXT, Steps, logprob_of
from tests.doubles.services import ADAPTER, BASE_MODEL, World

REPLY = f"[{ADAPTER}@0] Hello"


async def test_the_answer_has_openai_s_shape(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=HELLO)
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == ADAPTER
    message = {"role": "assistant", "content": REPLY, "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    prompt, completion = len("user:Hello\n"), len(REPLY) + 1
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    assert response.headers["x-claas-adapter"] == f"{ADAPTER}@0"
    assert response.headers["x-request-id"].startswith("req_")


async def test_the_reply_is_stored_as_served(client: httpx.AsyncClient, world: World) -> None:
    answer = await chat(client, temperature=0.5, top_p=0.9, seed=7, max_tokens=64, chat_template_kwargs={"enable_thinking": False})
    rollout = await world.rollouts.get(answer["id"])
    ids = [*map(ord, REPLY), 0]
    assert (rollout.lora_id, rollout.version, rollout.base_model) == (ADAPTER, 0, BASE_MODEL)
    assert rollout.messages == (ChatMessage(role="user", content="Hello"),)
    assert rollout.template_kwargs == {"enable_thinking": False}
    assert rollout.prompt_token_ids == tuple(map(ord, "user:Hello\n"))
    assert rollout.response_token_ids == tuple(ids)
    assert rollout.response_logprobs == tuple(map(logprob_of, ids))
    assert rollout.sampling.model_dump(include={"temperature", "top_p", "seed", "max_tokens"}) == {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "max_tokens": 64,
    }
    assert (rollout.finish_reason, rollout.text) == ("stop", REPLY)


async def test_thinking_is_served_but_is_not_the_visible_text(client: httpx.AsyncClient, world: World) -> None:
    world.inference.reply = lambda _: "<think>hm</think>Hi."
    answer = await chat(client)
    assert answer["choices"][0]["message"]["content"] == "<think>hm</think>Hi."
    assert (await world.rollouts.get(answer["id"])).text == "Hi."


async def test_the_base_model_and_pinned_versions_answer_by_name(client: httpx.AsyncClient, world: World) -> None:
    response = await client.post(CHAT, json=HELLO | {"model": BASE_MODEL})
    assert response.headers["x-claas-adapter"] == BASE_MODEL
    assert response.json()["choices"][0]["message"]["content"] == "[base] Hello"
    assert (await world.rollouts.get(response.json()["id"])).lora_id is None
    pinned = await chat(client, model=f"{ADAPTER}@0")
    assert pinned["model"] == f"{ADAPTER}@0"


async def test_n_replies_are_stored_one_by_one(client: httpx.AsyncClient, world: World) -> None:
    answer = await chat(client, n=3, seed=5)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    stored = [(await world.rollouts.get(answer["id"] + suffix)).sampling.seed for suffix in ("", ":1", ":2")]
    assert stored == [5, 6, 7]
    assert answer["usage"]["completion_tokens"] == 3 * (len(REPLY) + 1)
    assert answer["usage"]["prompt_tokens"] == len("user:Hello\n")


async def test_n_replies_are_admitted_all_or_none(client: httpx.AsyncClient, world: World) -> None:
    world.inference.max_running = 2
    response = await client.post(CHAT, json=HELLO | {"n": 3})
    assert_error(response, 429, says="slots")
    assert response.headers["retry-after"] == "3"
    assert not world.inference.running
    assert not world.rollouts.kept


async def test_n_replies_are_admitted_at_once(client: httpx.AsyncClient, world: World) -> None:
    world.inference.doors = doors = Steps()
    asking = asyncio.create_task(chat(client, n=3, seed=5))
    asked = [await asyncio.wait_for(world.inference.asked.get(), 10) for _ in range(3)]
    assert [request.sampling.seed for request in asked] == [5, 6, 7]
    doors.release_many(3)
    assert len((await asking)["choices"]) == 3


async def test_one_that_is_refused_stops_those_that_still_wait(client: httpx.AsyncClient, world: World) -> None:
    world.inference.doors = doors = Steps(1)
    world.inference.max_running = 1
    asking = asyncio.create_task(client.post(CHAT, json=HELLO | {"n": 4}))
    for _ in range(4):
        await asyncio.wait_for(world.inference.asked.get(), 10)
    doors.release()  # the first was let in, the second is refused, two wait
    assert_error(await asyncio.wait_for(asking, 10), 429, says="slots")
    assert not world.inference.running
    assert not world.rollouts.kept


async def test_logprobs_list_every_sampled_token(client: httpx.AsyncClient, world: World) -> None:
    world.inference.reply = lambda _: "é!"
    answer = await chat(client, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == ["é", "!", EOS_TEXT]
    assert content[0]["bytes"] == list("é".encode())
    assert content[0]["logprob"] == logprob_of(ord("é"))
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [logprob_of(ord("é")), logprob_of(ord("é")) - 1]
    assert len(content) == answer["usage"]["completion_tokens"]


async def test_logprobs_without_alternatives(client: httpx.AsyncClient) -> None:
    content = (await chat(client, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert all(token["top_logprobs"] == [] for token in content)


@pytest.mark.parametrize("stop", ["lo", ["x", "lo"]])
async def test_stop_strings(client: httpx.AsyncClient, stop: Any) -> None:
    choice = (await chat(client, stop=stop))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (f"[{ADAPTER}@0] Hel", "stop")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_the_length_limit(client: httpx.AsyncClient, field: str) -> None:
    choice = (await chat(client, **{field: 4}))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (REPLY[:4], "length")


async def test_the_default_length_gives_way_to_a_long_prompt(client: httpx.AsyncClient, world: World) -> None:
    world.inference.max_context = len("user:Hello\n") + 100  # less than the default length
    answer = await chat(client)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert (await world.rollouts.get(answer["id"])).sampling.max_tokens is None
    response = await client.post(CHAT, json=HELLO | {"max_tokens": 101})
    assert assert_error(response, 400, param="messages")["code"] == "context_length_exceeded"


async def test_text_parts_are_joined(client: httpx.AsyncClient, world: World) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await chat(client, messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts, "name": "ann"}])
    assert world.inference.requests[-1].messages == (
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="one\ntwo", name="ann"),
    )


async def test_an_answer_s_message_can_be_sent_back(client: httpx.AsyncClient) -> None:
    message = (await chat(client))["choices"][0]["message"]
    nulls: dict[str, Any] = {"audio": None, "function_call": None, "tool_calls": None, "reasoning_content": None, "annotations": []}
    await chat(client, messages=[*HELLO["messages"], message | nulls, {"role": "user", "content": "And?"}])


async def test_a_reply_that_cannot_be_stored_is_not_given(client: httpx.AsyncClient, world: World) -> None:
    world.rollouts.failure = StorageFull("no space is left: make room and try again")
    assert_error(await client.post(CHAT, json=HELLO), 503, says="no space")
    assert not world.inference.running


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_is_kept_of_an_adapter_that_was_deleted_while_it_spoke(client: httpx.AsyncClient, world: World, stream: bool) -> None:
    world.inference.steps = steps = Steps()
    speaking = asyncio.create_task(client.post(CHAT, json=HELLO | {"stream": stream}))
    await steps.blocked.wait()
    await world.services.lifecycle.delete(ADAPTER)
    steps.release_many(1000)
    assert (await speaking).status_code == 200
    assert (await world.rollouts.arrivals.get()).lora_id == ADAPTER, "it came to be stored"
    assert world.rollouts.kept == {}


async def test_an_engine_that_breaks_midway(client: httpx.AsyncClient, world: World) -> None:
    world.inference.broken_after = 3
    assert_error(await client.post(CHAT, json=HELLO | {"n": 2}), 503, says="broke")
    assert not world.inference.running
    assert {rollout.finish_reason for rollout in world.rollouts.kept.values()} == {"abort"}


async def test_an_abandoned_reply_that_cannot_be_stored_is_logged(
    client: httpx.AsyncClient, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.inference.broken_after = 3
    world.rollouts.failure = StorageFull("no space is left")
    assert_error(await client.post(CHAT, json=HELLO), 503, says="broke")
    assert "could not be stored" in caplog.text


NEUTRAL: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "modalities": ["text"],
    "reasoning_effort": "none",
    "verbosity": "medium",
    "service_tier": "auto",
    "store": False,
    "user": "ann",
    "metadata": {"chat": "7"},
    "safety_identifier": "ann",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "parallel_tool_calls": True,
    "stream": False,
    "n": 1,
}


async def test_values_that_ask_for_nothing_are_accepted(client: httpx.AsyncClient, world: World) -> None:
    await chat(client, **NEUTRAL)
    (asked,) = world.inference.requests
    assert (asked.tools, asked.tool_choice, asked.parallel_tool_calls, asked.response_format) == ((), None, None, None)
    assert asked.template_kwargs == {}


async def test_null_is_the_same_as_leaving_out(client: httpx.AsyncClient) -> None:
    optional = [name for name, info in ChatCompletionRequest.model_fields.items() if not info.is_required()]
    await chat(client, **dict.fromkeys(optional))


UNSUPPORTED: dict[str, Any] = {
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "logit_bias": {"50256": -100},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "service_tier": "flex",
    "web_search_options": {},
    "moderation": {"model": "m"},
    "prompt_cache_options": {"mode": "explicit"},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
async def test_what_is_not_supported_is_refused_by_name(client: httpx.AsyncClient, world: World, field: str) -> None:
    error = assert_error(await client.post(CHAT, json=HELLO | {field: UNSUPPORTED[field]}), 400, param=field, says="not supported")
    assert error["code"] == "unsupported_parameter"
    assert not world.inference.requests


def test_every_documented_field_is_known() -> None:
    documented = openai_params.CompletionCreateParamsBase.__annotations__.keys() | {"stream"}
    assert documented - ChatCompletionRequest.model_fields.keys() == set()


def turn(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hello"} | fields]


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"model": 7}, "model", "string"),
    ({"model": ""}, "model", "at least 1"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "Hello"}, "messages", "list"),
    ({"messages": [7]}, "messages.0", "an object"),
    ({"messages": turn(role="robot")}, "messages.0.role", "'user'"),
    ({"messages": turn(role="function", name="f")}, "messages.0.role", "send tools"),
    ({"messages": turn(content=None)}, "messages.0.content", "string"),
    ({"messages": turn(content=[])}, "messages.0.content", "empty"),
    ({"messages": turn(content=[IMAGE])}, "messages.0.content", "image_url"),
    ({"messages": turn(content=["x"])}, "messages.0.content", "every part"),
    ({"messages": turn(content=[{"type": "text", "text": 7}])}, "messages.0.content", "every part"),
    ({"messages": turn(mood="good")}, "messages.0.mood", "unknown"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
    ({"messages": turn(name="a b")}, "messages.0.name", "match"),
    ({"messages": [*turn(), {"role": "assistant", "content": "Hi"}]}, "messages", "last message"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"temperature": "1"}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 129}, "n", "128"),
    ({"n": 1.5}, "n", "integer"),
    ({"n": True}, "n", "integer"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "contradicts"),
    ({"seed": "x"}, "seed", "integer"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
    ({"stop": ""}, "stop.0", "at least 1"),
    ({"stop": [7]}, "stop.0", "string"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "'stream': true"),
    ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what", "unknown"),
    ({"logprobs": 1}, "logprobs", "boolean"),
    ({"top_logprobs": 2}, "top_logprobs", "'logprobs': true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"metadata": {"a": 1}}, "metadata.a", "string"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16"),
    ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs.a b.[key]", "match"),
    ({"top_k": 5}, "top_k", "unknown"),
]


@pytest.mark.parametrize(("changes", "param", "says"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
async def test_wrong_fields_are_named(client: httpx.AsyncClient, world: World, changes: dict[str, Any], param: str, says: str) -> None:
    assert_error(await client.post(CHAT, json=HELLO | changes), 400, param=param, says=says)
    assert not world.inference.requests


@pytest.mark.parametrize("field", ["model", "messages"])
async def test_missing_fields_are_named(client: httpx.AsyncClient, field: str) -> None:
    body = {name: value for name, value in HELLO.items() if name != field}
    assert assert_error(await client.post(CHAT, json=body), 400, param=field, says="missing")["code"] == "missing_required_parameter"


@pytest.mark.parametrize("model", ["nobody", f"{ADAPTER}@1", f"{ADAPTER}@x", "../etc/passwd", "a\tb", "me/assistant@-1", "é"])
async def test_unknown_models(client: httpx.AsyncClient, model: str) -> None:
    error = assert_error(await client.post(CHAT, json=HELLO | {"model": model}), 404, param="model", says="does not exist")
    assert error["code"] == "model_not_found"
