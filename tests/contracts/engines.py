"""An engine of each kind, for the suite that asks all of them the same, and how to bring about what they promise something for."""

from __future__ import annotations

import asyncio
import io
import threading
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import modal
from safetensors.torch import load

from claas.adapters.filesystem import FilesystemAdapterStore
from claas.adapters.modal_mounted import MountedVolumeStore
from claas.core.adapter_id import flat_name
from claas.core.errors import StepFailed
from claas.core.types import (
    ChatMessage,
    DistillBatchItem,
    DistillBatchRequestPayload,
    StepOutcome,
    TrainingConfig,
)
from claas.models.base_model import LoadedModel
from claas.models.chat_template import render
from claas.models.compute import ComputeShare
from claas.training.engine.base import TrainingEngine
from claas.training.engine.local import LocalEngine
from claas.training.engine.modal import ModalEngine
from claas.training.report import StepReport
from claas.training.residency import RESIDENT, Residency, Visiting
from claas.wiring_modal import open_modal
from tests.doubles.engine import NO_EFFECT, MemoryEngine
from tests.doubles.tinker_faults import CLOUD, SKYRL, Ways
from tests.doubles.tinker_server import TinkerDouble
from tests.modal_server.server import ModalDouble
from tests.models.tiny import load_tiny_model
from tests.on_modal.calls import LocalCalls, NoLease, app_of
from tests.on_modal.stage import APP, modal_settings
from tests.tinker.teaching import place_of, teaching

A, B = "me/a", "me/b"
KEEP = 10
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
APPLIED = {"learning_rate": 1e-2, "teacher_top_k": 20, "max_kl": 100.0, "min_signal": 0.0, "gradient_steps": 3}
OTHERWISE: dict[StepOutcome, dict[str, float]] = {"applied": {}, "skipped": {"min_signal": 100.0}, "undone": {"max_kl": 1e-9}}

Payload = Callable[..., DistillBatchRequestPayload]


@dataclass(frozen=True)
class Trained:
    """An engine, and how to bring about what it promises something for.

    will: makes the next lesson come to this; what must be in its settings for it.
    has_effect: whether exported weights change anything.
    misfit: an exported archive, changed so that it is not for this base model.
    breaks: from now on the steps that train this version of `A` break.
    busy: returns once a step that was just asked for is under way.
    """

    engine: TrainingEngine
    base_model: str
    will: Callable[[StepOutcome], dict[str, float]]
    has_effect: Callable[[bytes], bool]
    misfit: Callable[[bytes], bytes]
    breaks: Callable[[int], Awaitable[None]]
    busy: Callable[[], Awaitable[None]]
    prompt_token_ids: tuple[int, ...]

    def lesson(self, lora_id: str = A, outcome: StepOutcome = "applied", feedback: str = "Be kind.", **fields: Any) -> Any:
        """The payload of a lesson that comes to `outcome`."""
        item = DistillBatchItem(
            prompt="Hello", response="x", feedback=feedback, response_logprobs=(-1.0, -1.0, -1.0), messages=MESSAGES,
            prompt_token_ids=self.prompt_token_ids, response_token_ids=(5, 6, 7),
        )  # fmt: skip
        training = TrainingConfig.model_validate(APPLIED | self.will(outcome))
        return DistillBatchRequestPayload.model_validate({"lora_id": lora_id, "training": training, "samples": [item]} | fields)

    async def distill(self, *args: Any, **fields: Any) -> StepReport:
        return StepReport.model_validate((await self.engine.distill(self.lesson(*args, **fields))).metadata)

    async def files(self, lora_id: str = A, version: int | None = None) -> dict[str, bytes]:
        """What an export holds, by name."""
        archive = zipfile.ZipFile(io.BytesIO((await self.engine.export_lora(lora_id, version)).content))
        return {name: archive.read(name) for name in archive.namelist()}

    async def state(self, lora_id: str = A) -> tuple[object, ...]:
        """All there is to be seen of an adapter."""
        versions = await self.engine.versions(lora_id)
        return versions, await self.engine.lora_runtime_ref(lora_id), [await self.files(lora_id, v.version) for v in versions]


MESSAGES = (ChatMessage(role="user", content="Hello"),)


class Noticed(ComputeShare):
    """Cores for one, and a sign when a step takes its share: at its beginning, and between micro-batches."""

    def __init__(self) -> None:
        super().__init__(1)
        self.taken = threading.Event()

    def apply(self) -> None:
        self.taken.set()
        super().apply()


@asynccontextmanager
async def local(model: LoadedModel, folder: Path, residency: Residency = RESIDENT) -> AsyncIterator[Trained]:
    store, share = FilesystemAdapterStore(folder, keep_versions=KEEP), Noticed()
    engine = LocalEngine(store, model, share, residency=residency)

    async def breaks(version: int) -> None:
        (store.path(A, version) / WEIGHTS).write_bytes(b"damaged")

    async def busy() -> None:
        assert await asyncio.to_thread(share.taken.wait, 30)

    prompt = render(model.tokenizer, MESSAGES, {})
    try:
        yield Trained(engine, model.id, OTHERWISE.__getitem__, _changes_something, _for_a_taller_model, breaks, busy, prompt)
    finally:
        await engine.aclose()


@asynccontextmanager
async def visiting(model: LoadedModel, folder: Path) -> AsyncIterator[Trained]:
    """The weights are copied for each step, as to another device."""
    own = load_tiny_model(Path(model.path))
    async with local(own, folder, Visiting(own, lambda home: home.clone())) as trained:
        yield trained


@asynccontextmanager
async def on_tinker(model: LoadedModel, ways: Ways, **settings: float) -> AsyncIterator[Trained]:
    """Lessons on the double of a Tinker server, through the true SDK."""

    def will(outcome: StepOutcome) -> dict[str, float]:
        return settings | OTHERWISE[outcome]

    with TinkerDouble(model, ways, poll_s=0.2) as server:
        async with teaching(place_of(server)) as (engine, adapters):

            async def breaks(version: int) -> None:
                found = await adapters.version(A, version)
                await adapters.publish(found.model_copy(update={"state_path": "tinker://nobody/weights/v1"}))

            async def busy() -> None:
                while "forward" not in server.called():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

            prompt = render(model.tokenizer, MESSAGES, {})
            yield Trained(engine, model.id, will, _changes_something, _for_a_taller_model, breaks, busy, prompt)
        assert server.violations == []


def tinker(model: LoadedModel, _: Path) -> AbstractAsyncContextManager[Trained]:
    return on_tinker(model, CLOUD)


def tinker_of_ones_own(model: LoadedModel, _: Path) -> AbstractAsyncContextManager[Trained]:
    """A server that tells no likeliest tokens, deletes nothing, has room for four models, and speaks only through those it holds."""
    return on_tinker(model, SKYRL, learning_rate=1e-3)


@asynccontextmanager
async def modal_local(model: LoadedModel, folder: Path) -> AsyncIterator[Trained]:
    """Lessons of the app's own worker, through `.local()`."""
    adapters = {"CLAAS_LORA_ROOT": str(folder), "CLAAS_DEVICE": "cpu", "CLAAS_DTYPE": "float32"}
    app = app_of({"CLAAS_BASE_MODEL_ID": str(model.path), "CLAAS_MODAL_SERVING": "embedded"} | adapters)
    store, calls = MountedVolumeStore(folder, None, keep_versions=KEEP), LocalCalls(app.DistillWorker())
    engine = ModalEngine(store, replace(model, id=Path(model.path).name), calls, NoLease(), price=lambda gpu: None)

    async def breaks(version: int) -> None:
        (store.path(A, version) / WEIGHTS).write_bytes(b"damaged")

    async def busy() -> None:
        assert await asyncio.to_thread(calls.begun.wait, 30)

    prompt = render(model.tokenizer, MESSAGES, {})
    try:
        yield Trained(engine, Path(model.path).name, OTHERWISE.__getitem__, _changes_something, _for_a_taller_model, breaks, busy, prompt)
    finally:
        await engine.aclose()


@asynccontextmanager
async def on_modal(server: ModalDouble, model: LoadedModel, folder: Path) -> AsyncIterator[Trained]:
    """Lessons of containers, through the true SDK: the app is deployed on `server`, which this process calls."""
    engine, inference, base_id = await open_modal(modal_settings(folder, Path(model.path), keep_versions=KEEP), progress=False)
    volume = modal.Volume.from_name(f"{APP}-adapters")

    async def breaks(version: int) -> None:
        path = f"{flat_name(A)}/v{version}/{WEIGHTS}"
        size = len(b"".join([part async for part in volume.read_file.aio(path)]))
        async with volume.batch_upload.aio(force=True) as batch:
            batch.put_file(io.BytesIO(bytes(size)), path)

    async def busy() -> None:
        server.faults.delay("VolumeReload", 4.0, times=20)  # a lesson looks at the Volume before it trains
        while "training" not in str((await engine.health()).detail["lessons"]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    try:
        prompt = render(model.tokenizer, MESSAGES, {})
        yield Trained(engine, base_id, OTHERWISE.__getitem__, _changes_something, _for_a_taller_model, breaks, busy, prompt)
    finally:
        server.faults.clear()
        for lora_id in (await engine.list_loras()).loras:
            await engine.delete_lora(lora_id)
        await inference.aclose()
        await engine.aclose()


@asynccontextmanager
async def double(_: LoadedModel, __: Path) -> AsyncIterator[Trained]:
    engine = MemoryEngine()

    def will(outcome: StepOutcome) -> dict[str, float]:
        engine.outcome = outcome
        return {}

    async def breaks(_: int) -> None:
        engine.failure = StepFailed("the double was told to break")

    async def busy() -> None:
        await asyncio.sleep(0)

    yield Trained(engine, engine.base_model, will, lambda weights: weights != NO_EFFECT, _without_weights, breaks, busy, (1,))


def _changes_something(weights: bytes) -> bool:
    return any(bool(tensor.any()) for name, tensor in load(weights).items() if "lora_B" in name)


def _for_a_taller_model(archive: bytes) -> bytes:
    return _rewritten(archive, lambda name, content: (name, content.replace(b"layers.1.", b"layers.9.")))


def _without_weights(archive: bytes) -> bytes:
    return _rewritten(archive, lambda name, content: (name.replace(WEIGHTS, "other.safetensors"), content))


def _rewritten(archive: bytes, change: Callable[[str, bytes], tuple[str, bytes]]) -> bytes:
    source, out = zipfile.ZipFile(io.BytesIO(archive)), io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(*change(name, source.read(name)))
    return out.getvalue()


ENGINES = {
    "local": local,
    "local-visiting": visiting,
    "tinker": tinker,
    "tinker-own": tinker_of_ones_own,
    "modal-local": modal_local,
    "double": double,
}
