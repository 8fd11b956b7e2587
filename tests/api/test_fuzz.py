"""No body, however odd, gets anything but an answer in shape: a success, or an error that is the caller's."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.conftest import in_process
from tests.api.wire import CHAT, HELLO
from tests.doubles.services import ADAPTER, open_world

BODIES: dict[str, dict[str, Any]] = {
    CHAT: HELLO,
    "/v1/completions": {"model": ADAPTER, "prompt": "Once"},
    "/v1/score": HELLO | {"completion": "Hi"},
    "/v1/feedback": {"requests": [{"completion_id": "chatcmpl-x", "feedback": "x", "training": {"alpha": 0.5}}]},
    "/v1/lora/init": {"lora_id": "me/new"},
    "/v1/lora/rollback": {"lora_id": ADAPTER, "version": 0},
}
FIELDS = sorted(
    {
        "stream",
        "n",
        "stop",
        "seed",
        "max_tokens",
        "temperature",
        "top_p",
        "logprobs",
        "top_logprobs",
        "tools",
        "tool_choice",
        "metadata",
        "user",
        "wait",
        "show",
        "rating",
        "demonstration",
    }
    | {"stream_options", "chat_template_kwargs", "orchestration", "lora_r", "target_modules", "base_model", "response_format", "logit_bias"}
    | {name for body in BODIES.values() for name in body}
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["text", "user", "tool", "function", "auto", "json_schema", ADAPTER])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *FIELDS,
                    "role",
                    "content",
                    "type",
                    "function",
                    "name",
                    "parameters",
                    "tool_calls",
                    "tool_call_id",
                    "json_schema",
                    "schema",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
)
changes = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), values, max_size=3)


@pytest.mark.parametrize("path", BODIES)
@given(changes=changes)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_odd_bodies(tmp_path: Path, path: str, changes: dict[str, Any]) -> None:
    async def send() -> None:
        async with open_world(tmp_path) as world, in_process(world) as client:
            content = json.dumps(BODIES[path] | changes)
            response = await client.post(path, content=content, headers={"content-type": "application/json"})
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                error = response.json()["error"]
                assert error["message"]
                assert set(error) == {"message", "type", "param", "code"}
            assert not world.inference.running

    asyncio.run(send())
