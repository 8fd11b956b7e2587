"""The cache of adapter versions: one load for many, failures forgotten, the oldest let go, a deleted adapter gone for good."""

from __future__ import annotations

import asyncio

import pytest
import torch

from claas.core.errors import NotFound
from claas.core.types import LoraRuntimeRef
from claas.inference.lora_cache import LoraCache
from claas.models.lora import LoraWeights

SIZE = 1000


class Disk:
    """Loads when told to, and counts."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.ready = asyncio.Event()
        self.missing = False

    async def load(self, ref: LoraRuntimeRef) -> LoraWeights:
        self.loads.append(ref.vllm_name)
        await self.ready.wait()
        if self.missing:
            raise NotFound("gone")
        return LoraWeights(
            ref.vllm_name, {"layer": (torch.zeros(1, SIZE // 2, dtype=torch.uint8), torch.zeros(SIZE // 2, 1, dtype=torch.uint8))}
        )


def ref(version: int, lora_id: str = "a") -> LoraRuntimeRef:
    return LoraRuntimeRef(lora_id=lora_id, version=version, vllm_name=f"{lora_id}-v{version}", lora_path="-")


async def test_many_ask_and_one_load_answers_all() -> None:
    disk = Disk()
    cache = LoraCache(disk.load, 4 * SIZE)
    asking = [asyncio.ensure_future(cache.get(ref(1))) for _ in range(5)]
    await asyncio.sleep(0)
    disk.ready.set()
    assert len(set(map(id, await asyncio.gather(*asking)))) == 1
    assert disk.loads == ["a-v1"]


async def test_one_who_leaves_does_not_stop_the_load_for_others() -> None:
    disk = Disk()
    cache = LoraCache(disk.load, 4 * SIZE)
    leaving, staying = (asyncio.ensure_future(cache.get(ref(1))) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    disk.ready.set()
    assert (await staying).name == "a-v1"
    assert disk.loads == ["a-v1"]


async def test_a_failure_is_told_and_forgotten() -> None:
    disk = Disk()
    disk.ready.set()
    disk.missing = True
    cache = LoraCache(disk.load, 4 * SIZE)
    with pytest.raises(NotFound):
        await cache.get(ref(1))
    assert len(cache) == 0
    disk.missing = False
    assert (await cache.get(ref(1))).name == "a-v1"


async def test_the_least_recently_used_goes_first() -> None:
    disk = Disk()
    disk.ready.set()
    cache = LoraCache(disk.load, 2 * SIZE)
    for version in (1, 2, 1, 3, 1, 2):
        await cache.get(ref(version))
    assert disk.loads == ["a-v1", "a-v2", "a-v3", "a-v2"]
    assert len(cache) == 2


async def test_one_that_is_larger_than_all_room_is_kept_alone() -> None:
    disk = Disk()
    disk.ready.set()
    cache = LoraCache(disk.load, SIZE // 2)
    for version in (1, 2, 2):
        await cache.get(ref(version))
    assert disk.loads == ["a-v1", "a-v2"] and len(cache) == 1


async def test_a_forgotten_adapter_is_loaded_anew_even_if_it_was_just_loading() -> None:
    disk = Disk()
    cache = LoraCache(disk.load, 4 * SIZE)
    old = asyncio.ensure_future(cache.get(ref(1)))
    other = asyncio.ensure_future(cache.get(ref(1, "b")))
    await asyncio.sleep(0)
    cache.forget("a")
    new = asyncio.ensure_future(cache.get(ref(1)))
    disk.ready.set()
    assert await new is not await old
    assert await cache.get(ref(1, "b")) is await other
    assert disk.loads == ["a-v1", "b-v1", "a-v1"]
