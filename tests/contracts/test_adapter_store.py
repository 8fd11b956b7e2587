"""What every AdapterStore promises. A new store joins by one line in `STORES`."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from claas.adapters.store import CONFIG, MANIFEST, WEIGHTS, AdapterStore
from claas.core.errors import BadRequest, Conflict, NotFound, StorageFull
from claas.core.types import AdapterVersion
from tests.adapters.stores import KEEP, Kept, Opens, filesystem, mounted, volume

STORES = [filesystem, mounted, pytest.param(volume, marks=pytest.mark.integration)]


@pytest.fixture(params=STORES)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    opens: Opens = request.param
    with opens(tmp_path / "adapters") as opened:
        yield opened


@pytest.fixture
def store(kept: Kept) -> AdapterStore:
    return kept.store


def publish(store: AdapterStore, lora_id: str = "me/a", parent: int | None = None, content: bytes = b"weights", **changes: object) -> int:
    manifest = AdapterVersion.model_validate({"lora_id": lora_id, "version": 0, "parent": parent, "base_model": "base"} | changes)
    with store.stage(manifest) as staging:
        (staging.path / WEIGHTS).write_bytes(content)
        (staging.path / CONFIG).write_bytes(b"{}")
    return staging.version


def create(store: AdapterStore, lora_id: str = "me/a") -> None:
    store.create(lora_id, "base")
    store.set_latest(lora_id, publish(store, lora_id))


def stage(store: AdapterStore, body: Callable[[Path], None]) -> Path:
    """Stage a version of me/a that `body` fills; the staging folder."""
    with store.stage(AdapterVersion(lora_id="me/a", version=0, parent=0, base_model="base")) as staging:
        (staging.path / WEIGHTS).write_bytes(b"begun")
        body(staging.path)
    return staging.path


def numbers(store: AdapterStore, lora_id: str = "me/a") -> list[int]:
    return [version.version for version in store.versions(lora_id)]


def test_a_version_is_read_back_as_it_was_staged(store: AdapterStore) -> None:
    store.create("me/a", "base")
    number = publish(store, content=b"12345", parent=None, feedback_ids=("fb-1",), metrics={"loss": 0.5, "deep": {"x": [1, None]}})
    version = store.version("me/a", number)
    assert (version.version, version.feedback_ids, version.metrics) == (0, ("fb-1",), {"loss": 0.5, "deep": {"x": [1, None]}})
    assert version.size_bytes == len(b"12345{}")
    assert store.versions("me/a") == [version]
    files = store.path("me/a", number)
    assert (files / WEIGHTS).read_bytes() == b"12345"
    assert AdapterVersion.model_validate_json((files / MANIFEST).read_bytes()) == version


def test_publishing_does_not_move_latest(store: AdapterStore) -> None:
    create(store)
    assert publish(store, parent=0) == 1
    assert store.latest("me/a") == 0
    store.set_latest("me/a", 1)
    assert store.latest("me/a") == 1
    store.set_latest("me/a", 0)
    assert store.latest("me/a") == 0
    assert numbers(store) == [0, 1]


def test_an_adapter_exists_from_its_first_latest_on(store: AdapterStore) -> None:
    assert not store.exists("me/a")
    store.create("me/a", "base")
    publish(store)
    assert not store.exists("me/a")
    assert store.adapters() == []
    with pytest.raises(NotFound):
        store.latest("me/a")
    store.set_latest("me/a", 0)
    assert store.exists("me/a")
    assert store.adapters() == ["me/a"]


def test_ids_are_listed_sorted_and_by_prefix(store: AdapterStore) -> None:
    for lora_id in ("you/b", "me/b", "me/a", "me", "me-a"):
        create(store, lora_id)
    assert store.adapters() == ["me", "me-a", "me/a", "me/b", "you/b"]
    assert store.adapters("me/") == ["me/a", "me/b"]
    assert store.adapters("nobody") == []


def test_ids_that_look_alike_when_flat_are_two_adapters(store: AdapterStore) -> None:
    create(store, "user/a-b")
    create(store, "user-a/b")
    publish(store, "user-a/b")
    assert (numbers(store, "user/a-b"), numbers(store, "user-a/b")) == ([0], [0, 1])


def test_a_taken_id_is_a_conflict(store: AdapterStore) -> None:
    create(store)
    with pytest.raises(Conflict):
        store.create("me/a", "base")
    assert numbers(store) == [0]


@pytest.mark.parametrize("bad", ["", "..", "../a", "a/../../b", "/etc", ".hidden", "a\x00", "a\nb", "a//b", "a~b", "é", "x" * 200])
def test_an_id_that_is_none_touches_nothing(store: AdapterStore, bad: str) -> None:
    for call in (lambda: store.create(bad, "base"), lambda: store.latest(bad), lambda: store.exists(bad), lambda: store.delete(bad)):
        with pytest.raises(BadRequest):
            call()


def test_what_is_not_there_is_not_found(store: AdapterStore) -> None:
    create(store)
    unknown_adapter: list[Callable[[], object]] = [
        lambda: store.latest("me/b"),
        lambda: store.versions("me/b"),
        lambda: store.set_latest("me/b", 0),
        lambda: publish(store, "me/b"),
    ]
    unknown_version: list[Callable[[], object]] = [
        lambda: store.version("me/a", 7),
        lambda: store.path("me/a", 7),
        lambda: store.path("me/a", -1),
        lambda: store.set_latest("me/a", 7),
        lambda: store.discard("me/a", 7),
    ]
    for call in unknown_adapter + unknown_version:
        with pytest.raises(NotFound):
            call()
    assert store.latest("me/a") == 0


def test_an_error_while_staging_leaves_nothing_behind(store: AdapterStore) -> None:
    create(store)
    touched: list[Path] = []

    def break_off(folder: Path) -> None:
        touched.append(folder)
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        stage(store, break_off)
    assert not touched[0].exists()
    assert numbers(store) == [0]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_storage_full_and_leaves_nothing_behind(store: AdapterStore, error: Exception) -> None:
    create(store)
    touched: list[Path] = []

    def run_out_of_space(folder: Path) -> None:
        touched.append(folder)
        raise error

    with pytest.raises(StorageFull):
        stage(store, run_out_of_space)
    assert not touched[0].exists()
    assert numbers(store) == [0]


def test_no_number_is_used_twice(store: AdapterStore) -> None:
    create(store)
    assert publish(store, parent=0) == 1
    store.discard("me/a", 1)
    assert publish(store, parent=0) == 2
    with pytest.raises(FileNotFoundError):
        stage(store, lambda folder: (folder / "nothing").unlink())
    assert publish(store, parent=0) == 4
    assert numbers(store) == [0, 2, 4]


def test_the_manifests_own_number_is_ignored(store: AdapterStore) -> None:
    create(store)
    assert publish(store, parent=0, version=40, size_bytes=9) == 1
    assert store.version("me/a", 1).size_bytes == len(b"weights{}")


def test_the_latest_cannot_be_discarded(store: AdapterStore) -> None:
    create(store)
    with pytest.raises(Conflict):
        store.discard("me/a", 0)
    assert numbers(store) == [0]


def test_only_the_newest_versions_are_kept(store: AdapterStore) -> None:
    create(store)
    for parent in range(7):
        store.set_latest("me/a", publish(store, parent=parent))
    assert numbers(store) == [4, 5, 6, 7]
    with pytest.raises(NotFound):
        store.path("me/a", 3)


def test_the_latest_and_its_parent_are_kept_however_old(store: AdapterStore) -> None:
    create(store)
    store.set_latest("me/a", publish(store, parent=0))
    for _ in range(6):
        publish(store, parent=1)
    store.set_latest("me/a", 1)  # back to an old one, while seven others wait
    assert numbers(store) == [0, 1, 6, 7]
    assert store.latest("me/a") == 1


def test_deleting_takes_all_versions_of_one_adapter(store: AdapterStore) -> None:
    create(store)
    create(store, "me/b")
    folder = store.path("me/a", 0)
    assert store.delete("me/a")
    assert not store.delete("me/a")
    assert not store.exists("me/a")
    assert not folder.exists()
    assert store.adapters() == ["me/b"]
    create(store)
    assert numbers(store) == [0]


def test_an_adapter_deleted_while_a_version_is_staged_stays_deleted(store: AdapterStore) -> None:
    create(store)
    deleted: list[bool] = []
    with pytest.raises(NotFound, match="deleted"):
        stage(store, lambda _: deleted.append(store.delete("me/a")))
    assert deleted == [True]
    assert store.adapters() == []
    create(store)
    assert numbers(store) == [0]


def test_recovering_from_nothing_removes_nothing(store: AdapterStore) -> None:
    create(store)
    publish(store, parent=0)
    assert list(store.recover()) == []
    assert numbers(store) == [0, 1]


def test_recovering_removes_an_adapter_without_a_latest(store: AdapterStore, kept: Kept) -> None:
    create(store)
    store.create("me/b", "base")
    publish(store, "me/b")
    kept.clock.ahead_s = 2 * 3600
    assert any("me/b" in line for line in store.recover())
    assert store.adapters() == ["me/a"]
    create(store, "me/b")


def test_threads_publish_and_read_side_by_side(store: AdapterStore) -> None:
    create(store)
    done = threading.Event()

    def write(_: int) -> list[int]:
        made = []
        for _ in range(10):
            number = publish(store, parent=store.latest("me/a"), content=os.urandom(64))
            with contextlib.suppress(NotFound):  # the other threads may have published as many newer ones as are kept
                store.set_latest("me/a", number)
            made.append(number)
        return made

    def read() -> int:
        reads = 0
        while not done.is_set():
            number = store.latest("me/a")
            assert all(version.size_bytes > 0 for version in store.versions("me/a"))
            with contextlib.suppress(NotFound):  # ten newer ones may have come since
                assert store.version("me/a", number).version == number
            reads += 1
        return reads

    with ThreadPoolExecutor(6) as threads:
        reader = threads.submit(read)
        try:
            made = [number for numbers in threads.map(write, range(4)) for number in numbers]
        finally:
            done.set()
        assert reader.result() > 0
    assert sorted(made) == list(range(1, 41))
    assert store.latest("me/a") in numbers(store)
    assert len(numbers(store)) <= KEEP + 1
