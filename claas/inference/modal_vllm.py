"""A vLLM as a process of this container: how it is started, and that its end is noticed. It knows no Modal and no request.

The flags are those of `scripts/start-vllm` on a GPU, without sleep mode and the control endpoints: a GPU of its own needs neither.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_LORAS, MAX_LORA_RANK, MAX_LOGPROBS = 4, 32, 64
STOP_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


def vllm_command(model: str, port: int, *, max_cpu_loras: int, flags: Sequence[str] = ()) -> list[str]:
    """`model` is a hub id or a folder. `max_cpu_loras` adapters are kept in host memory, so that their files are read once.

    `flags` are the operator's own.
    """
    name = Path(model).resolve().name if Path(model).is_dir() else model
    return [
        *("vllm", "serve", model, "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
        *("--enable-lora", "--max-loras", str(MAX_LORAS), "--max-cpu-loras", str(max(max_cpu_loras, MAX_LORAS))),
        *("--max-lora-rank", str(MAX_LORA_RANK), "--lora-target-modules", *TARGETS, "--max-logprobs", str(MAX_LOGPROBS)),
        *flags,
    ]


def vllm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What vLLM is told beside the flags. Not the keys: who may ask it is the guard's to say, and vLLM runs others' code."""
    kept = {name: value for name, value in environment.items() if not name.startswith(("VLLM_API_KEY", "CLAAS_", "MODAL_"))}
    return kept | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "0", "VLLM_NO_USAGE_STATS": "1"}


class VllmProcess:
    """A running vLLM on loopback: the `vllm` on the PATH of `environment`.

    `gone` is called, in a thread, when it ends without having been stopped.
    """

    def __init__(
        self, model: str, environment: Mapping[str, str], *, max_cpu_loras: int, gone: Callable[[], None], flags: Sequence[str] = ()
    ) -> None:
        port = _free_port()
        command = vllm_command(model, port, max_cpu_loras=max_cpu_loras, flags=flags)
        self.url = f"http://127.0.0.1:{port}"
        self._gone = gone
        self._stopping = False
        self._process = subprocess.Popen(  # noqa: S603 - our own words, and the operator's model
            command, env=vllm_environment(environment), stdin=subprocess.DEVNULL
        )
        self._watch = threading.Thread(target=self._await_end, name="claas-vllm-watch", daemon=True)
        self._watch.start()

    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self._stopping = True
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._watch.join()

    def _await_end(self) -> None:
        status = self._process.wait()
        if not self._stopping:
            log.error("vLLM ended with status %d", status)
            self._gone()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
