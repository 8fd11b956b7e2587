"""A lesson with a real vLLM in front: the reply changes without any restart, and no key or value of the version before is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.process import Service
from tests.vllm.asking import finished_reply, loaded_versions
from tests.vllm.peer import CHAT
from tests.vllm.process import RealVllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

FEEDBACK = "Your name is Kuro, always introduce yourself as Kuro."
PROMPTS = ("Who are you?", "What is your name?", "Hi! Please introduce yourself.", "Hello, who am I talking to?")
PROBES = ("What should I call you?", "Tell me your name, please.", "Introduce yourself in one sentence.")
LESSON = {"hindsight_rollouts": 4, "imagined_prompts": 0, "anchors": 8}
"""Lighter than the default: four prompts of one's own teach a name without imagined ones."""
MAX_LESSONS = 3
LONG = "Here is some text that fills whole blocks of the cache before the question comes. " * 12 + "Who are you?"


def greedy(service: Service, text: str, model: str = "assistant") -> str:
    return str(service.chat(text, model, max_tokens=40, temperature=0)["choices"][0]["message"]["content"])


def logprobs(reply: dict[str, Any]) -> list[float]:
    return [entry["logprob"] for entry in reply["choices"][0]["logprobs"]["content"]]


def test_a_lesson_by_completion_id_changes_the_reply_without_a_restart(
    service: Service, vllm: RealVllm, direct: httpx.Client, data_dir: Path
) -> None:
    started = direct.get("/metrics").text.partition("\nprocess_start_time_seconds ")[2].partition("\n")[0]
    before = [greedy(service, probe) for probe in PROBES]
    assert not any("Kuro" in reply for reply in before)
    how: dict[str, Any] = {"logprobs": True, "max_tokens": 8, "temperature": 0}
    warm = [logprobs(service.chat(LONG, **how)) for _ in range(2)]
    assert warm[0] == pytest.approx(warm[1], abs=0.02), "its prefix is kept now"

    ids = [finished_reply(service, prompt) for prompt in PROMPTS]
    version, after = 0, before
    while sum("Kuro" in reply for reply in after) < 2:
        assert version < MAX_LESSONS, after
        body = {"requests": [{"completion_id": reply_id, "feedback": FEEDBACK, "training": LESSON} for reply_id in ids], "show": True}
        lesson = service.http.post("/v1/feedback", json=body).json()
        assert lesson["status"] == "ok", lesson
        assert {shown["prompt"] for shown in lesson["shown"]} == set(PROMPTS)
        version = lesson["version"]
        after = [greedy(service, probe) for probe in PROBES]
    assert "Paris" in greedy(service, "What is the capital of France?")
    assert [greedy(service, probe, "assistant@0") for probe in PROBES] == before, "a pinned version says what it always said"
    assert service.process.poll() is None
    assert f"\nprocess_start_time_seconds {started}\n" in direct.get("/metrics").text, "the same vLLM as before"

    # The same long prompt, whose prefix was kept under the version before: as a fresh load of the same files answers it.
    spoke = logprobs(service.chat(LONG, **how))
    copy = shutil.copytree(data_dir / "adapters" / "assistant" / f"v{version}", data_dir / "copy")
    direct.post("/v1/load_lora_adapter", json={"lora_name": "fresh", "lora_path": str(copy)}).raise_for_status()
    try:
        body = {"model": "fresh", "messages": [{"role": "user", "content": LONG}], **how}
        fresh = logprobs(direct.post(CHAT, json=body).json())
    finally:
        direct.post("/v1/unload_lora_adapter", json={"lora_name": "fresh"})
    assert spoke == pytest.approx(fresh, abs=1e-3)
    assert spoke != pytest.approx(warm[1], abs=0.05), "and not as the version before"


def test_every_version_has_a_name_and_a_folder_of_its_own(service: Service, direct: httpx.Client) -> None:
    loaded = loaded_versions(direct)
    assert len(set(loaded.values())) == len(loaded) >= 2
    latest = service.get("/v1/lora/versions", lora_id="assistant")["latest"]
    assert any(folder.endswith(f"v{latest}") for folder in loaded.values())


def test_a_rollback_is_served_at_once_and_the_next_lesson_builds_on_it(service: Service) -> None:
    latest = service.get("/v1/lora/versions", lora_id="assistant")["latest"]
    learnt = greedy(service, PROBES[0])
    service.http.post("/v1/lora/rollback", json={"lora_id": "assistant", "version": 0}).raise_for_status()
    assert greedy(service, PROBES[0]) != learnt
    service.http.post("/v1/lora/rollback", json={"lora_id": "assistant", "version": latest}).raise_for_status()
    assert greedy(service, PROBES[0]) == learnt
