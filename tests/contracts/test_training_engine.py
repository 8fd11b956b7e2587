"""What every TrainingEngine promises, asked of each: the local one over a tiny model, resident or visiting, Tinker's and the double."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from claas.core.errors import BackendUnavailable, BadRequest, Conflict, NotFound, StepFailed
from claas.core.types import (
    LoraInitRequest,
    StepOutcome,
    TrainingConfig,
)
from claas.models.base_model import LoadedModel
from tests.contracts.engines import CONFIG, ENGINES, WEIGHTS, A, B, Trained, on_modal

MODAL = "modal"  # containers: slow
ALL = [*ENGINES, pytest.param(MODAL, marks=pytest.mark.integration)]
TAKING_WEIGHTS = [name for name in ALL if name not in ("tinker", "tinker-own")]  # docs/tinker.md: not supported there


@pytest.fixture(params=ALL)
async def trained(request: pytest.FixtureRequest, tiny_model: LoadedModel, tmp_path: Path) -> AsyncIterator[Trained]:
    """An engine with one adapter, `A`."""
    opening = partial(on_modal, request.getfixturevalue("modal_double")) if request.param == MODAL else ENGINES[request.param]
    async with opening(tiny_model, tmp_path) as made:
        await made.engine.init_lora(LoraInitRequest(lora_id=A))
        yield made


# --- the adapters' life ---


async def test_a_new_adapter_has_one_version_of_no_effect(trained: Trained) -> None:
    assert not (await trained.engine.lora_exists(B)).exists
    made = await trained.engine.init_lora(LoraInitRequest(lora_id=B, base_model=trained.base_model))
    assert (made.lora_id, made.version) == (B, 0)
    assert (await trained.engine.lora_exists(B)).exists
    (first,) = await trained.engine.versions(B)
    assert (first.lora_id, first.version, first.parent, first.base_model) == (B, 0, None, trained.base_model)
    assert (await trained.engine.lora_runtime_ref(B)).version == 0
    assert not trained.has_effect((await trained.files(B))[WEIGHTS])


async def test_a_taken_name_another_base_model_and_a_name_that_is_none_are_refused(trained: Trained) -> None:
    before = await trained.state()
    with pytest.raises(Conflict, match=repr(A)):
        await trained.engine.init_lora(LoraInitRequest(lora_id=A))
    with pytest.raises(BadRequest, match="'gpt-4'") as caught:
        await trained.engine.init_lora(LoraInitRequest(lora_id=B, base_model="gpt-4"))
    assert caught.value.param == "base_model"
    with pytest.raises(BadRequest):
        await trained.engine.init_lora(LoraInitRequest(lora_id="../a"))
    assert (await trained.engine.list_loras()).loras == [A]
    assert await trained.state() == before


async def test_adapters_are_listed_sorted_and_by_prefix(trained: Trained) -> None:
    for lora_id in ("you/c", B, "me"):
        await trained.engine.init_lora(LoraInitRequest(lora_id=lora_id))
    assert (await trained.engine.list_loras()).loras == ["me", A, B, "you/c"]
    assert (await trained.engine.list_loras("me/")).loras == [A, B]
    assert (await trained.engine.list_loras("nobody")).loras == []


async def test_deleting_takes_all_of_one_adapter_and_frees_its_name(trained: Trained) -> None:
    await trained.engine.init_lora(LoraInitRequest(lora_id=B))
    await trained.distill()
    other = await trained.state(B)
    assert (await trained.engine.delete_lora(A)).deleted
    assert not (await trained.engine.delete_lora(A)).deleted
    assert not (await trained.engine.lora_exists(A)).exists
    assert (await trained.engine.list_loras()).loras == [B]
    with pytest.raises(NotFound):
        await trained.engine.versions(A)
    await trained.engine.init_lora(LoraInitRequest(lora_id=A))
    assert not trained.has_effect((await trained.files())[WEIGHTS])
    assert await trained.state(B) == other


async def test_an_export_is_a_zip_in_pefts_layout_of_the_version_asked_for(trained: Trained) -> None:
    report = await trained.distill()
    assert report.version is not None
    latest = await trained.engine.export_lora(A)
    assert latest.filename == "me~a-v0.zip"
    assert (await trained.engine.export_lora(A, report.version)).filename == f"me~a-v{report.version}.zip"
    files = [await trained.files(A, version) for version in (None, 0, report.version)]
    assert all({CONFIG, WEIGHTS} <= set(found) for found in files)
    assert files[0] == files[1]
    assert [trained.has_effect(found[WEIGHTS]) for found in files] == [False, False, True]


@pytest.mark.parametrize("trained", TAKING_WEIGHTS, indirect=True)
async def test_what_is_imported_is_what_was_exported(trained: Trained) -> None:
    report = await trained.distill()
    archive = (await trained.engine.export_lora(A, report.version)).content
    made = await trained.engine.import_lora(B, archive)
    assert (made.lora_id, made.version) == (B, 0)
    (first,) = await trained.engine.versions(B)
    assert (first.lora_id, first.parent, first.base_model) == (B, None, trained.base_model)
    assert (await trained.files(B))[WEIGHTS] == (await trained.files(A, report.version))[WEIGHTS]
    with pytest.raises(Conflict, match=repr(B)):
        await trained.engine.import_lora(B, archive)


@pytest.mark.parametrize("trained", TAKING_WEIGHTS, indirect=True)
async def test_an_archive_that_does_not_fit_leaves_nothing_behind(trained: Trained) -> None:
    fits = (await trained.engine.export_lora(A)).content
    for archive in (b"no zip", trained.misfit(fits)):
        with pytest.raises(BadRequest):
            await trained.engine.import_lora(B, archive)
        assert not (await trained.engine.lora_exists(B)).exists
        assert (await trained.engine.list_loras()).loras == [A]
    await trained.engine.import_lora(B, fits)


async def test_a_version_has_a_name_of_its_own_where_it_is_served(trained: Trained) -> None:
    report = await trained.distill()
    latest, first, second = [await trained.engine.lora_runtime_ref(A, version) for version in (None, 0, report.version)]
    assert latest == first
    assert (second.lora_id, second.version) == (A, report.version) and second.vllm_name.startswith(f"claas-me~a-v{report.version}")
    assert first.vllm_name != second.vllm_name


async def test_what_is_not_there_is_not_found(trained: Trained) -> None:
    engine = trained.engine
    calls: list[Callable[[str, int], Awaitable[object]]] = [
        engine.promote,
        engine.discard,
        engine.export_lora,
        engine.lora_runtime_ref,
        lambda lora_id, version: engine.distill(trained.lesson(lora_id, parent=version)),
    ]
    before = await trained.state()
    for call in calls:
        for lora_id, version in (("no/body", 0), (A, 7)):
            with pytest.raises(NotFound):
                await call(lora_id, version)
    for by_name in (engine.versions, engine.export_lora, engine.lora_runtime_ref, lambda lora_id: engine.distill(trained.lesson(lora_id))):
        with pytest.raises(NotFound):
            await by_name("no/body")
    assert await trained.state() == before


# --- a step ---


async def test_an_applied_lesson_is_one_new_version_and_latest_stays(trained: Trained) -> None:
    before = await trained.files()
    report = await trained.distill(feedback_ids=("fb-1", "fb-2"))
    assert (report.outcome, report.reason, report.parent, report.version) == ("applied", None, 0, 1)
    assert report.update.loss_after is not None and report.update.loss_after < report.update.loss_before
    first, second = await trained.engine.versions(A)
    assert (first.version, second.version, second.parent) == (0, 1, 0)
    assert (second.lora_id, second.base_model, second.feedback_ids) == (A, trained.base_model, ("fb-1", "fb-2"))
    assert (await trained.engine.lora_runtime_ref(A)).version == 0
    assert await trained.files() == before
    assert trained.has_effect((await trained.files(A, 1))[WEIGHTS])


@pytest.mark.parametrize("outcome", ["skipped", "undone"])
async def test_a_lesson_that_is_not_applied_writes_nothing_and_says_why(trained: Trained, outcome: StepOutcome) -> None:
    await trained.distill()
    before = await trained.state()
    report = await trained.distill(A, outcome)
    assert (report.outcome, report.version, report.parent) == (outcome, None, 0)
    assert report.reason
    assert await trained.state() == before
    after = await trained.distill()
    assert after.version == 2


async def test_the_parent_is_the_one_named_or_else_the_latest(trained: Trained) -> None:
    first = (await trained.distill(feedback="Be kind.")).version
    beside = await trained.distill(feedback="Be brief.")
    after = await trained.distill(feedback="Be brief.", parent=first)
    assert (beside.parent, after.parent) == (0, first)
    assert first is not None
    await trained.engine.promote(A, first)
    again = await trained.distill(feedback="Be brief.")
    assert again.parent == first
    weights = [(await trained.files(A, report.version))[WEIGHTS] for report in (beside, after)]
    assert weights[0] != weights[1]
    assert {v.version: v.parent for v in await trained.engine.versions(A)} == {0: None, 1: 0, 2: 0, 3: 1, 4: 1}


async def test_the_same_lesson_from_the_same_parent_gives_the_same_weights(trained: Trained) -> None:
    one, other = await trained.distill(), await trained.distill()
    assert one.version != other.version
    assert (await trained.files(A, one.version))[WEIGHTS] == (await trained.files(A, other.version))[WEIGHTS]


async def test_a_rollback_is_a_promotion(trained: Trained) -> None:
    await trained.distill()
    for version in (1, 0, 1):
        await trained.engine.promote(A, version)
        assert (await trained.engine.lora_runtime_ref(A)).version == version
        assert await trained.files() == await trained.files(A, version)


async def test_a_version_that_is_not_the_latest_can_be_discarded_and_its_number_is_gone(trained: Trained) -> None:
    await trained.distill()
    with pytest.raises(Conflict):
        await trained.engine.discard(A, 0)
    await trained.engine.discard(A, 1)
    assert [v.version for v in await trained.engine.versions(A)] == [0]
    with pytest.raises(NotFound):
        await trained.engine.lora_runtime_ref(A, 1)
    assert (await trained.distill()).version == 2


async def test_saving_in_place_is_refused_by_name(trained: Trained) -> None:
    before = await trained.state()
    with pytest.raises(BadRequest, match="save_in_place") as caught:
        await trained.distill(save_in_place=True)
    assert caught.value.param == "save_in_place"
    assert await trained.state() == before


async def test_a_step_that_breaks_publishes_nothing_and_says_so(trained: Trained) -> None:
    report = await trained.distill()
    assert report.version is not None
    before = await trained.engine.versions(A), await trained.files()
    await trained.breaks(report.version)
    with pytest.raises(StepFailed):
        await trained.distill(parent=report.version)
    assert (await trained.engine.versions(A), await trained.files()) == before


async def test_adapters_that_learn_at_the_same_time_do_not_touch_each_other(trained: Trained) -> None:
    await trained.engine.init_lora(LoraInitRequest(lora_id=B))
    untouched = await trained.state(B)
    alone = await trained.distill(A)
    assert await trained.state(B) == untouched
    both = await asyncio.gather(trained.distill(A), trained.distill(B, feedback="Be brief."))
    assert [(report.outcome, report.parent, report.version) for report in both] == [("applied", 0, 2), ("applied", 0, 1)]
    weights = [(await trained.files(lora_id, version))[WEIGHTS] for lora_id, version in ((A, alone.version), (A, 2), (B, 1))]
    assert weights[0] == weights[1] != weights[2]


async def test_the_default_settings_are_whole(trained: Trained) -> None:
    training = trained.engine.default_training()
    assert training == TrainingConfig.model_validate(training.model_dump())


# --- closing ---


async def test_health_says_whether_a_lesson_could_be_trained_now(trained: Trained) -> None:
    assert (await trained.engine.health()).status == "healthy"
    await trained.engine.aclose()
    health = await trained.engine.health()
    assert health.status == "unhealthy" and health.error
    with pytest.raises(BackendUnavailable):
        await trained.distill()
    await trained.engine.aclose()


async def test_closing_during_a_step_publishes_nothing(trained: Trained) -> None:
    before = await trained.state()
    lesson = trained.lesson()
    training = lesson.training.model_copy(update={"gradient_steps": 64})
    step = asyncio.create_task(trained.engine.distill(lesson.model_copy(update={"training": training})))
    await trained.busy()
    await trained.engine.aclose()
    with pytest.raises(BackendUnavailable) as caught:
        await step
    assert "again" in caught.value.message
    assert await trained.state() == before
