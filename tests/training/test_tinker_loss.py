"""The loss over a Tinker server is the local one on another support, and its weights are that loss's gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from claas.training import sdpo
from claas.training.engine.tinker_loss import buckets, divergence, weights

ALPHAS = (0.0, 0.3, 0.5, 1.0)


def drawn(seed: int, k: int, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
    """Logits of a student and a teacher, (5, 12), and `k` distinct ids for each row."""
    generator = np.random.default_rng(seed)
    logits = [torch.tensor(generator.normal(size=(5, 12)) * spread, dtype=torch.float64) for _ in range(2)]
    return logits[0], logits[1], np.stack([generator.permutation(12)[:k] for _ in range(5)])


def logp_of(logits: torch.Tensor, ids: NDArray[np.int64]) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids))


@pytest.mark.parametrize("alpha", ALPHAS)
@given(seed=st.integers(0, 10_000), k=st.sampled_from([1, 3, 8]))
def test_it_is_the_local_divergence_of_the_same_buckets(alpha: float, seed: int, k: int) -> None:
    student, teacher, ids = drawn(seed, k)
    real = np.ones_like(ids, dtype=bool)
    p_TS, q_TS = (buckets(logp_of(logits, ids).numpy(), real) for logits in (student, teacher))
    ours = divergence(p_TS, q_TS, alpha)
    local = sdpo.divergence(sdpo.bucket_logp(student, torch.tensor(ids)), sdpo.bucket_logp(teacher, torch.tensor(ids)), alpha)
    np.testing.assert_allclose(ours, local.numpy(), atol=2e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
@given(seed=st.integers(0, 10_000), k=st.sampled_from([1, 3, 8]))
def test_weights_of_logprobs_carry_the_loss_exactly(alpha: float, seed: int, k: int) -> None:
    student, teacher, ids = drawn(seed, k)
    student.requires_grad_()
    logp = logp_of(student, ids)
    rest = (1 - logp.exp().sum(-1, keepdim=True)).log()
    with torch.no_grad():
        q = logp_of(teacher, ids)
        q_TS = torch.cat([q, (1 - q.exp().sum(-1, keepdim=True)).log()], -1)
    (exact,) = torch.autograd.grad(sdpo.divergence(torch.cat([logp, rest], -1), q_TS, alpha).sum(), student, retain_graph=True)
    real = np.ones_like(ids, dtype=bool)
    w = weights(buckets(logp.detach().numpy(), real), buckets(q.numpy(), real), alpha)
    (carried,) = torch.autograd.grad(-(torch.tensor(w) * logp).sum(), student)
    torch.testing.assert_close(carried, exact, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_what_is_no_bucket_of_its_own_weighs_nothing_and_changes_nothing(alpha: float) -> None:
    student, teacher, ids = drawn(3, 4)
    again = np.concatenate([ids, ids[:, :2]], axis=1)
    real = np.concatenate([np.ones_like(ids, dtype=bool), np.zeros((5, 2), dtype=bool)], axis=1)
    p, q = (buckets(logp_of(logits, ids).numpy(), np.ones_like(ids, dtype=bool)) for logits in (student, teacher))
    p_again, q_again = (buckets(logp_of(logits, again).numpy(), real) for logits in (student, teacher))
    np.testing.assert_allclose(divergence(p, q, alpha), divergence(p_again, q_again, alpha))
    without, with_repeated = weights(p, q, alpha), weights(p_again, q_again, alpha)
    np.testing.assert_allclose(with_repeated[:, :4], without)
    assert not with_repeated[:, 4:].any()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_policies_have_no_loss_and_no_weights(alpha: float) -> None:
    student, _, ids = drawn(1, 3)
    same = buckets(logp_of(student, ids).numpy(), np.ones_like(ids, dtype=bool))
    assert divergence(same, same, alpha).max() < 1e-12
    assert abs(weights(same, same, alpha)).max() < 1e-12


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("logp", [-1e-9, 0.0, 1e-7, -700.0, -1e4])
def test_certain_and_impossible_tokens_give_finite_figures(alpha: float, logp: float) -> None:
    real = np.ones((1, 1), dtype=bool)
    student, teacher = buckets(np.array([[logp]]), real), buckets(np.array([[-1.0]]), real)
    for one, other in ((student, teacher), (teacher, student)):
        assert np.isfinite(weights(one, other, alpha)).all()
        assert (divergence(one, other, alpha) >= 0).all()
