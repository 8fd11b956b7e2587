"""A step on a device other than the CPU: nothing of it stays behind on the CPU, and it holds what was estimated."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest


def step_of(case: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "tests.training.other_device", case], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.parametrize("case", ["qwen3", "llama"])
def test_every_operation_of_a_step_is_on_the_trainers_device(case: str) -> None:
    """Student, each teacher, base, control and witness; loss, gradients, clip, optimizer."""
    step = step_of(case)
    assert step["devices"] == ["elsewhere"]
    assert step["float32_moments"]
    assert step["tokens"] == 200 + 150 + 5 + 5


def test_layers_as_wide_as_an_8b_models_hold_less_than_estimated() -> None:
    """Two replies of 1,024 tokens to prompts of 1,024: as many bytes as torch would ask of a GPU's allocator."""
    step = step_of("wide")
    assert (step["devices"], step["tokens"]) == (["elsewhere"], 2048)
    assert step["held_bytes"] <= step["estimated_bytes"] <= 2 * step["held_bytes"]
