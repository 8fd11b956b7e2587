"""The SDPO loss: how far the student is from its own hindsight, token by token. Pure functions on tensors; no model, no config.

Source: Hübotter et al. 2026, "Reinforcement Learning via Self-Distillation" (arXiv:2601.20802).

Shape legend
    T  response tokens        V  vocabulary
    K  support (top-K) tokens S  buckets: K, plus one tail bucket with all the rest when K < V

Student P carries the gradient, teacher Q does not. All arithmetic is in log space and float32, whatever the input's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0


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
    student_TV = student_logits_TV.float()
    teacher_TV = teacher_logits_TV.detach().float()
    index_TK = top_k_support(student_TV, top_k)
    student_TS = bucket_logp(student_TV, index_TK)
    teacher_TS = bucket_logp(teacher_TV, index_TK)
    student_logp_T = token_logp(student_TV, response_ids_T)
    divergence_T = divergence(student_TS, teacher_TS, alpha)
    ratio_T = importance_ratio(student_logp_T, old_logp_T, is_clip)
    return SdpoResult(
        loss_T=divergence_T * ratio_T,
        divergence_T=divergence_T.detach(),
        ratio_T=ratio_T,
        student_logp_T=student_logp_T.detach(),
        teacher_logp_T=token_logp(teacher_TV, response_ids_T),
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
    """Logprobs of the support's tokens and, when K < V, of everything else as one last bucket: (T, S).

    The tail is LSE(rest) − LSE(all). log(1 − Σp) would floor near −16 in float32 and have no gradient there.
    """
    total_T1 = logits_TV.logsumexp(-1, keepdim=True)
    logp_TK = logits_TV.gather(-1, index_TK) - total_T1
    if index_TK.shape[-1] == logits_TV.shape[-1]:
        return logp_TK
    tail_T1 = logits_TV.scatter(-1, index_TK, -math.inf).logsumexp(-1, keepdim=True) - total_T1
    return torch.cat([logp_TK, tail_T1], dim=-1)


def token_logp(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Full-vocabulary logprob of one id in each row, (T,)."""
    return logits_TV.gather(-1, ids_T[:, None]).squeeze(-1) - logits_TV.logsumexp(-1)


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
