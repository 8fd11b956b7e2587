"""The stores of the contract suite, each with how to let an hour pass for it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import modal

from claas.adapters.filesystem import FilesystemAdapterStore
from claas.adapters.modal_mounted import MountedVolumeStore
from claas.adapters.modal_volume import ModalVolumeStore
from claas.adapters.store import AdapterStore
from tests.modal_server.server import ModalDouble

KEEP = 4


class Committed:
    """What a Volume does for a container: a committed state, and a working copy at `mount` that shows it after a reload only.

    `failing_reloads`, `failing_commits`: how many of those to come fail.
    """

    def __init__(self, folder: Path, mount: Path) -> None:
        self._committed = folder
        self._mount = mount
        self.failing_reloads = 0
        self.failing_commits = 0
        folder.mkdir(parents=True, exist_ok=True)
        mount.mkdir(parents=True, exist_ok=True)

    def reload(self) -> None:
        """What was not committed is gone."""
        if self.failing_reloads:
            self.failing_reloads -= 1
            raise RuntimeError("there are open files preventing the operation")
        _mirror(self._committed, self._mount)

    def commit(self) -> None:
        """Let others see what was written at the mount."""
        if self.failing_commits:
            self.failing_commits -= 1
            raise RuntimeError("the volume is gone")
        _mirror(self._mount, self._committed)


def _mirror(source: Path, target: Path) -> None:
    """Only what differs is touched, so that files that are being read stay."""
    for path in sorted(target.rglob("*"), reverse=True):
        there = source / path.relative_to(target)
        if path.is_dir() and not there.is_dir():
            shutil.rmtree(path)
        elif path.is_file() and not there.is_file():
            path.unlink()
    for path in sorted(source.rglob("*")):
        to = target / path.relative_to(source)
        if path.is_dir():
            to.mkdir(exist_ok=True)
        elif not to.exists() or to.read_bytes() != path.read_bytes():
            half = to.with_name(f"{to.name}.half")
            shutil.copy2(path, half)
            half.replace(to)


class Clock:
    """The time of day, and what a test adds to it."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@dataclass(frozen=True)
class Kept:
    """A store, and the clock by which it says what is left over; one alone on its disk needs none."""

    store: AdapterStore
    clock: Clock


Opens = Callable[[Path], AbstractContextManager[Kept]]


@contextmanager
def filesystem(folder: Path) -> Iterator[Kept]:
    yield Kept(FilesystemAdapterStore(folder, keep_versions=KEEP), Clock())


@contextmanager
def mounted(folder: Path) -> Iterator[Kept]:
    mount = folder / "mount"
    yield Kept(MountedVolumeStore(mount, Committed(folder / "committed", mount), keep_versions=KEEP), Clock())


@contextmanager
def volume(folder: Path) -> Iterator[Kept]:
    with ModalDouble(folder / "modal") as server:
        clock = Clock()
        on_modal = modal.Volume.from_name("adapters", create_if_missing=True, version=2, client=server.client())
        yield Kept(ModalVolumeStore(on_modal, folder / "cache", keep_versions=KEEP, now=clock), clock)
