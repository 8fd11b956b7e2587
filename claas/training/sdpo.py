"""The SDPO loss: how far the student is from its own hindsight, token by token. Pure functions on tensors; no model, no config.

Source: Hübotter et al. 2026, "Reinforcement Learning via Self-Distillation" (arXiv:2601.20802).

Shape legend
    T  response tokens        V  vocabulary
    K  support (top-K) tokens S  buckets: K, plus one tail bucket with all the rest when K < V

Student P carries the gradient, teacher Q does not. All arithmetic is in log space and float32, whatever the input's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
GUIDED_TOKENS = 12  # of a reply's beginning
MAX_GAIN = 5.0  # nats that guidance takes a token for moved by
PLAUSIBLE = 0.1  # of the likeliest token's probability
ROWS = 16  # of logits that are worked on at a time: few enough for a CPU's cache


@dataclass(frozen=True, slots=True)
class SdpoResult:
    """One response's loss and what it was made of. Only `loss_T` has a gradient.

    loss_T: divergence times importance ratio, nats.
    divergence_T: the divergence alone, nats.
    ratio_T: importance ratio, 1 where none applies.
    student_logp_T, teacher_logp_T: full-vocabulary logprob of each response token.
    student_logp_TS, teacher_logp_TS: bucket logprobs on the support.
    index_TK: the support, token ids.
    """

    loss_T: Tensor
    divergence_T: Tensor
    ratio_T: Tensor
    student_logp_T: Tensor
    teacher_logp_T: Tensor
    student_logp_TS: Tensor
    teacher_logp_TS: Tensor
    index_TK: Tensor


def sdpo_loss(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    response_ids_T: Tensor,
    *,
    alpha: float,
    top_k: int,
    is_clip: float | None = None,
    old_logp_T: Tensor | None = None,
) -> SdpoResult:
    """The per-token SDPO loss of one response on the student's top-K tokens and one tail bucket.

    Args:
        student_logits_TV: logits that carry the gradient, any float dtype.
        teacher_logits_TV: logits given the feedback; detached here.
        response_ids_T: the sampled token ids, int64.
        alpha: 0 is KL(Q‖P), 1 is KL(P‖Q), between them the generalised Jensen–Shannon divergence.
        top_k: K, from 1; K >= V means the full vocabulary.
        is_clip: cap of the importance ratio; None leaves it uncapped.
        old_logp_T: logprobs at sampling; None means on-policy, ratio 1.

    Raises:
        ValueError: shapes that do not agree, alpha outside [0, 1], top_k under 1.
    """
    T, V = student_logits_TV.shape
    if teacher_logits_TV.shape != (T, V) or response_ids_T.shape != (T,) or (old_logp_T is not None and old_logp_T.shape != (T,)):
        raise ValueError(
            f"shapes differ: student {tuple(student_logits_TV.shape)}, teacher {tuple(teacher_logits_TV.shape)}, "
            f"response {tuple(response_ids_T.shape)}, old {None if old_logp_T is None else tuple(old_logp_T.shape)}"
        )
    index_TK = top_k_support(student_logits_TV, top_k)
    student_TS, student_logp_T = bucket_and_token_logp(student_logits_TV, index_TK, response_ids_T)
    teacher_TS, teacher_logp_T = bucket_and_token_logp(teacher_logits_TV.detach(), index_TK, response_ids_T)
    divergence_T = divergence(student_TS, teacher_TS, alpha)
    ratio_T = importance_ratio(student_logp_T, old_logp_T, is_clip)
    return SdpoResult(
        loss_T=divergence_T * ratio_T,
        divergence_T=divergence_T.detach(),
        ratio_T=ratio_T,
        student_logp_T=student_logp_T,
        teacher_logp_T=teacher_logp_T,
        student_logp_TS=student_TS.detach(),
        teacher_logp_TS=teacher_TS,
        index_TK=index_TK,
    )


def top_k_support(logits_TV: Tensor, k: int) -> Tensor:
    """Ids of the K largest logits of each row, (T, min(K, V)), without gradient."""
    if k < 1:
        raise ValueError(f"top_k is {k}: it must be at least 1")
    return logits_TV.detach().topk(min(k, logits_TV.shape[-1]), dim=-1, sorted=False).indices


def bucket_logp(logits_TV: Tensor, index_TK: Tensor) -> Tensor:
    """Logprobs of the support's tokens and, when K < V, of everything else as one last bucket: (T, S) in float32."""
    mass_TS, total_T1 = _log_masses(logits_TV, index_TK)
    return mass_TS - total_T1


def bucket_and_token_logp(logits_TV: Tensor, index_TK: Tensor, ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """`bucket_logp` and `token_logp` for one pass over the logits: (T, S), (T,). Only the buckets carry a gradient."""
    mass_TS, total_T1 = _log_masses(logits_TV, index_TK)
    return mass_TS - total_T1, (logits_TV.detach().gather(-1, ids_T[:, None]) - total_T1.detach()).squeeze(-1)


def token_logp(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Full-vocabulary logprob of one id in each row, (T,) in float32, without gradient."""
    return bucket_logp(logits_TV.detach(), ids_T[:, None])[:, 0]


def _log_masses(logits_TV: Tensor, index_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Log-masses of the buckets, not normalised, (T, S), and of all of them together, (T, 1)."""
    if index_TK.shape[-1] == logits_TV.shape[-1]:
        mass_TS = logits_TV.gather(-1, index_TK).float()
    else:
        mass_TS = torch.cat(_Buckets.apply(logits_TV, index_TK), dim=-1)  # type: ignore[no-untyped-call]
    return mass_TS, mass_TS.logsumexp(-1, keepdim=True)


class _Buckets(torch.autograd.Function):
    """The support's logits, (T, K), and LSE of the rest, (T, 1), in float32; one read of the logits, and one write of their gradient.

    The tail is an LSE of its own. log(1 − Σp) would floor near −16 in float32 and have no gradient there.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, index_TK: Tensor) -> tuple[Tensor, Tensor]:
        keep = ctx.needs_input_grad[0]
        share_TV = torch.empty_like(logits_TV if keep else logits_TV[:0])
        rest_T1 = logits_TV.new_empty(len(logits_TV), 1, dtype=torch.float32)
        for rows, rest_RV, share_RV in _blocks(logits_TV, 2):
            rest_RV.copy_(logits_TV[rows]).scatter_(-1, index_TK[rows], -math.inf)
            torch.softmax(rest_RV, -1, out=share_RV)
            # The largest share is 1 / Σ exp(z − max), so this is the LSE, without a pass of its own.
            rest_T1[rows] = rest_RV.amax(-1, keepdim=True) - share_RV.amax(-1, keepdim=True).log()
            if keep:
                share_TV[rows] = share_RV
        ctx.save_for_backward(share_TV, index_TK)
        return logits_TV.gather(-1, index_TK).float(), rest_T1

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor, grad_T1: Tensor) -> tuple[Tensor, None]:
        share_TV, index_TK = ctx.saved_tensors
        grad_TV = torch.empty_like(share_TV)
        for rows, grad_RV in _blocks(share_TV, 1):
            # Scattered in float32: in bfloat16 it copies the rows first.
            grad_TV[rows] = grad_RV.copy_(share_TV[rows]).mul_(grad_T1[rows]).scatter_(-1, index_TK[rows], grad_TK[rows])
        return grad_TV, None


def _blocks(logits_TV: Tensor, buffers: int) -> Iterator[Any]:
    """Blocks of rows in turn, each with float32 room of its size, the same for all: fresh memory costs more than what is done in it."""
    T, V = logits_TV.shape
    room = [logits_TV.new_empty(min(ROWS, T), V, dtype=torch.float32) for _ in range(buffers)]
    for at in range(0, T, ROWS):
        rows = slice(at, min(at + ROWS, T))
        yield rows, *(buffer[: rows.stop - at] for buffer in room)


def divergence(student_TS: Tensor, teacher_TS: Tensor, alpha: float) -> Tensor:
    """Divergence of two bucketed distributions given as logprobs, (T,), nats, never negative."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}: it must lie in [0, 1]")
    if alpha == 0.0:
        loss_T = _kl(teacher_TS, student_TS)
    elif alpha == 1.0:
        loss_T = _kl(student_TS, teacher_TS)
    else:
        mixture_TS = _log_mixture(student_TS, teacher_TS, alpha)
        loss_T = (1 - alpha) * _kl(student_TS, mixture_TS) + alpha * _kl(teacher_TS, mixture_TS)
    # Rounding may leave −1e-9: lift the value, keep the gradient.
    return loss_T + (-loss_T).clamp_min(0).detach()


def guided(teacher_TS: Tensor, control_TS: Tensor, guidance: float, at_T: Tensor, k: int) -> Tensor:
    """The teacher pushed on in the direction in which the feedback moved it: Q·(Q/C)^g, normalised, as bucket logprobs (T, S).

    g is `guidance` at a reply's first token and falls to none at `GUIDED_TOKENS`; `at_T` is where in its reply each token stands. What
    a reply is about is decided at its beginning; pushed to its end it would be surer of itself, and loop.

    C is the teacher under feedback that has nothing to do with it, so that what any feedback would change is not pushed. Of the first `k`
    buckets, the support's tokens, those gain that the teacher itself holds for likely; the others, and the tail, lose or stay.

    Source: classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), held to plausible tokens as in contrastive decoding (Li et
    al. 2023, arXiv:2210.15097).
    """
    gain_TS = (teacher_TS - control_TS).clamp(-MAX_GAIN, MAX_GAIN)
    likely_TS = teacher_TS >= teacher_TS[:, :k].amax(-1, keepdim=True) + math.log(PLAUSIBLE)
    likely_TS[:, k:] = False
    guidance_T1 = guidance * (1 - at_T / GUIDED_TOKENS).clamp_min(0)[:, None]
    return (teacher_TS + guidance_T1 * torch.where(likely_TS, gain_TS, gain_TS.clamp_max(0))).log_softmax(-1)


def importance_ratio(logp_T: Tensor, old_logp_T: Tensor | None, clip: float | None) -> Tensor:
    """min(P/P_old, clip) for each token, without gradient; 1 where the sample is on-policy (`old_logp_T` None)."""
    if old_logp_T is None:
        return torch.ones_like(logp_T, requires_grad=False)
    ratio_T = (logp_T.detach() - old_logp_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return ratio_T if clip is None else ratio_T.clamp_max(clip)


def entropy(logp_TS: Tensor) -> Tensor:
    """Entropy of the bucketed distribution, (T,), nats: a lower bound of the full one."""
    return -(logp_TS.exp() * logp_TS).sum(-1)


def _kl(a_TS: Tensor, b_TS: Tensor) -> Tensor:
    return (a_TS.exp() * (a_TS - b_TS)).sum(-1)


def _log_mixture(p_TS: Tensor, q_TS: Tensor, alpha: float) -> Tensor:
    """log((1−α)P + αQ) from logprobs. Exactly P where P = Q, so that equal policies give exactly no loss."""
    gap_TS = q_TS - p_TS
    larger_is_q = gap_TS > 0
    other_share_TS = torch.where(larger_is_q, 1 - alpha, alpha)
    larger_TS = torch.where(larger_is_q, q_TS, p_TS)
    return larger_TS + torch.log1p(other_share_TS * torch.expm1(torch.where(larger_is_q, -gap_TS, gap_TS)))
