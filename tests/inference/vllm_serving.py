"""The vLLM backend in front of the double."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from claas.core.settings import Settings
from claas.inference.vllm import VllmInference, vllm_of
from claas.inference.vllm_control import CONTROL_TIMEOUT_S, DeviceMemory
from tests.doubles.vllm_engine import GIB
from tests.doubles.vllm_server import VllmDouble
from tests.inference.gate import until

STEP_NEEDS = 7 * GIB


@contextmanager
def sound_double(tokenizer: PreTrainedTokenizerBase, **how: Any) -> Iterator[VllmDouble]:
    """A double that nothing was done to which would have harmed a vLLM: no reply was aborted, nothing touched what slept."""
    with VllmDouble(tokenizer, **how) as server:
        yield server
        assert server.violations == []


def memory_of(double: VllmDouble, needed: int = STEP_NEEDS) -> DeviceMemory:
    """The device that the double lives on, as a trainer beside it sees it."""
    return DeviceMemory(lambda: needed, lambda: double.engine.free_bytes)


@asynccontextmanager
async def serving(
    double: VllmDouble,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    memory: DeviceMemory | None = None,
    *,
    control_timeout_s: float = CONTROL_TIMEOUT_S,
    **settings: Any,
) -> AsyncIterator[VllmInference]:
    """`settings` go over the defaults; adapters are under `folder`."""
    chosen = Settings(data_dir=folder, lora_root=folder, vllm_base_url=double.url, **settings)
    backend = VllmInference(vllm_of(chosen), tokenizer, memory or memory_of(double), control_timeout_s=control_timeout_s)
    try:
        await backend.begin()
        yield backend
    finally:
        await backend.aclose()


async def serves(backend: VllmInference) -> bool:
    return (await backend.health()).detail["state"] == "serving"


async def when(holds: Callable[[], bool]) -> None:
    """Until something holds that another thread brings about."""

    async def now() -> bool:
        return holds()

    await until(now)


def in_order(found: Iterable[str], wanted: Iterable[str]) -> bool:
    """Whether each of `wanted` begins a later one of `found` than the one before."""
    rest = iter(found)
    return all(any(call.startswith(one) for call in rest) for one in wanted)
