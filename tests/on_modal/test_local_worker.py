"""The app's worker through `.local()`: a lesson with the true SDK, a plain folder, and nobody on the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from claas.adapters.filesystem import FilesystemAdapterStore
from tests.models.tiny import save_tiny_model
from tests.on_modal.local_lesson import LORA


@pytest.mark.integration
def test_it_teaches_a_lesson_into_the_folder_of_the_settings(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("CLAAS_", "MODAL_", "VLLM_"))}
    settings = {
        "CLAAS_BASE_MODEL_ID": str(model),
        "CLAAS_LORA_ROOT": str(tmp_path / "adapters"),
        "CLAAS_DEVICE": "cpu",
        "CLAAS_DTYPE": "float32",
        "CLAAS_MODAL_VOLUME_PATH": "/there/is/none/here",
        "MODAL_SERVER_URL": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_modal.local_lesson", "tiny"],
        capture_output=True, text=True, timeout=300, check=False, env=ours | settings, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    taught, refused, health = json.loads(done.stdout.splitlines()[-1])
    assert taught["report"]["outcome"] == "applied" and taught["report"]["version"] == 1, taught
    assert (taught["worker"]["gpu"], taught["worker"]["device"], taught["worker"]["cold"]) == ("L40S", "cpu", True)
    assert (refused["error"]["kind"], refused["worker"]["cold"]) == ("NotFound", False)
    assert (health["base_model"], health["lessons"]) == ("tiny", 2)
    (version,) = [v for v in FilesystemAdapterStore(tmp_path / "adapters", keep_versions=9).versions(LORA) if v.parent is not None]
    assert (version.version, version.parent, version.base_model) == (1, 0, "tiny")
