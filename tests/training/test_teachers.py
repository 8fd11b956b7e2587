"""Teachers that are remembered: what they begin as, how they move, and that a restart does not change them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from claas.adapters.filesystem import FilesystemAdapterStore
from claas.core.types import ChatMessage, DistillBatchItem, DistillBatchRequestPayload, LoraInitRequest, TrainingConfig
from claas.models.base_model import LoadedModel
from claas.models.chat_template import render
from claas.models.compute import ComputeShare
from claas.training.engine.local import LocalEngine
from claas.training.policy import Policy
from claas.training.step import LessonStep, StepResult
from claas.training.teachers import (
    EMA_RANKS,
    Adapter,
    TeacherMemory,
    after_lesson,
    average,
    load_teachers,
    save_teachers,
    wanted_teachers,
)
from tests.training.conftest import sample

KINDS: tuple[TeacherMemory, ...] = ("ema", "snapshot")
CONFIG = TrainingConfig(
    learning_rate=1e-2,
    teacher_top_k=20,
    max_kl=100.0,
    gradient_steps=3,
    teacher="ema",
    hindsight_teacher="snapshot",
    teacher_snapshot_every=2,
)


def taught(policy: Policy, folder: Path, seeds: tuple[int, ...], kinds: tuple[TeacherMemory, ...] = KINDS) -> StepResult:
    """A lesson on own replies, judged by the first kind, and on hindsight rollouts, judged by the last."""
    lesson = [
        sample(seed, source=source, teacher=kind) for seed in seeds for source, kind in (("sampled", kinds[0]), ("hindsight", kinds[-1]))
    ]
    optimizer = policy.optimizer(folder, CONFIG.learning_rate)
    result = LessonStep(policy, optimizer, CONFIG, lesson, lambda: None).run()
    assert result.outcome == "applied"
    policy.save(folder, optimizer)
    policy.teachers = after_lesson(policy.teachers, policy.snapshot(), CONFIG, len(result.grad_norms))
    save_teachers(folder, policy.teachers)
    return result


def student(base: LoadedModel, folder: Path) -> Policy:
    policy = Policy(base, folder)
    policy.teachers = load_teachers(folder, wanted_teachers(CONFIG), policy.snapshot())
    return policy


def products(adapter: Adapter) -> dict[str, Tensor]:
    """BA of every layer, in float64."""
    return {a: adapter[a.replace("lora_A", "lora_B")].double() @ adapter[a].double() for a in adapter if "lora_A" in a}


def same(a: Adapter, b: Adapter) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_begins_as_the_student_so_without_feedback_there_is_no_loss(base: LoadedModel, folder: Path, kind: TeacherMemory) -> None:
    first = student(base, folder)
    taught(first, folder, (1, 2))
    (folder / f"teacher_{kind}.safetensors").unlink()
    policy, before = student(base, folder), first.snapshot()
    weights = {name: p.clone() for name, p in base.module.named_parameters()}
    s = sample(7, teacher=kind, teacher_prompt=sample(7).student_prompt)
    result = LessonStep(policy, policy.optimizer(folder, 1e-2), CONFIG, [s], lambda: None).run()
    assert (result.outcome, result.before.divergence.abs().max().item()) == ("skipped", 0.0)
    assert same(before, policy.snapshot())
    assert all(torch.equal(weights[name], p) for name, p in base.module.named_parameters())


def test_the_teacher_speaks_with_its_own_weights_and_leaves_the_students(base: LoadedModel, folder: Path) -> None:
    policy = student(base, folder)
    taught(policy, folder, (1, 2))
    before, weights = policy.snapshot(), {name: p.clone() for name, p in base.module.named_parameters()}
    plain = sample(7).student_prompt
    losses = {}
    for kind in ("live", "ema", "snapshot", "base"):
        s = sample(7, teacher=kind, teacher_prompt=plain)
        once = CONFIG.model_copy(update={"min_signal": 1e9})
        losses[kind] = float(LessonStep(policy, policy.optimizer(folder, 1e-2), once, [s], lambda: None).run().before.divergence.mean())
    assert losses["live"] == 0.0
    # The snapshot is version 0, which is the base model; the average has hardly left it.
    assert losses["snapshot"] == pytest.approx(losses["base"], rel=1e-5)
    assert 0.0 < losses["ema"] < losses["snapshot"]
    assert same(before, policy.snapshot())
    assert all(torch.equal(weights[name], p) for name, p in base.module.named_parameters())


def test_the_average_moves_by_its_rate_for_each_gradient_step(base: LoadedModel, folder: Path) -> None:
    policy = student(base, folder)
    taught(policy, folder, (1, 2))
    before = products(policy.teachers["ema"].weights)
    taught(policy, folder, (3,))
    share = 1 - (1 - CONFIG.teacher_ema_rate) ** CONFIG.gradient_steps
    after, now = products(policy.teachers["ema"].weights), products(policy.snapshot())
    assert all(torch.allclose(after[n], (1 - share) * before[n] + share * now[n], atol=1e-7) for n in after)


@given(st.integers(0, 2**20), st.floats(0.001, 0.5), st.integers(1, 3), st.integers(1, 6))
def test_the_average_is_of_the_products_and_its_rank_is_bounded(seed: int, share: float, rank: int, lessons: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def adapter() -> dict[str, Tensor]:
        return {"x.lora_A.w": torch.randn(rank, 9, generator=generator), "x.lora_B.w": torch.randn(8, rank, generator=generator)}

    kept: Adapter = adapter()
    for _ in range(lessons):
        new = adapter()
        exact = (1 - share) * products(kept)["x.lora_A.w"] + share * products(new)["x.lora_A.w"]
        kept = average(kept, new, share)
        assert kept["x.lora_A.w"].dtype == torch.float32 and len(kept["x.lora_A.w"]) <= EMA_RANKS * rank
        dropped = torch.linalg.svdvals(exact)[EMA_RANKS * rank :].square().sum().sqrt()
        assert float((products(kept)["x.lora_A.w"] - exact).norm()) == pytest.approx(float(dropped), rel=1e-3, abs=1e-4)


def test_the_snapshot_is_taken_anew_after_so_many_lessons(base: LoadedModel, folder: Path) -> None:
    policy = student(base, folder)
    first = policy.snapshot()
    taught(policy, folder, (1,))
    assert same(policy.teachers["snapshot"].weights, first)
    taught(policy, folder, (2,))
    second = policy.snapshot()
    assert same(policy.teachers["snapshot"].weights, second)
    taught(policy, folder, (3,))
    assert same(policy.teachers["snapshot"].weights, second) and not same(second, policy.snapshot())


def test_a_restart_between_lessons_gives_the_same_bits(base: LoadedModel, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    uninterrupted = student(base, folder)
    optimizer = uninterrupted.optimizer(folder, CONFIG.learning_rate)
    at = tmp_path_factory.mktemp("version")
    for file in folder.iterdir():
        (at / file.name).write_bytes(file.read_bytes())
    for seeds in ((1, 2), (3,), (4,), (5,), (6,)):
        lesson = [sample(n, source=s, teacher=k) for n in seeds for s, k in (("sampled", "ema"), ("hindsight", "snapshot"))]
        assert LessonStep(uninterrupted, optimizer, CONFIG, lesson, lambda: None).run().outcome == "applied"
        uninterrupted.teachers = after_lesson(uninterrupted.teachers, uninterrupted.snapshot(), CONFIG, CONFIG.gradient_steps)
        taught(student(base, at), at, seeds)
    restarted = student(base, at)
    assert same(uninterrupted.snapshot(), restarted.snapshot())
    for kind in KINDS:
        assert same(uninterrupted.teachers[kind].weights, restarted.teachers[kind].weights)
        assert uninterrupted.teachers[kind].lessons == restarted.teachers[kind].lessons


def test_what_is_stored_are_plain_tensors_and_only_of_the_teachers_asked_for(base: LoadedModel, folder: Path) -> None:
    policy = student(base, folder)
    taught(policy, folder, (1,))
    with safe_open(folder / "teacher_ema.safetensors", framework="pt") as stored:
        assert set(stored.keys()) == {*policy.parameters, "lessons"}
    assert wanted_teachers(TrainingConfig()) == set()
    assert wanted_teachers(TrainingConfig(hindsight_teacher="ema")) == {"ema"}


async def test_the_engine_keeps_them_with_each_version_and_a_rollback_takes_them_back(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """The second lesson, taught once more from the first one's version, gives the same files, whatever was taught in between."""
    engine = LocalEngine(FilesystemAdapterStore(tmp_path, keep_versions=10), tiny_model, ComputeShare(1))
    await engine.init_lora(LoraInitRequest(lora_id="me/a", lora_r=4))
    messages = (ChatMessage(role="user", content="Hello"),)

    async def learn(parent: int, feedback: str) -> int:
        item = DistillBatchItem(
            prompt="Hello", response="x", feedback=feedback, response_logprobs=(-1.0, -1.0), messages=messages,
            prompt_token_ids=render(tiny_model.tokenizer, messages, {}), response_token_ids=(5, 6), version=parent,
        )  # fmt: skip
        rollout = item.model_copy(update={"source": "hindsight", "response_logprobs": ()})
        training = CONFIG.model_copy(update={"min_signal": 0.0})
        payload = DistillBatchRequestPayload(lora_id="me/a", parent=parent, training=training, samples=[item, rollout])
        report = (await engine.distill(payload)).metadata
        assert report["outcome"] == "applied", report["reason"]
        return int(report["version"])

    first = await learn(0, "Be kind.")
    second = await learn(first, "Be brief.")
    await learn(second, "Be calm.")
    again = await learn(first, "Be brief.")
    folders = [Path((await engine.lora_runtime_ref("me/a", version)).lora_path) for version in (second, again)]
    for name in ("teacher_ema.safetensors", "teacher_snapshot.safetensors", "adapter_model.safetensors"):
        a, b = (load_file(folder / name) for folder in folders)
        assert same(a, b), name
    assert not (Path((await engine.lora_runtime_ref("me/a", 0)).lora_path) / "teacher_ema.safetensors").exists()
    await engine.aclose()
