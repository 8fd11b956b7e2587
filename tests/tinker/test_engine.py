"""What is the Tinker engine's own: what it leaves on the server, what goes wrong there, and that moments go on across restarts."""

from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from claas.adapters.tinker import TinkerAdapter, TinkerAdapters
from claas.core.errors import BackendUnavailable, BadRequest, ClaasError, StepFailed
from claas.core.types import (
    ChatMessage,
    DistillBatchItem,
    DistillBatchRequestPayload,
    LoraInitRequest,
    SamplingParams,
    TrainingConfig,
)
from claas.core.usage import PER, charging, metered
from claas.inference.base import GenerationRequest
from claas.inference.tinker import TinkerInference
from claas.models.base_model import LoadedModel
from claas.models.chat_template import render
from claas.training.engine.tinker import TinkerEngine
from claas.training.report import StepReport
from tests.doubles.tinker_faults import CLOUD, SKYRL, Ways
from tests.doubles.tinker_server import TinkerDouble
from tests.tinker.teaching import PRICES, place_of, teaching

A = "me/a"
MESSAGES = (ChatMessage(role="user", content="Hello"),)
TRAINING = {"learning_rate": 3e-4, "max_kl": 100.0, "min_signal": 0.0, "gradient_steps": 2}


class Lessons:
    """An engine on a double, and how to teach it."""

    def __init__(self, server: TinkerDouble, engine: TinkerEngine, adapters: TinkerAdapters) -> None:
        self.server, self.engine, self.adapters = server, engine, adapters

    def payload(self, feedback: str = "Be kind.", parent: int | None = None, **training: Any) -> DistillBatchRequestPayload:
        prompt = render(self.server.model.tokenizer, MESSAGES, {})
        samples = [
            DistillBatchItem(
                prompt="Hello", response="x", feedback=feedback, response_logprobs=(), messages=MESSAGES, source="hindsight",
                prompt_token_ids=prompt, response_token_ids=ids,
            )
            for ids in ((5, 6, 7), (8, 9, 10, 11, 12))
        ]  # fmt: skip
        return DistillBatchRequestPayload(
            lora_id=A, parent=parent, training=TrainingConfig.model_validate(TRAINING | training), samples=samples
        )

    async def teach(self, *args: Any, **training: Any) -> StepReport:
        return StepReport.model_validate((await self.engine.distill(self.payload(*args, **training))).metadata)

    async def weights(self, number: int) -> bytes:
        return (await self.engine.export_lora(A, number)).content

    async def numbers(self) -> list[int]:
        return [version.version for version in await self.engine.versions(A)]


@pytest.fixture(params=[CLOUD, SKYRL], ids=["hosted", "own"])
async def lessons(request: pytest.FixtureRequest, tiny_model: LoadedModel) -> AsyncIterator[Lessons]:
    async with opened(tiny_model, request.param) as found:
        yield found


@asynccontextmanager
async def opened(model: LoadedModel, ways: Ways = CLOUD, **how: Any) -> AsyncIterator[Lessons]:
    with TinkerDouble(model, ways, poll_s=0.2) as server:
        async with teaching(place_of(server), **how) as (engine, adapters):
            await engine.init_lora(LoraInitRequest(lora_id=A))
            yield Lessons(server, engine, adapters)
        assert server.violations == []


# --- what is left on the server ---


async def test_an_adapter_that_was_never_taught_is_nothing_on_the_server(lessons: Lessons) -> None:
    await lessons.engine.init_lora(LoraInitRequest(lora_id="me/b"))
    await lessons.engine.delete_lora("me/b")
    assert not {"create_model", "save_weights", "delete_checkpoint"} & set(lessons.server.called())


async def test_every_answer_is_awaited_and_given_up_runs_are_unloaded(lessons: Lessons) -> None:
    applied = await lessons.teach()
    undone = await lessons.teach(max_kl=1e-9)
    skipped = await lessons.teach(min_signal=100.0)
    assert [report.outcome for report in (applied, undone, skipped)] == ["applied", "undone", "skipped"]
    while len(lessons.server.engine.live) > 1:  # unloading is asked for, not waited for  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert not [name for name in lessons.server.unawaited() if name not in ("unload_model", "asample")]
    assert len(lessons.server.engine.checkpoints) == 2


async def test_runs_are_bounded(lessons: Lessons) -> None:
    for _ in range(6):
        report = await lessons.teach()
        assert report.version is not None
        await lessons.engine.promote(A, report.version)
    assert len(lessons.server.engine.live) <= 4


async def test_what_is_discarded_superseded_or_deleted_goes_from_the_server_too(tiny_model: LoadedModel) -> None:
    async with opened(tiny_model) as lessons:
        for _ in range(3):
            await lessons.teach()
        await lessons.engine.discard(A, 2)
        names = {checkpoint.name for checkpoint in lessons.server.engine.checkpoints.values()}
        assert names == {"v1", "v3"}
        assert (await lessons.engine.delete_lora(A)).deleted
        assert lessons.server.engine.checkpoints == {}


async def test_a_version_that_was_being_saved_is_taken_away_after_a_crash(tiny_model: LoadedModel) -> None:
    async with opened(tiny_model) as lessons:
        run = await lessons.engine._runs.begin(await lessons.adapters.adapter(A), None)
        number = await lessons.adapters.reserve(A, run.id)
        await lessons.engine._server.wait(run.client.save_state(f"v{number}"))
        assert len(await lessons.engine.recover()) == 1
        assert lessons.server.engine.checkpoints == {}
        assert await lessons.numbers() == [0]


# --- what goes wrong ---


@pytest.mark.parametrize("step", ["forward", "forward_backward", "optim_step", "save_weights", "save_weights_for_sampler"])
async def test_a_step_that_fails_publishes_nothing_and_tells_the_servers_words(lessons: Lessons, step: str) -> None:
    await lessons.teach()
    before = await lessons.weights(1)
    lessons.server.fail(step, "fail", text="the moon is in the way", times=None)
    with pytest.raises(StepFailed, match="the moon is in the way"):
        await lessons.teach(parent=1)
    lessons.server.faults.clear()
    # The optimizer's step is sent along with the backward pass; what comes of it is given up with the run.
    lessons.server.violations[:] = [told for told in lessons.server.violations if "without gradients" not in told]
    assert await lessons.numbers() == [0, 1]
    assert await lessons.weights(1) == before
    after = await lessons.teach(parent=1)
    assert after.outcome == "applied"


async def test_a_server_that_dies_in_mid_step_is_said_to_be_down_and_the_lesson_can_be_taught_later(lessons: Lessons) -> None:
    lessons.server.fail("optim_step", "crash")
    with pytest.raises(BackendUnavailable, match="does not answer"):
        await lessons.teach()
    assert (await lessons.engine.health()).status == "unhealthy"
    lessons.server.start()
    report = await lessons.teach()
    assert report.outcome == "applied"
    assert await lessons.numbers() == [0, report.version]


async def test_too_many_requests_and_short_failures_are_waited_out(lessons: Lessons) -> None:
    for name in ("forward_backward", "optim_step", "asample"):
        lessons.server.fail(name, "status", status=429)
        lessons.server.fail(name, "status", status=503, nth=2)
    assert (await lessons.teach()).outcome == "applied"


async def test_a_slow_server_is_given_up_after_its_time(tiny_model: LoadedModel) -> None:
    async with opened(tiny_model, timeout_s=1.0) as lessons:
        lessons.server.fail("forward_backward", "slow", seconds=60.0)
        with pytest.raises(BackendUnavailable, match="has not answered"):
            await lessons.teach()
        assert await lessons.numbers() == [0]


async def test_what_has_no_counterpart_is_refused_by_name(lessons: Lessons) -> None:
    for field, value in (("teacher", "ema"), ("hindsight_teacher", "snapshot"), ("kl_reg_weight", 0.1)):
        with pytest.raises(BadRequest) as caught:
            await lessons.teach(**{field: value})
        assert caught.value.param == f"training.{field}"
    for asked in (LoraInitRequest(lora_id="me/b", lora_alpha=16), LoraInitRequest(lora_id="me/b", target_modules=("q_proj",))):
        with pytest.raises(BadRequest) as caught:
            await lessons.engine.init_lora(asked)
        assert caught.value.param in asked.model_fields_set
    with pytest.raises(BadRequest, match="takes no weights"):
        await lessons.engine.import_lora("me/b", b"zip")
    assert "create_model" not in lessons.server.called()


# --- going on ---


async def test_moments_go_on_from_version_to_version_across_a_restart_of_both(tiny_model: LoadedModel) -> None:
    """Two lessons with a restart between them are two lessons; one whose second begins with fresh moments is another."""
    outcomes = []
    for restart in (False, True):
        async with opened(tiny_model) as lessons:
            await lessons.teach("Be kind.")
            if restart:
                version = await lessons.adapters.version(A, 1)
                lessons.server.kill()
                lessons.server.start()
                async with teaching(place_of(lessons.server)) as (engine, adapters):
                    await adapters.create(TinkerAdapter(lora_id=A, base_model=tiny_model.id, rank=8), version.state_path)
                    again = Lessons(lessons.server, engine, adapters)
                    report = await again.teach("Be brief.", 0)
                    outcomes.append(await again.weights(report.version or -1))
            else:
                report = await lessons.teach("Be brief.", 1)
                outcomes.append(await lessons.weights(report.version or -1))
            checkpoint = [c for c in lessons.server.engine.checkpoints.values() if c.kind == "weights"][-1]
            assert checkpoint.steps >= 2 * TRAINING["gradient_steps"]
    assert _tensors(outcomes[0]) == _tensors(outcomes[1])


def _tensors(archive: bytes) -> bytes:
    return zipfile.ZipFile(io.BytesIO(archive)).read("adapter_model.safetensors")


async def test_the_record_says_what_the_teacher_told(lessons: Lessons) -> None:
    report = await lessons.teach()
    told = lessons.server.ways.topk
    assert (report.support.kind, report.support.size) == (("teacher_top_k", 21) if told else ("sampled_token", 1))


async def test_both_kinds_of_server_are_taught_the_same_when_they_tell_the_same(tiny_model: LoadedModel) -> None:
    """One sums and one takes means, and both are told of the sampled token only: the update is the same."""
    norms = []
    for ways in (CLOUD, SKYRL):
        async with opened(tiny_model, ways, top_k=0) as lessons:
            assert (await lessons.teach(max_grad_norm=1e6)).outcome == "applied"
            checkpoint = next(c for c in lessons.server.engine.checkpoints.values() if c.kind == "weights")
            norms.append({name: float(first.norm()) for name, (first, _) in checkpoint.moments.items()})
    assert norms[0].keys() == norms[1].keys()
    for name, norm in norms[0].items():
        assert norms[1][name] == pytest.approx(norm, rel=2e-2, abs=1e-7)


async def test_tokens_are_counted_and_priced(lessons: Lessons) -> None:
    payload = lessons.payload()
    lengths = [len(sample.prompt_token_ids) + len(sample.response_token_ids) - 1 for sample in payload.samples]
    with metered() as usage:
        await lessons.engine.distill(payload)
    assert usage.tokens["trained"] == 2 * sum(lengths)
    assert usage.tokens["scored"] > 3 * sum(lengths)
    assert usage.price == pytest.approx(sum(PRICES[use] * n for use, n in usage.tokens.items()) / PER)
    with metered() as nothing:
        await lessons.engine.versions(A)
    assert not nothing.tokens


async def test_what_an_adapter_has_used_is_summed_up_over_lessons_that_failed_too(lessons: Lessons) -> None:
    first = (await lessons.engine.distill(lessons.payload())).metadata["adapter_usage"]
    assert first["price"] == pytest.approx(sum(PRICES[use] * first[f"{use}_tokens"] for use in PRICES) / PER)
    lessons.server.fail("optim_step", "fail")
    with pytest.raises(StepFailed):
        await lessons.teach()
    used = await lessons.adapters.used(A)
    assert used["trained"] > first["trained_tokens"] and used["scored"] > first["scored_tokens"]


async def test_replies_are_on_the_account_of_who_speaks_and_in_a_lesson_on_the_learners(lessons: Lessons) -> None:
    engine, model = lessons.engine, place_of(lessons.server).model
    backend = TinkerInference(engine._server, engine._runs, lessons.adapters, model, max_queue=8, top_k=0)
    request = GenerationRequest(messages=MESSAGES, adapter=await engine.lora_runtime_ref(A), sampling=SamplingParams(max_tokens=5))
    by_base = request.model_copy(update={"adapter": None})
    try:
        (await backend.complete(request)), (await backend.complete(by_base))
        alone = await lessons.adapters.used(A)
        with charging(A):
            await backend.complete(by_base)
        together = await lessons.adapters.used(A)
    finally:
        await backend.aclose()
    prompt = len(render(model.tokenizer, MESSAGES, {}))
    assert alone["scored"] == prompt and 0 < alone["sampled"] <= 5
    assert together["scored"] == 2 * prompt and alone["sampled"] < together["sampled"] <= 10


async def test_health_tells_how_far_a_lesson_is(lessons: Lessons) -> None:
    lessons.server.fail("forward_backward", "slow", nth=2, seconds=5.0)
    lesson = asyncio.create_task(lessons.teach(gradient_steps=3))
    while lessons.server.called().count("forward_backward") < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert (await lessons.engine.health()).detail["learning"] == {A: "1 of 3 optimizer steps done"}
    await lesson
    assert (await lessons.engine.health()).detail["learning"] == {}


async def test_closing_ends_what_waits_for_the_server(lessons: Lessons) -> None:
    lessons.server.fail("forward_backward", "slow", seconds=60.0)
    lesson = asyncio.create_task(lessons.teach())
    while "forward_backward" not in lessons.server.called():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await lessons.engine.aclose()
    with pytest.raises(ClaasError):
        await lesson
    assert await lessons.numbers() == [0]
