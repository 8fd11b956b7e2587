"""At the same time: a deletion and a running reply, a restart and two requests, a load and its caller who left, an update and the end."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from claas.core.errors import NotFound, UpstreamRefused
from claas.core.types import LoraRuntimeRef, RoomPlan
from claas.inference.vllm_http import error_of
from claas.models.base_model import LoadedModel
from tests.doubles.vllm_server import CHAT, VllmDouble
from tests.inference.asking import ask
from tests.inference.vllm_serving import memory_of, serving, sound_double, when
from tests.models.tiny import adapter_ref


@pytest.fixture(name="double")
def _double(tiny_model: LoadedModel) -> Iterator[VllmDouble]:
    with sound_double(tiny_model.tokenizer, step_s=0.002) as server:
        yield server


@pytest.fixture(name="ref")
def _ref(tiny_model: LoadedModel, tmp_path: Path) -> LoraRuntimeRef:
    return adapter_ref(tmp_path, tiny_model, seed=1)


async def test_the_files_of_an_adapter_go_when_its_replies_have_ended(
    double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path, ref: LoraRuntimeRef
) -> None:
    """vLLM may read them again in the middle of a reply, and ends if they are gone."""
    async with serving(double, tmp_path, tiny_model.tokenizer) as backend:
        running = await backend.stream(ask(adapter=ref, max_tokens=40, ignore_eos=True))
        order: list[str] = []

        async def delete() -> None:
            async with backend.leaving(ref.lora_id):
                order.append("files go")
                shutil.rmtree(ref.lora_path)

        deleting = asyncio.create_task(delete())
        await asyncio.sleep(0)  # it has begun
        await anext(aiter(running))
        assert backend.in_use(ref.lora_id, ref.version) and not backend.in_use(ref.lora_id, ref.version + 1)
        with pytest.raises(NotFound, match="being deleted"):
            await backend.stream(ask(adapter=ref))
        chunks = [chunk async for chunk in running]
        order.insert(0, "reply ended")
        await deleting
        assert chunks[-1].finish_reason == "length" and order == ["reply ended", "files go"]
        assert double.engine.adapters == {} and not backend.in_use(ref.lora_id, ref.version)


async def test_two_requests_find_out_at_once_that_vllm_was_restarted(
    double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path, ref: LoraRuntimeRef
) -> None:
    async with serving(double, tmp_path, tiny_model.tokenizer) as backend:
        before = await backend.complete(ask(adapter=ref))
        await asyncio.to_thread(double.restart)
        assert await asyncio.gather(*(backend.complete(ask(adapter=ref)) for _ in range(4))) == [before] * 4
        assert await backend.complete(ask(adapter=ref)) == before


async def test_a_version_asked_for_while_it_is_unloaded_is_loaded_after_that(
    double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path, ref: LoraRuntimeRef
) -> None:
    async with serving(double, tmp_path, tiny_model.tokenizer) as backend:
        before = await backend.complete(ask(adapter=ref))
        double.fail("/v1/unload_lora_adapter", "delay", seconds=0.2)
        forgetting = asyncio.create_task(backend.forget(ref.lora_id))
        await when(lambda: any(call.path == "/v1/unload_lora_adapter" for call in double.calls))
        assert await backend.complete(ask(adapter=ref)) == before
        await forgetting
        assert await backend.complete(ask(adapter=ref)) == before


async def test_an_update_waits_for_a_load_whose_caller_left(
    double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path, ref: LoraRuntimeRef
) -> None:
    """Else it would go on into weights that are asleep: the double counts that as a violation, and a GPU's vLLM ends of it."""
    async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release="sleep") as backend:
        double.fail("/v1/load_lora_adapter", "delay", seconds=0.3)
        asking = asyncio.create_task(backend.complete(ask(adapter=ref)))
        await when(lambda: any(call.path == "/v1/load_lora_adapter" for call in double.calls))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        async with backend.paused(RoomPlan()) as room:
            assert len(double.engine.adapters) == 1, "it was loaded before vLLM went to sleep"
        assert room.slept and room.woke


async def test_a_reply_that_has_ended_holds_nothing_even_if_its_reader_dawdles(
    double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path, ref: LoraRuntimeRef
) -> None:
    async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release="sleep") as backend:
        stream = await backend.stream(ask(adapter=ref))
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].finish_reason is not None
        assert (await backend.health()).detail["running"] == 0
        async with backend.paused(RoomPlan()) as room:
            assert room.slept
        await stream.aclose()


async def test_the_version_that_a_rollback_returned_to_stays_loaded(double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path) -> None:
    refs = [adapter_ref(tmp_path, tiny_model, seed=version, version=version) for version in (1, 2, 3)]
    async with serving(double, tmp_path, tiny_model.tokenizer) as backend:
        for ref in (*refs, refs[0]):
            await backend.activate(ref)
        loads = sum(call.path == "/v1/load_lora_adapter" for call in double.calls)
        for _ in range(3):
            await backend.complete(ask(adapter=refs[0]))
        assert sum(call.path == "/v1/load_lora_adapter" for call in double.calls) == loads


async def test_closing_in_an_update_wakes_vllm_first(double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async with serving(double, tmp_path, tiny_model.tokenizer, memory_of(double), vllm_release="sleep") as backend:

        async def update() -> None:
            async with backend.paused(RoomPlan()):
                entered.set()
                await leave.wait()

        updating = asyncio.create_task(update())
        await entered.wait()
        waiting = asyncio.create_task(backend.complete(ask()))
        closing = asyncio.create_task(backend.aclose())
        await asyncio.sleep(0)
        asleep = [double.engine.is_sleeping]
        leave.set()
        await asyncio.gather(updating, closing)
        asleep.append(double.engine.is_sleeping)
        assert asleep == [True, False]
        with pytest.raises(Exception, match="closing"):
            await waiting


async def test_an_error_inside_a_stream_keeps_its_status_and_tells_no_path(
    double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    """vLLM answers 200 and then an error event for what it finds out late, such as a schema that its grammar cannot do."""
    said = b'{"error": {"message": "Grammar error in /srv/models/secret/x.json: no", "code": 400, "param": null}}'
    error = error_of(400, said)
    assert isinstance(error, UpstreamRefused) and error.status == 400
    assert "secret" not in error.message and "Grammar error" in error.message
    async with serving(double, tmp_path, tiny_model.tokenizer) as backend:
        double.fail(CHAT, "error", tokens=2, status=400)
        with pytest.raises(UpstreamRefused) as raised:
            await backend.complete(ask())
        assert raised.value.status == 400
        assert (await backend.complete(ask())).tokens
