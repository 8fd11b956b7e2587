"""From the decoding thread to the event loops of those who asked: results in order, one wake-up a step. It knows no tensors."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Outlet(Generic[T]):
    """Where the results of one job come out, on the event loop that asked for it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[T] = asyncio.Queue()

    def put(self, item: T) -> None:
        """On the event loop only."""
        self._items.put_nowait(item)

    async def get(self) -> T:
        """The next result, in the order they were sent."""
        return await self._items.get()


class Post:
    """Results of one step, handed over together: waking an event loop costs more than what it is woken for."""

    def __init__(self) -> None:
        self._items: defaultdict[asyncio.AbstractEventLoop, list[tuple[Outlet[Any], Any]]] = defaultdict(list)

    def send(self, outlet: Outlet[T], item: T) -> None:
        """Keep it for the next `flush`."""
        self._items[outlet.loop].append((outlet, item))

    def flush(self) -> None:
        """Wake each event loop once. What is for a loop closed meanwhile is dropped: nobody can read it."""
        items, self._items = self._items, defaultdict(list)
        for loop, batch in items.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_put_all, batch)


def _put_all(batch: list[tuple[Outlet[Any], Any]]) -> None:
    for outlet, item in batch:
        outlet.put(item)
