"""What the double of vLLM writes down, and what it can be told to do wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it came."""

    method: str
    path: str
    query: Mapping[str, str]
    body: Mapping[str, Any]

    def __str__(self) -> str:
        name = self.body.get("lora_name")
        return " ".join([self.path, *(f"{key}={value}" for key, value in self.query.items()), *([name] if name else [])])


@dataclass(slots=True)
class Fault:
    """What goes wrong with the `nth` call of `path` from now on, and with the `times` − 1 after it (None: all of them).

    status: answered `status` with `text`, nothing done. hang: never answered, nothing done. delay: done after `seconds`.
    lost: done, and the connection is cut instead of an answer. die: the server dies before it is done. die_after: after.
    half: of /sleep. A worker unmaps some of its weights and breaks; the engine takes itself for awake. Answered `status`.
    drop: the connection is cut after `tokens` streamed tokens. error: the stream breaks after them with an error event of `status`.
    """

    path: str
    do: Literal["status", "hang", "delay", "lost", "die", "die_after", "half", "drop", "error"]
    nth: int = 1
    times: int | None = 1
    status: int = 500
    text: str = "the double was told to fail"
    seconds: float = 0.0
    tokens: int = 0
    seen: int = 0

    def strikes(self, path: str) -> bool:
        if path != self.path:
            return False
        self.seen += 1
        return self.seen >= self.nth and (self.times is None or self.seen < self.nth + self.times)
