"""What of a raw reply the user sees: thinking and channel markup stripped. Pure text; knows no tokenizer and no model."""

from __future__ import annotations

import re

_OPEN, _CLOSE = "<think>", "</think>"
_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_CHANNEL_START = re.compile(r"\s*(?:<\|start\|>[^<]*)?<\|channel\|>")
_MESSAGE_END = re.compile(r"<\|(?:end|return|call|start)\|>")


def visible_text(raw: str) -> str:
    """Strip thinking blocks and keep only the final channel; text without such markup comes back as it is. Linear in time.

    A reply may begin inside its thinking (a lone `…</think>`, where the template opened the block) and may end there (an unclosed
    leading `<think>`, cut off by the token limit: nothing is visible yet). Tags that a reply only talks about stay.
    """
    return _final_channel(raw) if _CHANNEL_START.match(raw) else _without_thinking(raw)


def _final_channel(raw: str) -> str:
    final = []
    for part in raw.split(_CHANNEL)[1:]:
        header, found, content = part.partition(_MESSAGE)
        if found and header.split()[:1] == ["final"]:
            final.append(_MESSAGE_END.split(content, maxsplit=1)[0])
    return "".join(final)


def _without_thinking(raw: str) -> str:
    start = 0
    first_close = raw.find(_CLOSE)
    if first_close >= 0 and raw.find(_OPEN, 0, first_close) < 0:
        start = first_close + len(_CLOSE)
    kept = []
    stripped = start > 0
    while (opened := raw.find(_OPEN, start)) >= 0:
        closed = raw.find(_CLOSE, opened)
        if closed < 0:
            break
        kept.append(raw[start:opened])
        start = closed + len(_CLOSE)
        stripped = True
    rest = raw[start:]
    if opened >= 0 and not "".join((*kept, raw[start:opened])).strip():
        return ""
    text = "".join((*kept, rest))
    return text.lstrip() if stripped else text
