"""`claas serve` in front of a real vLLM: OpenAI's features, and the exact tokens of whatever passes through."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.process import Service
from tests.vllm.asking import direct_choice, kept, loaded_versions, streamed
from tests.vllm.peer import CHAT, NAMED, TEXT, TOOL

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

REQUESTS = 200
SNIPPETS = (
    "Who are you?", "Tell me a joke.", "naïve façade", "12 345 €", "你好，世界", "😀☃🏳️\u200d🌈", "def f(x):\n    return x < 0",
    "<|im_end|>", "\t tabs\n\n", "Привет", "한국어", "A\u030a\u0327é", "What is 2+2?", "List three colours.", "مرحبا", '{"json": [1, 2]}',
    "The quick brown fox", " ", "In one word:",
)  # fmt: skip
STOPS = (["."], ["\n"], [" the", "!"], ["e"], ["zzz"])


def test_chat_whole_and_streamed_through_openais_client(service: Service) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none")
    ask: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 30}
    whole = client.chat.completions.create(**ask, temperature=0)
    chunks = list(client.chat.completions.create(**ask, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert len(chunks) > 10, "token by token"
    assert chunks[-1].usage == whole.usage
    assert whole.choices[0].finish_reason == "length"


def test_two_choices_are_two_replies_that_can_both_be_taught(service: Service, direct: httpx.Client, data_dir: Path) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 16, "seed": 11, "temperature": 1.0}
    reply = service.chat("Tell me a story.", n=2, max_tokens=16, seed=11)
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    assert texts[0] != texts[1]
    (name,) = (name for name in loaded_versions(direct) if "assistant" in name)
    for index, reply_id in enumerate((reply["id"], f"{reply['id']}:1")):
        rollout = kept(data_dir, reply_id)
        own = direct_choice(direct, CHAT, body | {"seed": 11 + index}, name)
        assert rollout.ids == own["token_ids"] and rollout.text == texts[index] == own["message"]["content"]


def test_logprobs_are_vllms_own(service: Service, direct: httpx.Client, data_dir: Path) -> None:
    how: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 4}
    reply = service.chat("Who are you?", **how)
    (name,) = (name for name in loaded_versions(direct) if "assistant" in name)
    own = direct_choice(direct, CHAT, {"messages": [{"role": "user", "content": "Who are you?"}], **how}, name)
    ours, theirs = reply["choices"][0]["logprobs"]["content"], own["logprobs"]["content"]
    assert [entry["token"] for entry in ours] == [entry["token"] for entry in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["logprob"] == pytest.approx(its["logprob"], abs=1e-4)
        assert {top["token"] for top in mine["top_logprobs"]} == {top["token"] for top in its["top_logprobs"]}
    assert kept(data_dir, reply["id"]).logprobs == pytest.approx([entry["logprob"] for entry in ours], abs=1e-6)


def test_a_score_is_what_vllm_says_of_the_same_tokens(service: Service, direct: httpx.Client) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    score = service.http.post("/v1/score", json={"model": "assistant", "messages": messages, "completion": "It is Paris — naïvely."}).json()
    (name,) = (name for name in loaded_versions(direct) if "assistant" in name)
    prompt = direct_choice(direct, CHAT, {"messages": messages, "max_tokens": 1}, name)["prompt"]
    assert score["prompt_tokens"] == len(prompt)
    body = {"model": name, "prompt": [*prompt, *score["token_ids"]], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    entries = direct.post(TEXT, json=body).json()["choices"][0]["prompt_logprobs"][-len(score["token_ids"]) :]
    theirs = [entry[str(token)]["logprob"] for entry, token in zip(entries, score["token_ids"], strict=True)]
    assert score["logprobs"] == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize(("choice", "finish"), [(NAMED, "stop"), ("required", "tool_calls")], ids=["named", "required"])
def test_a_tool_is_called_whole_and_streamed(service: Service, data_dir: Path, choice: Any, finish: str) -> None:
    """The model's template knows no tools; a schema that vLLM enforces (`strict`) gets a right call out of it all the same."""
    how: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 100, "temperature": 0}
    (whole,) = service.chat("What is the weather in Paris?", **how)["choices"]
    (call,) = whole["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather" and json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert whole["finish_reason"] == finish

    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    chunks = list(client.chat.completions.create(model="assistant", messages=messages, stream=True, **how))
    pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or ()]
    assert pieces[0].id and pieces[0].function and pieces[0].function.name == "get_weather"
    assert json.loads("".join((piece.function and piece.function.arguments) or "" for piece in pieces)) == {"city": "Paris"}
    assert chunks[-1].choices[0].finish_reason == finish
    rollout = kept(data_dir, chunks[0].id)
    assert len(rollout.ids) == len(rollout.logprobs) > 20, "the call's own tokens, markers and all"
    assert rollout.ids[-1] == 2


def test_json_by_a_schema(service: Service) -> None:
    schema = {"name": "place", "schema": TOOL["function"]["parameters"]}
    reply = service.chat("Where is it? Answer as JSON.", response_format={"type": "json_schema", "json_schema": schema}, max_tokens=60)
    assert json.loads(reply["choices"][0]["message"]["content"])["city"] in ("Paris", "Rome")


def test_what_vllm_refuses_stays_a_refusal(service: Service) -> None:
    body = {"model": "assistant", "messages": [{"role": "user", "content": "word " * 3000}]}
    answer = service.http.post(CHAT, json=body)
    assert answer.status_code == 400 and "2048" in answer.json()["error"]["message"]
    answer = service.http.post(CHAT, json=body | {"model": "nobody"})
    assert answer.status_code == 404


@pytest.mark.timeout(1200)
def test_every_token_of_two_hundred_random_requests_is_vllms_own(service: Service, direct: httpx.Client, data_dir: Path) -> None:
    """Half of them streamed: what was stored to learn from is what vLLM says to the same request asked directly."""
    dice = random.Random(2026)
    (adapter,) = (name for name in loaded_versions(direct) if "assistant" in name)
    base = next(model["id"] for model in service.get("/v1/models")["data"] if model["id"] != "assistant")
    speakers = {"assistant": adapter, base: None}
    for number in range(REQUESTS):
        text = " ".join(dice.sample(SNIPPETS, dice.randint(1, 4)))
        how: dict[str, Any] = {
            "max_tokens": dice.randint(1, 16),
            "temperature": dice.choice((0.0, 0.7, 1.0)),
            "seed": dice.randrange(2**31),
        }
        how |= {"stop": dice.choice(STOPS)} if dice.random() < 0.5 else {}
        how |= {"top_p": 0.9} if dice.random() < 0.3 else {}
        chat = dice.random() < 0.8
        path, body = (CHAT, {"messages": [{"role": "user", "content": text}]}) if chat else (TEXT, {"prompt": text})
        model = dice.choice(list(speakers))
        if number % 2:
            reply_id = streamed(service, path, body | how | {"model": model}).id
        else:
            answer = service.http.post(path, json=body | how | {"model": model})
            assert answer.status_code == 200, answer.text
            reply_id = answer.json()["id"]
        rollout = kept(data_dir, reply_id)
        if chat:  # vLLM reads a control token that a user spells as control; the service sends it as text
            body = {"messages": [{"role": "user", "content": text.replace("<|im_end|>", "<\u200b|im_end|>")}]}
        own = direct_choice(direct, path, body | how | ({"logprobs": True} if chat else {"logprobs": 0}), speakers[model] or "smollm2")
        said = own["message"]["content"] if chat else own["text"]
        theirs = [e["logprob"] for e in own["logprobs"]["content"]] if chat else own["logprobs"]["token_logprobs"]
        where = f"request {number}: {path} {body} {how}"
        assert rollout.prompt == own["prompt"], where
        assert rollout.ids == own["token_ids"], where
        assert rollout.finish_reason == own["finish_reason"], where
        assert rollout.text == said, where
        assert rollout.logprobs == pytest.approx(theirs, abs=1e-3), where
