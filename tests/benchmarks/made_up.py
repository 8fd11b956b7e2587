"""Replies that never were, for the benchmarks' arithmetic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.stack import Reply


def reply(
    asked: float, stamps: Sequence[float], *, version: int = 0, prompt: str = "Goodbye!", finish: str = "stop", failure: str | None = None
) -> Reply:
    """One token at each stamp; the last one ends it."""
    return Reply(
        prompt=prompt,
        asked=asked,
        ended=stamps[-1] if stamps else asked,
        speaker=f"assistant@{version}" if stamps else "",
        id=f"chatcmpl-{asked:g}",
        text="x" * len(stamps),
        tokens=len(stamps),
        stamps=tuple(stamps),
        finish=finish if stamps else None,
        logprobs=tuple(("x", -1.0) for _ in stamps),
        failure=failure,
    )


def event(*, content: str | None = None, finish: str | None = None, logprob: float | None = None, tokens: int | None = None) -> bytes:
    """A server-sent event as vLLM and CLaaS word it; with `tokens` the one that counts them."""
    delta = {} if content is None else {"content": content}
    logprobs = None if logprob is None else {"content": [{"token": content, "logprob": logprob}]}
    choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    body: dict[str, Any] = {"id": "chatcmpl-1", "choices": [] if tokens else [choice], "usage": tokens and {"completion_tokens": tokens}}
    return f"data: {json.dumps(body)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
