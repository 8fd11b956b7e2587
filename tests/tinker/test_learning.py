"""The product's main job on a real server of the Tinker API: a person chats, says what was wrong, and the adapter there has learned it."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from claas.models.base_model import LoadedModel
from tests.inference.test_vllm_service import lessons as kept
from tests.integration.process import Service, running
from tests.integration.test_lesson import FEEDBACK, PROMPTS, greedy, peft_logprob
from tests.tinker.process import MAX_MODELS, MAX_RANK, MODEL, RealTinker

PROBES = (
    "What should I call you?",
    "Tell me your name, please.",
    "Good morning! And you are?",
    "Introduce yourself in one sentence.",
    "Do you have a name?",
)
UNRELATED = "What is the capital of France?"
MAX_LESSONS = 3
LESSON = {"imagined_prompts": 0, "anchors": 8, "replay": 16, "replay_steps": 0}
"""Lighter than the default: the server samples a few tokens a second here."""

pytestmark = [pytest.mark.tinker, pytest.mark.timeout(3000)]


def serving(server: RealTinker, data: Path, model_dir: Path) -> AbstractContextManager[Service]:
    """A service in tinker mode, which is left as many models as the server has room for, less one for a lesson beside them."""
    settings = {
        "CLAAS_DISTILL_EXECUTION_MODE": "tinker",
        "CLAAS_TINKER_BASE_URL": server.url,
        "CLAAS_TINKER_TOKENIZER": str(model_dir),
        "CLAAS_TINKER_LORA_RANK": str(MAX_RANK),
        "CLAAS_TINKER_MAX_RUNS": str(MAX_MODELS - 1),
        "CLAAS_TINKER_PRICES": '{"sampled": 2.0, "scored": 1.0, "trained": 3.0}',
    }
    return running(data, base_model=Path(MODEL), **settings)


def taught(service: Service, completion_ids: list[str]) -> dict[str, Any]:
    """One lesson on these replies; it must have been applied."""
    how = {"feedback": FEEDBACK, "training": LESSON}
    body = {"requests": [{"completion_id": reply_id} | how for reply_id in completion_ids]}
    answer = service.http.post("/v1/feedback", json=body, timeout=1200.0)
    assert answer.status_code == 200, answer.text
    lesson: dict[str, Any] = answer.json()
    assert lesson["status"] == "ok", lesson["reason"]
    return lesson


def finished_reply(service: Service, prompt: str) -> str:
    """The id of a sampled reply that ended by itself."""
    for seed in range(8):
        reply = service.chat(prompt, seed=seed, max_tokens=96, temperature=0.7)
        if reply["choices"][0]["finish_reason"] == "stop":
            return str(reply["id"])
    raise AssertionError(f"no reply to {prompt!r} ended by itself")


def at_once(ask: Callable[[str], str], prompts: Sequence[str]) -> list[str]:
    """Asked together, so that the server can answer them in one round."""
    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(ask, prompts))


def probed(service: Service, model: str = "assistant") -> list[str]:
    return at_once(lambda probe: greedy(service, probe, model), PROBES)


def scored(service: Service, model: str, completion: str) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": PROBES[0]}], "completion": completion}
    answer = service.http.post("/v1/score", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def broken_in_mid_step(service: Service, server: RealTinker, data: Path, completion_ids: list[str]) -> None:
    """The server is killed between two optimizer steps, and started again: the lesson is said to have failed, and is kept."""
    training = {"hindsight_rollouts": 0, "own_replies": True, "gradient_steps": 50, "min_signal": 0.0}
    body = {"requests": [{"completion_id": completion_ids[0], "feedback": "Be brief.", "training": training}]}
    before = server.done("forward_backward")
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(service.http.post, "/v1/feedback", json=body, timeout=1200.0)
        while server.done("forward_backward") < before + 2:
            assert not asked.done(), asked.result().text
            time.sleep(0.5)
        server.kill()
        answer = asked.result()
    server.start()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "backend_unavailable"), answer.text
    assert kept(data)[-1] == ("Be brief.", "failed")


def test_a_correction_is_learnt_kept_undone_exported_and_deleted(
    tinker_server: RealTinker, tmp_path: Path, model_dir: Path, loaded_model: LoadedModel
) -> None:
    data = tmp_path / "data"
    with serving(tinker_server, data, model_dir) as service:
        service.http.post("/v1/lora/init", json={"lora_id": "you/other"}).raise_for_status()
        before = probed(service)
        assert not any("Kuro" in reply for reply in before)
        other = scored(service, "you/other", before[0])["logprobs"]

        ids = at_once(lambda prompt: finished_reply(service, prompt), PROMPTS)
        lessons = [taught(service, ids)]
        after = probed(service)
        while sum("Kuro" in reply for reply in after) < 4:
            assert len(lessons) < MAX_LESSONS, after
            lessons.append(taught(service, ids))
            after = probed(service)
        learnt = lessons[-1]["version"]

        record = lessons[0]["distill_result"]["metadata"]
        assert record["update"]["loss_after"] < record["update"]["loss_before"]
        assert record["support"]["kind"] == "sampled_token"
        assert record["usage"]["trained_tokens"] > 0 and record["usage"]["price"] > 0
        assert "Paris" in greedy(service, UNRELATED)
        assert probed(service, "assistant@0") == before, "a pinned version says what it always said"
        assert scored(service, "you/other", before[0])["logprobs"] == pytest.approx(other, abs=1e-3), "another adapter is untouched"
        assert service.get("/v1/lora")["loras"] == ["assistant", "you/other"]
        mine = scored(service, "assistant", after[0])

    with serving(tinker_server, data, model_dir) as service:  # the runs of the one before are gone
        assert probed(service) == after, "what was learned stays learned"
        versions = service.get("/v1/lora/versions", lora_id="assistant")
        assert (versions["latest"], versions["versions"][-1]["parent"]) == (learnt, lessons[-1]["distill_result"]["metadata"]["parent"])
        assert scored(service, "assistant", after[0])["logprobs"] == pytest.approx(mine["logprobs"], abs=2e-2)
        archive = service.http.get("/v1/lora/export", params={"lora_id": "assistant"}).content

        service.http.post("/v1/lora/rollback", json={"lora_id": "assistant", "version": 0}).raise_for_status()
        assert probed(service) == before
        service.http.post("/v1/lora/rollback", json={"lora_id": "assistant", "version": learnt}).raise_for_status()

        broken_in_mid_step(service, tinker_server, data, ids)
        assert probed(service) == after, "a server that forgot it is told again"
        assert service.http.delete("/v1/lora", params={"lora_id": "assistant"}).status_code == 200
        assert service.get("/v1/lora")["loras"] == ["you/other"]

    folder = tmp_path / "exported"
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        zipped.extractall(folder)
    assert peft_logprob(loaded_model, folder, PROBES[0], after[0]) == pytest.approx(mine["logprob_sum"], rel=0.05, abs=0.3)
