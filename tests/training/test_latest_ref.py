"""The latest version is remembered, and never for longer than it is the latest."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from claas.adapters.filesystem import FilesystemAdapterStore
from claas.core.errors import NotFound
from claas.core.types import AdapterVersion, LoraInitRequest
from claas.models.compute import ComputeShare
from claas.training.engine.local import LocalEngine
from tests.models.tiny import load_tiny_model

A = "me/a"


class Store(FilesystemAdapterStore):
    """Counts who asks for the latest version, and can keep one waiting for its answer."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, keep_versions=10)
        self.asked = 0
        self.read, self.may_tell = threading.Event(), threading.Event()
        self.may_tell.set()

    def latest(self, lora_id: str) -> int:
        number = super().latest(lora_id)
        self.asked += 1
        self.read.set()
        assert self.may_tell.wait(10)
        return number


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture(name="engine")
async def _engine(store: Store, tiny_model_dir: Path) -> AsyncIterator[LocalEngine]:
    """With an adapter of two versions, of which the first serves."""
    model = load_tiny_model(tiny_model_dir)
    engine = LocalEngine(store, model, ComputeShare(1))
    await engine.init_lora(LoraInitRequest(lora_id=A))
    with store.stage(AdapterVersion(lora_id=A, version=1, base_model=model.id, parent=0)) as staging:
        shutil.copytree(store.path(A, 0), staging.path, dirs_exist_ok=True)
    yield engine
    await engine.aclose()


async def test_it_is_looked_up_once_and_again_when_it_moves(engine: LocalEngine, store: Store) -> None:
    assert [(await engine.lora_runtime_ref(A)).version for _ in range(3)] == [0, 0, 0]
    assert store.asked == 1
    await engine.promote(A, 1)
    assert [(await engine.lora_runtime_ref(A)).version for _ in range(3)] == [1, 1, 1]
    assert store.asked == 2


async def test_what_was_read_before_it_moved_is_not_remembered(engine: LocalEngine, store: Store) -> None:
    store.may_tell.clear()
    early = asyncio.create_task(engine.lora_runtime_ref(A))
    await asyncio.to_thread(store.read.wait, 10)
    await engine.promote(A, 1)
    store.may_tell.set()
    assert (await early).version == 0
    assert (await engine.lora_runtime_ref(A)).version == 1


async def test_a_deleted_adapter_is_not_found_and_one_made_again_begins_anew(engine: LocalEngine) -> None:
    await engine.promote(A, 1)
    assert (await engine.lora_runtime_ref(A)).version == 1
    await engine.delete_lora(A)
    with pytest.raises(NotFound):
        await engine.lora_runtime_ref(A)
    await engine.init_lora(LoraInitRequest(lora_id=A))
    assert (await engine.lora_runtime_ref(A)).version == 0


async def test_one_made_again_has_another_name_where_it_is_served(engine: LocalEngine) -> None:
    """Serving engines cache by name, and other services may have the one that is gone."""
    before = await engine.lora_runtime_ref(A, 0)
    await engine.delete_lora(A)
    await engine.init_lora(LoraInitRequest(lora_id=A))
    again = await engine.lora_runtime_ref(A, 0)
    assert again.vllm_name != before.vllm_name and again.vllm_name == (await engine.lora_runtime_ref(A)).vllm_name
