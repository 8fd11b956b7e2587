"""How serving and training divide the CPU's cores. Knows nothing of what either computes.

torch's intra-op thread count belongs to the calling thread, and each calling thread has an OpenMP team of its own. Two teams that
together are larger than the machine wait for each other at every operation, which is far slower than either alone; so while both
work, each takes its share, and while one is idle the other takes all.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch

CGROUP = Path("/sys/fs/cgroup")
Side = Literal["serving", "training"]
T = TypeVar("T")


def usable_cores(cgroup: Path = CGROUP) -> int:
    """How many cores this process may use: those that its CPU set, its container's quota and OMP_NUM_THREADS leave it.

    More threads than that wait for each other at every operation.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        cores = cores if quota == "max" else min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # not Linux, or an older cgroup
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(wanted)) if wanted.isdecimal() else cores)


def in_fresh_thread(name: str, work: Callable[[], T]) -> T:
    """Run `work` in a thread of its own and wait for it, so that its OpenMP team ends with it.

    A team that only stands by slows down those that work: with more threads than cores, OpenMP sends waiting ones to sleep at once, and
    waking them takes longer than most operations on a small model.
    """
    with ThreadPoolExecutor(1, name) as pool:
        return pool.submit(work).result()


class ComputeShare:
    """Who is active, and so how many threads each side may use. One for a process; safe from any thread."""

    def __init__(self, n_cores: int) -> None:
        assert n_cores >= 1
        self._n_cores = n_cores
        self._active: dict[Side, int] = {"serving": 0, "training": 0}
        self._lock = threading.Lock()
        self._thread = _Thread()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Mark the calling thread as serving while the body runs, with the cores that are its due."""
        with self._marked("serving"):
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Mark the calling thread as training while the body runs, with the cores that are its due."""
        with self._marked("training"):
            yield

    def threads(self, side: Side) -> int:
        """How many threads `side` may use now, at least one."""
        if not (self._active["serving"] and self._active["training"]):
            return self._n_cores
        half = self._n_cores // 2
        return max(1, half) if side == "training" else self._n_cores - half

    def apply(self) -> None:
        """Adopt the present share in the calling thread, inside `serving()` or `training()`. Cheap: call it often, between operations."""
        side = self._thread.side
        assert side is not None, "apply() belongs inside serving() or training()"
        share = self.threads(side)
        if self._thread.threads != share:
            # A thread's first read would overwrite what was set before it with another thread's count.
            torch.get_num_threads()
            torch.set_num_threads(share)
            self._thread.threads = share

    @contextmanager
    def _marked(self, side: Side) -> Iterator[None]:
        with self._lock:
            self._active[side] += 1
        self._thread.side = side
        try:
            self.apply()
            yield
        finally:
            self._thread.side = None
            with self._lock:
                self._active[side] -= 1


class _Thread(threading.local):
    """What the calling thread does and the count it last adopted."""

    side: Side | None = None
    threads: int | None = None
