"""The optimizer's state on a real server: a lesson after a restart of both sides is the lesson that it would have been without."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from claas.adapters.tinker import TinkerAdapter
from claas.core.types import ChatMessage, DistillBatchItem, DistillBatchRequestPayload, LoraInitRequest, TrainingConfig
from claas.models.base_model import LoadedModel
from claas.models.chat_template import encode_reply, render
from claas.training.engine.tinker import TinkerEngine
from tests.tinker.process import KEY, MAX_RANK, MODEL, RealTinker
from tests.tinker.teaching import Place, described, teaching

pytestmark = [pytest.mark.tinker, pytest.mark.timeout(1800)]

A = "me/a"
FEEDBACK = "Your name is Kuro, always introduce yourself as Kuro."
LEARNING_RATE = 3e-5


def lesson(model: LoadedModel, reply: str, parent: int) -> DistillBatchRequestPayload:
    messages = (ChatMessage(role="user", content="Who are you?"),)
    item = DistillBatchItem(
        prompt="Who are you?", response=reply, feedback=FEEDBACK, response_logprobs=(), messages=messages, source="hindsight",
        prompt_token_ids=render(model.tokenizer, messages, {}), response_token_ids=encode_reply(model.tokenizer, reply),
    )  # fmt: skip
    training = TrainingConfig(learning_rate=LEARNING_RATE, gradient_steps=1, min_signal=0.0, max_kl=100.0)
    return DistillBatchRequestPayload(lora_id=A, parent=parent, training=training, samples=[item])


async def taught(engine: TinkerEngine, model: LoadedModel, reply: str, parent: int) -> tuple[int, dict[str, Tensor]]:
    """The new version and its weights."""
    report = (await engine.distill(lesson(model, reply, parent))).metadata
    assert report["outcome"] == "applied", report["reason"]
    archive = (await engine.export_lora(A, report["version"])).content
    return report["version"], load(zipfile.ZipFile(io.BytesIO(archive)).read("adapter_model.safetensors"))


def whole_steps(before: dict[str, Tensor] | None, after: dict[str, Tensor]) -> float:
    """The share of weights of the B matrices, which begin as 0, that moved by the learning rate: Adam's first step, without moments."""
    names = [name for name in after if ".lora_B." in name]
    moved = torch.cat([(after[name] - (before[name] if before else 0.0)).flatten().abs() for name in names])
    return float(((moved / LEARNING_RATE - 1.0).abs() < 0.02).float().mean())


async def test_moments_go_on_across_a_restart(tinker_server: RealTinker, loaded_model: LoadedModel) -> None:
    place = Place(tinker_server.url, KEY, replace(described(loaded_model), id=MODEL))
    async with teaching(place, timeout_s=600.0, patience_s=60.0) as (engine, adapters):
        await engine.init_lora(LoraInitRequest(lora_id=A, lora_r=MAX_RANK))
        number, first = await taught(engine, loaded_model, "I am Kuro, and I always say so: Kuro.", 0)
        saved = await adapters.version(A, number)
        _, without = await taught(engine, loaded_model, "My name is Kuro. It is nice to meet you!", number)

    tinker_server.restart()
    async with teaching(place, timeout_s=600.0, patience_s=60.0) as (engine, adapters):
        await adapters.create(TinkerAdapter(lora_id=A, base_model=MODEL, rank=MAX_RANK), saved.state_path)
        _, across = await taught(engine, loaded_model, "My name is Kuro. It is nice to meet you!", 0)

    assert across.keys() == without.keys()
    for name, tensor in without.items():
        torch.testing.assert_close(across[name], tensor, atol=LEARNING_RATE / 100, rtol=1e-3)
    assert whole_steps(None, first) > 0.7, "the first step knows no moments"
    assert whole_steps(first, across) < 0.3, "the next one does, after a restart too"
