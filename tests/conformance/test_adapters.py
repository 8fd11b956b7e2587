"""Adapters, on every backend: made, listed, exported to PEFT's layout, deleted, and made again."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel

from claas.core.types import ChatMessage
from claas.models.base_model import LoadedModel
from claas.models.chat_template import encode_reply, render
from tests.api.wire import assert_error
from tests.conformance.talk import CHAT, HELLO, body_of, logprobs, said, taught, versions
from tests.models.tiny import load_tiny_model


async def test_from_birth_to_deletion(client: httpx.AsyncClient) -> None:
    made = body_of(await client.post("/v1/lora/init", json={"lora_id": "team/bot", "lora_r": 2}))
    assert made == {"lora_id": "team/bot", "version": 0}
    assert_error(await client.post("/v1/lora/init", json={"lora_id": "team/bot"}), 409, param="lora_id")
    assert_error(await client.post("/v1/lora/init", json={"lora_id": "team/x", "base_model": "gpt-4"}), 400, param="base_model")
    assert body_of(await client.get("/v1/lora"))["loras"] == ["assistant", "team/bot"]
    assert body_of(await client.get("/v1/lora", params={"prefix": "team/"}))["loras"] == ["team/bot"]
    assert await said(client, model="team/bot")
    assert body_of(await client.delete("/v1/lora", params={"lora_id": "team/bot"})) == {"deleted": True}
    assert_error(await client.delete("/v1/lora", params={"lora_id": "team/bot"}), 404, param="lora_id")
    assert_error(await client.post(CHAT, json=HELLO | {"model": "team/bot"}), 404, param="model")
    assert body_of(await client.get("/v1/lora"))["loras"] == ["assistant"]


async def test_an_adapter_of_a_deleted_one_s_name_knows_nothing_of_it(client: httpx.AsyncClient) -> None:
    before = await logprobs(client)
    await taught(client)
    body_of(await client.delete("/v1/lora", params={"lora_id": "assistant"}))
    body_of(await client.post("/v1/lora/init", json={"lora_id": "assistant"}))
    assert await versions(client) == (0, [(0, None)])
    assert await logprobs(client) == pytest.approx(before, abs=1e-4)


async def test_unknown_ones(client: httpx.AsyncClient) -> None:
    assert_error(await client.get("/v1/lora/versions", params={"lora_id": "nobody"}), 404, param="lora_id")
    assert_error(await client.get("/v1/lora/export", params={"lora_id": "nobody"}), 404, param="lora_id")
    assert_error(await client.get("/v1/lora/export", params={"lora_id": "assistant", "version": 9}), 404, param="version")
    assert_error(await client.post("/v1/lora/rollback", json={"lora_id": "assistant", "version": 9}), 404, param="version")


async def test_what_is_exported_says_in_peft_what_the_service_says(
    client: httpx.AsyncClient, tiny_model: LoadedModel, tiny_model_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    await taught(client)
    archive = zipfile.ZipFile(io.BytesIO((await client.get("/v1/lora/export", params={"lora_id": "assistant"})).content))
    archive.extractall(tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    exported = in_peft(tiny_model, tiny_model_dir, tmp_path / "exported")
    bare = in_peft(tiny_model, tiny_model_dir, None)
    assert exported != pytest.approx(bare, abs=1e-5)
    if "vllm" not in request.node.callspec.id:  # its double computes nothing
        assert await logprobs(client) == pytest.approx(exported, abs=2e-3)


def in_peft(model: LoadedModel, model_dir: Path, adapter: Path | None) -> list[float]:
    """What `logprobs` asks of a service, computed by transformers and PEFT."""
    module = load_tiny_model(model_dir).module
    if adapter is not None:
        module = PeftModel.from_pretrained(module, adapter).eval()
    prompt = render(model.tokenizer, (ChatMessage(role="user", content="Hello"),), {})
    reply = encode_reply(model.tokenizer, "and then")
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
    found: list[float] = logits.log_softmax(-1).gather(-1, torch.tensor(reply)[:, None])[:, 0].tolist()
    return found
