"""`POST /v1/completions`."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai.types import completion_create_params as openai_params

from claas.api.schemas.completions import CompletionRequest
from tests.api.wire import assert_error, events
from tests.doubles.inference import EOS_TEXT, logprob_of
from tests.doubles.services import ADAPTER, World

URL = "/v1/completions"
ONCE: dict[str, Any] = {"model": ADAPTER, "prompt": "Once"}
REPLY = f"[{ADAPTER}@0] Once"


@pytest.mark.parametrize("prompt", ["Once", ["Once"]])
async def test_a_text_goes_on(client: httpx.AsyncClient, world: World, prompt: Any) -> None:
    response = await client.post(URL, json=ONCE | {"prompt": prompt})
    answer = response.json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": REPLY, "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"]["prompt_tokens"] == len("Once")
    assert response.headers["x-claas-adapter"] == f"{ADAPTER}@0"
    rollout = await world.rollouts.get(answer["id"])
    assert (rollout.messages, rollout.text) == ((), REPLY)


async def test_it_has_no_conversation_so_it_cannot_be_taught(client: httpx.AsyncClient) -> None:
    completion_id = (await client.post(URL, json=ONCE)).json()["id"]
    response = await client.post("/v1/feedback", json={"requests": [{"completion_id": completion_id, "feedback": "Shorter."}]})
    assert_error(response, 422, param="requests.0", says="only chat completions can be learnt from")


async def test_logprobs_are_parallel_lists(client: httpx.AsyncClient, world: World) -> None:
    world.inference.reply = lambda _: "ab"
    logprobs = (await client.post(URL, json=ONCE | {"logprobs": 1})).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b", EOS_TEXT],
        "token_logprobs": [logprob_of(97), logprob_of(98), logprob_of(0)],
        "top_logprobs": [{"a": logprob_of(97)}, {"b": logprob_of(98)}, {EOS_TEXT: logprob_of(0)}],
        "text_offset": [0, 1, 2],
    }


async def test_a_stream_says_the_same(client: httpx.AsyncClient) -> None:
    body = ONCE | {"n": 2, "logprobs": 0, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", URL, json=body) as response:
        *chunks, usage, done = [event async for event in events(response)]
    assert done == "[DONE]"
    assert isinstance(usage, dict)
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2 * (len(REPLY) + 1))
    for index in range(2):
        own = [choice for chunk in chunks if isinstance(chunk, dict) for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == REPLY
        assert [offset for choice in own for offset in choice["logprobs"]["text_offset"]] == list(range(len(REPLY) + 1))
        assert [choice["finish_reason"] for choice in own] == [None] * len(REPLY) + ["stop"]


async def test_values_that_ask_for_nothing_are_accepted(client: httpx.AsyncClient) -> None:
    body = ONCE | {
        "echo": False,
        "suffix": "",
        "best_of": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "user": "ann",
    }
    assert (await client.post(URL, json=body)).status_code == 200


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"prompt": ["a", "b"]}, "prompt", "one text"),
        ({"prompt": [1, 2]}, "prompt", "one text"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": None}, "prompt", "string"),
        ({"echo": True}, "echo", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"logprobs": 6}, "logprobs", "5"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"messages": []}, "messages", "unknown"),
    ],
)
async def test_wrong_fields_are_named(client: httpx.AsyncClient, world: World, changes: dict[str, Any], param: str, says: str) -> None:
    assert_error(await client.post(URL, json=ONCE | changes), 400, param=param, says=says)
    assert not world.inference.requests


def test_every_documented_field_is_known() -> None:
    documented = openai_params.CompletionCreateParamsBase.__annotations__.keys() | {"stream"}
    assert documented - CompletionRequest.model_fields.keys() == set()
