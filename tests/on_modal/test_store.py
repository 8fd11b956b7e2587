"""Adapter versions on a Volume through Modal's file API, over the true SDK: torn versions, other services, lost answers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import modal
import pytest
from grpclib import Status

from claas.adapters.modal_volume import LEFT_OVER_S, SETTLED_S, ModalVolumeStore
from claas.adapters.store import CONFIG, MANIFEST, WEIGHTS
from claas.core.errors import BackendUnavailable, Conflict, NotFound, StorageFull
from claas.core.types import AdapterVersion
from tests.adapters.stores import Clock
from tests.modal_server.server import ModalDouble
from tests.on_modal.blocks import lose_blocks

pytestmark = pytest.mark.integration

SDK_GIVES_UP = 100
"""More times than the SDK tries again by itself."""

WRITES = ["VolumePutFiles2", "VolumeRemoveFile2"]


class World:
    """Modal, with services that share a Volume; each has a cache of its own and all have one clock."""

    def __init__(self, server: ModalDouble, folder: Path) -> None:
        self.server = server
        self.clock = Clock()
        self.used: set[tuple[str, int]] = set()
        self._folder = folder
        self.one = self.service("one")
        self.two = self.service("two")

    def service(self, name: str, token_secret: str | None = None) -> ModalVolumeStore:
        client = self.server.client() if token_secret is None else self.server.client(token_secret)
        volume = modal.Volume.from_name("adapters", create_if_missing=True, version=2, client=client)
        return ModalVolumeStore(
            volume, self._folder / name, keep_versions=3, in_use=lambda lora_id, version: (lora_id, version) in self.used, now=self.clock
        )

    @property
    def on_volume(self) -> Path:
        """The committed state."""
        return self.server.volumes.folder("adapters")

    def listed(self) -> list[str]:
        return sorted(str(path.relative_to(self.on_volume)) for path in self.on_volume.rglob("*") if path.is_file())


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ModalDouble(tmp_path / "modal") as server:
        made = World(server, tmp_path)
        made.one.create("me/a", "base")
        made.one.set_latest("me/a", publish(made.one))
        yield made


def publish(
    store: ModalVolumeStore, content: bytes = b"weights", parent: int | None = None, meanwhile: Callable[[], None] = lambda: None
) -> int:
    with store.stage(AdapterVersion(lora_id="me/a", version=0, parent=parent, base_model="base")) as staging:
        (staging.path / WEIGHTS).write_bytes(content)
        (staging.path / CONFIG).write_bytes(b"{}")
        meanwhile()
    return staging.version


def numbers(store: ModalVolumeStore) -> list[int]:
    return [version.version for version in store.versions("me/a")]


def test_what_one_service_wrote_the_other_reads(world: World) -> None:
    weights = os.urandom(20_000_000)  # more than two of Modal's blocks
    number = publish(world.one, weights, parent=0)
    world.one.set_latest("me/a", number)
    assert (world.two.latest("me/a"), numbers(world.two)) == (number, [0, number])
    assert (world.two.path("me/a", number) / WEIGHTS).read_bytes() == weights
    assert publish(world.two) == number + 1


def test_a_version_is_fetched_once(world: World) -> None:
    world.clock.ahead_s = SETTLED_S + 1
    files = world.two.path("me/a", 0)
    fetched = world.server.calls["VolumeGetFile2"]
    assert world.two.path("me/a", 0) == files
    assert world.server.calls["VolumeGetFile2"] == fetched


def test_what_this_service_wrote_is_not_fetched(world: World) -> None:
    number = publish(world.one)
    fetched = world.server.calls["VolumeGetFile2"]
    assert (world.one.path("me/a", number) / WEIGHTS).read_bytes() == b"weights"
    assert world.server.calls["VolumeGetFile2"] - fetched == 1, "only the manifest"


def test_for_a_config_the_weights_are_not_fetched(world: World) -> None:
    folder = world.two.config_path("me/a", 0)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, MANIFEST]
    assert sorted(path.name for path in world.two.path("me/a", 0).iterdir()) == [CONFIG, WEIGHTS, MANIFEST]


@pytest.mark.parametrize("torn", [MANIFEST, WEIGHTS])
def test_a_version_that_is_not_all_there_is_not_there(world: World, torn: str) -> None:
    number = publish(world.one)
    (world.on_volume / "me~a" / f"v{number}" / torn).unlink()
    assert numbers(world.two) == [0]
    for call in (world.two.path, world.two.version, world.two.set_latest, world.two.config_path):
        with pytest.raises(NotFound):
            call("me/a", number)


def test_weights_that_are_still_coming_are_not_there(world: World) -> None:
    number = publish(world.one)
    (world.on_volume / "me~a" / f"v{number}" / WEIGHTS).write_bytes(b"weig")
    assert numbers(world.two) == [0]


def test_an_adapter_made_anew_is_not_taken_for_the_old_one(world: World) -> None:
    assert (world.two.path("me/a", 0) / WEIGHTS).read_bytes() == b"weights"
    world.one.delete("me/a")
    world.one.create("me/a", "base")
    world.one.set_latest("me/a", publish(world.one, b"others!"))  # as long as those before
    assert (world.two.path("me/a", 0) / WEIGHTS).read_bytes() == b"others!"


def test_a_version_of_an_adapter_that_was_made_anew_is_not_published(world: World) -> None:
    """Though both have the same number."""

    def make_anew() -> None:
        world.two.delete("me/a")
        world.two.create("me/a", "base")
        world.two.set_latest("me/a", publish(world.two, b"of the new one"))
        publish(world.two, b"of the new one")

    with pytest.raises(NotFound, match="deleted meanwhile"):
        publish(world.one, b"of the old one", meanwhile=make_anew)
    assert numbers(world.two) == [0, 1]
    assert (world.service("three").path("me/a", 1) / WEIGHTS).read_bytes() == b"of the new one"


def test_half_an_adapter_does_not_block_its_id(world: World) -> None:
    """As where a deletion here met a commit in a container."""
    (world.on_volume / "me~a" / "adapter.json").unlink()
    assert not world.two.exists("me/a")
    world.two.create("me/a", "base")
    assert world.listed() == ["me~a/adapter.json"]
    world.two.create("me/a", "base")  # nor does one that has no version: its maker is gone, since this one holds the lease
    world.two.set_latest("me/a", publish(world.two))
    assert numbers(world.one) == [0]


def test_versions_in_use_outlive_their_time(world: World) -> None:
    for _ in range(2):
        world.one.set_latest("me/a", publish(world.one))
    world.used.add(("me/a", 0))
    kept = world.one.path("me/a", 0)
    for _ in range(3):
        world.one.set_latest("me/a", publish(world.one))
    assert numbers(world.one) == [0, 4, 5]
    assert kept.is_dir()
    world.used.clear()
    world.one.set_latest("me/a", publish(world.one))
    assert numbers(world.one) == [4, 5, 6]
    assert not kept.exists()


def test_the_cache_keeps_no_version_that_another_service_removed(world: World) -> None:
    first = world.two.path("me/a", 0)
    world.one.set_latest("me/a", publish(world.one))
    world.one.discard("me/a", 0)
    second = world.two.path("me/a", 1)
    assert second.is_dir() and not first.exists()


def test_only_what_is_an_hour_old_is_left_over(world: World) -> None:
    number = publish(world.one)
    (world.on_volume / "me~a" / f"v{number}" / MANIFEST).unlink()
    shutil.copytree(world.on_volume / "me~a" / "v0", world.on_volume / "me~a" / ".staging-1")
    shutil.copytree(world.on_volume / "me~a" / "v0", world.on_volume / "me~b" / "v0")
    world.two.create("me/c", "base")
    assert list(world.one.recover()) == []
    world.clock.ahead_s = LEFT_OVER_S + 60
    world.two.create("me/d", "base")
    os.utime(world.on_volume / "me~d" / "adapter.json", (world.clock(), world.clock()))
    assert sorted(world.one.recover()) == [
        "adapter 'me/c', which never got a version to serve",
        "half-written me~a/.staging-1",
        f"half-written me~a/v{number}",
        "half-written me~b",
    ]
    assert {path.partition("/")[0] for path in world.listed()} == {"me~a", "me~d"}
    assert numbers(world.one) == [0]


# --- Answers that get lost ---


@pytest.mark.parametrize("method", WRITES)
def test_answers_that_get_lost_now_and_then_change_nothing(world: World, method: str) -> None:
    steps: list[Callable[[], object]] = [
        lambda: world.one.create("me/b", "base"),
        lambda: world.one.set_latest("me/a", publish(world.one)),
        lambda: world.one.set_latest("me/a", publish(world.one)),
        lambda: world.one.discard("me/a", 1),
        lambda: world.one.delete("me/b"),
    ]
    for step in steps:
        world.server.faults.lose_answer(method, 1)
        step()
    assert (world.two.latest("me/a"), numbers(world.two)) == (2, [0, 2])
    assert {path.partition("/")[0] for path in world.listed()} == {"me~a"}


def test_what_was_done_without_an_answer_can_be_done_again(world: World) -> None:
    number = publish(world.one)
    steps: list[Callable[[], None]] = [lambda: world.one.create("me/b", "base"), lambda: world.one.set_latest("me/a", number)]
    for step in steps:
        world.server.faults.lose_answer("VolumePutFiles2", SDK_GIVES_UP)
        with pytest.raises(BackendUnavailable, match="cannot be reached"):
            step()
        world.server.faults.lose_answer("VolumePutFiles2", 0)
        step()
    assert world.two.latest("me/a") == number


def test_a_deletion_that_broke_off_can_be_done_again(world: World) -> None:
    world.server.faults.unavailable("VolumeRemoveFile2", times=SDK_GIVES_UP)
    with pytest.raises(BackendUnavailable, match="cannot be reached"):
        world.one.delete("me/a")
    assert world.two.exists("me/a")
    world.server.faults.clear()
    assert world.one.delete("me/a")
    assert world.listed() == []


def test_a_version_whose_upload_broke_off_leaves_nothing_and_its_number_is_taken(world: World) -> None:
    before = world.listed()
    with pytest.raises(BackendUnavailable):
        publish(world.one, b"lost", meanwhile=lambda: world.server.faults.lose_answer("VolumePutFiles2", SDK_GIVES_UP))
    world.server.faults.lose_answer("VolumePutFiles2", 0)
    assert world.listed() == before
    assert publish(world.two) == 2


# --- What Modal says ---


def test_a_full_volume_is_storage_full_and_nothing_is_published(world: World) -> None:
    def fill() -> None:
        world.server.faults.refuse("VolumePutFiles2", Status.RESOURCE_EXHAUSTED, "quota exceeded")

    with pytest.raises(StorageFull, match="the Volume on Modal is full"):
        publish(world.one, b"too much", meanwhile=fill)
    assert numbers(world.two) == [0]


def test_a_wrong_token_says_what_to_do(world: World) -> None:
    stranger = world.service("stranger", token_secret="as-wrong")
    for call in (stranger.adapters, lambda: stranger.latest("me/a"), lambda: stranger.create("me/b", "base")):
        with pytest.raises(BackendUnavailable, match="modal setup"):
            call()


def test_a_volume_that_was_destroyed_says_what_to_do(world: World) -> None:
    shutil.rmtree(world.on_volume)
    with pytest.raises(BackendUnavailable, match="claas modal deploy"):
        world.one.adapters()


def test_reading_survives_a_blip_and_says_so_when_it_lasts(world: World) -> None:
    world.server.faults.unavailable("VolumeListFiles2", times=2)
    assert world.one.latest("me/a") == 0
    world.server.faults.unavailable("VolumeListFiles2", times=SDK_GIVES_UP)
    with pytest.raises(BackendUnavailable, match="cannot be reached"):
        world.one.latest("me/a")


def test_a_file_that_is_replaced_while_it_is_read_is_read_anew(world: World) -> None:
    latest = world.on_volume / "me~a" / "latest"
    lose_blocks(world.server, lambda: latest.write_text("10"))
    assert world.two.latest("me/a") == 10
    lose_blocks(world.server, latest.unlink)
    with pytest.raises(NotFound, match="no version yet"):
        world.two.latest("me/a")


def test_the_id_of_another_service_is_taken(world: World) -> None:
    with pytest.raises(Conflict, match="taken"):
        world.two.create("me/a", "base")
