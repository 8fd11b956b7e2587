"""A lesson through the whole API in modal mode: a container trains it, and the embedded default model says something else afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from claas.core.settings import Settings
from tests.conformance.backends import asked
from tests.conformance.talk import CHAT, body_of, text_of
from tests.modal_server.processes import containers_possible
from tests.on_modal.stage import modal_settings, on_stage

FEEDBACK = "Your name is Kuro, always introduce yourself as Kuro."
PROMPTS = ("Who are you?", "What is your name?", "Hi! Please introduce yourself.", "Hello, who am I talking to?")
PROBES = ("What should I call you?", "Tell me your name, please.", "Introduce yourself in one sentence.")
MAX_LESSONS = 3


@pytest.fixture(name="chosen")
def _chosen(model_dir: Path, tmp_path: Path) -> Iterator[Settings]:
    with on_stage(tmp_path / "modal", model_dir):
        yield modal_settings(tmp_path / "data", model_dir)


@pytest.mark.model
@pytest.mark.integration
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not containers_possible(), reason="this machine lets nobody make namespaces")
async def test_a_lesson_changes_the_embedded_models_reply(chosen: Settings) -> None:
    async with asked(chosen) as client:
        before = [await greedy(client, probe) for probe in PROBES]
        assert not any("Kuro" in reply for reply in before)
        entries = [{"completion_id": (await finished(client, prompt))["id"], "feedback": FEEDBACK} for prompt in PROMPTS]
        version, after = 0, before
        while not any("Kuro" in reply for reply in after):
            assert version < MAX_LESSONS, after
            lesson = body_of(await client.post("/v1/feedback", json={"requests": entries}, timeout=600))
            version, report = lesson["version"], lesson["distill_result"]["metadata"]
            assert (lesson["status"], report["outcome"]) == ("ok", "applied")
            assert report["usage"]["gpu_seconds"]["L40S"] > 0 and report["usage"]["price"] > 0
            after = [await greedy(client, probe) for probe in PROBES]
        assert [await greedy(client, probe, "assistant@0") for probe in PROBES] == before


async def greedy(client: httpx.AsyncClient, text: str, model: str = "assistant") -> str:
    ask = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 40}
    return text_of(body_of(await client.post(CHAT, json=ask)))


async def finished(client: httpx.AsyncClient, prompt: str) -> dict[str, Any]:
    """A sampled reply that ended by itself."""
    for seed in range(8):
        ask = {"model": "assistant", "messages": [{"role": "user", "content": prompt}], "seed": seed, "max_tokens": 120, "temperature": 0.7}
        reply = body_of(await client.post(CHAT, json=ask))
        if reply["choices"][0]["finish_reason"] == "stop":
            return reply
    raise AssertionError(f"no reply to {prompt!r} ended by itself")
