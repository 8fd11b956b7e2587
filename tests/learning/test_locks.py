"""The locks of the adapters, and the engine that keeps other services out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from claas.core.errors import AdapterBusy
from claas.learning.locks import AdapterLocks
from tests.doubles.engine import MemoryEngine


class SharedEngine(MemoryEngine):
    """One whose adapters other services change too; those in `taken` are theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: set[str] = set()
        self.seen: list[str] = []

    @asynccontextmanager
    async def exclusive(self, lora_id: str) -> AsyncIterator[None]:
        if lora_id in self.taken:
            raise AdapterBusy(f"adapter {lora_id!r} is being changed by another service", param="lora_id")
        self.seen.append(f"in {lora_id}")
        try:
            yield
        finally:
            self.seen.append(f"out {lora_id}")


async def test_an_adapter_is_kept_from_other_services_while_it_is_held() -> None:
    engine = SharedEngine()
    locks = AdapterLocks(0.05, engine)
    async with locks.hold("me/a"):
        assert engine.seen == ["in me/a"]
        with pytest.raises(AdapterBusy, match="earlier lesson"):
            async with locks.hold("me/a"):
                pass
        assert engine.seen == ["in me/a"]  # one's own lessons wait here
    assert engine.seen == ["in me/a", "out me/a"]


async def test_an_adapter_that_another_service_holds_is_busy_and_then_free() -> None:
    engine = SharedEngine()
    locks = AdapterLocks(0.05, engine)
    engine.taken.add("me/a")
    for _ in range(2):
        with pytest.raises(AdapterBusy, match="another service"):
            async with locks.hold("me/a"):
                pass
    engine.taken.clear()
    async with locks.hold("me/a"):
        pass


async def test_an_engine_that_shares_nothing_keeps_nobody_out() -> None:
    async with MemoryEngine().exclusive("me/a"), MemoryEngine().exclusive("me/a"):
        pass
