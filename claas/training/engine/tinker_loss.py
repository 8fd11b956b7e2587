"""The SDPO loss where only logprobs can be had: what it is, and the weight of each token's logprob that gives its gradient. Numpy.

Shape legend
    T  response tokens   K  tokens of the support   S  buckets: the support, and all the rest as one

A server that trains takes weights w of logprobs and ascends Σ w·log P. The divergence C of the buckets depends on the student through
the support's logprobs alone, the rest being 1 − Σ; so w = −∂C/∂log P, taken here, carries it exactly. Only logprobs are given, so the
rest's mass is 1 − Σ exp and has their rounding: it is taken for `LEAST_REST` at least.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEAST_REST = 1e-6
LEAST_LOGP = -60.0


def buckets(logp_TK: Floats, real_TK: NDArray[np.bool_]) -> Floats:
    """Logprobs of the support's tokens and of the rest, (T, S); what is not `real` is no bucket of its own."""
    p_TK = np.where(real_TK, np.exp(np.maximum(logp_TK, LEAST_LOGP)), 0.0)
    rest_T1 = np.maximum(1.0 - p_TK.sum(-1, keepdims=True), LEAST_REST)
    p_TS = np.concatenate([p_TK, rest_T1], axis=-1)
    p_TS /= p_TS.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        logp_TS: Floats = np.log(p_TS)
    return logp_TS


def divergence(student_TS: Floats, teacher_TS: Floats, alpha: float) -> Floats:
    """As `claas.training.sdpo.divergence`: KL(Q‖P) at 0, KL(P‖Q) at 1, generalised Jensen–Shannon between; (T,), nats."""
    if alpha == 0.0:
        return np.maximum(_kl(teacher_TS, student_TS), 0.0)
    if alpha == 1.0:
        return np.maximum(_kl(student_TS, teacher_TS), 0.0)
    mixture_TS = np.logaddexp(student_TS + np.log1p(-alpha), teacher_TS + np.log(alpha))
    return np.maximum((1 - alpha) * _kl(student_TS, mixture_TS) + alpha * _kl(teacher_TS, mixture_TS), 0.0)


def weights(student_TS: Floats, teacher_TS: Floats, alpha: float) -> Floats:
    """−∂C/∂log P of the support's tokens, (T, K)."""
    p_TS = np.exp(student_TS)
    slope_TS = np.where(p_TS > 0, _slope(student_TS, teacher_TS, alpha), 0.0)
    taken: Floats = -p_TS[:, :-1] * (slope_TS[:, :-1] - slope_TS[:, -1:])
    return taken


def _slope(student: Floats, teacher: Floats, alpha: float) -> Floats:
    """∂C/∂P, up to a constant."""
    with np.errstate(over="ignore", invalid="ignore"):
        if alpha == 0.0:
            return -np.exp(teacher - student)
        if alpha == 1.0:
            return student - teacher
        mixture = np.logaddexp(student + np.log1p(-alpha), teacher + np.log(alpha))
        slope: Floats = (1 - alpha) * (student - mixture)
    return slope


def _kl(a_TS: Floats, b_TS: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        terms_TS = np.where(np.isneginf(a_TS), 0.0, np.exp(a_TS) * (a_TS - b_TS))
    summed: Floats = terms_TS.sum(-1)
    return summed
