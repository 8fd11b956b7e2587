"""Adapter versions in memory: loaded off the decoding thread when first asked for, the least recently used let go first.

A version that a running reply holds stays alive through that reply, whatever happens here.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from claas.core.types import LoraRuntimeRef
from claas.models.lora import LoraWeights

Load = Callable[[LoraRuntimeRef], Awaitable[LoraWeights]]


@dataclass(frozen=True, slots=True)
class _Entry:
    lora_id: str
    weights: asyncio.Task[LoraWeights]


class LoraCache:
    """Versions of at most `capacity` bytes in all, the latest at least, each loaded once however many ask at the same time.

    For one event loop.
    """

    def __init__(self, load: Load, capacity: int) -> None:
        self._load = load
        self._capacity = capacity
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, ref: LoraRuntimeRef) -> LoraWeights:
        """The version's weights. Raises what loading raises; a failure is not kept."""
        entry = self._entries.get(ref.vllm_name)
        if entry is None:
            entry = _Entry(ref.lora_id, asyncio.ensure_future(self._load(ref)))
            self._entries[ref.vllm_name] = entry
        self._entries.move_to_end(ref.vllm_name)
        try:
            # Shielded: others may wait for the same version, and the next request will want it.
            weights = await asyncio.shield(entry.weights)
        except Exception:
            if self._entries.get(ref.vllm_name) is entry:
                del self._entries[ref.vllm_name]
            raise
        self._trim()
        return weights

    def _trim(self) -> None:
        """Let go of the least recently used of those that are loaded."""
        loaded = {name: e.weights.result().nbytes for name, e in self._entries.items() if e.weights.done() and _went_well(e.weights)}
        size = sum(loaded.values())
        for name in list(loaded)[:-1]:
            if size <= self._capacity:
                return
            size -= loaded[name]
            del self._entries[name]

    def forget(self, lora_id: str) -> None:
        """Drop every version of an adapter, those still loading too: its name may come to mean something else."""
        for name in [name for name, entry in self._entries.items() if entry.lora_id == lora_id]:
            del self._entries[name]


def _went_well(task: asyncio.Task[LoraWeights]) -> bool:
    return not task.cancelled() and task.exception() is None
