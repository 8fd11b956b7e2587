"""`claas serve` as a process on a free loopback port, ended by its own id."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT_S = 180.0


class Caller:
    """Asks a service that runs at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=900.0)  # a lesson beside other tests' lessons takes many times what it takes alone

    def chat(self, text: str, model: str = "assistant", **fields: Any) -> dict[str, Any]:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        answer = self.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        reply: dict[str, Any] = answer.json()
        return reply

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        answer = self.http.get(path, params=params)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


class Service(Caller):
    """A running service. `kill` is SIGKILL: no goodbye."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        super().__init__(url)
        self.process = process
        self._log = log

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.http.close()

    def log(self) -> str:
        return self._log.read_text(errors="replace")


@contextmanager
def running(data_dir: Path, *, base_model: Path | None = None, **environment: str) -> Iterator[Service]:
    """Start a service on `data_dir` and wait until it answers; it is killed on leaving, if it still runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "claas", "serve", "--port", str(port), "--data-dir", str(data_dir)]
    command += ["--base-model", str(base_model)] if base_model else []
    log = data_dir.parent / f"{data_dir.name}-{port}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | environment)
    service = Service(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_it_answers(service)
        yield service
    finally:
        service.kill()


def _wait_until_it_answers(service: Service) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up:
        assert service.process.poll() is None, f"the service ended: {service.log()}"
        try:
            if service.http.get("/v1/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"the service did not answer within {START_TIMEOUT_S:g} s: {service.log()}")
