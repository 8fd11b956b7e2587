"""The guard in front of the double of vLLM, over HTTP."""

from __future__ import annotations

from pathlib import Path

from starlette.types import ASGIApp

from claas.inference.modal_guard import Guard
from tests.doubles.loopback import Loopback
from tests.doubles.vllm_server import VllmDouble

KEY = "a-key-for-tests"
BEARER = {"authorization": f"Bearer {KEY}"}


class Behind:
    """The double, as the guard sees a process."""

    def __init__(self, double: VllmDouble) -> None:
        self._double = double
        self.starting = False

    @property
    def url(self) -> str:
        return self._double.url

    def alive(self) -> bool:
        return self.starting or self._double.alive


class Guarded(Loopback):
    """`events` are what the guard had done, in order. `reload_fails` says how often the Volume cannot be looked at again."""

    def __init__(self, double: VllmDouble, mount: Path, *, ready_timeout_s: float = 10.0) -> None:
        super().__init__()
        self.vllm = Behind(double)
        self.events: list[str] = []
        self.reload_fails = 0
        self._guard = Guard(
            self.vllm,
            KEY,
            mount=mount,
            reload=self._reload,
            gone=lambda: self.events.append("gone"),
            ready_timeout_s=ready_timeout_s,
        )

    def app(self) -> ASGIApp:
        return self._guard

    def _reload(self) -> None:
        if self.reload_fails:
            self.reload_fails -= 1
            raise RuntimeError("there are open files preventing the operation")
        self.events.append("reloaded")
