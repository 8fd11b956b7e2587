"""Runs are few: a server with room for two is never asked for a third, and nobody who asks is left waiting for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from claas.adapters.tinker import TinkerAdapter, TinkerAdapters
from claas.core.errors import Overloaded
from claas.core.types import LoraInitRequest, LoraRuntimeRef
from claas.models.base_model import LoadedModel
from claas.models.tinker_runs import TinkerRuns
from claas.training.engine.tinker import TinkerEngine
from tests.doubles.tinker_faults import SKYRL
from tests.doubles.tinker_server import TinkerDouble
from tests.tinker.teaching import connected, place_of, teaching
from tests.tinker.test_engine import Lessons

ROOM = 2
SMALL = replace(SKYRL, models=ROOM)
ADAPTERS = ("me/a", "me/b", "me/c")


@asynccontextmanager
async def taught(model: LoadedModel, **how: Any) -> AsyncIterator[tuple[Lessons, TinkerEngine]]:
    """Three adapters with a version each, on a server that has room for two runs."""
    with TinkerDouble(model, SMALL, poll_s=0.2) as server:
        async with teaching(place_of(server), max_runs=ROOM, **how) as (engine, adapters):
            lessons = Lessons(server, engine, adapters)
            for lora_id in ADAPTERS:
                await engine.init_lora(LoraInitRequest(lora_id=lora_id))
                await learn(lessons, lora_id, 0)
            yield lessons, engine
        assert server.violations == []


async def learn(lessons: Lessons, lora_id: str, parent: int) -> None:
    payload = lessons.payload(parent=parent).model_copy(update={"lora_id": lora_id})
    report = (await lessons.engine.distill(payload)).metadata
    assert report["outcome"] == "applied", report["reason"]


async def test_lessons_and_replies_of_many_adapters_share_few_runs(tiny_model: LoadedModel) -> None:
    async with taught(tiny_model) as (lessons, engine):
        runs = engine._runs

        async def speak(lora_id: str) -> None:
            async with runs.speaking(await engine.lora_runtime_ref(lora_id, 1)) as sampler:
                await lessons.engine._server.score(sampler, [5], [6])

        work = [learn(lessons, lora_id, 1) for lora_id in ADAPTERS] + [speak(lora_id) for lora_id in ADAPTERS * 3]
        await asyncio.wait_for(asyncio.gather(*work), 120)
        assert runs.held <= ROOM
        assert [await version_numbers(lessons.adapters, lora_id) for lora_id in ADAPTERS] == [[0, 1, 2]] * 3


async def version_numbers(adapters: TinkerAdapters, lora_id: str) -> list[int]:
    return [version.manifest.version for version in await adapters.versions(lora_id)]


async def test_who_finds_all_runs_in_use_is_told_so_and_takes_no_place(tiny_model: LoadedModel) -> None:
    async with taught(tiny_model, timeout_s=3.0) as (_, engine):
        runs = engine._runs
        refs = [await engine.lora_runtime_ref(lora_id, 1) for lora_id in ADAPTERS]
        async with runs.speaking(refs[0]), runs.speaking(refs[1]):
            with pytest.raises(Overloaded, match="CLAAS_TINKER_MAX_RUNS"):
                await opened(runs, refs[2])
            waiting = asyncio.create_task(opened(runs, refs[2]))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert runs.held == ROOM
        await opened(runs, refs[2])
        assert runs.held == ROOM


async def test_whoever_waits_is_let_in_when_one_is_free(tiny_model: LoadedModel) -> None:
    async with taught(tiny_model) as (_, engine):
        runs = engine._runs
        refs = [await engine.lora_runtime_ref(lora_id, 1) for lora_id in ADAPTERS]
        async with runs.speaking(refs[0]):
            async with runs.speaking(refs[1]):
                waiting = asyncio.create_task(opened(runs, refs[2]))
                done, _ = await asyncio.wait({waiting}, timeout=0.5)
                assert not done
            await asyncio.wait_for(waiting, 30)


async def opened(runs: TinkerRuns, ref: LoraRuntimeRef) -> None:
    async with runs.speaking(ref):
        pass


async def test_a_run_that_could_not_be_made_takes_no_place(tiny_model: LoadedModel) -> None:
    with TinkerDouble(tiny_model, SMALL, poll_s=0.2) as server:
        async with connected(place_of(server), max_runs=ROOM) as (_, adapters, runs):
            await adapters.create(TinkerAdapter(lora_id="me/a", base_model=tiny_model.id, rank=4))
            for _ in range(ROOM):
                server.fail("create_model", "fail")
                with pytest.raises(Exception, match="told to fail"):
                    await runs.begin(await adapters.adapter("me/a"), None)
            run = await asyncio.wait_for(runs.begin(await adapters.adapter("me/a"), None), 30)
            assert runs.held == 1
            await runs.give_up(run)
            assert runs.held == 0


async def test_what_is_opened_when_nobody_waits_for_it_any_more_is_closed(tiny_model: LoadedModel) -> None:
    begun, open_, closed = threading.Event(), threading.Event(), asyncio.Queue[str]()
    loop = asyncio.get_running_loop()

    def work() -> str:
        begun.set()
        open_.wait(30)
        return "late"

    with TinkerDouble(tiny_model, SMALL, poll_s=0.2) as server:
        async with connected(place_of(server)) as (connection, _, _):
            told = connection._blocking(work, undo=lambda made: loop.call_soon_threadsafe(closed.put_nowait, made))
            opening = asyncio.create_task(told)
            await asyncio.to_thread(begun.wait, 30)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            assert closed.empty()
            open_.set()
            assert await asyncio.wait_for(closed.get(), 30) == "late"
