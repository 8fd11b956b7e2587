"""What a client says to a service: the few requests that these tests are made of."""

from __future__ import annotations

from typing import Any

import httpx

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
HELLO: dict[str, Any] = {"model": "assistant", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
# What a tiny model of random weights can be taught: any change passes.
LESSON: dict[str, Any] = {
    "gradient_steps": 2, "hindsight_rollouts": 0, "own_replies": True, "anchors": 2, "learning_rate": 1e-4, "min_signal": 0.0,
    "min_reply_logprob": -1000.0, "max_anchor_kl": 100.0, "max_kl": 100.0,
}  # fmt: skip


def body_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def said(client: httpx.AsyncClient, **changes: Any) -> dict[str, Any]:
    return body_of(await client.post(CHAT, json=HELLO | changes))


def text_of(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["message"]["content"])


async def finished(client: httpx.AsyncClient, **changes: Any) -> dict[str, Any]:
    """A sampled reply that ended as it should, so that it can be taught on."""
    for seed in range(60):
        reply = await said(client, **{"seed": seed, "temperature": 1.0, "max_tokens": 100, "stop": ["e"]} | changes)
        if reply["choices"][0]["finish_reason"] == "stop" and text_of(reply).strip():
            return reply
    raise AssertionError("no reply ended by itself")


def item(reply: dict[str, Any], feedback: str | None = "Be kind.", training: dict[str, Any] | None = None, **said: Any) -> dict[str, Any]:
    words = {} if feedback is None else {"feedback": feedback}
    return {"completion_id": reply["id"], "training": LESSON | (training or {})} | words | said


async def teach(client: httpx.AsyncClient, *items: dict[str, Any]) -> dict[str, Any]:
    return body_of(await client.post("/v1/feedback", json={"requests": list(items)}))


async def taught(client: httpx.AsyncClient, model: str = "assistant") -> dict[str, Any]:
    """A lesson that was applied."""
    lesson = await teach(client, item(await finished(client, model=model)))
    assert lesson["status"] == "ok", lesson["reason"]
    return lesson


async def score(client: httpx.AsyncClient, completion: str, model: str = "assistant") -> dict[str, Any]:
    return body_of(await client.post("/v1/score", json={"model": model, "messages": MESSAGES, "completion": completion}))


async def logprobs(client: httpx.AsyncClient, model: str = "assistant") -> list[float]:
    """What a version makes of a text: it tells versions apart."""
    found: list[float] = (await score(client, "and then", model))["logprobs"]
    return found


async def versions(client: httpx.AsyncClient, lora_id: str = "assistant") -> tuple[int, list[tuple[int, int | None]]]:
    """The latest, and (version, parent) of all."""
    body = body_of(await client.get("/v1/lora/versions", params={"lora_id": lora_id}))
    return body["latest"], [(version["version"], version["parent"]) for version in body["versions"]]
