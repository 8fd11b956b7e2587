"""Tokens and machines that are paid for, counted for whoever meters the task that uses them. Backends that cost nothing count nothing."""

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
    """Tokens by use, seconds by GPU, and their price; None where one of them has none."""

    def __init__(self) -> None:
        self.tokens: dict[TokenUse, int] = {}
        self.gpu_seconds: dict[str, float] = {}
        self.price: float | None = 0.0

    def add(self, use: TokenUse, tokens: int, price: float | None) -> None:
        self.tokens[use] = self.tokens.get(use, 0) + tokens
        self._pay(None if price is None else tokens * price / PER)

    def add_machine(self, gpu: str, seconds: float, price: float | None) -> None:
        self.gpu_seconds[gpu] = round(self.gpu_seconds.get(gpu, 0.0) + seconds, 3)
        self._pay(None if price is None else seconds * price)

    def _pay(self, price: float | None) -> None:
        self.price = None if price is None or self.price is None else self.price + price

    @property
    def anything(self) -> bool:
        """Whether there is something to pay for."""
        return bool(self.tokens or self.gpu_seconds)

    def told(self) -> dict[str, Any]:
        """For a record."""
        machines = {"gpu_seconds": self.gpu_seconds} if self.gpu_seconds else {}
        return {**{f"{use}_tokens": n for use, n in self.tokens.items()}, **machines, "price": self.price}


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


def count_machine(gpu: str, seconds: float, price: float | None) -> None:
    """Tell whoever meters this task. `price` is of a second, None if it is not known."""
    for usage in _meters.get():
        usage.add_machine(gpu, seconds, price)
