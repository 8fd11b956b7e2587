"""vLLM fails in each state of an update, in each way: it ends with vLLM awake, the version before still speaking, and nothing aborted."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from claas.core.errors import BackendUnavailable
from claas.core.settings import Settings
from claas.core.types import LoraRuntimeRef, RoomPlan
from claas.inference.vllm import VllmInference, vllm_of
from claas.inference.vllm_control import DeviceMemory
from claas.inference.vllm_http import VllmHttp
from claas.models.base_model import LoadedModel
from tests.doubles.http import Answering, handled_by
from tests.doubles.vllm_script import voices
from tests.doubles.vllm_server import VllmDouble
from tests.inference.asking import ask
from tests.inference.vllm_serving import serving
from tests.models.tiny import adapter_ref

STATES = {
    "draining": ("/pause", 1),
    "releasing the KV cache": ("/release_kv_cache_memory", 1),
    "falling asleep": ("/sleep", 1),
    "waking the weights": ("/wake_up", 1),
    "loading the new version": ("/v1/load_lora_adapter", 1),
    "waking the KV cache": ("/wake_up", 2),
    "looking whether it is awake": ("/is_sleeping", 1),
}
WAYS = ("status", "delay", "lost", "die", "die_after")


@asynccontextmanager
async def kept_alive(double: VllmDouble) -> AsyncIterator[None]:
    """Starts it anew a moment after it died, as an operator's supervisor does."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(0.1)
            if not double.alive:
                await asyncio.to_thread(double.restart)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def update(backend: VllmInference, new: LoraRuntimeRef) -> bool:
    """One step that makes `new`; False if there was no room for it."""
    try:
        async with backend.paused(RoomPlan()) as room:
            room.next = new
    except BackendUnavailable:
        return False
    return True


async def speaks(backend: VllmInference, ref: LoraRuntimeRef, within_s: float = 15.0) -> str:
    """What a version says, as soon as it is served again."""
    async with asyncio.timeout(within_s):
        while True:
            with suppress(BackendUnavailable):
                return (await backend.complete(ask(adapter=ref, max_tokens=90))).text
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", STATES)
async def test_a_fault_in_an_update(at: str, way: str, tiny_model: LoadedModel, tmp_path: Path) -> None:
    path, nth = STATES[at]
    policy = "kv_release" if path.startswith("/release") else "sleep"
    old, new = (adapter_ref(tmp_path, tiny_model, seed=n, version=n) for n in (1, 2))
    with VllmDouble(tiny_model.tokenizer) as double:
        async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release=policy) as backend, kept_alive(double):
            before = await speaks(backend, old)
            double.fail(path, way, nth=nth, seconds=0.3)
            await update(backend, new)
            assert await speaks(backend, old) == before
            assert not double.engine.is_sleeping and double.engine.gauge == "awake"
            assert (await backend.health()).status == "healthy"
            assert await update(backend, new), "the next one works"
            assert voices(await speaks(backend, new)) != voices(before)
            assert await speaks(backend, old) == before
    assert double.violations == []


@pytest.mark.parametrize("way", ["half", "hang"])
async def test_a_sleep_that_breaks_half_way_or_never_answers_ends_with_all_weights_mapped(
    way: str, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    """vLLM takes itself for awake, so only its workers can be asked to wake up; until they have said that they did, nothing is served."""
    old, new = (adapter_ref(tmp_path, tiny_model, seed=n, version=n) for n in (1, 2))
    with VllmDouble(tiny_model.tokenizer) as double:
        async with serving(double, tmp_path, tiny_model.tokenizer, control_timeout_s=0.5, vllm_release="sleep") as backend:
            before = await speaks(backend, old)
            double.fail("/sleep", way)
            double.fail("/collective_rpc", "status", times=2)
            assert not await update(backend, new)
            assert await speaks(backend, old) == before
            assert [str(call) for call in double.calls].count("/collective_rpc") == 3
            assert await update(backend, new), "the next one works"
            assert voices(await speaks(backend, new)) != voices(before)
    assert double.violations == []


async def test_a_vllm_that_stays_half_asleep_is_not_served_from(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """And if the service is started anew meanwhile, it does not take vLLM's word for it either."""
    ref = adapter_ref(tmp_path, tiny_model, seed=1)
    with VllmDouble(tiny_model.tokenizer) as double:
        async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release="sleep") as backend:
            before = await speaks(backend, ref)
            double.fail("/sleep", "half")
            never = double.fail("/collective_rpc", "status", times=None)
            assert not await update(backend, ref)
            assert (await backend.health()).detail["state"] == "down"
        never.times = 0
        async with serving(double, tmp_path, tiny_model.tokenizer) as backend:
            assert await speaks(backend, ref) == before
    assert double.violations == []


@pytest.mark.parametrize("way", ["drop", "error", "die"])
async def test_a_fault_while_it_serves(way: str, tiny_model: LoadedModel, tmp_path: Path) -> None:
    ref = adapter_ref(tmp_path, tiny_model, seed=1)
    with VllmDouble(tiny_model.tokenizer, step_s=0.002) as double:
        async with serving(double, tmp_path, tiny_model.tokenizer) as backend, kept_alive(double):
            before = await speaks(backend, ref)
            double.fail("/v1/chat/completions", way, nth=2, tokens=5)
            replies = await asyncio.gather(
                *(backend.complete(ask(f"Question {n}", ref, max_tokens=60)) for n in range(4)), return_exceptions=True
            )
            assert all(isinstance(reply, BackendUnavailable) or reply.finish_reason in ("stop", "length") for reply in replies)  # type: ignore[union-attr]
            assert await speaks(backend, ref) == before
    assert double.violations == []


async def test_vllm_is_killed_while_the_step_runs(tiny_model: LoadedModel, tmp_path: Path) -> None:
    old, new = (adapter_ref(tmp_path, tiny_model, seed=n, version=n) for n in (1, 2))
    with VllmDouble(tiny_model.tokenizer) as double:
        async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release="sleep") as backend:
            before = await speaks(backend, old)
            async with backend.paused(RoomPlan()) as room:
                await asyncio.to_thread(double.restart)
                room.next = new
            assert await speaks(backend, old) == before
            assert voices(await speaks(backend, new)) != voices(before)


async def test_a_vllm_that_stays_away_is_told_and_found_again(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """Longer than the tries of waking: the service says so to whoever asks, at once, and serves again when vLLM is back."""
    ref = adapter_ref(tmp_path, tiny_model, seed=1)
    with VllmDouble(tiny_model.tokenizer) as double:
        async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release="sleep") as backend:
            before = await speaks(backend, ref)
            async with backend.paused(RoomPlan()):
                await asyncio.to_thread(double.kill)
            assert (await backend.health()).status == "unhealthy"
            with pytest.raises(BackendUnavailable, match="try again soon"):
                await asyncio.wait_for(backend.complete(ask(adapter=ref)), 1.0)
            with pytest.raises(BackendUnavailable):
                await asyncio.wait_for(update_or_raise(backend), 1.0)
            await asyncio.to_thread(double.start)
            assert await speaks(backend, ref) == before


async def update_or_raise(backend: VllmInference) -> None:
    async with backend.paused(RoomPlan()):
        pytest.fail("there is no vLLM")


async def test_a_version_that_vllm_refuses_does_not_keep_it_asleep(tiny_model: LoadedModel, tmp_path: Path) -> None:
    old, large = adapter_ref(tmp_path, tiny_model, seed=1), adapter_ref(tmp_path, tiny_model, seed=2, version=2, rank=64)
    with VllmDouble(tiny_model.tokenizer) as double:
        async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release="sleep") as backend:
            before = await speaks(backend, old)
            assert await update(backend, large)
            assert await speaks(backend, old) == before
            with pytest.raises(BackendUnavailable, match="max_lora_rank"):
                await backend.activate(large)


async def test_a_slow_vllm_is_waited_for(tiny_model: LoadedModel, tmp_path: Path) -> None:
    new = adapter_ref(tmp_path, tiny_model, seed=1)
    with VllmDouble(tiny_model.tokenizer) as double:
        async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release="sleep") as backend:
            for path in ("/pause", "/sleep", "/wake_up", "/v1/load_lora_adapter"):
                double.fail(path, "delay", seconds=0.3, times=None)
            async with backend.paused(RoomPlan()) as room:
                room.next = new
            assert room.woke
            assert room.seconds["sleep"] >= 0.3 and room.seconds["wake"] >= 0.6
            assert (await backend.complete(ask(adapter=new))).tokens
    assert double.violations == []


@pytest.mark.parametrize("models", [{"data": []}, {"data": [{"id": "x"}]}, {"objects": 1}, [], "hello"], ids=str)
async def test_something_else_that_answers_there_is_no_vllm(models: Any, tiny_model: LoadedModel, tmp_path: Path) -> None:
    """The service starts, says so, and goes on looking."""

    class Handler(Answering):
        def do_GET(self) -> None:
            self.answer(200, json.dumps({"version": "0.32.0"} if self.path == "/version" else models).encode())

    with handled_by(Handler) as url:
        settings = Settings(data_dir=tmp_path, vllm_base_url=url)
        backend = VllmInference(vllm_of(settings), tiny_model.tokenizer, DeviceMemory(lambda: 0, lambda: None))
        await backend.begin()
        with pytest.raises(BackendUnavailable, match="not ready"):
            await backend.stream(ask())
        assert (await backend.health()).status == "unhealthy"
        await backend.aclose()


async def test_connections_are_probed_while_nothing_comes() -> None:
    """So a machine that is gone is noticed, in the middle of an answer too, within about a minute."""

    class Handler(Answering):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(200, b"{}")

    with handled_by(Handler) as url:
        vllm = VllmHttp(url, None)
        assert await vllm.ask("GET", "/health") == {}
        (fd,) = connections_to(int(url.rpartition(":")[2]))
        with socket.socket(fileno=os.dup(fd)) as connection:
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0
            if sys.platform == "linux":
                after, every, most = (
                    connection.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                )
                assert after + every * most <= 90
        await vllm.aclose()


def connections_to(port: int) -> list[int]:
    """This process's connections to the port of this machine, as file descriptors."""
    return [fd for entry in Path("/dev/fd").iterdir() if peer_of(fd := int(entry.name)) == ("127.0.0.1", port)]


def peer_of(fd: int) -> Any:
    """Whom a descriptor is connected to, if it is a socket that is."""
    with suppress(OSError):
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            with socket.socket(fileno=os.dup(fd)) as copy:
                return copy.getpeername()
    return None
