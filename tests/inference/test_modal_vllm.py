"""vLLM as a process of a container: the command is that of `scripts/start-vllm`, its end is noticed, and it gets no key."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from itertools import takewhile
from pathlib import Path

import httpx
import pytest

from claas.adapters.initialise import DEFAULT_TARGETS
from claas.inference.modal_vllm import TARGETS, VllmProcess, vllm_command, vllm_environment

ROOT = Path(__file__).parents[2]
FAKE = """#!{python}
import http.server, json, os, sys
words = sys.argv[1:]
said = json.dumps({{"words": words, "environment": dict(os.environ)}}).encode()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/end":
            os._exit(7)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(said)
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


def as_the_script_says(model: str) -> tuple[set[str], list[str]]:
    """Variables and words of a dry run for a GPU."""
    script = [
        "sh",
        str(ROOT / "scripts" / "start-vllm"),
        "--cuda",
        "--dry-run",
        "--model",
        model,
        "--port",
        "8123",
        "--max-cpu-loras",
        "64",
    ]
    words = shlex.split(subprocess.run(script, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert words.pop(0) == "env"
    variables = list(takewhile(lambda word: word.isupper() or "=" in word, words))
    return set(variables), words[len(variables) :]


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", str(ROOT / "claas")])
def test_it_is_started_as_the_script_starts_it(model: str) -> None:
    variables, words = as_the_script_says(model)
    words.remove("--enable-sleep-mode")  # its GPU is its own
    assert vllm_command(model, 8123, max_cpu_loras=64) == words
    ours = vllm_environment({})
    assert {f"{name}={value}" for name, value in ours.items()} == variables - {"VLLM_SERVER_DEV_MODE=1"} | {"VLLM_SERVER_DEV_MODE=0"}


def test_the_layers_that_it_adapts_are_those_that_are_trained() -> None:
    assert TARGETS == DEFAULT_TARGETS


def test_host_memory_holds_at_least_what_a_batch_takes() -> None:
    words = vllm_command("a/b", 1, max_cpu_loras=2)
    assert words[words.index("--max-cpu-loras") + 1] == "4"


@pytest.fixture(name="environment")
def _environment(tmp_path: Path) -> dict[str, str]:
    """The first `vllm` on its PATH is a fake one; it holds keys, as that of a container does."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "vllm"
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(0o755)
    keys = {"VLLM_API_KEY": "secret-key", "CLAAS_API_KEYS": '["secret-key"]', "MODAL_TOKEN_SECRET": "secret-key"}
    return {**os.environ, **keys, "HF_HOME": "/models/hub", "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


def get(vllm: VllmProcess, path: str) -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as client:
        return client.get(vllm.url + path)


@pytest.mark.integration
def test_it_runs_until_it_is_stopped(environment: dict[str, str]) -> None:
    gone = threading.Event()
    vllm = VllmProcess("a/b", environment, max_cpu_loras=8, gone=gone.set, flags=("--reasoning-parser", "mine"))
    told = json.loads(get(vllm, "/").content)
    assert told["words"][:2] == ["serve", "a/b"] and vllm.url.endswith(told["words"][told["words"].index("--port") + 1])
    assert "secret-key" not in str(told) and told["environment"]["HF_HOME"] == "/models/hub"
    assert told["words"][-2:] == ["--reasoning-parser", "mine"]
    assert vllm.alive()
    vllm.stop()
    assert not vllm.alive() and not gone.is_set(), "that was meant"


@pytest.mark.integration
def test_its_end_is_noticed_though_nobody_asks(environment: dict[str, str]) -> None:
    gone = threading.Event()
    vllm = VllmProcess("a/b", environment, max_cpu_loras=8, gone=gone.set)
    with pytest.raises(httpx.HTTPError):
        get(vllm, "/end")
    assert gone.wait(10) and not vllm.alive()
    vllm.stop()
