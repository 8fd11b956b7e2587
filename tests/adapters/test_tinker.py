"""Adapters on a Tinker server, on record: versions appear whole, numbers are never used again, and an upstream file is taken over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from claas.adapters.tinker import TinkerAdapter, TinkerAdapters, TinkerVersion, import_state_file
from claas.core.errors import ConfigurationError, Conflict, NotFound
from claas.core.types import AdapterVersion
from claas.storage.database import Database

A, BASE = "me/a", "Qwen/Qwen3-30B-A3B"


@pytest.fixture
def database() -> Iterator[Database]:
    database = Database("sqlite://")
    database.migrate()
    yield database
    database.close()


@pytest.fixture
async def adapters(database: Database) -> TinkerAdapters:
    found = TinkerAdapters(database, keep_versions=3)
    await found.create(TinkerAdapter(lora_id=A, base_model=BASE, rank=8, train_attn=False))
    return found


async def published(adapters: TinkerAdapters, parent: int) -> TinkerVersion:
    number = await adapters.reserve(A, f"run-{parent}")
    manifest = AdapterVersion(
        lora_id=A, version=number, parent=parent, base_model=BASE, feedback_ids=("fb-1",), metrics={"loss_before": 1.0}
    )
    version = TinkerVersion(
        manifest=manifest, state_path=f"tinker://run/weights/v{number}", sampler_path=f"tinker://run/sampler_weights/v{number}"
    )
    await adapters.publish(version)
    return version


async def test_what_was_published_is_read_back_whole(adapters: TinkerAdapters) -> None:
    first = await published(adapters, 0)
    assert await adapters.version(A, 1) == first
    assert [v.manifest.version for v in await adapters.versions(A)] == [0, 1]
    assert (await adapters.version(A)).paths == (), "version 0 is the base model"
    assert await adapters.adapter(A) == TinkerAdapter(lora_id=A, base_model=BASE, rank=8, train_attn=False)


async def test_a_version_being_saved_is_not_there_and_is_found_after_a_crash(adapters: TinkerAdapters) -> None:
    number = await adapters.reserve(A, "run-7")
    with pytest.raises(NotFound):
        await adapters.version(A, number)
    with pytest.raises(NotFound):
        await adapters.set_latest(A, number)
    assert await adapters.unfinished() == [("run-7", A, number)]
    assert await adapters.unfinished() == []
    assert (await published(adapters, 0)).manifest.version == number + 1, "its number is gone"


async def test_a_number_that_came_to_nothing_is_gone(adapters: TinkerAdapters) -> None:
    number = await adapters.reserve(A, "run-7")
    await adapters.unreserve(A, number)
    assert await adapters.unfinished() == []
    assert (await published(adapters, 0)).manifest.version == number + 1
    await adapters.unreserve(A, number + 1)
    assert (await adapters.version(A, number + 1)).paths, "what is published stays"


async def test_a_version_of_an_adapter_that_was_deleted_meanwhile_is_not_published(adapters: TinkerAdapters) -> None:
    number = await adapters.reserve(A, "run-1")
    assert await adapters.delete(A) is not None
    with pytest.raises(NotFound):
        await adapters.publish(
            TinkerVersion(manifest=AdapterVersion(lora_id=A, version=number, base_model=BASE), state_path="tinker://r/weights/v1")
        )
    assert await adapters.delete(A) is None


async def test_the_oldest_versions_go_but_never_the_latest_or_its_parent(adapters: TinkerAdapters) -> None:
    for parent in (0, 1, 1):
        await published(adapters, parent)
    dropped = await adapters.set_latest(A, 3)
    assert [v.manifest.version for v in dropped] == [0]
    assert [v.manifest.version for v in await adapters.versions(A)] == [1, 2, 3]
    await published(adapters, 3)
    assert [v.manifest.version for v in await adapters.set_latest(A, 3)] == [2], "1 is the parent of 3"
    with pytest.raises(Conflict):
        await adapters.discard(A, 3)


async def test_a_taken_name_is_a_conflict_and_changes_nothing(adapters: TinkerAdapters) -> None:
    await published(adapters, 0)
    with pytest.raises(Conflict, match=repr(A)):
        await adapters.create(TinkerAdapter(lora_id=A, base_model=BASE, rank=4))
    assert len(await adapters.versions(A)) == 2


# --- upstream's tinker_state.json ---

ENTRY: dict[str, Any] = {
    "tinker_path": "tinker://run-1/weights/step-5", "base_model": BASE, "rank": 16, "step": 5,
    "sampler_weights_path": "tinker://run-1/sampler_weights/step-5", "old_paths": ["tinker://run-0/weights/init"],
}  # fmt: skip


async def test_an_upstream_file_becomes_adapters_once(adapters: TinkerAdapters, tmp_path: Path) -> None:
    file = tmp_path / "tinker_state.json"
    file.write_text(json.dumps({"you/b": ENTRY, A: ENTRY, "of/another": ENTRY | {"base_model": "Qwen/Qwen3-8B"}}))
    lines = await import_state_file(adapters, file, BASE)
    assert [line.split("'")[1] for line in lines] == ["you/b", "of/another"]
    assert await adapters.adapters() == [A, "you/b"]
    assert (await adapters.adapter("you/b")).rank == 16
    assert (await adapters.version("you/b")).paths == (ENTRY["tinker_path"], ENTRY["sampler_weights_path"])
    assert (await adapters.version(A)).paths == (), "what is here already is left alone"
    assert len(await import_state_file(adapters, file, BASE)) == 1


@pytest.mark.parametrize(
    "written", ["{bad json", "[]", '{"a": 1}', json.dumps({"../a": ENTRY}), json.dumps({"a": ENTRY | {"tinker_path": "/etc/passwd"}})]
)
async def test_a_file_that_is_none_is_refused_whole(adapters: TinkerAdapters, tmp_path: Path, written: str) -> None:
    file = tmp_path / "tinker_state.json"
    file.write_text(written)
    with pytest.raises(ConfigurationError, match=r"tinker_state\.json"):
        await import_state_file(adapters, file, BASE)
    assert await adapters.adapters() == [A]
