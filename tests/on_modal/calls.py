"""The app's worker in this process, called through `.local()`: no Modal, and no network."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from claas.training.engine.modal_calls import Phase

APP = Path(__file__).resolve().parents[2] / "claas" / "training" / "engine" / "modal_app.py"


class LocalCalls:
    """Lessons of `worker`, an instance of the app's `DistillWorker`."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self.begun = threading.Event()

    async def check(self) -> None: ...

    async def distill(self, call: str, request: str, phase: Callable[[Phase], None]) -> str:
        def work() -> str:
            self._worker.health.local()  # it starts now, if it has not
            phase("training")
            self.begun.set()
            return str(self._worker.distill.local(request))

        return await asyncio.to_thread(work)

    async def aclose(self) -> None:
        if self.begun.is_set():  # else there is none yet
            await asyncio.to_thread(self._worker._worker.close)


class NoLease:
    """Of an adapter that nobody else knows."""

    @asynccontextmanager
    async def hold(self, lora_id: str) -> Any:
        yield

    def check(self, lora_id: str) -> None: ...


def app_of(environment: Mapping[str, str]) -> ModuleType:
    """The app, as a process with this environment imports it."""
    with _environment(environment):
        spec = importlib.util.spec_from_file_location("app_of_a_test", APP)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("CLAAS_", "MODAL_", "VLLM_"))]:
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
