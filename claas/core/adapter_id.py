"""Adapter ids: parsed once, here, and spelled injectively wherever a flat name is needed.

`user/a-b` and `user-a/b` are different adapters, so `/` becomes `~`, which no id may contain.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from claas.core.errors import BadRequest

MAX_ID_CHARS = 128
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def parse_adapter_id(raw: str, *, param: str = "lora_id") -> str:
    """Return `raw` if it is a valid adapter id: 1 to 4 segments of letters, digits, '.', '_', '-', joined by '/'.

    Raises:
        BadRequest: anything else, among it empty segments, leading dots, `..`, control characters and `@`.
    """
    segments = raw.split("/")
    if len(raw) > MAX_ID_CHARS or len(segments) > 4 or not all(_SEGMENT.fullmatch(s) for s in segments):
        raise BadRequest(
            f"{raw[:MAX_ID_CHARS]!r} is not an adapter id: use up to four names joined by '/', each beginning with a letter or digit "
            f"and made of letters, digits, '.', '_' and '-' (at most {MAX_ID_CHARS} characters in all)",
            param=param,
        )
    return raw


def flat_name(lora_id: str) -> str:
    """The id as one file name. Injective, since '~' is not allowed in ids."""
    return lora_id.replace("/", "~")


def vllm_name(lora_id: str, version: int, made: datetime | None = None) -> str:
    """The name under which a server that knows only flat names serves this version.

    With the time at which it was made, it is another name for an adapter that was deleted and made anew.
    """
    when = f"-{int(made.timestamp() * 1_000_000):x}" if made else ""
    return f"claas-{flat_name(lora_id)}-v{version}{when}"


@dataclass(frozen=True, slots=True)
class ModelName:
    """What a request's `model` field says: an adapter and, if pinned, its version."""

    lora_id: str
    version: int | None


def parse_model_name(raw: str) -> ModelName:
    """Split `lora_id` or `lora_id@version`.

    Raises:
        BadRequest: not an adapter id, or the version is not a whole number from 0.
    """
    lora_id, at, version = raw.partition("@")
    if at and not re.fullmatch(r"[0-9]{1,9}", version):
        raise BadRequest(f"{raw[:MAX_ID_CHARS]!r} pins no version: write 'lora_id@3', a whole number from 0", param="model")
    return ModelName(parse_adapter_id(lora_id, param="model"), int(version) if at else None)
