"""The GPU benchmark's script: it runs, says when its figures mean nothing, and refuses where it cannot measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """In a folder of its own: whatever it writes by default would be under it."""
    command = [sys.executable, "-m", "benchmarks.gpu_step", *args]
    return subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)


def test_the_tiny_run_measures_every_phase_says_what_it_is_and_writes_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "--tiny", "--batches", "1", "3", "--prompt", "24", "--response", "40", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("TINY MODEL ON THE CPU: these figures mean nothing")
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["tiny"] and "mean nothing" in results["label"]
    assert [row["batch"] for row in results["rows"]] == [1, 3]
    for row in results["rows"]:
        assert {"load", "offload", "adapter", "step", "whole", "teacher", "learn", "optimizer", "rescore"} <= set(row["seconds"])
        assert 0 < row["seconds"]["step"] < row["seconds"]["whole"]
        assert row["peak_device_bytes"] is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run here")
def test_without_a_gpu_it_refuses_and_writes_nothing(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr and "--tiny" in done.stderr
    assert list(tmp_path.iterdir()) == []
