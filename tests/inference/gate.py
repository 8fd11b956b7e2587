"""A tiny model whose forwards can be watched, held and broken: hooks on a real module, which its trees inherit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from claas.models.base_model import LoadedModel
from tests.models.tiny import load_tiny_model


async def until(happened: Callable[[], Awaitable[bool]]) -> None:
    """Until something that only the decoding thread does has happened; fails after ten seconds."""
    async with asyncio.timeout(10):
        while not await happened():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.001)


class Gate:
    """`seen` holds the (B, T) ids of every forward so far, `threads` those that computed them.

    After `close`, each forward waits for one `let`; `broken_by` breaks those that read this id.
    """

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []
        self.threads: set[threading.Thread] = set()
        self.broken_by: int | None = None
        self._permits = threading.Semaphore(0)
        self._closed = False
        self._arrived = threading.Semaphore(0)

    def close(self) -> None:
        self._closed = True

    def let(self, forwards: int = 1) -> None:
        self._permits.release(forwards)

    def open(self) -> None:
        """Let everything through from now on."""
        self._closed = False
        self._permits.release(1)

    async def held(self) -> None:
        """Until a forward waits at the gate that did not wait there at the last call."""
        assert await asyncio.to_thread(self._arrived.acquire, timeout=10)

    def forward(self, ids_BT: Tensor) -> None:
        if self._closed:
            self._arrived.release()
            self._permits.acquire()
        self.seen.append(ids_BT.tolist())
        self.threads.add(threading.current_thread())
        if self.broken_by is not None and bool((ids_BT == self.broken_by).any()):
            raise RuntimeError("a forward broke")


def gated_model(folder: Path) -> tuple[LoadedModel, Gate]:
    """The tiny model of `folder`, behind a gate of its own."""
    model, gate = load_tiny_model(folder), Gate()

    # A function, since a tree is a deep copy, and functions are copied as themselves.
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        gate.forward(kwargs["input_ids"])

    model.module.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    return model, gate
