"""The loss against hand-computed cases and, by hypothesis, against its invariants."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from claas.training.sdpo import GUIDED_TOKENS, bucket_logp, divergence, guided, importance_ratio, sdpo_loss, top_k_support

P = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]]).log()
Q = torch.tensor([[1 / 4, 1 / 2, 1 / 16, 3 / 16]]).log()
Y = torch.tensor([0])
ALPHAS = (0.0, 0.3, 0.5, 0.9, 1.0)

alphas = st.sampled_from(ALPHAS)
seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(1, 5), st.integers(2, 40))


def random_logits(seed: int, size: tuple[int, int], scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    T, V = size
    student, teacher = (scale * torch.randn(T, V, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(V, (T,), generator=generator)


def loss_and_gradient(student: Tensor, teacher: Tensor, ids: Tensor, alpha: float, k: int) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = sdpo_loss(leaf, teacher, ids, alpha=alpha, top_k=k).loss_T
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(
    ("alpha", "full", "coarse", "gradient"),
    [
        (0.0, 0.205990, 0.173287, (0.25, -0.25, 0.0, 0.0)),
        (0.5, 0.050930, 0.042475, (0.061302, -0.055992, -0.002655, -0.002655)),
        (1.0, 0.209247, 0.173287, (0.259930, -0.216608, -0.021661, -0.021661)),
    ],
)
def test_golden_table(alpha: float, full: float, coarse: float, gradient: tuple[float, ...]) -> None:
    loss_full, _ = loss_and_gradient(P, Q, Y, alpha, k=4)
    loss_coarse, grad = loss_and_gradient(P, Q, Y, alpha, k=2)
    assert loss_full.item() == pytest.approx(full, abs=1e-6)
    assert loss_coarse.item() == pytest.approx(coarse, abs=1e-6)
    assert grad[0].tolist() == pytest.approx(gradient, abs=2e-6)


@pytest.mark.parametrize(("old", "clip", "ratio"), [(0.4, None, 1.25), (0.4, 5.0, 1.25), (0.1, 2.0, 2.0), (1.0, 5.0, 0.5)])
def test_importance_ratio_multiplies_the_loss(old: float, clip: float | None, ratio: float) -> None:
    plain = sdpo_loss(P, Q, Y, alpha=0.5, top_k=2)
    weighted = sdpo_loss(P, Q, Y, alpha=0.5, top_k=2, is_clip=clip, old_logp_T=torch.tensor([old]).log())
    assert weighted.ratio_T.item() == pytest.approx(ratio, rel=1e-5)
    assert weighted.loss_T.item() == pytest.approx(ratio * plain.loss_T.item(), rel=1e-5)
    assert weighted.divergence_T.item() == pytest.approx(plain.loss_T.item(), rel=1e-5)


def test_importance_ratio_is_detached_and_bounded() -> None:
    logp = torch.tensor([-1.0, 0.0, -1e4], requires_grad=True)
    ratio = importance_ratio(logp, torch.tensor([-1.0, -1e4, 0.0]), None)
    assert not ratio.requires_grad
    assert ratio.tolist() == pytest.approx([1.0, math.exp(20), math.exp(-20)], rel=1e-4)


def test_result_reports_full_vocabulary_logprobs() -> None:
    result = sdpo_loss(P, Q, Y, alpha=0.5, top_k=1)
    assert result.student_logp_T.exp().item() == pytest.approx(0.5)
    assert result.teacher_logp_T.exp().item() == pytest.approx(0.25)
    assert result.student_logp_TS.exp().tolist()[0] == pytest.approx([0.5, 0.5])
    assert result.index_TK.tolist() == [[0]]


@pytest.mark.parametrize("change", [{"alpha": -0.1}, {"alpha": 1.1}, {"top_k": 0}, {"old_logp_T": torch.zeros(2)}])
def test_wrong_arguments_are_refused(change: dict[str, object]) -> None:
    arguments: dict[str, object] = {"alpha": 0.5, "top_k": 2, **change}
    with pytest.raises(ValueError, match=r"alpha|top_k|shapes"):
        sdpo_loss(P, Q, Y, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shapes"):
        sdpo_loss(P, Q[:, :3], Y, alpha=0.5, top_k=2)


@given(seeds, sizes, alphas)
def test_loss_is_never_negative_and_jsd_is_bounded(seed: int, size: tuple[int, int], alpha: float) -> None:
    loss, _ = loss_and_gradient(*random_logits(seed, size), alpha, k=5)
    assert (loss >= 0).all()
    if 0 < alpha < 1:
        bound = -(alpha * math.log(alpha) + (1 - alpha) * math.log(1 - alpha))
        assert (loss <= bound + 1e-5).all()


@given(seeds, sizes, alphas)
def test_equal_policies_give_no_loss_and_no_gradient(seed: int, size: tuple[int, int], alpha: float) -> None:
    student, _, ids = random_logits(seed, size)
    loss, grad = loss_and_gradient(student, student, ids, alpha, k=5)
    assert (loss == 0).all()
    assert grad.abs().max() < 1e-6


@given(seeds, sizes, alphas)
def test_different_policies_give_loss_and_gradient(seed: int, size: tuple[int, int], alpha: float) -> None:
    student, teacher, ids = random_logits(seed, size)
    loss, grad = loss_and_gradient(student, teacher, ids, alpha, k=size[1])
    differs = (student.softmax(-1) - teacher.softmax(-1)).abs().max(-1).values > 0.05
    assert (loss[differs] > 0).all()
    assert (grad.abs().max(-1).values[differs] > 0).all()


@given(seeds, sizes, alphas)
def test_coarse_is_at_most_full_and_monotone_in_k(seed: int, size: tuple[int, int], alpha: float) -> None:
    student, teacher, ids = random_logits(seed, size)
    losses = [sdpo_loss(student, teacher, ids, alpha=alpha, top_k=k).loss_T for k in range(1, size[1] + 1)]
    assert all((finer >= coarser - 1e-4).all() for coarser, finer in pairwise(losses))
    full = divergence(student.log_softmax(-1), teacher.log_softmax(-1), alpha)
    assert torch.allclose(losses[-1], full, atol=1e-5)


@given(seeds, sizes, alphas)
def test_gradient_rows_sum_to_zero(seed: int, size: tuple[int, int], alpha: float) -> None:
    _, grad = loss_and_gradient(*random_logits(seed, size), alpha, k=4)
    assert grad.sum(-1).abs().max() < 1e-5


@given(seeds, sizes, alphas, st.floats(-50, 50))
def test_a_shift_of_the_logits_changes_nothing(seed: int, size: tuple[int, int], alpha: float, shift: float) -> None:
    student, teacher, ids = random_logits(seed, size)
    loss, grad = loss_and_gradient(student, teacher, ids, alpha, k=4)
    shifted_loss, shifted_grad = loss_and_gradient(student + shift, teacher - shift, ids, alpha, k=4)
    assert torch.allclose(loss, shifted_loss, atol=1e-3, rtol=1e-3)
    assert torch.allclose(grad, shifted_grad, atol=1e-3)


@given(seeds, sizes, alphas)
def test_a_permuted_vocabulary_changes_nothing(seed: int, size: tuple[int, int], alpha: float) -> None:
    student, teacher, ids = random_logits(seed, size)
    order = torch.randperm(size[1], generator=torch.Generator().manual_seed(seed))
    loss, grad = loss_and_gradient(student, teacher, ids, alpha, k=4)
    permuted_loss, permuted_grad = loss_and_gradient(student[:, order], teacher[:, order], order.argsort()[ids], alpha, k=4)
    assert torch.allclose(loss, permuted_loss, atol=1e-5)
    assert torch.allclose(grad[:, order], permuted_grad, atol=1e-5)


@given(seeds, sizes, alphas)
def test_rows_are_independent(seed: int, size: tuple[int, int], alpha: float) -> None:
    student, teacher, ids = random_logits(seed, size)
    whole = sdpo_loss(student, teacher, ids, alpha=alpha, top_k=4).loss_T
    alone = torch.cat(
        [sdpo_loss(student[t : t + 1], teacher[t : t + 1], ids[t : t + 1], alpha=alpha, top_k=4).loss_T for t in range(size[0])]
    )
    assert torch.allclose(whole, alone, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_gaps_stay_finite(alpha: float, dtype: torch.dtype) -> None:
    student = torch.zeros(2, 60, dtype=dtype)
    student[0, 0], student[1, 1] = 1e4, -1e4
    teacher = torch.zeros(2, 60, dtype=dtype)
    teacher[0, 59], teacher[1, 1] = 1e4, 1e4
    loss, grad = loss_and_gradient(student, teacher, torch.tensor([0, 1]), alpha, k=5)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert (loss > 0).all()


def test_a_tiny_tail_keeps_its_gradient() -> None:
    """log(1 − Σp) is −inf or −16 here, with no gradient; the tail by LSE is exact."""
    logits = torch.zeros(1, 10)
    logits[0, 0] = 60.0
    leaf = logits.clone().requires_grad_()
    tail = bucket_logp(leaf, torch.tensor([[0]]))[0, -1]
    tail.backward()
    assert tail.item() == pytest.approx(math.log(9) - 60.0, abs=1e-4)
    assert leaf.grad is not None
    assert leaf.grad[0, 0].item() == pytest.approx(-1.0, abs=1e-5)
    assert leaf.grad[0, 1:].sum().item() == pytest.approx(1.0, abs=1e-5)


def test_no_gradient_reaches_the_teacher() -> None:
    teacher = Q.clone().requires_grad_()
    student = P.clone().requires_grad_()
    result = sdpo_loss(student, teacher, Y, alpha=0.5, top_k=2, is_clip=2.0, old_logp_T=torch.tensor([-3.0]))
    result.loss_T.sum().backward()
    assert teacher.grad is None
    assert not any(t.requires_grad for t in (result.ratio_T, result.divergence_T, result.student_logp_TS, result.teacher_logp_TS))


@given(seeds, alphas)
@settings(max_examples=30)
def test_a_small_step_along_the_gradient_reduces_the_loss(seed: int, alpha: float) -> None:
    student, teacher, ids = random_logits(seed, (3, 12))
    loss, grad = loss_and_gradient(student, teacher, ids, alpha, k=12)
    after = sdpo_loss(student - 1e-2 * grad, teacher, ids, alpha=alpha, top_k=12).loss_T
    assert after.sum() < loss.sum()


def test_support_is_the_students_top_k() -> None:
    assert sorted(top_k_support(torch.tensor([[0.0, 5.0, 3.0, 4.0]]), 2)[0].tolist()) == [1, 3]
    assert top_k_support(torch.zeros(1, 4), 100).shape == (1, 4)


def test_guidance_pushes_likely_tokens_on_and_never_the_tail() -> None:
    """By hand: Q·(Q/C), normalised. The third token and the tail do not gain, the one being too unlikely; the fourth may lose."""
    teacher = torch.tensor([[0.50, 0.25, 0.02, 0.02, 0.21]]).log()
    control = torch.tensor([[0.25, 0.50, 0.01, 0.04, 0.20]]).log()
    pushed = torch.tensor([0.50 * 2, 0.25 / 2, 0.02, 0.02 / 2, 0.21])
    first = torch.tensor([0])
    assert torch.allclose(guided(teacher, control, 1.0, first, k=4).exp(), pushed / pushed.sum(), atol=1e-6)
    assert torch.allclose(guided(teacher, control, 0.0, first, k=4), teacher.log_softmax(-1), atol=1e-6)
    assert torch.allclose(guided(teacher, teacher, 2.0, first, k=4), teacher.log_softmax(-1), atol=1e-6), "where feedback does nothing"


def test_guidance_fades_over_the_beginning_of_a_reply() -> None:
    teacher, control = Q.expand(4, -1), P.expand(4, -1)
    found = guided(teacher, control, 0.8, torch.tensor([0, GUIDED_TOKENS // 2, GUIDED_TOKENS, 100]), k=4)
    first = torch.tensor([0])
    assert torch.allclose(found[0], guided(Q, P, 0.8, first, k=4)[0])
    assert torch.allclose(found[1], guided(Q, P, 0.4, first, k=4)[0])
    assert torch.allclose(found[2:], teacher[2:])


def test_guidance_of_huge_gaps_stays_finite() -> None:
    teacher, control = torch.tensor([[0.0, -1e4, -2.0]]), torch.tensor([[-1e4, 0.0, -2.0]])
    found = guided(teacher, control, 2.0, torch.tensor([0]), k=2)
    assert found.isfinite().all() and found.exp().sum() == pytest.approx(1.0)
