"""Serving through the guard: a vLLM with a GPU of its own, which several services share and which is not asked without need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr

from claas.core.errors import BackendUnavailable
from claas.core.settings import Settings
from claas.core.types import RoomPlan
from claas.inference.vllm import VllmInference, vllm_on_modal
from claas.inference.vllm_control import DeviceMemory
from claas.models.base_model import LoadedModel
from tests.doubles.vllm_script import voices
from tests.doubles.vllm_server import VllmDouble
from tests.inference.asking import ask
from tests.inference.guarding import KEY, Guarded
from tests.inference.vllm_serving import serves, sound_double, when
from tests.models.tiny import adapter_ref


@pytest.fixture(name="double")
def _double(tiny_model: LoadedModel) -> Iterator[VllmDouble]:
    """As it is on Modal: without control endpoints."""
    with sound_double(tiny_model.tokenizer, dev_mode=False) as server:
        yield server


@pytest.fixture(name="guard")
def _guard(double: VllmDouble, tmp_path: Path) -> Iterator[Guarded]:
    with Guarded(double, tmp_path) as guard:
        yield guard


@asynccontextmanager
async def services(guard: Guarded, model: LoadedModel, count: int = 1, key: str = KEY) -> AsyncIterator[list[VllmInference]]:
    settings = Settings(vllm_api_key=SecretStr(key))
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(count):
            backend = VllmInference(vllm_on_modal(settings, guard.url), model.tokenizer, DeviceMemory(lambda: 0, lambda: None))
            stack.push_async_callback(backend.aclose)
            await backend.begin()
            made.append(backend)
        yield made


async def test_it_answers_through_an_adapter_whose_files_are_out_of_sight(guard: Guarded, tiny_model: LoadedModel, tmp_path: Path) -> None:
    """The ref alone says its name and its place, which nobody looks at from here."""
    ref = adapter_ref(tmp_path, tiny_model, seed=1)
    async with services(guard, tiny_model) as (backend,):
        spoken = await backend.complete(ask(adapter=ref))
        assert voices(spoken.text) != voices((await backend.complete(ask())).text)
        nowhere = ref.model_copy(update={"lora_path": str(tmp_path / "nowhere"), "vllm_name": "claas-me~a-v9-1", "version": 9})
        with pytest.raises(BackendUnavailable):
            await backend.activate(nowhere)


async def test_services_that_share_it_know_an_adapter_by_one_name(
    guard: Guarded, double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    ref = adapter_ref(tmp_path, tiny_model, seed=1)
    async with services(guard, tiny_model, 2) as (one, two):
        assert await one.complete(ask(adapter=ref)) == await two.complete(ask(adapter=ref))
        assert list(double.engine.adapters) == [ref.vllm_name]
        await two.forget(ref.lora_id)
        await when(lambda: not double.engine.adapters)
        assert (await one.complete(ask(adapter=ref))).tokens, "it is loaded again for who still asks for it"


async def test_one_that_begins_leaves_the_adapters_of_another(
    guard: Guarded, double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    ref = adapter_ref(tmp_path, tiny_model, seed=1)
    async with services(guard, tiny_model) as (one,):
        await one.activate(ref)
        async with services(guard, tiny_model):
            assert list(double.engine.adapters) == [ref.vllm_name]
        assert all(call.path != "/v1/unload_lora_adapter" for call in double.calls)


async def test_a_step_elsewhere_takes_nothing_from_it(guard: Guarded, double: VllmDouble, tiny_model: LoadedModel) -> None:
    async with services(guard, tiny_model) as (backend,):
        async with backend.paused(RoomPlan()):
            assert (await backend.complete(ask())).tokens
        assert double.control_calls() == []


async def test_how_it_is_costs_no_container(guard: Guarded, double: VllmDouble, tiny_model: LoadedModel) -> None:
    """Who looks at a service's health every few seconds must not keep a GPU awake."""
    async with services(guard, tiny_model) as (backend,):
        before = len(double.calls)
        for _ in range(5):
            assert (await backend.health()).status == "healthy"
        assert len(double.calls) == before
        await asyncio.to_thread(guard.kill)
        assert (await backend.health()).status == "healthy", "it ended since nobody asked, and starts when somebody does"
        with pytest.raises(BackendUnavailable):
            await backend.stream(ask())
        assert (await backend.health()).status == "unhealthy", "somebody did"


async def test_a_first_request_waits_for_it_to_start(guard: Guarded, tiny_model: LoadedModel, tmp_path: Path) -> None:
    """What can be done later does not: the service itself must not wait for a container to begin."""
    await asyncio.to_thread(guard.kill)
    async with services(guard, tiny_model) as (backend,):
        with pytest.raises(BackendUnavailable):
            await backend.activate(adapter_ref(tmp_path, tiny_model, seed=1))
        first = asyncio.create_task(backend.complete(ask()))
        await asyncio.sleep(0)
        assert not await serves(backend)
        await asyncio.to_thread(guard.start)
        assert (await first).tokens


async def test_a_wrong_key_says_what_to_set(guard: Guarded, tiny_model: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    async with services(guard, tiny_model, key="wrong") as (backend,):
        assert not await serves(backend)
        assert "set VLLM_API_KEY" in caplog.text
        with pytest.raises(BackendUnavailable):
            await asyncio.wait_for(backend.complete(ask()), 10)
