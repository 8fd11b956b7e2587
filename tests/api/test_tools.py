"""Tools, thoughts and answers of a given form: what is asked of a backend, and how its replies are worded, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from claas.core.types import ChatMessage, ToolCall
from tests.api.wire import CHAT, HELLO, assert_error, chat, events
from tests.doubles.inference import EOS, EOS_TEXT, Said
from tests.doubles.services import ADAPTER, World

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "weather", "description": "Today's weather", "parameters": SCHEMA}}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock", "strict": True}}
CALLS = (ToolCall(id="call_1", name="weather", arguments='{"city": "Zürich"}'), ToolCall(id="call_2", name="clock", arguments="{}"))
ON_THE_WIRE = [{"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in CALLS]
NAMED = {"type": "function", "function": {"name": "clock"}}
ANSWER = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


# --- What is asked ---


async def test_tools_are_asked_for_and_stand_in_the_prompt(client: httpx.AsyncClient, world: World) -> None:
    answer = await chat(
        client, tools=[WEATHER, CLOCK], tool_choice=NAMED, parallel_tool_calls=False, chat_template_kwargs={"enable_thinking": False}
    )
    (asked,) = world.inference.requests
    assert (asked.tool_choice, asked.parallel_tool_calls) == (NAMED, False)
    assert [tool["function"] for tool in asked.tools] == [
        {"name": "weather", "description": "Today's weather", "parameters": SCHEMA},
        {"name": "clock", "description": None, "parameters": None, "strict": True},
    ]
    assert asked.template_kwargs == {"enable_thinking": False, "tools": list(asked.tools)}
    assert (await world.rollouts.get(answer["id"])).template_kwargs == asked.template_kwargs


@pytest.mark.parametrize("choice", ["none", "auto", "required", NAMED, None])
async def test_every_documented_choice_is_passed_on(client: httpx.AsyncClient, world: World, choice: Any) -> None:
    await chat(client, tools=[CLOCK], tool_choice=choice)
    assert world.inference.requests[-1].tool_choice == choice


@pytest.mark.parametrize("form", [{"type": "json_object"}, ANSWER])
async def test_the_form_of_an_answer_is_passed_on(client: httpx.AsyncClient, world: World, form: dict[str, Any]) -> None:
    await chat(client, response_format=form)
    assert world.inference.requests[-1].response_format == form


@pytest.mark.parametrize(
    ("asked", "constrained"),
    [
        ({}, False),
        ({"tools": [WEATHER]}, False),
        ({"tools": [WEATHER], "tool_choice": "auto", "parallel_tool_calls": True}, False),
        ({"tools": [WEATHER, CLOCK], "tool_choice": "none", "parallel_tool_calls": False}, False),
        ({"tools": [WEATHER, CLOCK]}, True),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, True),
        ({"tools": [WEATHER], "tool_choice": "required"}, True),
        ({"tools": [WEATHER, CLOCK], "tool_choice": NAMED}, True),
        ({"response_format": {"type": "json_object"}}, True),
        ({"response_format": {"type": "text"}}, False),
    ],
)
async def test_a_reply_under_a_grammar_is_stored_as_one(
    client: httpx.AsyncClient, world: World, asked: dict[str, Any], constrained: bool
) -> None:
    """vLLM 0.32 has a grammar for free calls too, of tools that are strict and where one call is the most."""
    answer = await chat(client, **asked)
    assert (await world.rollouts.get(answer["id"])).sampling.constrained == constrained


async def test_calls_and_their_results_are_sent_back(client: httpx.AsyncClient, world: World) -> None:
    world.inference.reply = lambda _: Said(reasoning="Ask.", tool_calls=CALLS)
    message = (await chat(client, tools=[WEATHER, CLOCK]))["choices"][0]["message"]
    results = [
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "12:00"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": ""},
    ]
    await chat(client, messages=[*HELLO["messages"], message, *results], tools=[WEATHER, CLOCK])
    assert world.inference.requests[-1].messages == (
        ChatMessage(role="user", content="Hello"),
        ChatMessage.model_validate({"role": "assistant", "reasoning_content": "Ask.", "tool_calls": ON_THE_WIRE}),
        ChatMessage(role="tool", content="12:00", tool_call_id="call_2"),
        ChatMessage(role="tool", content="", tool_call_id="call_1"),
    )


def tools(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | function}]}


def after_hello(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*HELLO["messages"], *messages]}


CALLED: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": ON_THE_WIRE}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": {}}, "tools", "list"),
    ({"tools": [CLOCK] * 129}, "tools", "at most 128"),
    ({"tools": [CLOCK, WEATHER, CLOCK]}, "tools", "'clock'"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type", "'function'"),
    ({"tools": [{"type": "function"}]}, "tools.0.function", "missing"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", "missing"),
    (tools(name="a b"), "tools.0.function.name", "match"),
    (tools(name="x" * 65), "tools.0.function.name", "match"),
    (tools(parameters=[]), "tools.0.function.parameters", "an object"),
    (tools(parameters={"type": "string"}), "tools.0.function.parameters", "of an object"),
    (tools(description=7), "tools.0.function.description", "string"),
    (tools(strict="yes"), "tools.0.function.strict", "boolean"),
    (tools(mood="good"), "tools.0.function.mood", "unknown"),
    ({"tool_choice": "auto"}, "tool_choice", "only with 'tools'"),
    ({"tool_choice": NAMED, "tools": []}, "tool_choice", "only with 'tools'"),
    ({"tool_choice": "weather", "tools": [WEATHER]}, "tool_choice", "required"),
    ({"tool_choice": {"type": "function"}, "tools": [WEATHER]}, "tool_choice", "required"),
    ({"tool_choice": named("clock"), "tools": [WEATHER]}, "tool_choice", "'clock'"),
    ({"tool_choice": named("weather") | {"more": 1}, "tools": [WEATHER]}, "tool_choice", "required"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls", "boolean"),
    ({"chat_template_kwargs": {"tools": []}, "tools": [WEATHER]}, "chat_template_kwargs", "leave one"),
    ({"response_format": "json"}, "response_format", "an object"),
    ({"response_format": {"type": "grammar"}}, "response_format.type", "'json_schema'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "goes with"),
    ({"response_format": {"type": "text", "json_schema": ANSWER["json_schema"]}}, "response_format.json_schema", "goes with"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema", "missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name", "missing"),
    (after_hello({"role": "tool", "content": "12:00"}), "messages.1.tool_call_id", "missing"),
    (after_hello({"role": "tool", "content": "12:00", "tool_call_id": "call_1"}), "messages", "'call_1'"),
    (after_hello(CALLED, {"role": "tool", "content": None, "tool_call_id": "call_1"}), "messages.2.content", "missing"),
    (after_hello(CALLED), "messages", "last message"),
    (after_hello(CALLED | {"role": "user"}), "messages.1.tool_calls", "only an assistant"),
    (after_hello({"role": "user", "content": "x", "tool_call_id": "call_1"}), "messages.1.tool_call_id", "only a tool"),
    (after_hello({"role": "user", "content": "x", "reasoning_content": "hm"}), "messages.1.reasoning_content", "only an assistant"),
    (after_hello({"role": "assistant", "tool_calls": []}, *HELLO["messages"]), "messages.1.content", "missing"),
    (after_hello(CALLED | {"tool_calls": [{"id": "c", "type": "function"}]}), "messages.1.tool_calls.0.function", "missing"),
]


@pytest.mark.parametrize(("changes", "param", "says"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
async def test_wrong_fields_are_named(client: httpx.AsyncClient, world: World, changes: dict[str, Any], param: str, says: str) -> None:
    assert_error(await client.post(CHAT, json=HELLO | changes), 400, param=param, says=says)
    assert not world.inference.requests


# --- What is answered ---


async def test_an_answer_of_calls_alone(client: httpx.AsyncClient, world: World) -> None:
    world.inference.reply = lambda _: Said(tool_calls=CALLS)
    answer = await chat(client, tools=[WEATHER, CLOCK])
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None, "tool_calls": ON_THE_WIRE}
    rollout = await world.rollouts.get(answer["id"])
    sampled = [*"".join(call.name + call.arguments for call in CALLS)]
    assert rollout.response_token_ids == (*map(ord, sampled), EOS)
    assert answer["usage"]["completion_tokens"] == len(sampled) + 1
    assert (rollout.finish_reason, rollout.text) == ("tool_calls", "")


async def test_an_answer_that_thinks_speaks_and_calls(client: httpx.AsyncClient, world: World) -> None:
    world.inference.reply = lambda _: Said("Let me look.", "Where?", CALLS[:1])
    answer = await chat(client, tools=[WEATHER], logprobs=True)
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Let me look.", "Where?")
    assert message["tool_calls"] == ON_THE_WIRE[:1]
    assert (await world.rollouts.get(answer["id"])).text == "Let me look."
    tokens = [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert tokens == [*"Where?Let me look.weather", *CALLS[0].arguments, EOS_TEXT]


async def test_thoughts_that_ran_out_of_tokens(client: httpx.AsyncClient, world: World) -> None:
    world.inference.reply = lambda _: Said("4", "2 and 2")
    choice = (await chat(client, max_tokens=5))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"] == {"role": "assistant", "content": "", "refusal": None, "reasoning_content": "2 and"}


async def stream_of(client: httpx.AsyncClient, **changes: Any) -> list[dict[str, Any]]:
    """The choices of a stream's events; it ends well."""
    async with client.stream("POST", CHAT, json=HELLO | {"stream": True} | changes) as response:
        *chunks, done = [event async for event in events(response)]
    assert done == "[DONE]"
    return [chunk["choices"][0] for chunk in chunks if isinstance(chunk, dict)]


async def test_a_stream_of_thoughts_text_and_calls(client: httpx.AsyncClient, world: World) -> None:
    world.inference.reply = lambda _: Said("Hm.", "Where?", CALLS)
    first, *middle, last = await stream_of(client, tools=[WEATHER, CLOCK])
    assert first["delta"] == {"role": "assistant", "content": ""}
    deltas = [choice["delta"] for choice in middle]
    assert [delta["reasoning_content"] for delta in deltas[:6]] == [*"Where?"]
    assert [delta["content"] for delta in deltas[6:9]] == [*"Hm."]
    assert all(len(delta) == 1 for delta in deltas)
    pieces = [piece for delta in deltas[9:] for piece in delta["tool_calls"]]
    heads = [piece for piece in pieces if "id" in piece]
    assert heads == [
        {"index": index, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        for index, call in enumerate(CALLS)
    ]
    for index, call in enumerate(CALLS):
        own = [piece for piece in pieces if piece["index"] == index]
        assert own[0] in heads
        assert all(piece.keys() == {"index", "function"} and piece["function"].keys() == {"arguments"} for piece in own[1:])
        assert "".join(piece["function"]["arguments"] for piece in own) == call.arguments
    assert last == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}


async def test_logprobs_in_a_stream_cover_thoughts_and_calls(client: httpx.AsyncClient, world: World) -> None:
    world.inference.reply = lambda _: Said("Hm.", "Where?", CALLS[:1])
    choices = await stream_of(client, tools=[WEATHER], logprobs=True)
    tokens = [entry["token"] for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert tokens == [*"Where?Hm.weather", *CALLS[0].arguments, EOS_TEXT]


# --- The stock client, and lessons ---


async def test_the_stock_client_calls_tools(live: str, world: World) -> None:
    world.inference.reply = lambda request: (
        Said(reasoning="Where?", tool_calls=CALLS[:1]) if request.messages[-1].role == "user" else "It is sunny."
    )
    asked: list[Any] = [{"role": "user", "content": "Weather in Zürich?"}]
    async with openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="none") as client:
        whole = (await client.chat.completions.create(model=ADAPTER, messages=asked, tools=[WEATHER])).choices[0]  # type: ignore[list-item]
        assert whole.message.tool_calls is not None
        assert whole.message.tool_calls[0].model_dump() == ON_THE_WIRE[0]
        assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
        async with client.chat.completions.stream(model=ADAPTER, messages=asked, tools=[WEATHER]) as stream:  # type: ignore[list-item]
            streamed = (await stream.get_final_completion()).choices[0]
        assert streamed.message.tool_calls is not None
        assert streamed.message.tool_calls[0].function.name == "weather"
        assert streamed.message.tool_calls[0].function.arguments == CALLS[0].arguments
        asked += [whole.message, {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]
        said = await client.chat.completions.create(model=ADAPTER, messages=asked)
        assert said.choices[0].message.content == "It is sunny."


async def test_the_stock_client_wants_an_answer_of_a_given_form(live: str, world: World) -> None:
    world.inference.reply = lambda _: json.dumps({"city": "Zürich"})
    async with openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(
            model=ADAPTER,
            messages=[{"role": "user", "content": "Where?"}],
            response_format=ANSWER,  # type: ignore[call-overload]
        )
    assert json.loads(answer.choices[0].message.content) == {"city": "Zürich"}
    assert world.inference.requests[-1].response_format == ANSWER


@pytest.mark.parametrize("stream", [True, False])
async def test_a_reply_that_calls_a_tool_takes_feedback(client: httpx.AsyncClient, world: World, stream: bool) -> None:
    world.inference.reply = lambda _: Said(tool_calls=CALLS[:1])
    if stream:
        await stream_of(client, tools=[WEATHER])
        (completion_id,) = world.rollouts.kept
    else:
        completion_id = (await chat(client, tools=[WEATHER]))["id"]
    entry = {"completion_id": completion_id, "feedback": "Ask which Zürich."}
    response = await client.post("/v1/feedback", json={"requests": [entry]})
    assert response.status_code == 200, response.text
    assert response.json()["status"] == "ok"
    (sample,) = world.engine.lessons[-1].samples
    assert sample.response_token_ids == (*map(ord, "weather" + CALLS[0].arguments), EOS)
    assert sample.template_kwargs["tools"] == list(world.inference.requests[0].tools)


async def test_a_good_rating_cannot_keep_a_call(client: httpx.AsyncClient, world: World) -> None:
    world.inference.reply = lambda _: Said("Let me look.", tool_calls=CALLS[:1])
    entry = {"completion_id": (await chat(client, tools=[WEATHER]))["id"], "rating": 1}
    assert_error(await client.post("/v1/feedback", json={"requests": [entry]}), 422, param="requests.0", says="tool calls")
