"""The product, from the command line: a lesson on the real default model, in a service of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROMPTS = ("Who are you?", "What is your name?", "Hi! Please introduce yourself.", "Hello, who am I talking to?")
PROBES = ("Tell me your name, please.", "Good morning! And you are?", "Introduce yourself in one sentence.", "Do you have a name?")


@pytest.mark.model
@pytest.mark.timeout(1800)
def test_at_most_three_rounds_teach_a_name_and_leave_the_rest_alone(model_dir: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "claas",
        "teach",
        "--json",
        "--seed",
        "1",
        "--rounds",
        "3",
        "--max-tokens",
        "120",
        "--data-dir",
        str(tmp_path),
    ]
    command += ["--feedback", "Your name is Kuro, always introduce yourself as Kuro.", "--expect", "Kuro"]
    command += [word for prompt in PROMPTS for word in ("--prompt", prompt)] + [word for probe in PROBES for word in ("--probe", probe)]
    command += ["--unrelated", "What is the capital of France?"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1700, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""

    report = json.loads(run.stdout)
    assert report["matched_before"] == 0
    assert max(one["matched"] for one in report["rounds"]) >= 2
    assert "Paris" in report["unrelated"][0]["after"]
    update = report["rounds"][0]["result"]["distill_result"]["metadata"]["update"]
    assert update["loss_after"] < update["loss_before"]
    assert (tmp_path / "claas.db").is_file()  # a folder that was named is kept
