"""A real server of the Tinker API, SkyRL on the CPU, as a process on a loopback port: started, killed, and started again where it was."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx
import platformdirs

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
# A name as a hub has it: the SDK and the server take what looks like an absolute path apart.
MODEL = "claas/SmolLM2-135M-Instruct"
KEY = "tml-any"  # it asks for none; the SDK does not start without one
MAX_RANK = 8
# Slot 0 is the base model's. Every model carries an optimizer over all slots, so each costs memory times their number.
MAX_MODELS = 4


class RealTinker:
    """One server and its folder: database, checkpoints, log. It leads a process group of its own, which is ended as a whole."""

    def __init__(self, python: Path, model_dir: Path, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._bin = python.parent
        self._folder = folder
        _in_float32(model_dir, folder / MODEL)
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers: models are gone, checkpoints are there."""
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                self._command(), cwd=self._folder, stdout=out, stderr=out, env=os.environ | self._environment(), start_new_session=True
            )
        give_up = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up:
            assert self._process.poll() is None, f"the Tinker server ended: {self.log()}"
            try:
                if httpx.get(f"{self.url}/api/v1/healthz", timeout=5.0).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"the Tinker server did not answer within {START_TIMEOUT_S:g} s: {self.log()}")

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

    def restart(self) -> None:
        self.kill()
        self.start()

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def done(self, name: str) -> int:
        """How many batches of this kind of request it has computed, by its own account."""
        return self._log.read_text(errors="replace").count(f"process_batch_requests({name},")

    def _command(self) -> list[str]:
        # It reads its own `uv run` command line, and starts its engine with the same.
        command = [str(self._bin / "uv"), "run", "--active", "--no-project", "-m", "skyrl.tinker.api"]
        command += ["--base-model", MODEL, "--host", "127.0.0.1", "--port", str(self.port), "--backend", "jax"]
        sizes = {"sample_max_num_sequences": 8, "train_micro_batch_size": 4}  # few shapes: each is compiled, for half a minute
        command += ["--backend-config", json.dumps({"max_lora_adapters": MAX_MODELS + 1, "max_lora_rank": MAX_RANK} | sizes)]
        return [*command, "--checkpoints-base", str(self._folder / "checkpoints"), "--database-url", "sqlite:///tinker.db"]

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(self._bin.parent),
            "UV_NO_SYNC": "1",
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            # What was compiled once is found by the next server, and by the next run of the tests.
            "JAX_COMPILATION_CACHE_DIR": str(Path(platformdirs.user_cache_dir("claas")) / "tinker-compiled" / _processor()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_llvm_disable_expensive_passes=true",  # compiles in half the time, and computes as fast
        }

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):  # all of it has ended
                os.killpg(self._process.pid, number)


def _processor() -> str:
    """Tells apart processors of other abilities: what was compiled for one may not run on another."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    abilities = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join([platform.machine(), platform.processor(), *abilities]).encode()).hexdigest()[:16]


def _in_float32(model_dir: Path, folder: Path) -> None:
    """The same model, to be computed with in float32: it keeps adapters, moments and logprobs in what the model says, and rounds them."""
    folder.mkdir(parents=True)
    for file in model_dir.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((model_dir / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
