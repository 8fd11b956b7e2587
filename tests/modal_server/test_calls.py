"""Calls of functions and methods in containers."""

from __future__ import annotations

import asyncio

import modal
import pytest

from tests.modal_server.sample_app import SampleError
from tests.modal_server.server import ModalDouble
from tests.modal_server.waiting import until

pytestmark = pytest.mark.integration


async def test_a_method_runs_after_its_enter_hooks_with_the_apps_variables_only(
    worker: modal.cls.Obj, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOT_FOR_CONTAINERS", "1")
    described = await worker.describe.remote.aio("me")
    described.pop("task")
    assert described == {
        "name": "me",
        "steps": ["snapshot", "restored"],
        "SAMPLE_GREETING": "good day",
        "SAMPLE_SECRET": "hush",
        "DOUBLE_ENV": "from the machine",
        "NOT_FOR_CONTAINERS": None,
    }


def test_a_function_is_called_by_its_name(client: modal.Client) -> None:
    assert modal.Function.from_name("sample", "plain", client=client).remote(1, b=3) == 4


async def test_a_spawned_call_is_awaited_by_its_id(worker: modal.cls.Obj, client: modal.Client) -> None:
    call = await worker.echo.spawn.aio(b"later")
    assert await modal.FunctionCall.from_id(call.object_id, client=client).get.aio(timeout=30) == b"later"


def test_an_exception_keeps_its_type(worker: modal.cls.Obj) -> None:
    with pytest.raises(SampleError, match="not today"):
        worker.fail.remote("not today")


def test_payloads_of_three_megabytes_travel_both_ways(worker: modal.cls.Obj) -> None:
    payload = bytes(range(256)) * 12_000
    assert worker.echo.remote(payload) == payload


def test_a_result_that_is_not_there_yet_is_a_timeout(worker: modal.cls.Obj) -> None:
    call = worker.sleep.spawn(3, "slow")
    with pytest.raises(TimeoutError):
        call.get(timeout=0)
    assert call.get(timeout=30) == "slept"


def test_calls_share_no_more_containers_than_allowed(server: ModalDouble, worker: modal.cls.Obj) -> None:
    calls = [worker.sleep.spawn(0.5, f"crowd-{number}") for number in range(4)]
    stats = worker.sleep.get_current_stats()
    assert stats.backlog + stats.num_running_inputs == 4
    assert [call.get(timeout=60) for call in calls] == ["slept"] * 4
    assert 1 <= len(server.containers.live(function_id=server.apps.function_id("sample", "Worker.*"))) <= 2
    assert stats.num_total_runners <= 2


def test_cancelling_ends_what_runs_and_what_waits(server: ModalDouble, client: modal.Client, worker: modal.cls.Obj) -> None:
    begun = modal.Dict.from_name("sample-dict", create_if_missing=True, client=client)
    calls = [worker.sleep.spawn(300, f"cancel-{number}") for number in range(3)]
    until(lambda: begun.contains("cancel-0") and begun.contains("cancel-1"))
    for call in calls:
        call.cancel()
        with pytest.raises(modal.exception.RemoteError, match="cancelled"):
            call.get(timeout=5)
    until(lambda: all(not container.running for container in server.live_containers("sample")))
    tasks = {container.task_id for container in server.live_containers("sample")}
    assert worker.describe.remote("after")["task"] in tasks


def test_cancelling_may_end_the_container_too(server: ModalDouble, client: modal.Client, worker: modal.cls.Obj) -> None:
    begun = modal.Dict.from_name("sample-dict", create_if_missing=True, client=client)
    call = worker.sleep.spawn(300, "terminate")
    until(lambda: begun.contains("terminate"))
    call.cancel(terminate_containers=True)
    until(lambda: begun["terminate"] not in {container.task_id for container in server.live_containers("sample")})


def test_an_idle_container_ends_and_the_next_call_gets_another(server: ModalDouble, worker: modal.cls.Obj) -> None:
    first = worker.describe.remote("x")["task"]
    until(lambda: first not in {container.task_id for container in server.live_containers("sample")})
    assert worker.describe.remote("y")["task"] != first


def test_a_function_has_its_time(client: modal.Client) -> None:
    with pytest.raises(modal.exception.FunctionTimeoutError, match="timeout of 1s"):
        modal.Function.from_name("sample", "late", client=client).remote()


async def test_a_caller_that_is_cancelled_can_cancel_the_call(worker: modal.cls.Obj) -> None:
    call = await worker.sleep.spawn.aio(300, "gone")
    waiting = asyncio.create_task(call.get.aio())
    await asyncio.sleep(0)
    waiting.cancel()
    await call.cancel.aio()
    with pytest.raises(modal.exception.RemoteError):
        await call.get.aio(timeout=5)
