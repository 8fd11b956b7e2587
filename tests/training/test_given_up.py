"""A lesson that nobody waits for any more stops, and publishes nothing: a worker that is told so is free for the next."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from claas.core.types import LoraInitRequest
from claas.models.base_model import LoadedModel
from tests.contracts.engines import A, local


async def test_a_lesson_that_was_given_up_publishes_nothing(tiny_model: LoadedModel, tmp_path: Path) -> None:
    async with local(tiny_model, tmp_path) as trained:
        await trained.engine.init_lora(LoraInitRequest(lora_id=A))
        long = trained.lesson()
        training = long.training.model_copy(update={"gradient_steps": 64})
        lesson = asyncio.create_task(trained.engine.distill(long.model_copy(update={"training": training})))
        await trained.busy()
        lesson.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lesson
        assert (await trained.distill()).version == 1, "its turn came, and the number is free"
        assert [version.version for version in await trained.engine.versions(A)] == [0, 1]


async def test_the_thread_of_a_lesson_ends_with_it(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """Its OpenMP team would slow down whoever computes next."""

    def learning() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("claas-lesson")]

    async with local(tiny_model, tmp_path) as trained:
        await trained.engine.init_lora(LoraInitRequest(lora_id=A))
        lesson = asyncio.create_task(trained.distill())
        await trained.busy()
        assert learning()
        await lesson
        assert not learning()
