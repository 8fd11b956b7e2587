"""Sharing the cores: counts that belong to a thread, halves while both sides work, all for one alone."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from claas.models.compute import ComputeShare, in_fresh_thread, usable_cores

THREADS = Path("/proc/self/task")


@pytest.mark.parametrize(("cores", "serving", "training"), [(1, 1, 1), (2, 1, 1), (3, 2, 1), (8, 4, 4)])
def test_each_gets_its_share_while_both_work_and_all_when_alone(cores: int, serving: int, training: int) -> None:
    share = ComputeShare(cores)
    # Each wait is for the other thread to have come that far.
    trains, serves, trained_beside, served = (threading.Event() for _ in range(4))
    seen: dict[str, int] = {}

    def train() -> None:
        with share.training():
            seen["training alone"] = torch.get_num_threads()
            trains.set()
            serves.wait(10)
            share.apply()
            seen["training beside"] = torch.get_num_threads()
            trained_beside.set()
            served.wait(10)
            share.apply()
            seen["training after"] = torch.get_num_threads()

    def serve() -> None:
        trains.wait(10)
        with share.serving():
            seen["serving beside"] = torch.get_num_threads()
            serves.set()
            trained_beside.wait(10)
        served.set()

    with ThreadPoolExecutor(2) as pool:
        for work in [pool.submit(train), pool.submit(serve)]:
            work.result()
    assert seen == {"training alone": cores, "serving beside": serving, "training beside": training, "training after": cores}


def test_a_threads_count_is_its_own_from_its_first_use_on() -> None:
    """What torch promises nowhere: the ground this file stands on."""
    marked, changed = threading.Event(), threading.Event()

    def one() -> int:
        with ComputeShare(3).serving():
            marked.set()
            changed.wait(10)
            torch.randn(400, 400).mm(torch.randn(400, 400))
            return torch.get_num_threads()

    def other() -> int:
        marked.wait(10)
        with ComputeShare(1).training():
            changed.set()
            return torch.get_num_threads()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(one), pool.submit(other)
        assert (first.result(), second.result()) == (3, 1)


def test_applying_outside_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="belongs inside"):
        ComputeShare(2).apply()


def test_a_fresh_thread_returns_and_raises_what_its_work_does() -> None:
    thread = in_fresh_thread("fresh", threading.current_thread)
    assert thread is not threading.current_thread() and thread.name.startswith("fresh")
    with pytest.raises(ZeroDivisionError):
        in_fresh_thread("fresh", lambda: 1 // 0)


@pytest.mark.skipif(not THREADS.is_dir(), reason="threads are counted in Linux's /proc")
def test_a_team_ends_with_its_fresh_thread() -> None:
    def threads() -> set[str]:
        return {thread.name for thread in THREADS.iterdir()}

    def work() -> set[str]:
        torch.set_num_threads(3)
        torch.randn(400, 400).mm(torch.randn(400, 400)).exp_()
        return threads() - before

    before = threads()
    team = in_fresh_thread("fresh", work)
    assert len(team) >= 3, "itself, and two of its team"
    deadline = time.monotonic() + 10
    while threads() & team and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads() & team


@pytest.mark.parametrize(
    ("quota", "wanted", "cores"),
    [(None, "", 8), ("max 100000", "", 8), ("150000 100000", "", 2), ("50000 100000", "", 1), ("900000 100000", "", 8), (None, "3", 3),
     ("200000 100000", "6", 2), (None, "0", 1), (None, "2,1", 8), ("?", "", 8)],
)  # fmt: skip
def test_no_more_cores_are_used_than_the_process_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, wanted: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert usable_cores(tmp_path) == cores
