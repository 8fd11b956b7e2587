"""The default model itself: fetched, converted, loaded in the machine's dtype, served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from claas.core.types import ChatMessage, SamplingParams
from claas.inference.base import GenerationRequest
from claas.inference.embedded import EmbeddedInference
from claas.models.base_model import LoadedModel
from claas.models.chat_template import render, stop_token_ids
from claas.models.compute import ComputeShare
from claas.models.default_model import DEFAULT_MODEL_ID, default_model, is_complete
from tests.models.tiny import adapter_ref

pytestmark = pytest.mark.model


@asynccontextmanager
async def serving(model: LoadedModel) -> AsyncIterator[EmbeddedInference]:
    backend = EmbeddedInference(model, ComputeShare(torch.get_num_threads()), max_batch=8)
    try:
        yield backend
    finally:
        await backend.aclose()


def ask(text: str, **sampling: object) -> GenerationRequest:
    params = SamplingParams.model_validate({"temperature": 0.0, "max_tokens": 32} | sampling)
    return GenerationRequest(messages=(ChatMessage(role="user", content=text),), sampling=params)


def test_the_converted_folder_is_whole_and_found_again(model_dir: Path) -> None:
    assert is_complete(model_dir)
    assert default_model(model_dir.parent) == model_dir


def test_it_is_what_it_should_be(loaded_model: LoadedModel) -> None:
    assert (loaded_model.id, loaded_model.n_params, loaded_model.max_context) == (DEFAULT_MODEL_ID, 134_515_008, 8192)
    end = loaded_model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(loaded_model) == {end} == {2}


def test_control_tokens_in_a_message_are_plain_text(loaded_model: LoadedModel) -> None:
    tokenizer = loaded_model.tokenizer
    control = {int(i) for i in tokenizer.added_tokens_decoder}
    plain = render(tokenizer, [ChatMessage(role="user", content="x")], {})
    text = "".join(str(token) for token in tokenizer.added_tokens_decoder.values())
    hostile = render(tokenizer, [ChatMessage(role="user", content=text)], {})
    assert [i for i in hostile if i in control] == [i for i in plain if i in control]
    assert text in tokenizer.decode(hostile)


async def test_it_knows_the_capital_of_france_and_stops(loaded_model: LoadedModel) -> None:
    async with serving(loaded_model) as backend:
        reply = await backend.complete(ask("What is the capital of France?"))
    assert reply.text == "The capital of France is Paris."
    assert (reply.finish_reason, reply.tokens[-1].id) == ("stop", 2)


async def test_logprobs_in_company_are_those_of_a_full_forward(loaded_model: LoadedModel) -> None:
    questions = ["Who are you?", "What is 2 + 2?", "Explain how a bicycle stays upright, as you would to a child who has never seen one."]
    async with serving(loaded_model) as backend:
        replies = await asyncio.gather(*(backend.complete(ask(q, temperature=1.0, top_p=0.9, seed=1)) for q in questions))
    # bfloat16 keeps three digits of a logit, and sums differ in order: over many seeds the mean gap is 0.02 to 0.06.
    tolerance = 0.1 if loaded_model.dtype == torch.bfloat16 else 1e-3
    for reply in replies:
        ids, n = [token.id for token in reply.tokens], len(reply.prompt_token_ids)
        with torch.no_grad():
            logp = loaded_model.module(input_ids=torch.tensor([[*reply.prompt_token_ids, *ids]])).logits[0].float().log_softmax(-1)
        full = logp[n - 1 : -1].gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        served = torch.tensor([token.logprob for token in reply.tokens])
        assert (served - full).abs().mean() < tolerance
        assert (served - full).abs().max() < 6 * tolerance
        assert (served - full).mean().abs() < tolerance / 2, "noise has no direction"


async def test_an_adapter_beside_the_base_changes_only_its_own_reply(loaded_model: LoadedModel, tmp_path: Path) -> None:
    ref = adapter_ref(tmp_path, loaded_model, seed=1, rank=8, scale=0.2)
    question = ask("What is the capital of France?")
    async with serving(loaded_model) as backend:
        base, adapted = await asyncio.gather(backend.complete(question), backend.complete(question.model_copy(update={"adapter": ref})))
    assert base.text == "The capital of France is Paris."
    assert adapted.text != base.text
