"""What is done before the worker's snapshot is taken, where there is no GPU yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.tiny import save_tiny_model

LOADS = """
import sys, threading
from pathlib import Path
import torch
from claas.core.settings import Settings
from claas.training.engine.modal_worker import Worker

asked = []
def watch(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename == torch.cuda.__file__ and code.co_name in ("is_available", "device_count", "_lazy_init"):
        asked.append(f"{frame.f_back.f_code.co_filename}: {code.co_name}")

threading.setprofile(watch)
sys.setprofile(watch)
worker = Worker(Settings(base_model_id=sys.argv[1], dtype="float32", modal_volume_path=Path(sys.argv[2])))
before = list(asked)
worker.start()
sys.stdout.write(f"{before} {len(asked) > 0}")
"""


@pytest.mark.integration
def test_torch_is_not_asked_for_a_gpu_before_the_snapshot(tmp_path: Path) -> None:
    """It remembers the answer, so that a worker which starts from the snapshot would train on its CPU."""
    model = save_tiny_model(tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(model), str(tmp_path / "adapters")], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[] True"), done.stdout + done.stderr[-3000:]
