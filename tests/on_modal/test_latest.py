"""Other services move what serves: how long it is remembered, and that a lesson begins from what is true, or does not begin."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from claas.adapters.filesystem import FilesystemAdapterStore
from claas.core.errors import BackendUnavailable, NotFound
from claas.core.types import AdapterVersion, LoraInitRequest
from claas.training.engine.modal import FRESH_S, USABLE_S, ModalEngine
from tests.models.tiny import load_tiny_model
from tests.on_modal.lessons import A, lesson


class Store(FilesystemAdapterStore):
    """Counts who asks for the latest version, can keep one waiting, and fails when it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, keep_versions=10)
        self.asked = 0
        self.fails = False
        self.read, self.may_tell = threading.Event(), threading.Event()
        self.may_tell.set()

    def latest(self, lora_id: str) -> int:
        self.asked += 1
        if self.fails:
            raise BackendUnavailable("down", retry_after_s=1)
        number = super().latest(lora_id)
        self.read.set()
        assert self.may_tell.wait(10)
        return number


class Lease:
    """One that can be lost."""

    def __init__(self) -> None:
        self.lost = False

    @asynccontextmanager
    async def hold(self, lora_id: str) -> AsyncIterator[None]:
        yield

    def check(self, lora_id: str) -> None:
        if self.lost:
            raise BackendUnavailable("the lease was lost")


class NoCalls:
    async def check(self) -> None: ...

    async def distill(self, call: str, request: str, phase: object) -> str:
        raise AssertionError("no lesson was expected")

    async def aclose(self) -> None: ...


@dataclass
class Clock:
    seconds: float = 1000.0

    def __call__(self) -> float:
        return self.seconds


@dataclass
class World:
    engine: ModalEngine
    store: Store
    lease: Lease
    clock: Clock

    def another_service_moves_it(self, version: int) -> None:
        FilesystemAdapterStore(self.store._root, keep_versions=10).set_latest(A, version)

    async def served(self) -> int:
        return (await self.engine.lora_runtime_ref(A)).version

    async def looked_behind(self) -> None:
        """Until nobody looks any more."""
        await asyncio.gather(*self.engine._refreshing.values())


@pytest.fixture(name="world")
async def _world(tmp_path: Path, tiny_model_dir: Path) -> AsyncIterator[World]:
    """With an adapter of two versions, of which the first serves and is remembered."""
    store, lease, clock = Store(tmp_path), Lease(), Clock()
    model = load_tiny_model(tiny_model_dir)
    engine = ModalEngine(store, model, NoCalls(), lease, price=lambda gpu: None, now=clock)
    await engine.init_lora(LoraInitRequest(lora_id=A))
    with store.stage(AdapterVersion(lora_id=A, version=1, base_model=model.id, parent=0)) as staging:
        shutil.copytree(store.path(A, 0), staging.path, dirs_exist_ok=True)
    world = World(engine, store, lease, clock)
    assert await world.served() == 0
    yield world
    await engine.aclose()


async def test_it_is_remembered_for_a_moment(world: World) -> None:
    asked = world.store.asked
    world.another_service_moves_it(1)
    world.clock.seconds += FRESH_S - 0.1
    assert [await world.served() for _ in range(3)] == [0, 0, 0]
    assert world.store.asked == asked


async def test_then_it_is_looked_up_once_behind_those_who_ask(world: World) -> None:
    world.another_service_moves_it(1)
    world.clock.seconds += FRESH_S + 0.1
    world.store.may_tell.clear()
    asked = world.store.asked
    assert [await world.served() for _ in range(3)] == [0, 0, 0], "nobody waits for Modal"
    world.store.may_tell.set()
    await world.looked_behind()
    assert (await world.served(), world.store.asked) == (1, asked + 1)


async def test_what_is_too_old_is_not_served(world: World) -> None:
    world.another_service_moves_it(1)
    world.clock.seconds += USABLE_S + 0.1
    assert await world.served() == 1


async def test_without_modal_it_is_served_for_a_while_and_then_refused(world: World) -> None:
    world.store.fails = True
    world.clock.seconds += FRESH_S + 0.1
    assert await world.served() == 0
    await world.looked_behind()
    assert await world.served() == 0
    world.clock.seconds += USABLE_S
    with pytest.raises(BackendUnavailable):
        await world.served()


async def test_one_that_another_service_deleted_is_soon_not_found(world: World) -> None:
    FilesystemAdapterStore(world.store._root, keep_versions=10).delete(A)
    world.clock.seconds += FRESH_S + 0.1
    assert await world.served() == 0
    await world.looked_behind()
    with pytest.raises(NotFound):
        await world.served()


async def test_who_holds_the_adapter_begins_from_the_true_latest(world: World) -> None:
    world.another_service_moves_it(1)
    async with world.engine.exclusive(A):
        assert await world.served() == 1


async def test_what_was_looked_up_before_is_not_remembered_by_who_holds_it(world: World) -> None:
    world.clock.seconds += FRESH_S + 0.1
    world.store.read.clear()
    world.store.may_tell.clear()
    await world.served()
    assert await asyncio.to_thread(world.store.read.wait, 10)
    world.another_service_moves_it(1)
    async with world.engine.exclusive(A):
        world.store.may_tell.set()
        await world.looked_behind()
        assert await world.served() == 1


async def test_without_its_lease_nothing_is_changed(world: World) -> None:
    world.lease.lost = True
    engine = world.engine
    for change in (engine.promote(A, 1), engine.discard(A, 1), engine.delete_lora(A), engine.distill(lesson())):
        with pytest.raises(BackendUnavailable, match="lease was lost"):
            await change
    with pytest.raises(BackendUnavailable, match="lease was lost"):
        await engine.init_lora(LoraInitRequest(lora_id="me/b"))
    assert [version.version for version in await engine.versions(A)] == [0, 1] and await world.served() == 0
