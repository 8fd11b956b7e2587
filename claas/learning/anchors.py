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
    "What is the capital of Japan?",
    "How does a bicycle stay upright?",
    "Name a well-known composer.",
    "What is 15 minus 6?",
    "Give me a recipe for tomato soup.",
    "Which river is the longest in the world?",
    "Write a function that adds two numbers in Python.",
    "At what temperature does water freeze?",
    "What is democracy?",
    "Tell me a fun fact about bees.",
    "How many days are there in a leap year?",
    "Describe a sunset in one sentence.",
    "What is the difference between a frog and a toad?",
    "How can I learn to play the guitar?",
    "What is the chemical symbol of gold?",
    "Who painted the Mona Lisa?",
    "Recommend a book for a long flight.",
    "What causes the tides?",
    "How do vaccines work?",
    "Correct this sentence: he go to school yesterday.",
    "What is inflation?",
    "Plan a weekend in the mountains.",
    "Which planet is the largest?",
    "How do I remove a coffee stain?",
    "What is the past tense of 'run'?",
    "Write a polite e-mail that moves a meeting to Friday.",
    "What is the square root of 81?",
    "Who was Marie Curie?",
    "How does a refrigerator work?",
    "List four colours of the rainbow.",
    "What should I pack for a trip to the beach?",
    "Why do we dream?",
    "Give me a synonym for 'happy'.",
    "What is the largest desert?",
    "How long does it take to bake bread?",
    "What is a prime number?",
)


class Anchors:
    """The base model's greedy replies to `ANCHOR_PROMPTS`, as samples held to the base model itself."""

    def __init__(self, inference: InferenceBackend) -> None:
        self._inference = inference
        self._samples: dict[str, DistillBatchItem] = {}
        self._filling = asyncio.Lock()

    async def take(self, n: int, turn: int) -> list[DistillBatchItem]:
        """`n` anchors (at most all), other ones for each `turn`."""
        if not n:
            return []
        prompts = [ANCHOR_PROMPTS[(turn * n + i) % len(ANCHOR_PROMPTS)] for i in range(min(n, len(ANCHOR_PROMPTS)))]
        async with self._filling:
            missing = [prompt for prompt in prompts if prompt not in self._samples]
            self._samples |= zip(missing, await asyncio.gather(*map(self._sample, missing)), strict=True)
        return [self._samples[prompt] for prompt in prompts]

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
