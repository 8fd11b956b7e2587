"""What many API tests send and check."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from tests.doubles.services import ADAPTER

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": ADAPTER, "messages": [{"role": "user", "content": "Hello"}]}


def assert_error(response: httpx.Response, status: int, *, param: str | None = None, says: str = "") -> dict[str, Any]:
    """The response is an error in OpenAI's shape, about `param`, whose message holds `says`. Returns the error."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert error["param"] == param, error
    assert says in error["message"], error
    assert "Traceback" not in response.text
    return error


async def chat(client: httpx.AsyncClient, **changes: Any) -> dict[str, Any]:
    """A whole answer to HELLO with `changes`."""
    response = await client.post(CHAT, json=HELLO | changes)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any] | str]:
    """The events of a stream, as they arrive; "[DONE]" as text."""
    async for line in response.aiter_lines():
        if line:
            assert line.startswith("data: "), line
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)
