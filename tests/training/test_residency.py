"""Base weights that visit the training device for a step: the same bits as where they live, home again whatever happens, nothing left."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from claas.adapters.filesystem import FilesystemAdapterStore
from claas.core.errors import StepFailed
from claas.core.types import ChatMessage, DistillBatchItem, DistillBatchRequestPayload, LoraInitRequest, TrainingConfig
from claas.models.base_model import LoadedModel
from claas.models.chat_template import render
from claas.models.compute import ComputeShare
from claas.training.engine.local import LocalEngine
from claas.training.memory import AFTER_FAILURE, Gauge, Meter
from claas.training.report import StepReport
from claas.training.residency import RESIDENT, Residency, Visiting
from tests.models.tiny import load_tiny_model
from tests.training.conftest import tiny_llama

MESSAGES = (ChatMessage(role="user", content="Hello"),)
TRAINING = TrainingConfig(learning_rate=1e-2, teacher_top_k=20, max_kl=100.0, min_signal=0.0, gradient_steps=3)


class Device:
    """Stands for a device with memory of its own: it hands out copies, knows which still live, and has room for `room` tensors."""

    def __init__(self, room: int | None = None, error: Exception | None = None) -> None:
        self.room = room
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.moved = 0
        self._copies: list[weakref.ref[Any]] = []

    def __call__(self, home: Tensor) -> Tensor:
        if self._live() == self.room:
            raise self.error
        copy = home.clone()
        self.moved += 1
        self._copies.append(weakref.ref(copy.untyped_storage()))
        return copy

    def alive(self) -> int:
        gc.collect()
        return self._live()

    def _live(self) -> int:
        return sum(copy() is not None for copy in self._copies)


def state(base: LoadedModel) -> list[tuple[int, Tensor]]:
    """Where every parameter and buffer is, and a copy of it."""
    return [(t.data_ptr(), t.detach().clone()) for t in tensors(base)]


def tensors(base: LoadedModel) -> list[Tensor]:
    return [*base.module.parameters(), *base.module.buffers()]


def unchanged(base: LoadedModel, before: list[tuple[int, Tensor]]) -> bool:
    now = [(t.data_ptr(), t) for t in tensors(base)]
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(before, now, strict=True))


def test_all_trees_see_the_device_during_a_visit_and_the_host_afterwards() -> None:
    base = tiny_llama()
    tree, device = base.tree(), Device()
    visiting = Visiting(base, device)
    before = state(base)
    homes = {address for address, _ in before}
    with visiting.on_device() as seconds:
        away = {t.data_ptr() for t in (*tree.parameters(), *tree.buffers())}
        assert not away & homes
        assert device.alive() == device.moved == len(before) == len(away)
        assert all(torch.equal(t, value) for t, (_, value) in zip(tensors(base), before, strict=True))
    assert unchanged(base, before)
    assert {t.data_ptr() for t in (*tree.parameters(), *tree.buffers())} == homes
    assert device.alive() == 0
    assert set(seconds) == {"load", "offload"} and all(s >= 0 for s in seconds.values())


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel by way of /proc")
def test_at_home_they_are_in_memory_of_the_process_and_keep_their_values(tiny_model_dir: Path) -> None:
    """As loaded they are pages of a file, which the system may drop and read again."""
    base = load_tiny_model(tiny_model_dir)
    values = [value for _, value in state(base)]
    assert str(tiny_model_dir / "model.safetensors") in mapped_files(base)
    Visiting(base)
    assert all(torch.equal(t, value) and t.is_contiguous() for t, value in zip(tensors(base), values, strict=True))
    assert not any(name.startswith("/") for name in mapped_files(base))


def mapped_files(base: LoadedModel) -> set[str]:
    """What lies in the memory of the base's tensors, as the kernel says: a file's name, or "" for memory of the process."""
    areas = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split(maxsplit=5)
        start, end = (int(edge, 16) for edge in span.split("-"))
        areas.append((start, end, rest[4] if len(rest) == 5 else ""))
    return {name for t in tensors(base) for start, end, name in areas if start <= t.data_ptr() < end}


def test_on_the_cpu_nothing_moves() -> None:
    base = tiny_llama()
    visiting = Visiting(base)
    before = state(base)
    with visiting.on_device():
        assert unchanged(base, before)
    assert visiting.visiting_bytes == 0


def test_tied_weights_move_once() -> None:
    tied, device = tiny_llama(), Device()
    tied.module.lm_head.weight = tied.module.get_input_embeddings().weight
    with Visiting(tied, device).on_device():
        assert device.moved == len(list(tied.module.parameters())) + len(list(tied.module.buffers()))
        assert tied.module.lm_head.weight.data_ptr() == tied.module.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("room", [0, 1, 7])
def test_no_room_on_the_way_in_leaves_all_at_home_and_says_what_to_do(room: int) -> None:
    base, device = tiny_llama(), Device(room)
    visiting = Visiting(base, device)
    before = state(base)
    entered = False
    with pytest.raises(StepFailed, match="stop what else uses it") as caught, visiting.on_device():
        entered = True
    assert not entered and device.moved == room
    assert "CLAAS_VLLM_RELEASE=sleep" in caught.value.message
    assert unchanged(base, before)
    assert device.alive() == 0
    device.room = None
    with visiting.on_device():
        assert device.alive() == len(before)


def test_another_error_on_the_way_in_comes_through_as_it_is() -> None:
    base, device = tiny_llama(), Device(3, RuntimeError("CUDA error: an illegal memory access was encountered"))
    visiting = Visiting(base, device)
    before = state(base)
    with pytest.raises(RuntimeError, match="illegal memory access"), visiting.on_device():
        pytest.fail("entered")
    assert unchanged(base, before) and device.alive() == 0


def test_an_error_during_the_visit_holds_nothing_on_the_device_while_it_is_looked_at() -> None:
    """A traceback keeps the locals of its frames, and with them a step's graph."""
    base, device = tiny_llama(), Device()
    visiting = Visiting(base, device)
    before = state(base)

    def step() -> None:
        graph = [device(parameter) for parameter in base.module.parameters()]
        try:
            raise ZeroDivisionError(len(graph))
        except ZeroDivisionError as error:
            raise ValueError("a step broke") from error

    with pytest.raises(ValueError, match="broke") as caught, visiting.on_device():
        step()
    assert device.alive() == 0
    assert caught.value.__cause__ is not None
    assert unchanged(base, before)


# --- the engine ---


async def taught(
    base: LoadedModel, folder: Path, residency: Residency, watch: Callable[[], None] = lambda: None
) -> tuple[list[StepReport], list[bytes]]:
    """Two lessons, one upon the other: their reports, and the files that they left."""
    store = FilesystemAdapterStore(folder, keep_versions=5)
    engine = LocalEngine(store, base, ComputeShare(1), residency=residency)
    await engine.init_lora(LoraInitRequest(lora_id="me/a", lora_r=4))
    reports: list[StepReport] = []
    try:
        for feedback in ("Be kind.", "Be brief."):
            report = StepReport.model_validate((await engine.distill(payload(base, feedback, len(reports)))).metadata)
            assert report.outcome == "applied"
            reports.append(report)
            watch()
    finally:
        await engine.aclose()
    files = sorted(file for version in (1, 2) for file in store.path("me/a", version).glob("*.safetensors"))
    return reports, [file.read_bytes() for file in files]


def payload(base: LoadedModel, feedback: str, parent: int) -> DistillBatchRequestPayload:
    item = DistillBatchItem(
        prompt="Hello", response="x", feedback=feedback, response_logprobs=(-1.0, -1.0), messages=MESSAGES,
        prompt_token_ids=render(base.tokenizer, MESSAGES, {}), response_token_ids=(5, 6), version=parent,
    )  # fmt: skip
    training = TRAINING.model_copy(update={"teacher": "ema"})
    return DistillBatchRequestPayload(lora_id="me/a", parent=parent, training=training, samples=[item])


async def test_lessons_of_visiting_weights_are_those_of_resident_ones_to_the_bit(tiny_model_dir: Path, tmp_path: Path) -> None:
    resident, visiting = load_tiny_model(tiny_model_dir), load_tiny_model(tiny_model_dir)
    device = Device()
    residency = Visiting(visiting, device)
    before = state(visiting)

    def watch() -> None:
        assert device.alive() == 0, "not the weights, nor anything that refers to them, outlives a step"
        assert unchanged(visiting, before)

    reports, files = await taught(resident, tmp_path / "resident", RESIDENT)
    visited, same = await taught(visiting, tmp_path / "visiting", residency, watch)
    assert len(files) == 6 and files == same
    assert device.moved == 2 * len(before)
    for one, other in zip(reports, visited, strict=True):
        assert set(other.cost.seconds) - set(one.cost.seconds) == {"load", "offload"}
        assert one.update == other.update


async def test_the_engine_goes_on_after_a_step_that_did_not_fit(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = load_tiny_model(tiny_model_dir)
    device = Device(room=5)
    store = FilesystemAdapterStore(tmp_path, keep_versions=5)
    engine = LocalEngine(store, base, ComputeShare(1), residency=Visiting(base, device))
    await engine.init_lora(LoraInitRequest(lora_id="me/a", lora_r=4))
    with pytest.raises(StepFailed, match="stop what else uses it"):
        await engine.distill(payload(base, "Be kind.", 0))
    assert [v.version for v in await engine.versions("me/a")] == [0]
    assert device.alive() == 0
    device.room = None
    assert (await engine.distill(payload(base, "Be kind.", 0))).metadata["outcome"] == "applied"
    await engine.aclose()


async def test_running_out_of_memory_in_the_step_says_what_to_do(tiny_model_dir: Path, tmp_path: Path) -> None:
    base, device = load_tiny_model(tiny_model_dir), Device()
    share = Exhausted(device)
    engine = LocalEngine(FilesystemAdapterStore(tmp_path, keep_versions=5), base, share, residency=Visiting(base, device))
    await engine.init_lora(LoraInitRequest(lora_id="me/a", lora_r=4))
    with pytest.raises(StepFailed, match="ran out of the memory of 'cpu': stop what else uses it, or teach shorter conversations"):
        await engine.distill(payload(base, "Be kind.", 0))
    assert device.moved and device.alive() == 0
    assert [v.version for v in await engine.versions("me/a")] == [0]
    await engine.aclose()


class Crowded(Gauge):
    """An allocator that a step had 100 GiB of."""

    def reset(self) -> int:
        return 0

    def peak(self) -> int:
        return 100 * 2**30


async def test_a_step_that_ran_out_of_memory_wants_more_for_the_next_and_does_not_say_that_it_needs_it(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    base, device = load_tiny_model(tiny_model_dir), Device()
    store = FilesystemAdapterStore(tmp_path, keep_versions=5)
    engine = LocalEngine(store, base, Exhausted(device), residency=Visiting(base, device), meter=Meter(Crowded()))
    needed = engine.memory_needed()
    assert engine.memory_wanted() == needed
    await engine.init_lora(LoraInitRequest(lora_id="me/a", lora_r=4))
    with pytest.raises(StepFailed, match="ran out of the memory"):
        await engine.distill(payload(base, "Be kind.", 0))
    assert engine.memory_needed() == needed
    assert engine.memory_wanted() == AFTER_FAILURE * 100 * 2**30
    await engine.aclose()


class Exhausted(ComputeShare):
    """Cores for one, and no memory for a micro-batch once the weights are there."""

    def __init__(self, device: Device) -> None:
        super().__init__(1)
        self._device = device

    def apply(self) -> None:
        super().apply()
        if self._device.moved:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


async def test_what_a_step_needs_is_asked_of_the_engine(tiny_model: LoadedModel, tmp_path: Path) -> None:
    engine = LocalEngine(FilesystemAdapterStore(tmp_path, keep_versions=5), tiny_model, ComputeShare(1))
    assert engine.free_memory() is None
    assert 0 < engine.memory_needed(1) == engine.memory_needed(512) == engine.memory_needed(), "no sample is longer than the context"
    await engine.aclose()
