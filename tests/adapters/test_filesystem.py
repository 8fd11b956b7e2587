"""Adapter versions on a disk: kills, full disks, a disk that ignores case."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from claas.adapters.filesystem import FilesystemAdapterStore
from claas.adapters.store import CONFIG, MANIFEST, OPTIMIZER, WEIGHTS
from claas.core.errors import Conflict, NotFound
from claas.core.types import AdapterVersion

FILES = {CONFIG, WEIGHTS, OPTIMIZER, MANIFEST}

# Publishes versions for ever, each with the digest of its weights beside them; every second one is discarded, every fourth adapter deleted.
WRITER = f"""
import hashlib, itertools, os, sys
from pathlib import Path
from claas.adapters.filesystem import FilesystemAdapterStore
from claas.core.types import AdapterVersion

store = FilesystemAdapterStore(Path(sys.argv[1]), keep_versions=3)
if not store.exists("me/a"):
    store.create("me/a", "base")
for round_ in itertools.count():
    latest = store.latest("me/a") if store.exists("me/a") else None
    with store.stage(AdapterVersion(lora_id="me/a", version=0, parent=latest, base_model="base")) as staging:
        weights = os.urandom(300_000)
        (staging.path / "{WEIGHTS}").write_bytes(weights)
        (staging.path / "{OPTIMIZER}").write_bytes(os.urandom(100_000))
        (staging.path / "{CONFIG}").write_text(hashlib.sha256(weights).hexdigest())
    if round_ % 2 and latest is not None:
        store.discard("me/a", staging.version)
    else:
        store.set_latest("me/a", staging.version)
        print("latest", staging.version, flush=True)
    if round_ % 4 == 0:
        store.create("me/other", "base")
        store.delete("me/other")
"""


def _publish(store: FilesystemAdapterStore, lora_id: str = "me/a") -> int:
    with store.stage(AdapterVersion(lora_id=lora_id, version=0, base_model="base")) as staging:
        (staging.path / WEIGHTS).write_bytes(b"weights")
    return staging.version


def _next_version(root: Path) -> int:
    return int(json.loads((root / "me~a" / "adapter.json").read_bytes())["next_version"])


@pytest.mark.integration
def test_kill_9_at_any_moment_leaves_whole_versions_and_a_valid_latest(tmp_path: Path) -> None:
    told, next_version, seen = -1, 0, set[int]()
    moments = random.Random(7)
    for _ in range(10):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline()]  # it has begun
            try:
                process.wait(timeout=moments.uniform(0, 0.2))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
        assert process.returncode == -signal.SIGKILL
        told = max([told, *(int(line.split()[1]) for line in lines if line.endswith("\n"))])

        store = FilesystemAdapterStore(tmp_path, keep_versions=3)
        for recovered in (False, True):
            versions = store.versions("me/a")
            assert store.latest("me/a") >= told, "a version that was told to be the latest is lost"
            assert store.latest("me/a") in [version.version for version in versions]
            for version in versions:
                folder = store.path("me/a", version.version)
                weights = (folder / WEIGHTS).read_bytes()
                assert {path.name for path in folder.iterdir()} == FILES
                assert (folder / CONFIG).read_text() == hashlib.sha256(weights).hexdigest()
                assert version.size_bytes == len(weights) + 100_000 + 64
            if not recovered:
                list(store.recover())
        assert store.adapters() == ["me/a"]
        assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")], "recovering leaves nothing half written"
        assert _next_version(tmp_path) > max(version.version for version in versions)
        assert _next_version(tmp_path) > next_version, "numbers only grow"
        next_version = _next_version(tmp_path)
        seen.add(told)
    assert len(seen) == 10


def test_a_number_taken_before_a_crash_is_not_used_again(tmp_path: Path) -> None:
    first = FilesystemAdapterStore(tmp_path, keep_versions=3)
    first.create("me/a", "base")
    staging = first.stage(AdapterVersion(lora_id="me/a", version=0, base_model="base"))
    assert staging.__enter__().version == 0  # and never left: the process is gone
    again = FilesystemAdapterStore(tmp_path, keep_versions=3)
    assert _publish(again) == 1
    again.set_latest("me/a", 1)
    assert any(".staging-" in line for line in again.recover())
    assert sorted(path.name for path in (tmp_path / "me~a").iterdir()) == ["adapter.json", "latest", "v1"]


def test_a_disk_that_ignores_case_holds_one_of_two_ids(tmp_path: Path) -> None:
    store = FilesystemAdapterStore(tmp_path, keep_versions=3)
    store.create("Me/A", "base")
    store.set_latest("Me/A", _publish(store, "Me/A"))
    (tmp_path / "Me~A").rename(tmp_path / "me~a")  # what such a disk shows to one who asks for me/a
    with pytest.raises(Conflict, match="same name as 'Me/A'"):
        store.create("me/a", "base")
    for call in (store.latest, store.versions):
        with pytest.raises(NotFound):
            call("me/a")
    assert not store.exists("me/a")
    assert not store.delete("me/a")
    assert store.adapters() == ["Me/A"]


def test_a_disk_that_fills_up_while_publishing_is_storage_full(tmp_path: Path) -> None:
    """A real limit under real writes, safetensors' own among them."""
    script = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from claas.adapters.filesystem import FilesystemAdapterStore
from claas.core.errors import StorageFull
from claas.core.types import AdapterVersion

store = FilesystemAdapterStore(Path(sys.argv[1]), keep_versions=3)
store.create("me/a", "base")
manifest = AdapterVersion(lora_id="me/a", version=0, base_model="base")
with store.stage(manifest) as staging:
    (staging.path / "adapter_model.safetensors").write_bytes(b"w")
store.set_latest("me/a", staging.version)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

def by_safetensors(folder): save_file({"w": torch.zeros(9_000)}, folder / "adapter_model.safetensors")
def by_python(folder): (folder / "adapter_model.safetensors").write_bytes(bytes(36_000))
def by_the_manifest(folder): pass

for fill in (by_safetensors, by_python, by_the_manifest):
    metrics = {"notes": "x" * 20_000} if fill is by_the_manifest else {}
    try:
        with store.stage(manifest.model_copy(update={"metrics": metrics})) as staging:
            fill(staging.path)
        print("published")
    except StorageFull:
        print("full", [version.version for version in store.versions("me/a")], store.latest("me/a"))
print(sorted(path.name for path in (Path(sys.argv[1]) / "me~a").iterdir()))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines() == ["full [0] 0"] * 3 + ["['adapter.json', 'latest', 'v0']"], done.stderr


def test_a_folder_that_is_no_adapter_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    store = FilesystemAdapterStore(tmp_path, keep_versions=3)
    assert store.adapters() == []
    assert list(store.recover()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lost+found", "notes.txt"]


def test_files_in_a_version_folder_that_are_no_versions_are_not_listed(tmp_path: Path) -> None:
    store = FilesystemAdapterStore(tmp_path, keep_versions=3)
    store.create("me/a", "base")
    store.set_latest("me/a", _publish(store))
    for name in ("v01", "v1x", "version", "v"):
        (tmp_path / "me~a" / name).mkdir()
    assert [version.version for version in store.versions("me/a")] == [0]


def test_a_version_that_a_reply_still_speaks_through_outlives_its_turn(tmp_path: Path) -> None:
    spoken: set[tuple[str, int]] = {("me/a", 0)}
    store = FilesystemAdapterStore(tmp_path, keep_versions=2, in_use=lambda lora_id, version: (lora_id, version) in spoken)
    store.create("me/a", "base")
    for _ in range(4):
        store.set_latest("me/a", _publish(store))
    assert [version.version for version in store.versions("me/a")] == [0, 3]
    spoken.clear()
    store.set_latest("me/a", _publish(store))
    assert [version.version for version in store.versions("me/a")] == [3, 4]
