"""One lesson on a tiny model: what it computes, what it leaves alone, when it takes itself back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from claas.core.types import TrainingConfig
from claas.models.base_model import LoadedModel
from claas.training.batch import collate
from claas.training.figures import summarise
from claas.training.micro_batch import CHUNK, part_means
from claas.training.policy import Policy
from claas.training.samples import MICRO_BATCH_TOKENS, Sample
from claas.training.sdpo import bucket_logp, guided, sdpo_loss
from claas.training.step import LessonStep, StepResult
from tests.training.conftest import sample, unfuse

CONFIG = TrainingConfig(learning_rate=1e-2, teacher_top_k=20, max_kl=100.0)


def learn(policy: Policy, folder: Path, samples: Sequence[Sample], config: TrainingConfig = CONFIG) -> StepResult:
    return LessonStep(policy, policy.optimizer(folder, config.learning_rate), config, samples, lambda: None).run()


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.parameters.items() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6, rtol=1e-4) for name in a)


def after_one_accumulation(
    base: LoadedModel, folder: Path, samples: Sequence[Sample], config: TrainingConfig = CONFIG
) -> dict[str, Tensor]:
    """Gradients of one pass over the samples, before any clipping."""
    policy = Policy(base, folder)
    learn(policy, folder, samples, config.model_copy(update={"max_grad_norm": 1e9, "gradient_steps": 1, "min_signal": 0.0}))
    return gradients(policy)


def naive_gradients(base: LoadedModel, folder: Path, samples: Sequence[Sample], config: TrainingConfig = CONFIG) -> dict[str, Tensor]:
    """The same by whole (T, V) logits, one sample at a time and the pure function: what the chunked, padded form must equal."""
    policy = Policy(base, folder)
    unfuse(policy)
    tokens = sum(len(s.response) for s in samples)
    model = policy._peft
    for s in samples:
        T, ids_T = len(s.response), torch.tensor(s.response)

        def logits(prompt: tuple[int, ...], s: Sample = s, T: int = T) -> Tensor:
            out: Tensor = model(input_ids=torch.tensor([[*prompt, *s.response]])).logits
            return out[0, -T - 1 : -1]

        with torch.no_grad(), model.disable_adapter():
            teacher_TV = logits(s.teacher_prompt)
        (
            sdpo_loss(logits(s.student_prompt), teacher_TV, ids_T, alpha=config.alpha, top_k=config.teacher_top_k).loss_T.sum() / tokens
        ).backward()
    return gradients(policy)


def test_a_lesson_lowers_its_loss_and_moves_only_the_adapter(policy: Policy, folder: Path, base: LoadedModel) -> None:
    weights = {name: p.clone() for name, p in base.module.named_parameters()}
    before = policy.snapshot()
    result = learn(policy, folder, [sample(1), sample(2)], CONFIG.model_copy(update={"gradient_steps": 4}))
    assert result.outcome == "applied" and result.after is not None
    assert result.after.divergence.mean() < result.before.divergence.mean()
    assert result.after.kl_to_start.mean() > 0
    assert len(result.grad_norms) == 4
    assert result.relative_change is None, "from a zero adapter there is nothing to relate to"
    assert not same(before, policy.snapshot())
    assert all(torch.equal(weights[name], p) for name, p in base.module.named_parameters())


def test_two_trees_share_the_base_and_not_the_adapter(policy: Policy, folder: Path, base: LoadedModel) -> None:
    other = Policy(base, folder)
    learn(policy, folder, [sample(1)])
    assert not same(policy.snapshot(), other.snapshot())
    storages = {p.data_ptr() for p in base.module.parameters()}
    assert {p.data_ptr() for n, p in policy._peft.named_parameters() if "lora" not in n} == storages
    assert not any("lora" in name for name, _ in base.module.named_parameters())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_chunked_padded_form_equals_the_pure_function(base: LoadedModel, folder: Path, alpha: float) -> None:
    samples = [sample(1, prompt=3, response=9), sample(2, prompt=8, response=4), sample(3, prompt=5, response=7)]
    config = CONFIG.model_copy(update={"alpha": alpha})
    expected = naive_gradients(base, folder, samples, config)
    assert close(after_one_accumulation(base, folder, samples, config), expected)


def test_chunks_longer_responses_without_a_difference(base: LoadedModel, folder: Path) -> None:
    samples = [sample(4, prompt=5, response=2 * CHUNK + 3)]
    assert close(after_one_accumulation(base, folder, samples), naive_gradients(base, folder, samples))


def test_batch_order_does_not_matter_and_halves_make_a_whole(base: LoadedModel, folder: Path) -> None:
    samples = [sample(n, prompt=3 + n, response=2 + n) for n in range(1, 5)]
    whole = after_one_accumulation(base, folder, samples)
    assert close(whole, after_one_accumulation(base, folder, samples[::-1]))
    tokens = [sum(len(s.response) for s in half) for half in (samples[:2], samples[2:])]
    halves = [after_one_accumulation(base, folder, half) for half in (samples[:2], samples[2:])]
    joined = {n: (halves[0][n] * tokens[0] + halves[1][n] * tokens[1]) / sum(tokens) for n in whole}
    assert close(whole, joined)


def test_no_feedback_with_the_live_teacher_is_no_loss_and_no_change(policy: Policy, folder: Path) -> None:
    prompt = sample(1).student_prompt
    before = policy.snapshot()
    result = learn(policy, folder, [sample(1, teacher="live", teacher_prompt=prompt)])
    assert (result.outcome, result.before.divergence.abs().max().item()) == ("skipped", 0.0)
    assert result.reason is not None and "already known" in result.reason
    assert same(before, policy.snapshot())


def test_the_live_teacher_wears_the_adapter_and_the_base_teacher_does_not(policy: Policy, folder: Path) -> None:
    learn(policy, folder, [sample(1)], CONFIG.model_copy(update={"gradient_steps": 5}))
    prompt = sample(2).student_prompt
    live = learn(policy, folder, [sample(2, teacher="live", teacher_prompt=prompt)])
    base_teacher = learn(policy, folder, [sample(2, teacher="base", teacher_prompt=prompt)])
    assert live.before.divergence.abs().max() == 0.0
    assert base_teacher.before.divergence.mean() > 1e-4


def test_the_end_of_a_reply_is_learnt_and_the_prompt_is_not(base: LoadedModel, folder: Path) -> None:
    """The loss is on exactly the response tokens: N of them, the last included, whatever the prompt's length."""
    for prompt in (1, 7):
        result = learn(Policy(base, folder), folder, [sample(1, prompt=prompt, response=5)])
        assert result.before.divergence.shape == (5,)
        assert (result.before.divergence > 0).all()


def test_own_replies_take_the_students_support_and_the_teachers_replies_the_teachers(policy: Policy, folder: Path) -> None:
    config = CONFIG.model_copy(update={"teacher_top_k": 3})
    own = learn(policy, folder, [sample(1)], config).batches[0]
    theirs = learn(policy, folder, [sample(1, source="hindsight")], config).batches[0]
    assert own.targets is not None and theirs.targets is not None
    assert (own.alpha, theirs.alpha) == (0.5, 0.0)
    assert own.targets.start_logp_NS[:, :-1].exp().sum() > theirs.targets.start_logp_NS[:, :-1].exp().sum()
    assert theirs.targets.teacher_logp_NS[:, :-1].exp().sum() > own.targets.teacher_logp_NS[:, :-1].exp().sum()


def test_guidance_moves_the_targets_of_hindsight_rollouts_and_of_nothing_else(base: LoadedModel, folder: Path) -> None:
    """Away from what the teacher says under feedback that has nothing to do with it; which is no control of the report then."""
    control = sample(3).teacher_prompt
    lesson = [sample(n, source=source, control_prompt=control) for n, source in enumerate(("sampled", "hindsight"))]
    told, pushed = (
        learn(Policy(base, folder), folder, lesson, CONFIG.model_copy(update={"guidance": guidance})).batches for guidance in (0.0, 1.0)
    )
    own, theirs = ([batch.targets for batch in batches] for batches in (told, pushed))
    assert own[0] is not None and own[1] is not None and theirs[0] is not None and theirs[1] is not None
    assert torch.equal(own[0].teacher_logp_NS, theirs[0].teacher_logp_NS) and own[0].control_logp_NS is not None
    assert theirs[1].control_logp_NS is None
    policy = Policy(base, folder)
    control_TS = bucket_logp(policy.logits(policy.hidden(collate([control], [lesson[1].response]), speaker="base")), own[1].index_NK)
    expected = guided(own[1].teacher_logp_NS, control_TS, 1.0, torch.arange(len(control_TS)), k=CONFIG.teacher_top_k)
    assert torch.allclose(theirs[1].teacher_logp_NS, expected, atol=1e-5)
    assert not torch.allclose(expected, own[1].teacher_logp_NS, atol=1e-2)


def test_importance_ratio_applies_to_older_versions_only(policy: Policy, folder: Path) -> None:
    served = (-3.0,) * 5
    on_policy = learn(policy, folder, [sample(1, served_logp=served)])
    assert (on_policy.before.ratio == 1).all()
    off_policy = learn(policy, folder, [sample(1, served_logp=served, on_policy=False, age=2)])
    expected = (off_policy.before.logp + 3.0).exp().clamp_max(5.0)
    assert torch.allclose(off_policy.before.ratio, expected)
    assert (learn(policy, folder, [sample(1, source="hindsight", on_policy=False)]).before.ratio == 1).all()


def test_targets_are_taken_once(policy: Policy, folder: Path) -> None:
    """Four gradient steps need one teacher pass: 1 teacher + 4 student + 1 rescoring forward."""
    s = sample(1)
    result = learn(policy, folder, [s], CONFIG.model_copy(update={"gradient_steps": 4}))
    student, teacher = len(s.student_prompt) + 5, len(s.teacher_prompt) + 5
    assert result.forward_tokens == teacher + 5 * student


def test_the_base_anchor_runs_a_forward_only_when_it_weighs_something(base: LoadedModel, folder: Path) -> None:
    plain = learn(Policy(base, folder), folder, [sample(1)])
    anchored_config = CONFIG.model_copy(update={"kl_reg_weight": 0.5})
    trained = Policy(base, folder)
    learn(trained, folder, [sample(3)], CONFIG.model_copy(update={"gradient_steps": 3}))
    assert learn(Policy(base, folder), folder, [sample(1)], anchored_config).forward_tokens == plain.forward_tokens + 11
    state = trained.snapshot()
    learn(trained, folder, [sample(1)], CONFIG)
    without = gradients(trained)
    trained.restore(state)
    learn(trained, folder, [sample(1)], anchored_config)
    assert not close(without, gradients(trained))


def test_minibatches_measure_the_whole_lesson_first_and_then_take_parts_in_turn(policy: Policy, folder: Path) -> None:
    samples = [sample(n) for n in range(5)] + [sample(9, source="anchor", teacher_prompt=sample(9).student_prompt)]
    config = CONFIG.model_copy(update={"gradient_steps": 3, "minibatch": 2})
    result = learn(policy, folder, samples, config)
    assert sorted(len(b.samples) for b in result.batches) == [1, 1, 2, 2]
    assert result.before.divergence.numel() == result.after.divergence.numel() == 30  # type: ignore[union-attr]
    whole = sum(b.student.whole().numel() for b in result.batches)
    teacher = 5 * 15 + 11
    # Turns 1 and 2 take the second and third lesson group, of 2 and 1 samples, and the anchor each time.
    assert result.forward_tokens == teacher + whole + (2 + 1 + 1 + 1) * 11 + whole


def test_a_reply_that_is_not_taught_is_only_watched(base: LoadedModel, folder: Path) -> None:
    alone, watched = Policy(base, folder), Policy(base, folder)
    taught, reply = sample(1, source="hindsight"), sample(2)
    without = learn(alone, folder, [taught])
    result = learn(watched, folder, [taught, sample(2, taught=False)])
    assert same(alone.snapshot(), watched.snapshot())
    assert without.reply_logp == (None, None)
    before, after = result.reply_logp
    assert before is not None and after is not None and before != after
    taught_too = learn(Policy(base, folder), folder, [reply])
    assert taught_too.reply_logp[0] == pytest.approx(before, abs=1e-5)


# --- verdicts: whatever is not applied changes nothing, bit for bit ---


@pytest.mark.parametrize(
    ("changes", "outcome", "says"),
    [
        ({"min_signal": 100.0}, "skipped", "already known"),
        ({"hindsight_rollouts": 4, "own_replies": False}, "skipped", "could not act on this feedback"),
        ({"max_kl": 1e-9}, "undone", "over max_kl"),
        ({"learning_rate": 1.0, "alpha": 0.0}, "undone", "loss rose"),
        ({"max_anchor_kl": 1e-9}, "undone", "unrelated prompts"),
    ],
)
def test_a_lesson_that_must_not_stand(policy: Policy, folder: Path, changes: dict[str, Any], outcome: str, says: str) -> None:
    before = policy.snapshot()
    anchor = sample(9, response=1, source="anchor", teacher_prompt=sample(9).student_prompt)
    result = learn(policy, folder, [sample(1), anchor], CONFIG.model_copy(update=changes))
    assert result.outcome == outcome
    assert result.reason is not None and says in result.reason
    assert same(before, policy.snapshot())


ANCHOR = sample(9, response=12, source="anchor", teacher_prompt=sample(9).student_prompt)


def test_a_run_of_lessons_cannot_drift_away_from_the_base(policy: Policy, folder: Path) -> None:
    """Each of them moves the anchor little, and yet it never gets further away than one may move it."""
    config = CONFIG.model_copy(update={"gradient_steps": 3, "learning_rate": 3e-2})
    limit = config.model_copy(update={"max_anchor_kl": 0.02})
    outcomes, drift = [], 0.0
    for seed in range(1, 13):
        result = learn(policy, folder, [sample(seed, response=30, source="hindsight"), ANCHOR], limit)
        outcomes.append((result.outcome, "unrelated prompts" in (result.reason or "")))
        before = part_means(result.batches, result.before.divergence)["anchor"]
        assert before == pytest.approx(drift, abs=1e-5), "measured from the base, not from the version before"
        if result.outcome == "applied":
            assert result.after is not None
            drift = part_means(result.batches, result.after.divergence)["anchor"]
        assert drift <= limit.max_anchor_kl
    assert ("applied", False) in outcomes and ("undone", True) in outcomes, outcomes


def test_an_adapter_that_is_far_from_the_base_is_not_undone_for_coming_nearer(policy: Policy, folder: Path) -> None:
    strict = CONFIG.model_copy(update={"max_anchor_kl": 1e-6, "learning_rate": 1e-3})
    learn(policy, folder, [sample(1, response=30, source="hindsight")], CONFIG.model_copy(update={"gradient_steps": 10}))
    result = learn(policy, folder, [sample(2, response=2, source="hindsight"), ANCHOR], strict)
    assert result.outcome == "applied" and result.after is not None
    before, after = (part_means(result.batches, measure.divergence)["anchor"] for measure in (result.before, result.after))
    assert before > after > strict.max_anchor_kl


def test_nan_never_reaches_the_weights(base: LoadedModel, folder: Path) -> None:
    policy = Policy(base, folder)
    with torch.no_grad():
        next(iter(policy.parameters.values())).fill_(float("nan"))
    before = policy.snapshot()
    result = learn(policy, folder, [sample(1)])
    assert result.outcome == "skipped"
    assert result.reason is not None and "not finite" in result.reason
    after = policy.snapshot()
    assert all(torch.equal(before[n].nan_to_num(7.0), after[n].nan_to_num(7.0)) for n in before)


# --- the optimizer and restarts ---


def test_a_restart_in_the_middle_gives_the_same_bits(base: LoadedModel, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    lessons = [[sample(1), sample(2)], [sample(3)], [sample(4), sample(5)]]
    config = CONFIG.model_copy(update={"gradient_steps": 3})

    uninterrupted = Policy(base, folder)
    optimizer = uninterrupted.optimizer(folder, config.learning_rate)
    for lesson in lessons:
        assert LessonStep(uninterrupted, optimizer, config, lesson, lambda: None).run().outcome == "applied"

    at = folder
    for lesson in lessons:
        restarted = Policy(base, at)
        optimizer = restarted.optimizer(at, config.learning_rate)
        LessonStep(restarted, optimizer, config, lesson, lambda: None).run()
        at = tmp_path_factory.mktemp("version")
        restarted.save(at, optimizer)
    assert same(uninterrupted.snapshot(), Policy(base, at).snapshot())


def test_the_requested_learning_rate_wins_over_restored_moments(
    base: LoadedModel, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    policy = Policy(base, folder)
    optimizer = policy.optimizer(folder, 1e-2)
    LessonStep(policy, optimizer, CONFIG, [sample(1)], lambda: None).run()
    version = tmp_path_factory.mktemp("version")
    policy.save(version, optimizer)

    def moved(learning_rate: float) -> float:
        again = Policy(base, version)
        start = again.snapshot()
        LessonStep(again, again.optimizer(version, learning_rate), CONFIG, [sample(2)], lambda: None).run()
        return sum(float((p.detach() - start[n]).norm()) for n, p in again.parameters.items())

    assert moved(1e-2) == pytest.approx(10 * moved(1e-3), rel=0.01)


def test_relative_change_is_the_norm_of_the_products_difference(base: LoadedModel, folder: Path) -> None:
    policy = Policy(base, folder)
    learn(policy, folder, [sample(1)])
    start = policy.snapshot()
    learn(policy, folder, [sample(2)])
    now = policy.snapshot()
    pairs = [(n, n.replace("lora_A", "lora_B")) for n in start if "lora_A" in n]
    change = sum(float((now[b] @ now[a] - start[b] @ start[a]).norm() ** 2) for a, b in pairs) ** 0.5
    size = sum(float((start[b] @ start[a]).norm() ** 2) for a, b in pairs) ** 0.5
    assert policy.relative_change(start) == pytest.approx(change / size, rel=1e-3)


def test_a_micro_batch_never_grows_past_its_tokens(policy: Policy, folder: Path) -> None:
    result = learn(policy, folder, [sample(n, prompt=100, response=100) for n in range(12)])
    assert len(result.batches) > 1
    assert all(b.student.whole().numel() <= MICRO_BATCH_TOKENS for b in result.batches)


# --- earlier lessons beside the new one ---


def test_replay_keeps_what_a_lesson_alone_would_undo(base: LoadedModel, folder: Path) -> None:
    """Two lessons that pull the same prompt's tokens apart: what was learnt first fades less when it is rehearsed."""
    earlier, later = sample(1, source="hindsight"), sample(1, source="hindsight", teacher_prompt=sample(9).teacher_prompt)
    config = CONFIG.model_copy(update={"gradient_steps": 8, "max_forgetting": 100.0})

    def after_both(rehearsed: list[Sample]) -> tuple[float, StepResult]:
        policy = Policy(base, folder)
        learn(policy, folder, [earlier], config)
        result = learn(policy, folder, [later, *rehearsed], config)
        assert result.outcome == "applied"
        kept = learn(policy, folder, [earlier], config.model_copy(update={"gradient_steps": 1, "min_signal": 1e6}))
        return float(kept.before.divergence.mean()), result

    forgotten, _ = after_both([])
    kept, result = after_both([replace(earlier, replayed=True)])
    assert kept < 0.7 * forgotten
    assert [batch.part for batch in result.batches] == ["lesson", "replay"]


def test_a_lesson_that_makes_earlier_ones_fade_is_undone(policy: Policy, folder: Path) -> None:
    earlier = sample(1, source="hindsight")
    later = sample(1, source="hindsight", teacher_prompt=sample(9).teacher_prompt, response=40)
    learn(policy, folder, [earlier], CONFIG.model_copy(update={"gradient_steps": 20}))
    before = policy.snapshot()
    result = learn(
        policy, folder, [replace(earlier, replayed=True), later], CONFIG.model_copy(update={"gradient_steps": 4, "max_forgetting": 1e-3})
    )
    assert result.outcome == "undone"
    assert result.reason is not None and "earlier lessons would fade" in result.reason
    assert same(before, policy.snapshot())


def test_the_gate_asks_the_lesson_alone(policy: Policy, folder: Path) -> None:
    """What is rehearsed may be far from known; what is to be learnt is known already."""
    known = sample(1, source="hindsight", teacher_prompt=sample(1).student_prompt)
    result = learn(policy, folder, [known, replace(sample(2, source="hindsight"), replayed=True)])
    assert (result.outcome, result.after) == ("skipped", None)
    assert result.reason is not None and "already known" in result.reason


def test_the_report_tells_the_lesson_from_what_was_rehearsed(policy: Policy, base: LoadedModel, folder: Path) -> None:
    lesson, earlier = sample(1, source="hindsight"), replace(sample(2, source="hindsight", response=9), replayed=True)
    anchor = sample(3, source="anchor", teacher_prompt=sample(3).student_prompt)
    result = learn(policy, folder, [anchor, earlier, lesson])
    report = summarise(result, CONFIG, parent=3, token_text=str)
    alone = learn(Policy(base, folder), folder, [lesson])
    assert report.update.loss_before == pytest.approx(float(alone.before.divergence.mean()))
    assert report.signal.loss_mean == pytest.approx(report.update.loss_before)
    assert {moved.token_id for moved in report.signal.most_moved} <= set(lesson.response)
    retention = report.retention
    assert (retention.replayed_samples, retention.anchor_kl_before) == (1, 0.0)
    assert retention.replay_loss_before is not None and retention.replay_loss_before > 0
    assert retention.anchor_kl_after is not None and retention.anchor_kl_after > 0
