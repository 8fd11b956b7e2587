"""The third source of a lesson: other messages that the feedback is about, imagined by the base model, and good replies to them.

A lesson taught on one prompt alone carries over to others only in part. Told to reword a prompt, a small model answers it instead; a list
that has begun it goes on with. What it imagines may be far off: a message on which the feedback makes no difference is not taught. Neither
is one that an earlier lesson is about: told to be a pirate, a small model answers "What is your name?" with a pirate's name.
"""

from __future__ import annotations

import asyncio
import re
import statistics
from collections.abc import Sequence
from itertools import chain, zip_longest

from claas.core.errors import ContextOverflow
from claas.core.types import DistillBatchItem, LoraRuntimeRef, SamplingParams, TrainingConfig
from claas.inference.base import GenerationRequest, InferenceBackend
from claas.learning.hindsight_rollouts import lifted_rollouts
from claas.training.hindsight import DISLIKED

LIST_TOKENS = 32
LISTS_PER_PROMPT = 1.5
"""Sampled for each prompt that is wanted: most hold two or three, some alike."""
TRIED_PER_PROMPT = 2
"""Prompts that are answered for each that is wanted: those on which the feedback does most are taught."""
ROLLOUTS = 2
AT_ONCE = 8
BEGINNING = 12  # tokens, in which it is decided what a reply says
OPPOSED = 2.0
"""Nats by which what was learnt may speak against the beginning of a reply more than it does on the user's own message."""
MAX_CHARS = 200  # of a feedback or a message that is to be a line of a list
_LIST = """Remark: "I am allergic to nuts." Messages it is about:
1. What shall I have for breakfast?
2. Suggest a dessert.
3. Is this cake fine for me?
4. Write my shopping list.

Remark: "Always answer in verse." Messages it is about:
1. What is the moon?
2. How are you?
3. Describe a bicycle.
4. Tell me what you did today.

Remark: "{feedback}" Messages it is about:
1. {prompt}
2."""


async def imagined_rollouts(
    item: DistillBatchItem,
    inference: InferenceBackend,
    training: TrainingConfig,
    keep: int,
    *,
    own: Sequence[DistillBatchItem] = (),
    learnt: LoraRuntimeRef | None = None,
) -> list[DistillBatchItem]:
    """Hindsight rollouts for at most `keep` imagined prompts, one each: those that the feedback lifts most; maybe none.

    The conversation before the user's last message stays as it was. A demonstration or a rating is of its own prompt only.
    `own` are the item's own hindsight rollouts, and `learnt` the version to be taught, if earlier lessons taught it anything: prompts that
    those are about are left to them.
    """
    if not keep or not _can_be_listed(item):
        return []
    at_once = asyncio.Semaphore(AT_ONCE)

    async def answered(prompt: str) -> list[tuple[float, DistillBatchItem]]:
        asked = (*item.messages[:-1], item.messages[-1].model_copy(update={"content": prompt}))
        async with at_once:
            other = item.model_copy(update={"prompt": prompt, "messages": asked, "imagined": True})
            try:
                return (await lifted_rollouts(other, inference, training, ROLLOUTS))[:1]
            except ContextOverflow:  # a longer message than the user's
                return []

    prompts = (await imagine(item, inference, round(keep * LISTS_PER_PROMPT)))[: keep * TRIED_PER_PROMPT]
    found = chain.from_iterable(await asyncio.gather(*map(answered, prompts)))
    best = [sample for _, sample in sorted(found, key=lambda lifted: lifted[0], reverse=True)]
    if learnt is not None and own:
        best = await _not_opposed(best, own, learnt, inference)
    return list(await asyncio.gather(*(_with_prompt_ids(sample, inference) for sample in best[:keep])))


async def _not_opposed(
    samples: Sequence[DistillBatchItem], own: Sequence[DistillBatchItem], learnt: LoraRuntimeRef, inference: InferenceBackend
) -> list[DistillBatchItem]:
    """Those samples that what was learnt does not speak against. Where it speaks against the user's own, the lesson is to change it."""
    at_once = asyncio.Semaphore(AT_ONCE)

    async def opposition(sample: DistillBatchItem) -> float:
        async with at_once:
            return await _opposition(sample, learnt, inference)

    nats = await asyncio.gather(*map(opposition, (*own, *samples)))
    allowed = max(0.0, statistics.mean(nats[: len(own)])) + OPPOSED
    return [sample for sample, against in zip(samples, nats[len(own) :], strict=True) if against <= allowed]


async def _opposition(sample: DistillBatchItem, learnt: LoraRuntimeRef, inference: InferenceBackend) -> float:
    """How much less likely the adapter makes the beginning of a reply than the base model does, in nats."""
    asked = GenerationRequest(messages=sample.messages, template_kwargs=sample.template_kwargs, background=True)
    beginning = sample.response_token_ids[:BEGINNING]
    base, adapter = [await inference.score(asked.model_copy(update={"adapter": ref}), beginning) for ref in (None, learnt)]
    return sum(base.logprobs) - sum(adapter.logprobs)


def _can_be_listed(item: DistillBatchItem) -> bool:
    said = item.feedback.strip()
    return (
        item.demonstration is None
        and said not in ("", DISLIKED)
        and item.messages[-1].role == "user"
        and bool(item.prompt.strip())
        and max(len(said), len(item.prompt)) <= MAX_CHARS
    )


async def imagine(item: DistillBatchItem, inference: InferenceBackend, lists: int) -> list[str]:
    """Distinct messages like the item's prompt that its feedback is about, those that were thought of first in front."""
    request = GenerationRequest(
        prompt=_LIST.format(feedback=_one_line(item.feedback), prompt=_one_line(item.prompt)),
        sampling=SamplingParams(temperature=0.8, top_p=0.95, max_tokens=LIST_TOKENS, stop=("\n\n",)),
        background=True,
    )
    at_once = asyncio.Semaphore(2 * AT_ONCE)

    async def sampled() -> list[str]:
        async with at_once:
            try:
                reply = await inference.complete(request)
            except ContextOverflow:  # of a model that reads less than the list
                return []
        return read_list(reply.text, whole=reply.finish_reason == "stop")

    columns = await asyncio.gather(*(sampled() for _ in range(lists)))
    lines = dict.fromkeys(line for row in zip_longest(*columns) for line in row if line is not None)
    return [line for line in lines if line.casefold() != _one_line(item.prompt).casefold()]


def read_list(text: str, *, whole: bool) -> list[str]:
    """The lines of a list that went on after "2."; the last one, if it was cut, is none."""
    lines = re.split(r"\n\s*", text.strip())
    lines = [re.sub(r"^\d+\.\s*", "", line).strip(" \"'") for line in (lines if whole else lines[:-1])]
    return [line for line in lines if re.search(r"\w", line) and len(line) <= MAX_CHARS]


def _one_line(text: str) -> str:
    return " ".join(text.replace('"', "'").split())


async def _with_prompt_ids(sample: DistillBatchItem, inference: InferenceBackend) -> DistillBatchItem:
    """The sample with its prompt's tokens, as the backend serves them."""
    request = GenerationRequest(
        messages=sample.messages,
        template_kwargs=sample.template_kwargs,
        sampling=SamplingParams(temperature=0.0, max_tokens=1),
        background=True,
    )
    return sample.model_copy(update={"prompt_token_ids": (await inference.complete(request)).prompt_token_ids})
