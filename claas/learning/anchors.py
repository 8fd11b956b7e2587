"""What a lesson must leave alone: the base model's replies to unrelated prompts, held in place while the lesson is learnt.

They are sampled once in the life of the service. Each lesson takes a few, the next ones in turn.
"""

from __future__ import annotations

import asyncio

from claas.core.types import ChatMessage, DistillBatchItem, SamplingParams
from claas.inference.base import Generation, GenerationRequest, InferenceBackend

ANCHOR_TOKENS = 32
ANCHOR_PROMPTS = (
    "What is the tallest mountain on Earth?",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "What is 7 times 8?",
    "Explain photosynthesis in simple words.",
    "Give me three tips for sleeping better.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into French.",
    "What does a compiler do?",
    "Suggest a name for my new cat.",
    "Why is the sky blue?",
    "Who was the first person on the Moon?",
)


class Anchors:
    """The base model's greedy replies to `ANCHOR_PROMPTS`, as samples held to the base model itself."""

    def __init__(self, inference: InferenceBackend) -> None:
        self._inference = inference
        self._samples: list[DistillBatchItem] = []
        self._filling = asyncio.Lock()

    async def take(self, n: int, turn: int) -> list[DistillBatchItem]:
        """`n` anchors (at most all), other ones for each `turn`."""
        if not n:
            return []
        async with self._filling:
            self._samples = self._samples or list(await asyncio.gather(*map(self._sample, ANCHOR_PROMPTS)))
        return [self._samples[(turn * n + i) % len(self._samples)] for i in range(min(n, len(self._samples)))]

    async def _sample(self, prompt: str) -> DistillBatchItem:
        messages = (ChatMessage(role="user", content=prompt),)
        reply: Generation = await self._inference.complete(
            GenerationRequest(messages=messages, sampling=SamplingParams(temperature=0.0, max_tokens=ANCHOR_TOKENS), background=True)
        )
        return DistillBatchItem(
            prompt=prompt,
            response=reply.text,
            feedback="",
            response_logprobs=(),
            prompt_token_ids=reply.prompt_token_ids,
            response_token_ids=tuple(token.id for token in reply.tokens),
            messages=messages,
            source="anchor",
        )
