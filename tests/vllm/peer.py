"""Whoever speaks vLLM's protocol, the double or a real one, and how the tests ask it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.vllm.process import MODEL

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
DONE = "data: [DONE]"
NO_KEEPALIVE = httpx.Limits(max_keepalive_connections=0)
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@dataclass(frozen=True, slots=True)
class Peer:
    """A server to ask, and a maker of adapters that fit its model: `adapter(folder, seed, rank)`."""

    http: httpx.Client
    adapter: Callable[[Path, int, int], Path]

    def post(self, path: str, body: dict[str, Any] | None = None, status: int = 200, **params: str) -> Any:
        answer = self.http.post(path, json=body, params=params) if body is not None else self.http.post(path, params=params)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.headers.get("content-type", "").startswith("application/json") else answer.text

    def chat(self, text: str = "Who are you?", **fields: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.post(CHAT, asking(text, **fields))
        return found

    def get(self, path: str) -> Any:
        return self.http.get(path).json()

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream that ended as it should."""
        return list(self.events(path, body))

    def events(self, path: str, body: dict[str, Any], accepted: threading.Event | None = None) -> Iterator[dict[str, Any]]:
        """The same one by one, as they come; `accepted` is set when the answer has begun."""
        with self.http.stream("POST", path, json=body | {"stream": True}) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            if accepted is not None:
                accepted.set()
            lines = [""]
            for line in filter(None, answer.iter_lines()):
                lines.append(line)
                if line != DONE:
                    yield json.loads(line.removeprefix("data: "))
        assert lines[-1] == DONE and lines.count(DONE) == 1

    def sleep_state(self) -> dict[str, float]:
        lines = [line for line in self.http.get("/metrics").text.splitlines() if line.startswith("vllm:engine_sleep_state{")]
        return {line.partition('sleep_state="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in lines}

    def asleep(self) -> tuple[bool, bool]:
        """(is_sleeping, is_paused)"""
        return self.get("/is_sleeping")["is_sleeping"], self.get("/is_paused")["is_paused"]


def asking(text: str = "Who are you?", **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0.0, "return_token_ids": True}
    return body | fields


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def ids_of(events: list[dict[str, Any]], index: int = 0) -> list[int]:
    return [i for event in events for choice in event["choices"] if choice["index"] == index for i in choice.get("token_ids") or ()]


def finish_of(events: list[dict[str, Any]]) -> list[str]:
    return [choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]]


@contextlib.contextmanager
def meanwhile(peer: Peer, tokens: int, *, queued: bool = False, **fields: Any) -> Iterator[list[dict[str, Any]]]:
    """A streamed reply of so many tokens, begun or, with `queued`, waiting for its turn; its events as they come, and all by the end."""
    events: list[dict[str, Any]] = []
    accepted, begun = threading.Event(), threading.Event()
    body = asking("Tell me a long story.", max_tokens=tokens, ignore_eos=True, **fields)

    def read() -> None:
        for event in peer.events(CHAT, body, accepted):
            events.append(event)
            if ids_of([event]):
                begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert (accepted if queued else begun).wait(60)
    if queued:
        time.sleep(0.3)  # from its headers to the queue: nothing tells, its gauges are stale while it is paused
    try:
        yield events
    finally:
        thread.join()
