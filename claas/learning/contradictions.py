"""Does a lesson take back what was taught before? False alarms weigh more than misses: only what is said plainly is noticed.

A new feedback text takes an earlier one back if it is the same but denied ("You are not called Kuro any more"), or if it is the same but
for one thing ("You are called Max") and the model confirms it: told the new feedback in place of the old one, it has lost most of what the
old one did for the taught replies. Either way the thing must have been learnt: a taught reply says it, and no prompt does. Another
demonstration for the very same conversation takes the first one back. The measurements are in docs/decisions/0009-contradictions.md.

It knows nothing of versions, of the book or of what follows.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from claas.core.errors import ContextOverflow
from claas.core.types import DistillBatchItem
from claas.inference.base import GenerationRequest, InferenceBackend
from claas.training.hindsight import DISLIKED, hindsight_messages

MAX_CLAIMS = 64
MAX_TEXTS = 8
MAX_CHARS = 500
MAX_DOUBTS = 8
SAMPLES = 2
LOST = 0.5
"""The share of the old feedback's effect on its replies that must be gone."""
SHARED_WORDS = 3
SLOT_WORDS = 2
STEM = 4
_NOT = frozenset(("not", "no", "never", "stop"))
_DENYING = _NOT | {"do", "does", "longer", "any", "more", "anymore"}
_QUOTE = re.compile(r"[\"“”]([^\"“”]+)[\"“”]|(?<!\w)['‘]((?:[^'’]|(?<=\w)['’](?=\w))+)['’](?!\w)")


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing that was taught: a feedback text and the taught samples that carry it."""

    feedback: str
    samples: tuple[DistillBatchItem, ...]

    @property
    def in_words(self) -> bool:
        """Whether it says something of its own; a demonstration or a rating alone does not."""
        return self.feedback not in ("", DISLIKED)

    @property
    def is_plain(self) -> bool:
        """Whether it is in words, and short enough to be compared word for word."""
        return self.in_words and len(self.feedback) <= MAX_CHARS

    @property
    def feedback_ids(self) -> set[str]:
        return {sample.feedback_id for sample in self.samples if sample.feedback_id is not None}


def claims(samples: Sequence[DistillBatchItem]) -> list[Claim]:
    """What these samples teach, feedback by feedback; the one that was given last comes last."""
    texts = list(dict.fromkeys(sample.feedback for sample in reversed(samples)))[::-1]
    return [Claim(text, tuple(sample for sample in samples if sample.feedback == text)) for text in texts]


async def contradicted(old: Sequence[Claim], new: Sequence[DistillBatchItem], inference: InferenceBackend) -> set[str]:
    """The ids of the earlier feedback that the new samples contradict. Looks at the last `MAX_CLAIMS` claims, with bounded work."""
    texts = [claim.feedback for claim in claims(new) if claim.is_plain][:MAX_TEXTS]
    pairs = [(claim, text) for claim in old[-MAX_CLAIMS:] if claim.is_plain for text in texts]
    doubts = [(claim, text, thing) for claim, text in pairs if (thing := replaced(claim, text)) is not None][-MAX_DOUBTS:]
    lost = await asyncio.gather(*(share_lost(*doubt, inference) for doubt in doubts))
    found = [claim for (claim, *_), share in zip(doubts, lost, strict=True) if share >= LOST]
    found += [claim for claim, text in pairs if denied(claim, text)]
    ids = {feedback_id for claim in found for feedback_id in claim.feedback_ids}
    return ids | {s.feedback_id for claim in old for s in claim.samples if s.feedback_id is not None and _shown_otherwise(s, new)}


def _shown_otherwise(sample: DistillBatchItem, new: Sequence[DistillBatchItem]) -> bool:
    """The very same conversation, with another reply to be given."""
    shown = {other.demonstration for other in new if other.messages == sample.messages} - {None}
    return sample.demonstration is not None and bool(shown) and sample.demonstration not in shown


def replaced(claim: Claim, text: str) -> str | None:
    """What the replies have learnt to say, if it is the one thing in which the new feedback differs; None if it is not so."""
    old, new = _tokens(claim.feedback), _tokens(text)
    if len(set(old).intersection(new)) < SHARED_WORDS:
        return None
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    changes = {(old[a:b], new[c:d]) for kind, a, b, c, d in matcher.get_opcodes() if kind != "equal"}
    if len(changes) != 1:
        return None
    ((was, becomes),) = changes
    if not (1 <= len(was) <= SLOT_WORDS and 1 <= len(becomes) <= SLOT_WORDS) or _NOT.intersection(becomes):
        return None
    if _is_name(was[0], claim.feedback) and not _is_name(becomes[0], text) and text != text.lower():
        return None  # "I live in Lisbon", "I live in a flat"
    thing = " ".join(was)
    return thing if not _says(text, thing) and _learnt(claim, thing) else None


def _is_name(word: str, text: str) -> bool:
    """Whether it is written with a capital letter."""
    return word[:1].upper() + word[1:] in re.findall(r"\w+", text)


def denied(claim: Claim, text: str) -> bool:
    """Whether a clause of the new feedback is one of the claim's with a "not", whole or but for a word, about something that was learnt."""
    for new in filter(_NOT.intersection, _clauses(text)):
        stated = {word[:STEM] for word in new if word not in _DENYING}
        for old in _clauses(claim.feedback):
            told = {word[:STEM] for word in old}
            whole = len(stated) >= SHARED_WORDS and stated <= told and len(told - stated) <= 1
            if (
                whole
                and not _NOT.intersection(old)
                and any(word[:STEM] in stated and len(word) > 2 and _learnt(claim, word) for word in old)
            ):
                return True
    return False


def _clauses(text: str) -> list[list[str]]:
    """The words of each clause, with "n't" as a "not" of its own."""
    return [_words(clause) for clause in re.split(r"[,.;:!?]+(?:\s|$)", text.replace("’", "'").replace("n't", " not"))]


def _learnt(claim: Claim, phrase: str) -> bool:
    """A taught reply says it, and no prompt of the user's does."""
    asked = [s.prompt for s in claim.samples if not s.imagined]
    return any(_says(s.response, phrase) for s in claim.samples) and not any(_says(prompt, phrase) for prompt in asked)


def _says(text: str, phrase: str) -> bool:
    return f" {' '.join(_words(phrase))} " in f" {' '.join(_words(text))} "


async def share_lost(claim: Claim, text: str, thing: str, inference: InferenceBackend) -> float:
    """How much of what its feedback does for the likelihood of the claim's replies is gone where the new feedback is told instead.

    Asked of at most `SAMPLES` replies that say `thing`, of different conversations where there are several.
    """
    saying = [sample for sample in claim.samples if _says(sample.response, thing)]
    replies = [*{sample.prompt_token_ids: sample for sample in saying}.values()][:SAMPLES]
    try:
        logps = await asyncio.gather(*(_logp(s, told, inference) for told in ("", claim.feedback, text) for s in replies))
    except ContextOverflow:  # told this, the conversation is too long to ask
        return 0.0
    plain, told, instead = (sum(logps[at : at + len(replies)]) for at in range(0, len(logps), len(replies)))
    return (told - instead) / (told - plain) if told > plain else 0.0


async def _logp(sample: DistillBatchItem, feedback: str, inference: InferenceBackend) -> float:
    messages = hindsight_messages(sample.messages, feedback)
    request = GenerationRequest(messages=messages, template_kwargs=sample.template_kwargs, background=True)
    return sum((await inference.score(request, sample.response_token_ids)).logprobs)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’]\w+)*", text.casefold().replace("’", "'"))


def _tokens(text: str) -> tuple[str, ...]:
    """Words, with everything in quotes as one."""
    found: list[str] = []
    at = 0
    for quote in _QUOTE.finditer(text):
        found += [*_words(text[at : quote.start()]), " ".join(_words(quote[1] or quote[2]))]
        at = quote.end()
    return (*found, *_words(text[at:]))
