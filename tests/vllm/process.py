"""A real vLLM, its CPU build, as a process on a loopback port: started, killed, and started again on the same port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
MODEL = "smollm2"
MAX_MODEL_LEN = 2048
FLAGS = {
    "--max-model-len": str(MAX_MODEL_LEN),
    "--max-loras": "2",
    "--max-lora-rank": "32",
    "--max-logprobs": "64",
    "--tool-call-parser": "hermes",
}
# All but lm_head: with that one wrapped, the CPU build dies of prompt_logprobs under an adapter in a batch with other requests.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SWITCHES = ("--enable-lora", "--enforce-eager", "--enable-auto-tool-choice")
ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class RealVllm:
    """One vLLM. It leads a process group of its own, which is ended as a whole."""

    def __init__(self, python: Path, model_dir: Path, log: Path, dtype: str = "bfloat16") -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir), *SWITCHES]
        self._command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(self.port)]
        self._command += [word for flag in ({"--dtype": dtype} | FLAGS).items() for word in flag]
        self._command += ["--lora-target-modules", *TARGETS]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(self._command, stdout=out, stderr=out, env=os.environ | ENVIRONMENT, start_new_session=True)
        give_up = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up:
            assert self._process.poll() is None, f"vLLM ended: {self.log()}"
            try:
                if httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"vLLM did not answer within {START_TIMEOUT_S:g} s: {self.log()}")

    def stop(self) -> None:
        """Ask it to end, and end what is left of it."""
        self._signal(signal.SIGTERM)
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to its whole group: no goodbye. Safe to call twice."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def forget_adapters(self) -> None:
        """As after a start: what tests before had loaded is gone."""
        for card in httpx.get(f"{self.url}/v1/models", timeout=30.0).json()["data"]:
            if card["parent"] is not None:
                httpx.post(f"{self.url}/v1/unload_lora_adapter", json={"lora_name": card["id"]}, timeout=30.0).raise_for_status()

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):  # all of it has ended
                os.killpg(self._process.pid, number)
