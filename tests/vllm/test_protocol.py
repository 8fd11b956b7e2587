"""One set of questions about vLLM's protocol, asked of the double and of a real vLLM: what the double answers is what vLLM answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.peer import CHAT, NAMED, TEXT, TOOL, Peer, asking, finish_of, ids_of, text_of
from tests.vllm.process import MODEL

# What it is


def test_what_it_says_of_itself(peer: Peer) -> None:
    assert peer.get("/version") == {"version": "0.32.0"}
    health = peer.http.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    (card,) = peer.get("/v1/models")["data"]
    assert (card["id"], card["parent"], card["max_model_len"], card["owned_by"]) == (MODEL, None, 2048, "vllm")
    assert peer.sleep_state() == {"awake": 1.0, "weights_offloaded": 0.0, "discard_all": 0.0}
    assert "\nprocess_start_time_seconds " in "\n" + peer.http.get("/metrics").text
    nothing = peer.http.get("/v1/nothing")
    assert (nothing.status_code, nothing.json()) == (404, {"detail": "Not Found"})
    wrong = peer.http.get("/sleep")
    assert (wrong.status_code, wrong.json()) == (405, {"detail": "Method Not Allowed"})
    tokens = peer.post("/tokenize", {"model": MODEL, "prompt": "Hello there", "add_special_tokens": False})
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 2048


TOO_LONG = "This model's maximum context length is 2048 tokens. However, your prompt contains"
BAD_REQUESTS: list[tuple[str, dict[str, Any], int, str, str | None, str]] = [
    (CHAT, asking(model="nope"), 404, "NotFoundError", "model", f"The model `nope` does not exist. Valid aliases: {MODEL}."),
    (CHAT, asking(max_tokens=5000), 400, "BadRequestError", "max_tokens",
     "max_tokens=5000 cannot be greater than max_model_len=2048. Please request fewer output tokens. (parameter=max_tokens, value=5000)"),
    (TEXT, {"model": MODEL, "prompt": [5] * 2100}, 400, "BadRequestError", "input_tokens",
     f"{TOO_LONG} 2100 input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input "
     "prompt. (parameter=input_tokens, value=2100)"),
    (TEXT, {"model": MODEL, "prompt": [5] * 2048, "max_tokens": 1}, 400, "BadRequestError", "max_tokens",
     "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)"),
    (TEXT, {"model": MODEL, "prompt": []}, 400, "BadRequestError", None, "You must pass at least one prompt"),
    (TEXT, {"model": MODEL, "prompt": [60000]}, 400, "BadRequestError", None, "Token id 60000 is out of vocabulary"),
    (CHAT, asking(temperature=-1), 400, "BadRequestError", "temperature",
     "temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)"),
    (CHAT, asking(top_logprobs=5), 400, "BadRequestError", "top_logprobs",
     "when using `top_logprobs`, `logprobs` must be set to true. (parameter=top_logprobs)"),
    (CHAT, asking(logprobs=True, top_logprobs=65), 400, "BadRequestError", "logprobs",
     "Requested sample logprobs of 65, which is greater than max allowed: 64 (parameter=logprobs, value=65)"),
    (CHAT, asking(n=2), 400, "BadRequestError", None, "n must be 1 when using greedy sampling, got 2."),
    (CHAT, asking(tools=[]), 400, "BadRequestError", "tools",
     "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely. (parameter=tools)"),
    (CHAT, asking(tool_choice="required"), 400, "BadRequestError", "tool_choice",
     "When using `tool_choice`, `tools` must be set. (parameter=tool_choice)"),
    (CHAT, asking(tools=[TOOL], tool_choice="maybe"), 400, "BadRequestError", "tool_choice",
     'Invalid value for `tool_choice`: maybe! Only named tools, "none", "auto" or "required" are supported. (parameter=tool_choice)'),
    (CHAT, asking(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "other"}}), 400, "BadRequestError", "tool_choice",
     "The tool specified in `tool_choice` does not match any of the specified `tools` (parameter=tool_choice)"),
    (CHAT, asking() | {"messages": "x"}, 400, "Bad Request", "body.messages",
     "1 validation error:\n  {'type': 'list_type', 'loc': 'body.messages', 'msg': 'Input should be a valid list', 'input': 'x'}"),
    ("/v1/load_lora_adapter", {"lora_name": "x"}, 400, "Bad Request", "body.lora_path",
     "1 validation error:\n  {'type': 'missing', 'loc': 'body.lora_path', 'msg': 'Field required', 'input': '<dict of 1 items>'}"),
    ("/v1/load_lora_adapter", {"lora_name": MODEL, "lora_path": "nowhere"}, 400, "InvalidUserInput", None,
     f"The lora adapter '{MODEL}' conflicts with a served base model."),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/nowhere"}, 404, "NotFoundError", None,
     "Loading lora x failed: No adapter found for /nowhere"),
    ("/v1/unload_lora_adapter", {"lora_name": "x"}, 404, "NotFoundError", None, "The lora adapter 'x' cannot be found."),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD_REQUESTS)))
def test_what_it_refuses_and_how(peer: Peer, case: int) -> None:
    path, body, status, kind, param, message = BAD_REQUESTS[case]
    error = {"message": message, "type": kind, "param": param, "code": status}
    assert peer.post(path, body, status) == {"error": error}


@pytest.mark.parametrize("path", ["/sleep", "/pause"])
def test_a_mode_it_does_not_know(peer: Peer, path: str) -> None:
    error = peer.post(path, None, 400, mode="never")["error"]
    assert (error["type"], error["param"], error["code"]) == ("Bad Request", "query.mode", 400)
    assert "Input should be 'abort', 'wait' or 'keep'" in error["message"]


# What it says


def test_a_whole_reply_has_its_exact_tokens(peer: Peer) -> None:
    reply = peer.chat(logprobs=True, top_logprobs=3)
    (choice,) = reply["choices"]
    content = choice["logprobs"]["content"]
    assert reply["object"] == "chat.completion" and reply["model"] == MODEL and reply["id"].startswith("chatcmpl-")
    assert len(choice["token_ids"]) == len(content) == reply["usage"]["completion_tokens"] == 12
    assert len(reply["prompt_token_ids"]) == reply["usage"]["prompt_tokens"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    assert choice["message"]["role"] == "assistant" and choice["message"]["reasoning"] is None
    for entry in content:
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"], "greedy: the likeliest was taken"
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode(errors="replace") != ""
    named = peer.chat(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)["choices"][0]
    assert [entry["token"] for entry in named["logprobs"]["content"]] == [f"token_id:{i}" for i in named["token_ids"]]
    assert named["token_ids"] == choice["token_ids"]


def test_its_id_is_the_request_id(peer: Peer) -> None:
    answer = peer.http.post(CHAT, json=asking(max_tokens=1), headers={"x-request-id": "abc"})
    assert answer.json()["id"] == "chatcmpl-abc"


@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "seed": 5}, {"stop": ["e", " th"]}, {"max_tokens": 3}], ids=str)
def test_a_stream_says_what_the_whole_says(peer: Peer, how: dict[str, Any]) -> None:
    whole = peer.chat(**how)
    events = peer.stream(CHAT, asking(logprobs=True, top_logprobs=0, stream_options={"include_usage": True}, **how))
    first, *middle, usage = events
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert all("prompt_token_ids" not in event for event in middle)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    (choice,) = whole["choices"]
    assert ids_of(middle) == choice["token_ids"]
    assert text_of(middle) == choice["message"]["content"]
    assert finish_of(middle) == [choice["finish_reason"]]
    assert middle[-1]["choices"][0]["stop_reason"] == choice["stop_reason"]
    for event in middle:
        assert len(event["choices"][0]["logprobs"]["content"]) == len(event["choices"][0]["token_ids"])
    assert {event["id"] for event in events} == {first["id"]} and {event["object"] for event in events} == {"chat.completion.chunk"}


def test_a_stop_string_ends_the_text_and_not_the_tokens(peer: Peer) -> None:
    free = peer.chat(max_tokens=20)["choices"][0]
    stop = free["message"]["content"][4:7]
    cut = peer.chat(max_tokens=20, stop=[stop])["choices"][0]
    assert cut["message"]["content"] == free["message"]["content"].partition(stop)[0]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    assert cut["token_ids"] == free["token_ids"][: len(cut["token_ids"])]
    assert len(cut["token_ids"]) >= 2, "those of the stop string are there"
    seen = ""
    for event in peer.stream(CHAT, asking(max_tokens=20, stop=[stop]))[1:]:
        seen += event["choices"][0]["delta"].get("content") or ""
        assert stop not in seen and not seen.endswith(stop[:-1]), "what may become a stop string is held back"


def test_the_token_that_ends_a_reply_counts_and_has_no_text(peer: Peer) -> None:
    reply = peer.chat("Hi", max_tokens=400, logprobs=True)["choices"][0]
    assert (reply["finish_reason"], reply["stop_reason"]) == ("stop", None)
    assert reply["token_ids"][-1] == 2 and "<|im_end|>" not in reply["message"]["content"]
    assert reply["logprobs"]["content"][-1]["token"] == "<|im_end|>"
    on = peer.chat("Hi", max_tokens=len(reply["token_ids"]) + 5, ignore_eos=True)["choices"][0]
    assert on["finish_reason"] == "length" and len(on["token_ids"]) == len(reply["token_ids"]) + 5


def test_two_choices_come_interleaved(peer: Peer) -> None:
    body = asking(n=2, temperature=1.0, seed=4, max_tokens=20, ignore_eos=True, stream_options={"include_usage": True})
    events = peer.stream(CHAT, body)
    order = [event["choices"][0]["index"] for event in events[:-1]]
    assert order[:2] == [0, 1] and 1 in order[2 : len(order) // 2 + 2], "neither waits for the other to end"
    assert events[0]["prompt_token_ids"] == events[1]["prompt_token_ids"] != []
    whole = peer.post(CHAT, body | {"stream_options": None})
    for index in (0, 1):
        assert ids_of(events, index) == whole["choices"][index]["token_ids"]
        assert len(ids_of(events, index)) == 20
    assert ids_of(events, 0) != ids_of(events, 1)
    assert events[-1]["usage"]["completion_tokens"] == 40


def test_a_completion_of_token_ids(peer: Peer) -> None:
    prompt = peer.chat(max_tokens=1)["prompt_token_ids"]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 5, "temperature": 0.0, "return_token_ids": True, "logprobs": 2}
    whole = peer.post(TEXT, body)["choices"][0]
    assert whole["prompt_token_ids"] == prompt
    assert len(whole["token_ids"]) == len(whole["logprobs"]["tokens"]) == len(whole["logprobs"]["token_logprobs"]) == 5
    assert all(1 <= len(top) <= 3 for top in whole["logprobs"]["top_logprobs"])
    assert whole["token_ids"] == peer.chat(max_tokens=5)["choices"][0]["token_ids"]
    first, *later = peer.stream(TEXT, body)
    assert first["choices"][0]["prompt_token_ids"] == prompt
    assert all(event["choices"][0]["prompt_token_ids"] is None for event in later)
    assert ids_of([first, *later]) == whole["token_ids"]
    assert "".join(event["choices"][0]["text"] for event in (first, *later)) == whole["text"]
    assert later[-1]["choices"][0]["finish_reason"] == "length"


def test_events_of_many_tokens(peer: Peer) -> None:
    whole = peer.chat(max_tokens=12)["choices"][0]
    events = peer.stream(CHAT, asking(max_tokens=12, stream_interval=8))[1:]
    assert len(events) < 8 and len(events[0]["choices"][0]["token_ids"]) == 1
    assert ids_of(events) == whole["token_ids"] and text_of(events) == whole["message"]["content"]


def test_a_given_text_is_scored_as_it_was_sampled(peer: Peer) -> None:
    reply = peer.chat(logprobs=True)
    sampled = reply["choices"][0]["token_ids"]
    ids = [*reply["prompt_token_ids"], *sampled]
    body = {"model": MODEL, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    entries = peer.post(TEXT, body)["choices"][0]["prompt_logprobs"]
    assert len(entries) == len(ids) and entries[0] is None
    assert [list(entry) for entry in entries[1:]] == [[str(i)] for i in ids[1:]]
    assert set(entries[-1][str(ids[-1])]) == {"logprob", "rank", "decoded_token"}
    scored = [entry[str(i)]["logprob"] for entry, i in zip(entries[-len(sampled) :], sampled, strict=True)]
    assert scored == pytest.approx([entry["logprob"] for entry in reply["choices"][0]["logprobs"]["content"]], abs=0.1)


@pytest.mark.parametrize(("choice", "finish"), [(NAMED, "stop"), ("required", "tool_calls")], ids=["named", "required"])
def test_a_tool_is_called(peer: Peer, choice: Any, finish: str) -> None:
    body = asking("What is the weather in Paris?", tools=[TOOL], tool_choice=choice, max_tokens=100, logprobs=True)
    (whole,) = peer.post(CHAT, body)["choices"]
    (call,) = whole["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("chatcmpl-tool-")
    assert call["function"]["name"] == "get_weather"
    assert len(json.loads(call["function"]["arguments"])) == 1
    assert whole["finish_reason"] == finish and whole["message"]["content"] == ""
    events = peer.stream(CHAT, body)
    pieces = [piece for event in events for piece in event["choices"][0]["delta"].get("tool_calls", ())]
    assert set(pieces[0]) == {"id", "type", "index", "function"} and pieces[0]["function"] == {"name": "get_weather"}
    assert all(set(piece) == {"index", "function"} for piece in pieces[1:])
    assert json.loads("".join(piece["function"]["arguments"] for piece in pieces[1:])) == json.loads(call["function"]["arguments"])
    assert ids_of(events) == whole["token_ids"] and finish_of(events) == [finish]
    assert all(event["choices"][0]["delta"] != {} or event["choices"][0]["token_ids"] for event in events), "no event says nothing"


# Adapters


def test_adapters_come_and_go(peer: Peer, tmp_path: Path) -> None:
    one, two = peer.adapter(tmp_path / "one", 1, 4), peer.adapter(tmp_path / "two", 2, 4)
    load = {"lora_name": "one", "lora_path": str(one)}
    assert peer.post("/v1/load_lora_adapter", load) == "Success: LoRA adapter 'one' added successfully."
    assert "has already been loaded" in peer.post("/v1/load_lora_adapter", load, 400)["error"]["message"]
    peer.post("/v1/load_lora_adapter", {"lora_name": "two", "lora_path": str(two)})
    cards = {card["id"]: card for card in peer.get("/v1/models")["data"]}
    assert (cards["one"]["root"], cards["one"]["parent"], cards["one"]["max_model_len"]) == (str(one), MODEL, None)
    said = [peer.chat(model=name) for name in (MODEL, "one", "two")]
    assert [reply["model"] for reply in said] == [MODEL, "one", "two"]
    assert len({tuple(reply["choices"][0]["token_ids"]) for reply in said}) == 3, "each speaks for itself"
    for name in ("one", "two"):
        unloaded = peer.post("/v1/unload_lora_adapter", {"lora_name": name})
        assert unloaded == f"Success: LoRA adapter '{name}' removed successfully."
    peer.post(CHAT, asking(model="one"), 404)


def test_an_adapter_that_it_cannot_load(peer: Peer, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        error = peer.post("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": str(folder)}, 500)["error"]
        assert (error["type"], error["code"]) == ("InternalServerError", 500)
        return str(error["message"])

    large = peer.adapter(tmp_path / "large", 1, 64)
    assert "LoRA rank 64 is greater than max_lora_rank 32." in refused(large)
    dora = peer.adapter(tmp_path / "dora", 1, 4)
    config = dora / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    assert "vLLM does not yet support DoRA." in refused(dora)
    broken = peer.adapter(tmp_path / "broken", 1, 4)
    (broken / "adapter_config.json").write_text("{")
    assert "line 1 column 2" in refused(broken)
    peer.post(CHAT, asking(model="bad"), 404)


def test_weights_changed_in_place_are_answered_from_a_stale_prefix_cache(peer: Peer, tmp_path: Path) -> None:
    """Why no version is ever loaded in place."""
    folder, other = peer.adapter(tmp_path / "a", 1, 4), peer.adapter(tmp_path / "b", 2, 4)
    long = "A rather long question, so that whole blocks of it are kept in the prefix cache. " * 12

    def logprobs(name: str) -> list[float]:
        content = peer.chat(long, model=name, logprobs=True, max_tokens=1)["choices"][0]["logprobs"]["content"]
        return [entry["logprob"] for entry in content]

    peer.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": str(folder)})
    logprobs("a")
    for file in other.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    peer.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": str(folder), "load_inplace": True})
    peer.post("/v1/load_lora_adapter", {"lora_name": "b", "lora_path": str(other)})
    stale, fresh = logprobs("a"), logprobs("b")
    assert stale != pytest.approx(fresh, abs=1e-3)
    assert peer.post("/reset_prefix_cache") == {"success": True}
    assert logprobs("a") == pytest.approx(fresh, abs=1e-3)
    for name in ("a", "b"):
        peer.post("/v1/unload_lora_adapter", {"lora_name": name})


# Shapes


def shape(value: Any) -> Any:
    """The keys and types of an answer, without what differs from one to the next."""
    if isinstance(value, dict):
        return {
            key: {} if key == "top_logprobs" and isinstance(item, list) else shape(item) for key, item in value.items() if not key.isdigit()
        }
    if isinstance(value, list):
        return [shape(value[-1])] if value else []
    return type(value).__name__


def holds(whole: Any, part: Any, where: str = "") -> None:
    """Every key of `part` is in `whole`, with a value of the same type."""
    if isinstance(part, dict):
        assert part.keys() <= whole.keys(), f"{where}: {sorted(part.keys() - whole.keys())}"
        for key, value in part.items():
            holds(whole[key], value, f"{where}.{key}")
    elif isinstance(part, list):
        if part and whole:
            holds(whole[0], part[0], where)
    else:
        assert part == whole, where


@pytest.mark.vllm
def test_no_answer_of_the_double_has_what_the_real_one_has_not(double: Peer, real: Peer) -> None:
    full = asking(logprobs=True, top_logprobs=2)
    text = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 2, "logprobs": 1, "prompt_logprobs": 1, "return_token_ids": True}
    for path, body in ((CHAT, full), (CHAT, asking(tools=[TOOL], tool_choice=NAMED, max_tokens=100)), (TEXT, text)):
        holds(shape(real.post(path, body)), shape(double.post(path, body)), path)
    for path, body in ((CHAT, full), (TEXT, text | {"prompt_logprobs": None})):
        for place in (0, 1, -1):
            theirs, ours = (peer.stream(path, body)[place] for peer in (real, double))
            holds(shape(theirs), shape(ours), f"{path}, event {place}")
    for path in ("/v1/models", "/version", "/is_paused", "/is_sleeping", "/server_info?config_format=json"):
        holds(shape(real.get(path)), shape(double.get(path)), path)
