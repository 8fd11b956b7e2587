"""The second source of a lesson: the reply the user wanted, and replies sampled with the feedback in view, only the good ones.

Where the student's own reply never goes near what the user wants, hardly any of its tokens carry signal; these do.
"""

from __future__ import annotations

import asyncio
import re

from claas.core.types import DistillBatchItem, SamplingParams, TrainingConfig
from claas.inference.base import Generation, GenerationRequest, InferenceBackend
from claas.rollouts.visible import visible_text
from claas.training.hindsight import CONTROL_FEEDBACK, DEMONSTRATED, HINDSIGHT_BLOCK, hindsight_messages

QUOTE_WORDS = 4
LEAST_QUOTED = 3
"""Of feedback with fewer words, saying them is no quoting: "Lisbon." is the very reply that was wanted."""
LEAST_LOOPED = 6
_ENGLISH = re.compile(
    r"\b(the|a|an|is|are|was|be|do|does|you|your|i|my|me|it|to|of|and|in|on|for|what|who|how|why|say|please|not)\b", re.IGNORECASE
)
_LANGUAGE = re.compile(
    r"\b(language|translate|translation|arabic|bengali|bulgarian|catalan|chinese|croatian|czech|danish|dutch|estonian|farsi|finnish|french|"
    r"german|greek|hebrew|hindi|hungarian|icelandic|indonesian|irish|italian|japanese|korean|latvian|lithuanian|mandarin|norwegian|persian|"
    r"polish|portuguese|romanian|russian|serbian|slovak|slovenian|spanish|swahili|swedish|tamil|thai|turkish|ukrainian|urdu|vietnamese|welsh)\b",
    re.IGNORECASE,
)


async def hindsight_rollouts(
    item: DistillBatchItem, inference: InferenceBackend, training: TrainingConfig, keep: int | None = None
) -> list[DistillBatchItem]:
    """The item's demonstration, if it has one, and distinct good replies of the base model that knows its feedback and demonstration.

    Of `training.hindsight_rollouts` replies sampled, at most `keep` (None: all), those that the feedback lifts most; maybe none.
    """
    shown = [] if item.demonstration is None else [await _demonstrated(item, item.demonstration, inference)]
    lifted = await lifted_rollouts(item, inference, training, training.hindsight_rollouts)
    return [*shown, *(sample for _, sample in lifted[:keep])]


async def lifted_rollouts(
    item: DistillBatchItem, inference: InferenceBackend, training: TrainingConfig, n: int
) -> list[tuple[float, DistillBatchItem]]:
    """The good ones of `n` replies sampled, each with its lift, those that the feedback lifts most first."""
    told = GenerationRequest(
        messages=hindsight_messages(item.messages, item.feedback, item.demonstration),
        template_kwargs=item.template_kwargs,
        sampling=SamplingParams(max_tokens=training.hindsight_max_tokens, temperature=training.hindsight_temperature),
        background=True,
    )
    told_else = told.model_copy(update={"messages": hindsight_messages(item.messages, CONTROL_FEEDBACK)})
    replies = await asyncio.gather(*(inference.complete(told) for _ in range(n)))
    good = {reply.text.strip(): reply for reply in replies if fault(reply, item.prompt, item.feedback, item.demonstration or "") is None}
    good.pop((item.demonstration or "").strip(), None)
    lifts = await asyncio.gather(*(_lift(reply, told_else, inference) for reply in good.values()))
    best = sorted(zip(lifts, good.values(), strict=True), key=lambda lifted: lifted[0], reverse=True)
    return [
        (lift, _sample(item, reply.text, tuple(token.id for token in reply.tokens))) for lift, reply in best if lift >= training.min_lift
    ]


async def _demonstrated(item: DistillBatchItem, demonstration: str, inference: InferenceBackend) -> DistillBatchItem:
    """The demonstration as a sample, whole and whatever it says: the user chose it. The model's own reply is taken token for token."""
    own = demonstration == item.response
    return _sample(item, demonstration, item.response_token_ids if own else await inference.reply_tokens(demonstration))


async def _lift(reply: Generation, told_else: GenerationRequest, inference: InferenceBackend) -> float:
    """How much likelier the feedback made the reply than another feedback does, that has nothing to do with it, nats a token.

    A reply that would have come anyway has nothing to teach, and neither has one that any feedback brings about: small models speak of
    the block that carries it ("(The user's response is …").
    """
    without = await inference.score(told_else, tuple(token.id for token in reply.tokens))
    return sum(token.logprob - logp for token, logp in zip(reply.tokens, without.logprobs, strict=True)) / len(reply.tokens)


def fault(reply: Generation, prompt: str, feedback: str, demonstration: str = "") -> str | None:
    """Why a hindsight rollout must not be taught: its blemishes would be learnt too. None if it is good.

    It may quote the demonstration, which is what that is for. One that was cut at its token limit is good: each token is held to the
    teacher's whole distribution, and no end is taught.
    """
    text = visible_text(reply.text).strip()
    if reply.finish_reason == "abort":
        return "aborted"
    if not text:
        return "empty"
    if any(quotes(text, source) for source in (feedback, HINDSIGHT_BLOCK, DEMONSTRATED)):
        return "quotes the feedback"
    if is_degenerate(text):
        return "repeats itself"
    if drifts(text, prompt, feedback + demonstration):
        return "drifts into another script"
    return None


def quotes(text: str, source: str, words: int = QUOTE_WORDS) -> bool:
    """Whether `text` repeats a run of `words` words of `source` (all of it, where it is shorter), ignoring case and punctuation."""
    said, told = _words(text), _words(source)
    if len(told) < LEAST_QUOTED:
        return False
    n = min(words, len(told))
    runs = {tuple(told[at : at + n]) for at in range(len(told) - n + 1)} if n else set()
    return any(tuple(said[at : at + n]) in runs for at in range(len(said) - n + 1))


def is_degenerate(text: str) -> bool:
    """Whether the text is caught in a loop: of six words or more, over a fifth of the three-word runs have been said before."""
    said = _words(text)
    runs = list(zip(said, said[1:], said[2:], strict=False))
    return len(said) >= LEAST_LOOPED and len(set(runs)) < 0.8 * len(runs)


def drifts(text: str, prompt: str, feedback: str) -> bool:
    """Whether a reply to a conversation in plain English, in which no language is spoken of, slid into another script or language."""
    conversation = f"{prompt}\n{feedback}"
    in_english = conversation.isascii() and _ENGLISH.search(conversation) is not None and _LANGUAGE.search(conversation) is None
    return in_english and any(letter.isalpha() and not letter.isascii() for letter in text)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _sample(item: DistillBatchItem, text: str, token_ids: tuple[int, ...]) -> DistillBatchItem:
    return item.model_copy(
        update={"response": text, "response_token_ids": token_ids, "response_logprobs": (), "source": "hindsight"},
    )
