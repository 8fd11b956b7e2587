"""Judges a new version before it serves: none of its replies may have collapsed.

It answers unrelated prompts, the lesson's own and those of earlier lessons, greedily and in one batch. Distances and losses are judged
where the lesson is trained; here is judged what a person would see. The limits were chosen on replies of sound and of wrecked versions:
docs/decisions/0008-checks.md.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from claas.core.types import ChatMessage, DistillBatchItem, LoraRuntimeRef, SamplingParams
from claas.inference.base import Generation, GenerationRequest, InferenceBackend
from claas.learning.lesson_book import TaughtLesson
from claas.training.hindsight import hindsight_messages

CHECK_TOKENS = 32
CHECK_PROMPTS = ("What is the capital of France?", "Explain what a bicycle is.")
OWN_PROMPTS = 2
EARLIER_LESSONS = 2
# Longer ones would cost more than they tell, and might not fit the context.
MAX_PROMPT_TOKENS = 512
MAX_SAID_CHARS = 1000
# The greedy reply to a prompt that was taught is a loop now and then: of a few sampled ones, most must be bad too.
SAMPLED = 3
TEMPERATURE = 0.7
# A reply of this many tokens or more is a loop if a smaller share of its runs of three tokens is new.
LOOP_TOKENS = 16
MIN_NEW_RUNS = 0.75
# Of a reply with fewer tokens, the base model takes the missing ones for certain: a short one is no garbage.
LEAST_TOKENS = 8
LOOP = "a loop"


@dataclass(frozen=True, slots=True)
class Question:
    """What a version is asked. `whose` says why; `told` is the conversation with what the lesson said in view, as the base judges it.

    `taught` says whether a lesson was about it.
    """

    whose: str
    prompt: str
    messages: tuple[ChatMessage, ...]
    told: tuple[ChatMessage, ...]
    taught: bool = False
    template_kwargs: dict[str, JsonValue] = field(default_factory=dict)


def questions(own: Sequence[DistillBatchItem], learnt: Sequence[TaughtLesson]) -> list[Question]:
    """The unrelated prompts, up to `OWN_PROMPTS` of the lesson's, and one of each of the latest `EARLIER_LESSONS`."""
    earlier = [item for lesson in learnt[-EARLIER_LESSONS:] for item in _conversations(lesson.samples)[:1]]
    return [
        *(_unrelated(prompt) for prompt in CHECK_PROMPTS),
        *(_question("the lesson's own prompt", item) for item in _conversations(own)[:OWN_PROMPTS]),
        *(_question("an earlier lesson's prompt", item) for item in earlier),
    ]


async def find_collapse(
    inference: InferenceBackend, candidate: LoraRuntimeRef, parent: LoraRuntimeRef, asked: Sequence[Question], min_logprob: float
) -> str | None:
    """Why the candidate must not serve; None if it is sound. A reply under `min_logprob` nats a token for the base model is garbage.

    Parent and base model are asked only where the candidate looks bad: what was bad before, or what the base model itself cannot answer,
    told or not, is not held against it.
    """

    async def trial(question: Question) -> str | None:
        reply = await _reply(inference, question, candidate, question.messages)
        if (fault := await _fault(inference, question, reply, min_logprob)) is None:
            return None
        if fault == LOOP and question.taught and not await mostly_bad(question):
            return None
        for other, messages in ((parent, question.messages), (None, question.messages), (None, question.told)):
            if await _fault(inference, question, await _reply(inference, question, other, messages), min_logprob) is not None:
                return None
        return f"the new version's reply to {question.whose} {question.prompt[:80]!r} is {fault}: {reply.text[:80]!r}"

    async def mostly_bad(question: Question) -> bool:
        replies = [await _reply(inference, question, candidate, question.messages, seed) for seed in range(SAMPLED)]
        faults = [await _fault(inference, question, reply, min_logprob) for reply in replies]
        return len(list(filter(None, faults))) > SAMPLED / 2

    found = await asyncio.gather(*map(trial, asked))
    return next((reason for reason in found if reason is not None), None)


async def _fault(inference: InferenceBackend, question: Question, reply: Generation, min_logprob: float) -> str | None:
    """What a reply is, if it is anything but a reply."""
    text, ids = reply.text.strip(), [token.id for token in reply.tokens]
    if not text:
        return "empty"
    if text.isascii() and not re.search(r"\w", text):
        return "without a word"
    if _loops(ids):
        return LOOP
    request = GenerationRequest(messages=question.told, template_kwargs=question.template_kwargs, background=True)
    logprobs = (await inference.score(request, tuple(ids))).logprobs
    logprob = sum(logprobs) / max(len(logprobs), LEAST_TOKENS)
    return f"garbage to the base model ({logprob:.1f} nats a token)" if logprob < min_logprob else None


def _loops(ids: Sequence[int]) -> bool:
    runs = list(zip(ids, ids[1:], ids[2:], strict=False))
    return len(ids) >= LOOP_TOKENS and len(set(runs)) < MIN_NEW_RUNS * len(runs)


async def _reply(
    inference: InferenceBackend,
    question: Question,
    adapter: LoraRuntimeRef | None,
    messages: tuple[ChatMessage, ...],
    seed: int | None = None,
) -> Generation:
    """The greedy reply; with a seed, a sampled one."""
    return await inference.complete(
        GenerationRequest(
            messages=messages,
            template_kwargs=question.template_kwargs,
            adapter=adapter,
            sampling=SamplingParams(temperature=0.0 if seed is None else TEMPERATURE, seed=seed, max_tokens=CHECK_TOKENS),
            background=True,
        )
    )


def _unrelated(prompt: str) -> Question:
    messages = (ChatMessage(role="user", content=prompt),)
    return Question("the unrelated prompt", prompt, messages, messages)


def _question(whose: str, item: DistillBatchItem) -> Question:
    told = hindsight_messages(item.messages, item.feedback, item.demonstration)
    return Question(whose, item.prompt, item.messages, told, True, item.template_kwargs)


def _conversations(items: Sequence[DistillBatchItem]) -> list[DistillBatchItem]:
    """One item of each conversation of the user's that is not too long to ask."""
    short = [
        item
        for item in items
        if not item.imagined
        and len(item.prompt_token_ids) <= MAX_PROMPT_TOKENS
        and len(item.feedback) + len(item.demonstration or "") <= MAX_SAID_CHARS
    ]
    return list({item.prompt_token_ids: item for item in reversed(short)}.values())[::-1]
