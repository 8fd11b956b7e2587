"""Tokens that are paid for, counted for whoever meters the task that uses them. Backends that cost nothing count nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

TokenUse = Literal["sampled", "scored", "trained"]
"""Drawn; read (prompts, and texts that are judged); or sent through a backward pass."""
PER = 1_000_000
"""Prices are for so many tokens."""


class Usage:
    """Tokens by use, and their price; None where one of them has none."""

    def __init__(self) -> None:
        self.tokens: dict[TokenUse, int] = {}
        self.price: float | None = 0.0

    def add(self, use: TokenUse, tokens: int, price: float | None) -> None:
        self.tokens[use] = self.tokens.get(use, 0) + tokens
        self.price = None if price is None or self.price is None else self.price + tokens * price / PER

    def told(self) -> dict[str, Any]:
        """For a record."""
        return {**{f"{use}_tokens": n for use, n in self.tokens.items()}, "price": self.price}


_meters: ContextVar[tuple[Usage, ...]] = ContextVar("meters", default=())
_account: ContextVar[str | None] = ContextVar("account", default=None)


@contextmanager
def metered() -> Iterator[Usage]:
    """Counts what the block uses, and all tasks that it starts."""
    usage = Usage()
    token = _meters.set((*_meters.get(), usage))
    try:
        yield usage
    finally:
        _meters.reset(token)


@contextmanager
def charging(lora_id: str) -> Iterator[None]:
    """What the block uses is on this adapter's account, whoever speaks in it."""
    token = _account.set(lora_id)
    try:
        yield
    finally:
        _account.reset(token)


def account() -> str | None:
    """The adapter that is being charged, if one is."""
    return _account.get()


def count(use: TokenUse, tokens: int, price: float | None) -> None:
    """Tell whoever meters this task. `price` is of a million tokens, None if it is not known."""
    for usage in _meters.get():
        usage.add(use, tokens, price)
