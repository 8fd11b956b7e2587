"""Adapter versions under a mount of a Volume: what others see, and when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from claas.adapters.modal_mounted import MountedVolumeStore
from claas.adapters.store import WEIGHTS
from claas.core.errors import BackendUnavailable, NotFound
from claas.core.types import AdapterVersion
from tests.adapters.stores import Committed

MINE = AdapterVersion(lora_id="me/a", version=0, base_model="base")


class Container:
    """A store in a container of its own, and the Volume as it sees it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.mount = folder / name
        self.volume = Committed(folder / "committed", self.mount)
        self.store = MountedVolumeStore(self.mount, self.volume, keep_versions=3)


@pytest.fixture
def one(tmp_path: Path) -> Container:
    made = Container(tmp_path, "one")
    made.store.create("me/a", "base")
    made.store.set_latest("me/a", _publish(made.store))
    return made


@pytest.fixture
def two(tmp_path: Path) -> Container:
    return Container(tmp_path, "two")


def _publish(store: MountedVolumeStore, content: bytes = b"weights", meanwhile: Callable[[], None] = lambda: None) -> int:
    with store.stage(MINE) as staging:
        (staging.path / WEIGHTS).write_bytes(content)
        meanwhile()
    return staging.version


def _numbers(store: MountedVolumeStore) -> list[int]:
    return [version.version for version in store.versions("me/a")]


def test_what_one_container_wrote_the_other_reads(one: Container, two: Container) -> None:
    assert two.store.latest("me/a") == 0
    number = _publish(one.store, b"newer")
    assert (two.store.path("me/a", number) / WEIGHTS).read_bytes() == b"newer"
    one.store.set_latest("me/a", number)
    assert two.store.latest("me/a") == number
    assert _publish(two.store) == number + 1
    one.store.discard("me/a", number + 1)
    assert _numbers(two.store) == [0, 1]
    assert one.store.delete("me/a")
    assert two.store.adapters() == []


def test_nothing_of_a_version_is_on_the_volume_before_it_is_whole(one: Container) -> None:
    with one.store.stage(MINE) as staging:
        (staging.path / WEIGHTS).write_bytes(b"half")
        assert sorted(path.name for path in (one.mount / "me~a").iterdir()) == ["adapter.json", "latest", "v0"]
    assert _numbers(one.store) == [0, 1]


def test_a_commit_that_fails_publishes_nothing(one: Container, two: Container) -> None:
    def break_the_next() -> None:
        one.volume.failing_commits = 1

    with pytest.raises(BackendUnavailable, match="nothing was published"):
        _publish(one.store, meanwhile=break_the_next)
    assert not (one.mount / "me~a" / "v1").exists(), "Modal commits by itself what lies there"
    assert _numbers(one.store) == _numbers(two.store) == [0]
    assert _publish(two.store) == 2, "its number is taken"


def test_a_reload_that_fails_reads_nothing_stale(one: Container) -> None:
    one.volume.failing_reloads = 1
    with pytest.raises(BackendUnavailable, match="try again"):
        one.store.latest("me/a")
    assert one.store.latest("me/a") == 0


def test_a_version_of_an_adapter_that_was_deleted_and_made_anew_is_not_published(one: Container, two: Container) -> None:
    def make_anew() -> None:
        two.store.delete("me/a")
        two.store.create("me/a", "base")
        two.store.set_latest("me/a", _publish(two.store))

    with pytest.raises(NotFound, match="deleted meanwhile"):
        _publish(one.store, meanwhile=make_anew)
    assert _numbers(two.store) == [0]


def test_half_an_adapter_does_not_block_its_id(one: Container, tmp_path: Path) -> None:
    """As where a deletion on one side met a commit on the other."""
    (tmp_path / "committed" / "me~a" / "adapter.json").unlink()
    assert not one.store.exists("me/a")
    one.store.create("me/a", "base")
    one.store.set_latest("me/a", _publish(one.store))
    assert _numbers(one.store) == [0]


def test_without_a_volume_it_is_a_plain_folder(tmp_path: Path) -> None:
    store = MountedVolumeStore(tmp_path, None, keep_versions=3)
    store.create("me/a", "base")
    store.set_latest("me/a", _publish(store))
    assert store.latest("me/a") == 0
