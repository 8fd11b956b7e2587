"""Taking turns on one device: the gate, the order of control calls for each policy, and memory that is measured before a step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from claas.core.errors import BackendUnavailable
from claas.core.types import RoomPlan
from claas.inference.base import Room
from claas.inference.vllm import VllmInference
from claas.inference.vllm_control import DeviceMemory
from claas.models.base_model import LoadedModel
from tests.doubles.vllm_engine import GIB, Memory
from tests.doubles.vllm_script import voices
from tests.doubles.vllm_server import VllmDouble
from tests.inference.asking import ask
from tests.inference.vllm_serving import in_order, memory_of, serving, sound_double, when
from tests.models.tiny import adapter_ref

LONG: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}


@pytest.fixture(name="double")
def _double(tiny_model: LoadedModel) -> Iterator[VllmDouble]:
    """24 GiB: 16 of weights, 6 of KV cache, 2 free."""
    with sound_double(tiny_model.tokenizer, step_s=0.002) as server:
        yield server


@asynccontextmanager
async def updating(backend: VllmInference) -> AsyncIterator[Room]:
    async with backend.paused(RoomPlan()) as room:
        yield room


async def state(backend: VllmInference) -> Any:
    return (await backend.health()).detail["state"]


@pytest.mark.parametrize(
    ("policy", "needs_gib", "calls"),
    [
        ("none", 1, []),
        ("auto", 1, []),
        ("auto", 7, ["/pause mode=wait", "/release_kv_cache_memory", "/wake_up"]),
        ("auto", 20, ["/pause mode=wait", "/release_kv_cache_memory", "/sleep level=1 mode=wait", "/wake_up tags=weights", "/wake_up"]),
        ("kv_release", 1, ["/pause mode=wait", "/release_kv_cache_memory", "/wake_up"]),
        ("sleep", 1, ["/pause mode=wait", "/sleep level=1 mode=wait", "/wake_up tags=weights", "/wake_up"]),
    ],
)
async def test_each_policy_takes_as_much_as_it_must(
    policy: str, needs_gib: int, calls: list[str], double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    async with serving(double, tmp_path, tiny_model.tokenizer, memory_of(double, needs_gib * GIB), vllm_release=policy) as backend:
        double.calls.clear()
        async with updating(backend) as room:
            assert double.engine.free_bytes >= needs_gib * GIB
            assert room.slept == bool(calls)
            assert await state(backend) == ("training" if calls else "serving")
        assert room.woke == bool(calls)
        assert in_order(double.control_calls(), calls)
        assert bool(double.control_calls()) == bool(calls)
        assert set(room.seconds) == ({"drain", "sleep", "wake"} if calls else set())
        assert not double.engine.is_sleeping and double.engine.gauge == "awake"
        assert (await backend.complete(ask())).tokens


async def test_what_was_too_little_is_not_tried_again(double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path) -> None:
    needs = [20]
    memory = DeviceMemory(lambda: needs[0] * GIB, lambda: double.engine.free_bytes)
    async with serving(double, tmp_path, tiny_model.tokenizer, memory, vllm_release="auto") as backend:
        tried = []
        for needs[0] in (20, 22, 7):
            double.calls.clear()
            async with updating(backend):
                assert double.engine.free_bytes >= needs[0] * GIB
            tried.append([call for call in double.control_calls() if call.startswith(("/release", "/sleep"))])
    kv, sleep = "/release_kv_cache_memory", "/sleep level=1 mode=wait"
    assert tried == [[kv, sleep], [sleep], [kv]]


@pytest.mark.parametrize("policy", ["auto", "none", "kv_release", "sleep"])
async def test_what_a_step_would_rather_have_is_made_and_not_insisted_on(
    policy: str, double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    """A long lesson ran out of the whole device's memory: those after it may be short."""
    memory = DeviceMemory(lambda: GIB, lambda: double.engine.free_bytes, wanted=lambda: 30 * GIB)
    kv, sleep = "/release_kv_cache_memory", "/sleep level=1 mode=wait"
    wanted = {"auto": [[kv, sleep], [sleep]], "none": [[], []], "kv_release": [[kv], [kv]], "sleep": [[sleep], [sleep]]}
    async with serving(double, tmp_path, tiny_model.tokenizer, memory, vllm_release=policy) as backend:
        tried = []
        for _ in range(2):
            double.calls.clear()
            async with updating(backend):
                pass
            tried.append([call for call in double.control_calls() if call.startswith(("/release", "/sleep"))])
    assert tried == wanted[policy]


async def test_a_new_version_is_loaded_between_the_weights_and_the_kv_cache(
    double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release="sleep") as backend:
        double.calls.clear()
        async with updating(backend) as room:
            room.next = adapter_ref(tmp_path, tiny_model, seed=1)
        wanted = ["/sleep", "/wake_up tags=weights", "/v1/load_lora_adapter claas-me~a-v1", "/wake_up"]
        assert in_order(double.control_calls(), wanted)
        loads = sum(call.startswith("/v1/load") for call in double.control_calls())
        assert (await backend.complete(ask(adapter=room.next))).tokens
        assert loads == sum(call.startswith("/v1/load") for call in double.control_calls()) == 1, "it was there already"


@pytest.mark.parametrize("policy", ["auto", "kv_release", "sleep"])
async def test_without_room_nothing_is_trained_and_serving_goes_on(
    policy: str, double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    """Memory that vLLM says it freed and did not: fail closed."""
    double.engine.memory = Memory(stuck=22 * GIB)
    async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release=policy) as backend:
        with pytest.raises(BackendUnavailable, match=r"needs 7.0 GiB of device memory and 2.0 GiB is free"):
            async with updating(backend):
                pytest.fail("there is no room")
        assert await state(backend) == "serving"
        assert (await backend.complete(ask())).tokens


async def test_without_room_beside_the_server_the_policy_none_trains_nothing(
    double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release="none") as backend:
        with pytest.raises(BackendUnavailable, match="CLAAS_VLLM_RELEASE"):
            async with updating(backend):
                pytest.fail("there is no room")
        assert (await backend.complete(ask())).tokens
        assert double.control_calls() == []


async def test_requests_wait_through_an_update_and_those_that_ran_came_to_their_end(
    double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    one, two = adapter_ref(tmp_path, tiny_model, seed=1), adapter_ref(tmp_path, tiny_model, seed=2, version=2)
    async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release="sleep") as backend:
        before = [asyncio.create_task(backend.complete(ask(f"Early {n}", one, **LONG))) for n in range(4)]
        await when(lambda: len(double.engine.running) == 4)
        async with updating(backend) as room:
            assert all(task.done() for task in before)
            assert double.engine.asleep == {"weights", "kv_cache"}
            during = [asyncio.create_task(backend.complete(ask(f"Late {n}", two, **LONG))) for n in range(4)]
            while (await backend.health()).detail["waiting"] != 4:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            assert not any(task.done() for task in during)
            assert double.engine.running == [] and len(double.engine.waiting) == 0, "the gate holds them, not vLLM's queue"
            room.next = two
        replies = [await task for task in (*before, *during)]
    assert all(reply.finish_reason == "length" and len(reply.tokens) == 60 for reply in replies)
    early, late = ({voice for reply in some for voice in voices(reply.text)} for some in (replies[:4], replies[4:]))
    assert len(early) == len(late) == 1 and early != late


async def test_the_gate_gives_up_with_a_time_to_come_back(double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path) -> None:
    how: dict[str, Any] = {"vllm_release": "sleep", "vllm_gate_timeout_s": 0.05, "feedback_drain_timeout_s": 0.04}
    async with serving(double, tmp_path, tiny_model.tokenizer, **how) as backend:
        async with updating(backend):
            with pytest.raises(BackendUnavailable, match="the model is learning") as late:
                await backend.complete(ask())
            assert late.value.retry_after_s
            patient = asyncio.create_task(backend.complete(ask(background=True)))
            await asyncio.sleep(0.1)
            assert not patient.done(), "what the service itself asks for has time"
        assert (await patient).tokens


async def test_a_reply_that_does_not_end_puts_the_update_off(double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path) -> None:
    how: dict[str, Any] = {"vllm_release": "sleep", "feedback_drain_timeout_s": 0.05}
    async with serving(double, tmp_path, tiny_model.tokenizer, **how) as backend:
        endless = await backend.stream(ask(max_tokens=450, ignore_eos=True))
        await anext(aiter(endless))
        double.calls.clear()
        with pytest.raises(BackendUnavailable, match="FEEDBACK_DRAIN_TIMEOUT_S"):
            async with updating(backend):
                pytest.fail("a reply still runs")
        assert not in_order(double.control_calls(), ["/sleep"])
        chunks = [chunk async for chunk in endless]
        assert chunks[-1].finish_reason == "length", "it went on"
        assert (await backend.complete(ask())).tokens


async def test_one_update_at_a_time_has_the_device(double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path) -> None:
    inside = most = 0

    async def update(backend: VllmInference) -> None:
        nonlocal inside, most
        async with updating(backend):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.02)
            inside -= 1

    async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release="sleep") as backend:
        await asyncio.gather(*(update(backend) for _ in range(4)))
        assert most == 1
        assert sum(call.startswith("/sleep") for call in double.control_calls()) == 4


@pytest.mark.parametrize("policy", ["none", "kv_release", "sleep"])
async def test_a_step_that_breaks_leaves_it_serving(policy: str, double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path) -> None:
    memory = memory_of(double, GIB)
    async with serving(double, tmp_path, tiny_model.tokenizer, memory, vllm_release=policy) as backend:
        with pytest.raises(ZeroDivisionError):
            async with updating(backend):
                raise ZeroDivisionError
        assert await state(backend) == "serving"
        assert not double.engine.is_sleeping
        assert (await backend.complete(ask())).tokens


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.03, 0.06, 0.1, 0.15])
async def test_an_update_that_is_cancelled_at_any_moment_leaves_it_serving(
    after_s: float, double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    async def update(backend: VllmInference) -> None:
        async with updating(backend) as room:
            await asyncio.sleep(0.05)
            room.next = adapter_ref(tmp_path, tiny_model, seed=1)

    async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release="sleep") as backend:
        running = asyncio.create_task(backend.complete(ask(max_tokens=20, ignore_eos=True)))
        task = asyncio.create_task(update(backend))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.wait({task})
        assert await state(backend) == "serving"
        assert not double.engine.is_sleeping
        assert (await running).finish_reason == "length"
        assert (await backend.complete(ask())).tokens


async def test_closing_while_an_update_has_the_device_leaves_vllm_awake(
    double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    """The service is stopped in the middle of a lesson: its step is given up after the serving side was closed."""

    async def update(backend: VllmInference, inside: asyncio.Event) -> None:
        async with updating(backend):
            inside.set()
            await asyncio.sleep(60)

    async with serving(double, tmp_path, tiny_model.tokenizer, vllm_release="sleep") as backend:
        inside = asyncio.Event()
        task = asyncio.create_task(update(backend, inside))
        await inside.wait()
        closing = asyncio.create_task(backend.aclose())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait({task, closing})
    assert not double.engine.is_sleeping


@pytest.mark.parametrize("left", ["paused", "asleep", "kv cache dropped or not yet woken"])
async def test_a_vllm_that_was_left_asleep_is_woken_at_the_start(
    left: str, double: VllmDouble, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    """A service that was killed in the middle of an update leaves it so."""
    engine = double.engine
    engine.paused = "new"
    asleep: dict[str, set[str]] = {"paused": set(), "asleep": {"weights", "kv_cache"}}
    engine.asleep = asleep.get(left, {"kv_cache"})
    async with serving(double, tmp_path, tiny_model.tokenizer) as backend:
        assert not engine.is_sleeping
        assert (await backend.complete(ask())).tokens
