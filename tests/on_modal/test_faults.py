"""What can fail on the way to Modal and there: each says what to do, publishes nothing, and leaves nothing running."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import modal
import pytest
from grpclib import Status
from modal_proto import api_pb2 as pb

from claas.adapters.filesystem import FilesystemAdapterStore
from claas.core.errors import BackendUnavailable, ClaasError, StepFailed
from claas.core.types import DistillBatchRequestPayload, LoraInitRequest
from claas.training.engine.modal import ModalEngine
from claas.training.engine.modal_calls import ModalCalls
from claas.wiring_modal import open_modal
from tests.modal_server.processes import containers_possible
from tests.modal_server.server import ModalDouble
from tests.models.tiny import load_tiny_model
from tests.on_modal.calls import NoLease
from tests.on_modal.lessons import A, lesson
from tests.on_modal.stage import APP, modal_settings

Make = Callable[..., ModalEngine]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not containers_possible(), reason="this machine lets nobody make namespaces"),
]


@pytest.fixture(name="engine_of")
async def _engine_of(modal_double: ModalDouble, tiny_model_dir: Path, tmp_path: Path) -> AsyncIterator[Make]:
    """Engines with settings of their own, whose one adapter is in a folder here: that is enough for what fails before it is read."""
    made: list[ModalEngine] = []
    model = load_tiny_model(tiny_model_dir)

    def make(client: modal.Client | None = None, **more: Any) -> ModalEngine:
        chosen = modal_settings(tmp_path / "data", tiny_model_dir).model_copy(update=more)
        signs = modal.Dict.from_name(f"{APP}-leases", create_if_missing=True, client=client)
        store = FilesystemAdapterStore(tmp_path / "adapters", keep_versions=9)
        made.append(ModalEngine(store, model, ModalCalls(chosen, signs, client), NoLease(), price=lambda gpu: None))
        return made[-1]

    await make().init_lora(LoraInitRequest(lora_id=A))
    yield make
    modal_double.faults.clear()
    for engine in made:
        await engine.aclose()


async def failing(engine: ModalEngine, payload: DistillBatchRequestPayload | None = None) -> ClaasError:
    with pytest.raises(ClaasError) as caught:
        await engine.distill(payload or lesson())
    assert "/" not in caught.value.message, "no path"
    return caught.value


RESULTS = [
    (pb.GenericResult.GENERIC_STATUS_KERNEL_OOM_KILL, "Container was OOM killed", StepFailed, "ran out of memory"),
    (pb.GenericResult.GENERIC_STATUS_MEMORY_MANAGER_EVICTION, "evicted: out of memory", StepFailed, "CLAAS_MODAL_GPU"),
    (pb.GenericResult.GENERIC_STATUS_TIMEOUT, "timed out", StepFailed, "CLAAS_MODAL_TIMEOUT_S"),
    (pb.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE, "worker preempted", BackendUnavailable, "lost the container"),
    (pb.GenericResult.GENERIC_STATUS_TERMINATED, "terminated", StepFailed, "claas modal logs-hint"),
    (pb.GenericResult.GENERIC_STATUS_FAILURE, "the container exited with /a/path", StepFailed, "ended during the lesson"),
]


@pytest.mark.parametrize(("status", "text", "kind", "words"), RESULTS, ids=lambda value: value if isinstance(value, str) else "")
async def test_what_becomes_of_a_container(
    engine_of: Make, modal_double: ModalDouble, status: Any, text: str, kind: type[ClaasError], words: str
) -> None:
    modal_double.faults.result(status, text)
    error = await failing(engine_of())
    assert isinstance(error, kind) and words in error.message


REFUSALS = [
    (Status.RESOURCE_EXHAUSTED, "workspace billing cycle spend limit reached", "spending limit"),
    (Status.FAILED_PRECONDITION, "no credit is left", "credit"),
    (Status.PERMISSION_DENIED, "not for this token", "rights"),
]


@pytest.mark.parametrize(("status", "text", "words"), REFUSALS, ids=["limit", "credit", "rights"])
async def test_what_modal_refuses(engine_of: Make, modal_double: ModalDouble, status: Status, text: str, words: str) -> None:
    modal_double.faults.refuse("FunctionMap", status, text, times=100)
    error = await failing(engine_of())
    assert isinstance(error, BackendUnavailable) and words in error.message


async def test_an_app_that_is_not_deployed(engine_of: Make) -> None:
    engine = engine_of(modal_app="nobody")
    assert "claas modal deploy" in (await failing(engine)).message
    health = await engine.health()
    assert health.status == "unhealthy" and "claas modal deploy" in (health.error or "")


async def test_a_wrong_token(engine_of: Make, modal_double: ModalDouble) -> None:
    error = await failing(engine_of(client=await asyncio.to_thread(modal_double.client, "wrong")))
    assert isinstance(error, BackendUnavailable) and "modal setup" in error.message


async def test_no_container_comes(engine_of: Make, modal_double: ModalDouble) -> None:
    modal_double.faults.no_containers = True
    error = await failing(engine_of(modal_start_timeout_s=1))
    assert isinstance(error, BackendUnavailable) and "CLAAS_MODAL_START_TIMEOUT_S" in error.message
    await until(lambda: modal_double.calls["FunctionCallCancel"] > 0)


async def test_an_answer_that_is_there_no_more(engine_of: Make, modal_double: ModalDouble) -> None:
    modal_double.faults.outputs_expired = True
    assert "send the feedback again" in (await failing(engine_of())).message


async def test_a_network_that_is_gone_for_a_while_costs_no_lesson(modal_double: ModalDouble, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Longer than the SDK tries by itself: the same call is asked after again."""
    async with service(tiny_model_dir, tmp_path) as engine:
        spawned = modal_double.calls["FunctionMap"]
        teaching = asyncio.create_task(engine.distill(lesson()))
        await until(lambda: modal_double.calls["FunctionMap"] > spawned)
        modal_double.faults.unavailable("FunctionGetOutputs", times=6)
        step = await teaching
        assert (step.metadata["outcome"], modal_double.calls["FunctionMap"]) == ("applied", spawned + 1)


async def test_an_error_of_ours_comes_back_as_what_it_was(modal_double: ModalDouble, tiny_model_dir: Path, tmp_path: Path) -> None:
    async with service(tiny_model_dir, tmp_path) as engine:
        long = lesson().samples[0].model_copy(update={"prompt_token_ids": (5,) * 600})
        error = await failing(engine, lesson().model_copy(update={"samples": [long]}))
        assert not isinstance(error, StepFailed | BackendUnavailable), error


async def test_a_lesson_that_nobody_waits_for_frees_its_container(modal_double: ModalDouble, tiny_model_dir: Path, tmp_path: Path) -> None:
    async with service(tiny_model_dir, tmp_path) as engine:
        modal_double.faults.delay("VolumeReload", 4.0, times=20)  # a lesson looks at the Volume before it trains
        teaching = asyncio.create_task(engine.distill(lesson(gradient_steps=64)))
        await until(lambda: bool(modal_double.live_containers(APP)))
        await until_training(engine)
        teaching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await teaching
        await until(lambda: not modal_double.live_containers(APP))
        modal_double.faults.clear()
        assert [version.version for version in await engine.versions(A)] == [0]


async def test_answers_that_get_lost_are_asked_for_again(modal_double: ModalDouble, tiny_model_dir: Path, tmp_path: Path) -> None:
    """What was done and not answered for longer than the SDK tries is done: to promote, to discard and to delete."""
    async with service(tiny_model_dir, tmp_path) as engine:
        for _ in range(2):
            await engine.distill(lesson())
        modal_double.faults.lose_answer("VolumePutFiles2", 5)
        await engine.promote(A, 1)
        assert (await engine.lora_runtime_ref(A)).version == 1
        modal_double.faults.lose_answer("VolumeRemoveFile2", 5)
        await engine.discard(A, 2)
        assert [version.version for version in await engine.versions(A)] == [0, 1]
        modal_double.faults.lose_answer("VolumeRemoveFile2", 5)
        assert (await engine.delete_lora(A)).deleted
        assert not (await engine.lora_exists(A)).exists


async def until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.02)


async def until_training(engine: ModalEngine) -> None:
    while "training" not in str((await engine.health()).detail["lessons"]):  # noqa: ASYNC110
        await asyncio.sleep(0.02)


@asynccontextmanager
async def service(model: Path, folder: Path) -> AsyncIterator[ModalEngine]:
    """The engine as it is wired, with one adapter on the Volume, and nothing on it afterwards."""
    engine, inference, _ = await open_modal(modal_settings(folder / "data", model), progress=False)
    assert isinstance(engine, ModalEngine)
    await engine.init_lora(LoraInitRequest(lora_id=A))
    try:
        yield engine
    finally:
        await engine.delete_lora(A)
        await inference.aclose()
        await engine.aclose()
