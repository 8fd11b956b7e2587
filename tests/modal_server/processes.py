"""Containers as processes of this machine: each in namespaces of its own, so that its Volumes are where the app wants
them, and nothing that it started outlives it."""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A file in /proc, by its inode and its name: file systems number theirs independently.
File = tuple[int, str]

_ISOLATED = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *([] if os.geteuid() == 0 else ["--map-root-user"])]


def containers_possible() -> bool:
    """Whether this machine lets us make namespaces. That of continuous integration must: there nothing is skipped."""
    if "CI" in os.environ:
        return True
    try:
        return subprocess.run([*_ISOLATED, "true"], capture_output=True, check=False, timeout=30).returncode == 0
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Bind:
    """A folder of ours, seen by the container at another place."""

    source: Path
    target: str
    read_only: bool


class MountPoints:
    """The folders that must be there for Volumes to be mounted on; those made for it are removed in the end.

    Linux takes a mount away, in whichever namespace it is, once the folder that it lies on is removed: each double mounts on its own.
    """

    def __init__(self) -> None:
        self._made: list[Path] = []

    def ensure(self, path: Path) -> None:
        """Raises FileExistsError for a folder that is not ours."""
        if path in self._made:
            return
        missing = [folder for folder in path.parents if not folder.exists()]
        for folder in (*reversed(missing), path):
            folder.mkdir()
            self._made.append(folder)

    def remove(self) -> None:
        for folder in reversed(self._made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self._made.clear()


async def start(binds: list[Bind], environment: dict[str, str], folder: Path, log: Path) -> asyncio.subprocess.Process:
    """The SDK's own container entry point, in this folder, with only these variables."""
    steps = [step for bind in binds for step in _steps(bind)]
    # Not `exec`: the first process of a namespace is deaf to signals from within.
    entry = f"{shlex.quote(sys.executable)} -m modal._container_entrypoint"
    script = " && ".join([*steps, f"cd {shlex.quote(str(folder))}", entry]) + "; exit $?"
    with log.open("wb") as out:
        return await asyncio.create_subprocess_exec(
            *_ISOLATED, "sh", "-c", script, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )


def _steps(bind: Bind) -> Iterator[str]:
    source, target = shlex.quote(str(bind.source)), shlex.quote(bind.target)
    yield f"mount --bind {source} {target}"
    if bind.read_only:
        yield f"mount -o remount,bind,ro {target}"


def open_files(pid: int) -> set[File]:
    """All that this process and its children hold open or mapped."""
    return {file for descendant in _family(pid) for file in (*_opened(descendant), *_mapped(descendant))}


def _family(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in found:
            yield from _family(int(child))


def _opened(pid: int) -> Iterator[File]:
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            yield entry.stat().st_ino, entry.readlink().name
        except OSError:  # it was closed, or leads nowhere
            continue


def _mapped(pid: int) -> Iterator[File]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:  # the process has ended
        return
    for line in lines:
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5].startswith("/"):
            yield int(parts[4]), Path(parts[5]).name
