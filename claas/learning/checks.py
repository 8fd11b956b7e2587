"""Judges a new version before it serves: its replies to unrelated prompts must not have collapsed."""

from __future__ import annotations

import asyncio

from claas.core.types import ChatMessage, LoraRuntimeRef, SamplingParams
from claas.inference.base import GenerationRequest, InferenceBackend
from claas.learning.hindsight_rollouts import is_degenerate

CHECK_TOKENS = 32
CHECK_PROMPTS = ("What is the capital of France?", "Explain what a bicycle is.")


async def find_collapse(inference: InferenceBackend, candidate: LoraRuntimeRef, parent: LoraRuntimeRef) -> str | None:
    """Why the candidate must not serve; None if it is sound.

    A prompt on which the parent already repeats itself, or says nothing, is not held against the candidate.
    """
    for prompt, reply in zip(CHECK_PROMPTS, await _replies(inference, candidate, CHECK_PROMPTS), strict=True):
        if _collapsed(reply) and not _collapsed((await _replies(inference, parent, (prompt,)))[0]):
            return f"the new version's reply to {prompt!r} is {'empty' if not reply.strip() else 'a loop'}: {reply[:80]!r}"
    return None


def _collapsed(reply: str) -> bool:
    return not reply.strip() or is_degenerate(reply)


async def _replies(inference: InferenceBackend, adapter: LoraRuntimeRef, prompts: tuple[str, ...]) -> list[str]:
    def request(prompt: str) -> GenerationRequest:
        return GenerationRequest(
            messages=(ChatMessage(role="user", content=prompt),),
            adapter=adapter,
            sampling=SamplingParams(temperature=0.0, max_tokens=CHECK_TOKENS),
            background=True,
        )

    return [reply.text for reply in await asyncio.gather(*(inference.complete(request(prompt)) for prompt in prompts))]
