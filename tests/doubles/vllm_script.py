"""What the double of vLLM says, token by token: scripted text, its exact tokens, stop strings, and logprobs that any of them has.

No arithmetic of a model is done: a reply and its logprobs are functions of the adapter's weights (its voice), the prompt and the seed.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

BASE_VOICE = "base"
WORDS = ("theory", "thing", "other", "and then", "naïve", "10 €", "☃", "😀", "one came in", "is there")
UNFINISHED = "\ufffd"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a reply depends on. `dice` is 0 for greedy sampling."""

    voice: str
    prompt: str
    dice: int = 0
    tools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Said:
    """A reply before it is tokens. `calls` are (name, arguments as JSON)."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()


Script = Callable[[Asked], Said]


def speak(asked: Asked) -> Said:
    """A few words, each with the voice that says it, or a call of the first tool: any mix of two versions shows."""
    dice = random.Random(f"{asked.voice}|{asked.prompt}|{asked.dice}")
    words = [f"{dice.choice(WORDS)}-{asked.voice}" for _ in range(dice.randint(3, 12))]
    if asked.tools:
        return Said(calls=((asked.tools[0], json.dumps({"said": words[0]}, ensure_ascii=False)),))
    return Said(" ".join(words))


def voices(text: str) -> set[str]:
    """Who spoke in a reply of `speak`; of a reply that was cut, its last word is left out."""
    return set(re.findall(r"-(\w+)(?= )", text + (" " if re.search(r"-(base|[0-9a-f]{8})$", text) else "")))


Kind = Literal["marker", "reasoning", "content", "name", "arguments"]


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the raw text that the model emits, and what vLLM's parsers make of it. `call` counts tool calls."""

    kind: Kind
    text: str
    call: int = 0


def parts(said: Said, *, parsed: bool) -> list[Part]:
    """The raw text in parts; without parsers (`parsed` False) all of it is content, markers too."""
    found = [Part("marker", "<think>"), Part("reasoning", said.reasoning), Part("marker", "</think>")] if said.reasoning else []
    found.append(Part("content", said.text))
    for number, (name, arguments) in enumerate(said.calls):
        found += [Part("marker", '<tool_call>\n{"name": "'), Part("name", name, number), Part("marker", '", "arguments": ')]
        found += [Part("arguments", arguments, number), Part("marker", "}\n</tool_call>")]
    whole = [part for part in found if part.text]
    return whole if parsed else [Part("content", "".join(part.text for part in whole))]


def deltas(script: Sequence[Part], begin: int, end: int) -> list[Part]:
    """What lies between two offsets of the raw text. A name counts where it ends: it is sent whole."""
    found: list[Part] = []
    at = 0
    for part in script:
        first, last = max(begin, at), min(end, at + len(part.text))
        if part.kind == "name":
            if begin < at + len(part.text) <= end:
                found.append(part)
        elif first < last:
            found.append(Part(part.kind, part.text[first - at : last - at], part.call))
        at += len(part.text)
    return found


@dataclass(frozen=True, slots=True)
class Step:
    """One decoding step: a token (None where a reply is aborted), the text it sets free, and how the reply ended."""

    token: int | None
    text: str = ""
    finish: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """When a reply ends. `max_tokens` is already clipped to the context."""

    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    include_stop: bool = False


@dataclass(slots=True)
class Decoder:
    """Tokens → text as vLLM's detokeniser does: an unfinished character waits, and so does what may become a stop string."""

    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    ids: list[int] = field(default_factory=list)
    text: str = ""
    sent: int = 0

    def push(self, token: int) -> str | None:
        """Take one token. The stop string that it completes, if any; the text is then cut there."""
        self.ids.append(token)
        decoded = self.tokenizer.decode(self.ids, skip_special_tokens=True).rstrip(UNFINISHED)
        before, self.text = len(self.text), decoded
        ends = [(at + len(stop), order, stop) for order, stop in enumerate(self.limits.stop) if (at := self._find(stop, before)) >= 0]
        if not ends:
            return None
        end, _, stop = min(ends)
        self.text = self.text[: end if self.limits.include_stop else end - len(stop)]
        return stop

    def _find(self, stop: str, before: int) -> int:
        return self.text.find(stop, max(0, before + 1 - len(stop))) if len(self.text) > before else -1

    def take(self, *, last: bool) -> str:
        """The text that may be sent now."""
        held = 0 if last or self.limits.include_stop else max((len(stop) for stop in self.limits.stop), default=1) - 1
        until = max(self.sent, len(self.text) - held)
        piece, self.sent = self.text[self.sent : until], until
        return piece


def plan(tokenizer: PreTrainedTokenizerBase, raw: str, limits: Limits) -> list[Step]:
    """The whole reply, step by step."""
    eos = tokenizer.eos_token_id
    ids = list(tokenizer.encode(raw, add_special_tokens=False)) or [eos]
    if limits.ignore_eos:
        ids = (ids * (1 + limits.max_tokens // len(ids)))[: limits.max_tokens]
    else:
        ids.append(eos)
    decoder, steps = Decoder(tokenizer, limits), []
    for count, token in enumerate(ids, start=1):
        by_id = token in limits.stop_token_ids
        ended = by_id or (token == eos and not limits.ignore_eos)
        stop: str | int | None = token if by_id else None
        if not ended:  # the token that ends a reply has no text
            stop = decoder.push(token)
            ended = stop is not None
        finish = "stop" if ended else "length" if count == limits.max_tokens else None
        steps.append(Step(token, decoder.take(last=finish is not None), finish, stop))
        if finish:
            break
    return steps


def logprob_of(voice: str, context: Sequence[int], token: int) -> float:
    """Of this token after these, in nats: exactly representable, above −0.5, and another for another voice."""
    return -(zlib.crc32(f"{voice}|{len(context)}|{list(context[-8:])}|{token}".encode()) % 512) / 1024


def ranked(voice: str, context: Sequence[int], token: int, k: int, size: int) -> list[tuple[int, float]]:
    """The token first, then `k` − 1 others that are less likely (at least the token)."""
    own = logprob_of(voice, context, token)
    return [(token, own), *(((token + rank) % size, own - rank) for rank in range(1, k))]
