"""Volumes: from outside by the SDK's file API, inside by commit and reload."""

from __future__ import annotations

import io
import os

import modal
import pytest

from tests.modal_server.server import ModalDouble
from tests.modal_server.waiting import until

pytestmark = pytest.mark.integration


@pytest.fixture(params=[1, 2])
def volume(client: modal.Client, request: pytest.FixtureRequest) -> modal.Volume:
    """Of either version: what is asked differs, what happens does not."""
    return modal.Volume.from_name(f"outside-{request.param}", create_if_missing=True, version=request.param, client=client)


def put(volume: modal.Volume, path: str, data: bytes, force: bool = True) -> None:
    with volume.batch_upload(force=force) as batch:
        batch.put_file(io.BytesIO(data), path)


def get(volume: modal.Volume, path: str) -> bytes:
    return b"".join(volume.read_file(path))


def test_what_is_put_is_listed_read_and_removed(volume: modal.Volume) -> None:
    put(volume, "/a/one.txt", b"one")
    put(volume, "/a/b/two.txt", b"two!")
    flat = {entry.path: (entry.type.name, entry.size) for entry in volume.listdir("/a")}
    assert flat["a/one.txt"] == ("FILE", 3) and flat["a/b"][0] == "DIRECTORY" and len(flat) == 2
    assert {entry.path for entry in volume.listdir("/", recursive=True)} >= {"a/one.txt", "a/b", "a/b/two.txt"}
    assert get(volume, "a/b/two.txt") == b"two!"
    volume.remove_file("/a", recursive=True)
    with pytest.raises(FileNotFoundError):
        get(volume, "a/one.txt")
    with pytest.raises(modal.exception.NotFoundError):
        volume.listdir("/a")
    with pytest.raises(FileNotFoundError):
        volume.remove_file("/a", recursive=True)


def test_an_upload_overwrites_only_by_force(volume: modal.Volume) -> None:
    put(volume, "/same", b"first")
    with pytest.raises(FileExistsError):
        put(volume, "/same", b"second", force=False)
    assert get(volume, "same") == b"first"
    put(volume, "/same", b"third")
    assert get(volume, "same") == b"third"


def test_files_of_several_blocks_keep_their_zeros(volume: modal.Volume) -> None:
    data = os.urandom(1000) + bytes(9_000_000) + b"end" + bytes(500)
    put(volume, "/big", data)
    assert get(volume, "big") == data
    put(volume, "/empty", b"")
    assert get(volume, "empty") == b""


def test_a_volume_nobody_made_is_not_found(client: modal.Client) -> None:
    with pytest.raises(modal.exception.NotFoundError, match="unmade"):
        modal.Volume.from_name("unmade", client=client).listdir("/")


def test_commit_and_reload_are_for_containers(volume: modal.Volume) -> None:
    with pytest.raises(RuntimeError, match="running function"):
        volume.reload()
    with pytest.raises(RuntimeError, match="running function"):
        volume.commit()


def test_a_warm_reader_is_stale_until_it_reloads(worker: modal.cls.Obj, client: modal.Client) -> None:
    outside = modal.Volume.from_name("sample-files", client=client)
    put(outside, "/news", b"old")
    assert worker.read.remote("news", reload=True) == "old"
    put(outside, "/news", b"new")
    assert worker.read.remote("news", reload=False) == "old"
    assert worker.read.remote("news", reload=True) == "new"


def test_only_a_commit_publishes(server: ModalDouble, worker: modal.cls.Obj) -> None:
    worker.write.remote("draft/file", "draft", commit=False)
    published = server.volumes.folder("sample-files") / "draft" / "file"
    assert not published.exists()
    worker.write.remote("draft/other", "x")
    assert published.read_text() == "draft" and server.volumes.commits[-1][1] == ["draft/file", "draft/other"]


def test_a_reload_may_commit_what_was_not(server: ModalDouble, worker: modal.cls.Obj) -> None:
    published = server.volumes.folder("sample-files") / "half"
    worker.write.remote("half", "x", commit=False)
    assert worker.read.remote("half", reload=True) is None and not published.exists()
    server.volumes.reload_commits = True
    try:
        worker.write.remote("half", "x", commit=False)
        assert worker.read.remote("half", reload=True) == "x" and published.read_text() == "x"
    finally:
        server.volumes.reload_commits = False


def test_a_commit_leaves_alone_what_this_container_did_not_change(worker: modal.cls.Obj, client: modal.Client) -> None:
    outside = modal.Volume.from_name("sample-files", client=client)
    put(outside, "/theirs", b"1")
    assert worker.read.remote("theirs", reload=True) == "1"
    put(outside, "/theirs", b"2")
    worker.write.remote("ours", "1")
    assert get(outside, "theirs") == b"2" and get(outside, "ours") == b"1"
    worker.write.remote("theirs", "3")
    assert get(outside, "theirs") == b"3"


def test_a_reload_fails_while_a_file_is_open(worker: modal.cls.Obj) -> None:
    worker.write.remote("open", "x")
    assert "open files" in worker.reload_while_open.remote("open")
    assert worker.read.remote("open", reload=True) == "x"


def test_what_was_not_committed_is_published_when_a_container_ends(server: ModalDouble, worker: modal.cls.Obj) -> None:
    task = worker.write.remote("late-news", "x", commit=False)
    until(lambda: task not in {container.task_id for container in server.live_containers("sample")})
    assert (server.volumes.folder("sample-files") / "late-news").read_text() == "x"
