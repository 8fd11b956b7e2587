"""What the embedded model cannot honour is refused by name; what asks for nothing passes. The model is real, if tiny."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from claas.inference.embedded import EmbeddedInference
from claas.models.base_model import LoadedModel
from claas.models.compute import ComputeShare
from tests.api.conftest import in_process
from tests.api.wire import CHAT, assert_error
from tests.doubles.services import BASE_MODEL, World

BRIEF: dict[str, Any] = {"model": BASE_MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.fixture
async def embedded(world: World, tiny_model: LoadedModel) -> AsyncIterator[httpx.AsyncClient]:
    backend = EmbeddedInference(tiny_model, ComputeShare(1), max_batch=2, max_context=512)
    try:
        async with in_process(replace(world, services=replace(world.services, inference=backend))) as client:
            yield client
    finally:
        await backend.aclose()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("tools", {"tools": TOOLS}),
        ("tools", {"tools": TOOLS, "tool_choice": "required"}),
        ("response_format", {"response_format": {"type": "json_object"}}),
    ],
)
async def test_what_it_cannot_honour_is_refused_by_name(
    embedded: httpx.AsyncClient, stream: bool, field: str, changes: dict[str, Any]
) -> None:
    response = await embedded.post(CHAT, json=BRIEF | {"stream": stream} | changes)
    assert_error(response, 400, param=field, says=f"{field} is not supported by the embedded model")


async def test_what_asks_for_nothing_passes(embedded: httpx.AsyncClient) -> None:
    nothing = {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"}}
    response = await embedded.post(CHAT, json=BRIEF | nothing)
    assert response.status_code == 200, response.text
    assert set(response.json()["choices"][0]["message"]) == {"role", "content", "refusal"}
