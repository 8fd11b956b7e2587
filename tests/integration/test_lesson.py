"""The product's main job on the real default model: a person chats, says what was wrong, and the model has learned it."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel

from claas.models.base_model import LoadedModel
from tests.integration.process import Service, running

FEEDBACK = "Your name is Kuro, always introduce yourself as Kuro."
PROMPTS = ("Who are you?", "What is your name?", "Hi! Please introduce yourself.", "Hello, who am I talking to?")
MAX_LESSONS = 3
OLDER = {"hindsight_rollouts": 0, "gradient_steps": 1, "anchors": 0, "replay": 0, "max_kl": 9}
PROBES = ("What should I call you?", "Tell me your name, please.", "Introduce yourself in one sentence.")


def greedy(service: Service, text: str, model: str = "assistant", max_tokens: int = 40) -> str:
    reply = service.chat(text, model, max_tokens=max_tokens, temperature=0)
    return str(reply["choices"][0]["message"]["content"])


def taught(service: Service, completion_ids: list[str]) -> dict[str, Any]:
    """One lesson on these replies; it must have been applied."""
    body = {"requests": [{"completion_id": reply_id, "feedback": FEEDBACK} for reply_id in completion_ids], "show": True}
    answer = service.http.post("/v1/feedback", json=body)
    assert answer.status_code == 200, answer.text
    lesson: dict[str, Any] = answer.json()
    assert lesson["status"] == "ok", lesson["reason"]
    return lesson


def finished_reply(client: openai.OpenAI, prompt: str) -> str:
    """The id of a sampled reply that ended by itself; streamed, as a chat client would."""
    for seed in range(8):
        stream = client.chat.completions.create(
            model="assistant", messages=[{"role": "user", "content": prompt}], seed=seed, max_tokens=120, temperature=0.7, stream=True
        )
        chunks = list(stream)
        if chunks[-1].choices[0].finish_reason == "stop":
            return chunks[0].id
    raise AssertionError(f"no reply to {prompt!r} ended by itself")


@pytest.mark.model
@pytest.mark.integration
@pytest.mark.timeout(1500)
def test_a_correction_is_learnt_kept_undone_and_exported(tmp_path: Path, model_dir: Path, loaded_model: LoadedModel) -> None:
    data = tmp_path / "data"
    with running(data) as service:
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none")
        before = [greedy(service, probe) for probe in PROBES]
        assert not any("Kuro" in reply for reply in before)

        ids = [finished_reply(client, prompt) for prompt in PROMPTS]
        first = taught(service, ids)
        assert first["version"] == 1
        update = first["distill_result"]["metadata"]["update"]
        assert update["loss_after"] < update["loss_before"] / 2
        assert update["reply_logprob_before"] is not None
        assert {shown["prompt"] for shown in first["shown"]} == set(PROMPTS)
        learnt, after = first["version"], [greedy(service, probe) for probe in PROBES]
        while sum("Kuro" in reply for reply in after) < 2:
            assert learnt < MAX_LESSONS, after
            learnt = taught(service, ids)["version"]
            after = [greedy(service, probe) for probe in PROBES]

        assert "Paris" in greedy(service, "What is the capital of France?")
        pinned = [greedy(service, probe, "assistant@0") for probe in PROBES]
        assert pinned == before, "a pinned version says what it always said"

        # An older reply can be learnt from too, now off-policy: its ratio is no longer 1.
        again = {"completion_id": ids[0], "feedback": "Be brief.", "training": OLDER}
        second = service.http.post("/v1/feedback", json={"requests": [again]}).json()
        assert second["distill_result"]["metadata"]["off_policy"]["version_age"] == learnt
        assert second["distill_result"]["metadata"]["off_policy"]["ratio_mean"] != 1.0
        service.http.post("/v1/lora/rollback", json={"lora_id": "assistant", "version": learnt}).raise_for_status()

    with running(data) as service:
        assert [greedy(service, probe) for probe in PROBES] == after, "what was learned stays learned"
        archive = service.http.get("/v1/lora/export", params={"lora_id": "assistant", "version": learnt}).content
        reply = after[0]
        scored = service.http.post(
            "/v1/score", json={"model": f"assistant@{learnt}", "messages": [{"role": "user", "content": PROBES[0]}], "completion": reply}
        ).json()
        service.http.post(
            "/v1/lora/import", params={"lora_id": "copy"}, content=archive, headers={"content-type": "application/zip"}
        ).raise_for_status()
        assert greedy(service, PROBES[0], "copy") == reply
        service.http.post("/v1/lora/rollback", json={"lora_id": "assistant", "version": 0}).raise_for_status()
        assert [greedy(service, probe) for probe in PROBES] == before

    folder = tmp_path / "exported"
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        zipped.extractall(folder)
    assert peft_logprob(loaded_model, folder, PROBES[0], reply) == pytest.approx(scored["logprob_sum"], rel=0.03)


def peft_logprob(base: LoadedModel, folder: Path, prompt: str, reply: str) -> float:
    """What PEFT, given the exported folder, makes of the same reply."""
    model = PeftModel.from_pretrained(base.tree(), str(folder)).eval()
    prompt_ids = base.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False)
    reply_ids = base.tokenizer(reply, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([prompt_ids + reply_ids])).logits[0].float().log_softmax(-1)
    return float(sum(logp[len(prompt_ids) + at - 1, token] for at, token in enumerate(reply_ids)))
