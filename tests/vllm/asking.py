"""How the tests against a real vLLM look at both sides: what the service stored, and what vLLM itself says to the same request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from claas.storage.models import FeedbackRow, RolloutRow
from tests.integration.process import Service
from tests.vllm.process import MODEL

NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""So that the model's generation config decides nothing."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A rollout as it stands in the database."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    version: int | None


def kept(data: Path, reply_id: str) -> Kept:
    engine = create_engine(f"sqlite:///{data / 'claas.db'}")
    try:
        with Session(engine) as session:
            row = session.scalars(select(RolloutRow).where(RolloutRow.id == reply_id)).one()
            ids, logprobs = list(row.response_token_ids), list(row.response_logprobs)
            return Kept(list(row.prompt_token_ids), ids, logprobs, row.finish_reason, row.text, row.version)
    finally:
        engine.dispose()


def lessons(data: Path) -> list[str]:
    """The state of every lesson that was ever sent, in their order."""
    engine = create_engine(f"sqlite:///{data / 'claas.db'}")
    try:
        with Session(engine) as session:
            return [row.state for row in session.scalars(select(FeedbackRow).order_by(FeedbackRow.number))]
    finally:
        engine.dispose()


@dataclass(slots=True)
class Streamed:
    """A stream that ended as it should, put together."""

    id: str = ""
    speaker: str = ""
    text: str = ""
    finish_reason: str = ""
    pieces: int = 0


def streamed(service: Service, path: str, body: dict[str, Any]) -> Streamed:
    """One streamed reply, of either kind."""
    found = Streamed()
    with httpx.stream("POST", f"{service.url}{path}", json=body | {"stream": True}, timeout=300.0) as answer:
        assert answer.status_code == 200, answer.read()
        found.speaker = answer.headers["x-claas-adapter"]
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]", lines[-1]
    for line in lines[:-1]:
        event = json.loads(line)
        assert "error" not in event, event
        found.id = event["id"]
        for choice in event["choices"]:
            found.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            found.finish_reason = choice["finish_reason"] or found.finish_reason
            found.pieces += 1
    return found


def direct_choice(direct: httpx.Client, path: str, body: dict[str, Any], model: str = MODEL) -> dict[str, Any]:
    """vLLM's own only choice, with its token ids."""
    answer = direct.post(path, json=body | NEUTRAL | {"model": model, "return_token_ids": True})
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    choice: dict[str, Any] = whole["choices"][0]
    return choice | {"prompt": whole.get("prompt_token_ids") or choice.get("prompt_token_ids")}


def loaded_versions(direct: httpx.Client) -> dict[str, str]:
    """Names of adapters that vLLM knows, with their folders."""
    return {card["id"]: card["root"] for card in direct.get("/v1/models").json()["data"] if card["parent"]}


def finished_reply(service: Service, prompt: str, model: str = "assistant", **fields: Any) -> str:
    """The id of a reply that ended by itself: one can learn from it."""
    for seed in range(10):
        reply = service.chat(prompt, model, **({"seed": seed, "max_tokens": 120, "temperature": 0.7} | fields))
        if reply["choices"][0]["finish_reason"] == "stop":
            return str(reply["id"])
    raise AssertionError(f"no reply to {prompt!r} ended by itself")
