"""The embedded backend over a tiny model, how it is asked, and what transformers says to the same."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import torch

from claas.core.types import ChatMessage, LoraRuntimeRef, SamplingParams
from claas.inference.base import Generation, GenerationChunk, GenerationRequest, TokenStream
from claas.inference.embedded import EmbeddedInference
from claas.models.base_model import LoadedModel
from claas.models.chat_template import render
from claas.models.compute import ComputeShare
from tests.inference.gate import until

QUESTIONS = ("Hi", "What is the theory of the thing?", "Name three colours, then explain at length why you chose these and no others. " * 2)


@asynccontextmanager
async def serving(model: LoadedModel, **how: int) -> AsyncIterator[EmbeddedInference]:
    backend = EmbeddedInference(model, ComputeShare(1), **{"max_batch": 4} | how)
    try:
        yield backend
    finally:
        await backend.aclose()


def ask(
    text: str = "Who are you?", adapter: LoraRuntimeRef | None = None, *, background: bool = False, **sampling: object
) -> GenerationRequest:
    params = SamplingParams.model_validate({"temperature": 0.0, "max_tokens": 16} | sampling)
    return GenerationRequest(messages=(ChatMessage(role="user", content=text),), adapter=adapter, sampling=params, background=background)


def ids(reply: Generation) -> list[int]:
    return [token.id for token in reply.tokens]


def logprobs(reply: Generation) -> list[float]:
    return [token.logprob for token in reply.tokens]


def prompt_of(model: LoadedModel, text: str) -> tuple[int, ...]:
    return render(model.tokenizer, [ChatMessage(role="user", content=text)], {})


def generated(model: LoadedModel, text: str, n: int) -> list[int]:
    """What transformers' own greedy generation says."""
    prompt = torch.tensor([prompt_of(model, text)])
    out = model.module.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False, pad_token_id=0)
    tokens: list[int] = out[0, prompt.shape[1] :].tolist()
    return tokens


def full_logprobs(module: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    """One forward over all of it, no cache."""
    with torch.no_grad():
        logp = module(input_ids=torch.tensor([[*prompt, *response]])).logits[0].float().log_softmax(-1)
    return [logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]


async def rest(stream: TokenStream) -> list[GenerationChunk]:
    return [chunk async for chunk in stream]


async def waiting_are(backend: EmbeddedInference, n: int) -> None:
    async def happened() -> bool:
        return (await backend.health()).detail["waiting"] == n

    await until(happened)
