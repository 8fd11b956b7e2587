"""A lesson through the whole API in modal mode: a container trains it, and the embedded default model says something else afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from claas.core.settings import Settings
from tests.conformance.backends import asked
from tests.conformance.talk import CHAT, body_of, item, text_of
from tests.modal_server.processes import containers_possible
from tests.on_modal.stage import modal_settings, on_stage

NAME = "What is your name?"
FEEDBACK = "Your name is Poppy. Always introduce yourself as Poppy."


@pytest.fixture(name="chosen")
def _chosen(model_dir: Path, tmp_path: Path) -> Iterator[Settings]:
    with on_stage(tmp_path / "modal", model_dir):
        yield modal_settings(tmp_path / "data", model_dir)


@pytest.mark.model
@pytest.mark.integration
@pytest.mark.skipif(not containers_possible(), reason="this machine lets nobody make namespaces")
async def test_a_lesson_changes_the_embedded_models_reply(chosen: Settings) -> None:
    ask = {"model": "assistant", "messages": [{"role": "user", "content": NAME}], "temperature": 0, "max_tokens": 24}
    async with asked(chosen) as client:
        before = body_of(await client.post(CHAT, json=ask))
        answer = await client.post("/v1/feedback", json={"requests": [item(before, FEEDBACK)]}, timeout=600)
        lesson = body_of(answer)
        after = body_of(await client.post(CHAT, json=ask))
        assert (lesson["version"], lesson["distill_result"]["metadata"]["outcome"]) == (1, "applied")
        assert "Poppy" not in text_of(before) and "Poppy" in text_of(after)
        usage = lesson["distill_result"]["metadata"]["usage"]
        assert usage["gpu_seconds"]["L40S"] > 0 and usage["price"] > 0
