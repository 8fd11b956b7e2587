"""One lock for each adapter: lessons, rollbacks and deletions of one adapter never overlap, whichever service does them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from claas.core.errors import AdapterBusy
from claas.training.engine.base import TrainingEngine


class AdapterLocks:
    """Locks by adapter id, forgotten when nobody holds or awaits them. The engine keeps other services out."""

    def __init__(self, timeout_s: float, engine: TrainingEngine) -> None:
        self._timeout_s = timeout_s
        self._engine = engine
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._users: dict[str, int] = defaultdict(int)

    @asynccontextmanager
    async def hold(self, lora_id: str, *, patient: bool = False) -> AsyncIterator[None]:
        """Hold the adapter.

        Raises AdapterBusy when another holds it past the timeout, unless `patient`; BackendUnavailable where that cannot be known.
        """
        lock = self._locks[lora_id]
        self._users[lora_id] += 1
        try:
            try:
                async with asyncio.timeout(None if patient else self._timeout_s):
                    await lock.acquire()
            except TimeoutError:
                raise AdapterBusy(
                    f"adapter {lora_id!r} is still learning an earlier lesson after {self._timeout_s:g} s: try again later", param="lora_id"
                ) from None
            try:
                async with AsyncExitStack() as others:
                    await self._keep_out(others, lora_id, patient)
                    yield
            finally:
                lock.release()
        finally:
            self._users[lora_id] -= 1
            if not self._users[lora_id]:
                del self._users[lora_id], self._locks[lora_id]

    async def _keep_out(self, stack: AsyncExitStack, lora_id: str, patient: bool) -> None:
        while True:
            try:
                await stack.enter_async_context(self._engine.exclusive(lora_id))
                return
            except AdapterBusy:
                if not patient:
                    raise
