"""Logits → sampled tokens with their logprobs. Pure functions on tensors; it knows no request and no model.

Shape legend
    B  rows of a step   V  vocabulary   K  alternatives that were asked for

A token is drawn by inverting the cumulative distribution at one uniform number from the row's own generator, one number a token:
so what a seed gives does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from claas.core.types import SamplingParams
from claas.inference.base import SampledToken

NUCLEUS_GUESS = 256
LEAST_TEMPERATURE = 1e-5
"""Below it a logprob divided by it could leave float32; a reply at it is greedy all but surely."""


class Sampler:
    """How one row draws its tokens: its parameters and its stream of random numbers."""

    def __init__(self, params: SamplingParams) -> None:
        self.temperature = params.temperature if params.temperature >= LEAST_TEMPERATURE else 0.0
        self.top_p = params.top_p
        self.top_logprobs = params.top_logprobs
        seed = None if params.seed is None else params.seed % 2**64
        self._random = np.random.Generator(np.random.Philox(seed))

    def uniform(self) -> float:
        """The next number of the stream, in [0, 1)."""
        return float(self._random.random())


def sample(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[SampledToken | None]:
    """One token for each row, with logprobs in nats of the unmodified distribution, in float32; None for a row without a distribution."""
    if logits_BV.device.type == "mps":
        logits_BV = logits_BV.cpu()  # Metal has no float64
    logp_BV = logits_BV.float().log_softmax(-1)
    broken_B = logp_BV[:, 0].isnan()  # one NaN or +inf makes all of the row NaN
    if broken := bool(broken_B.any()):
        logp_BV = logp_BV.masked_fill(broken_B[:, None], 0.0)
    chosen_B = logp_BV.argmax(-1) if all(s.temperature == 0 for s in samplers) else _choose(logp_BV, samplers)
    logp_B = logp_BV.gather(1, chosen_B[:, None]).squeeze(1)
    top = _alternatives(logp_BV, [s.top_logprobs for s in samplers])
    tokens: list[SampledToken | None] = [SampledToken(*drawn) for drawn in zip(chosen_B.tolist(), logp_B.tolist(), top, strict=True)]
    return [None if bad else token for token, bad in zip(tokens, broken_B.tolist(), strict=True)] if broken else tokens


def _choose(logp_BV: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Greedy rows take the likeliest token, the others draw."""
    device = logp_BV.device
    # One number for every row, greedy ones too: a stream must not depend on its neighbours.
    uniform_B = torch.tensor([s.uniform() for s in samplers], dtype=torch.float64, device=device)
    temperatures = [s.temperature or 1.0 for s in samplers]
    plain = all(t == 1.0 for t in temperatures)
    probs_BV = logp_BV.exp() if plain else (logp_BV / torch.tensor(temperatures, device=device)[:, None]).softmax(-1)
    for i, sampler in enumerate(samplers):
        if sampler.top_p < 1.0 and sampler.temperature > 0:
            probs_BV[i] = _nucleus(probs_BV[i], sampler.top_p)
    drawn_B = _invert(probs_BV, uniform_B)
    greedy_B = torch.tensor([s.temperature == 0 for s in samplers], device=device)
    return torch.where(greedy_B, logp_BV.argmax(-1), drawn_B) if any(s.temperature == 0 for s in samplers) else drawn_B


def _invert(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token of each row whose cumulative probability exceeds the uniform number, scaled to the row's total."""
    cumulative_BV = probs_BV.cumsum(-1, dtype=torch.float64)
    total_B = cumulative_BV[:, -1]
    # Below the total even after rounding, so that the token found has a probability.
    below_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    return torch.searchsorted(cumulative_BV, below_B[:, None], right=True).squeeze(1)


def _nucleus(probs_V: Tensor, top_p: float) -> Tensor:
    """`probs_V` with all but the smallest set of likeliest tokens whose mass reaches `top_p` set to zero."""
    for guess in (NUCLEUS_GUESS, probs_V.shape[0]):
        top_K, index_K = probs_V.topk(min(guess, probs_V.shape[0]))
        before_K = top_K.cumsum(0) - top_K
        if float(before_K[-1] + top_K[-1]) >= top_p:
            break
    kept_K = top_K * (before_K < top_p)
    return torch.zeros_like(probs_V).scatter_(0, index_K, kept_K)


def _alternatives(logp_BV: Tensor, wanted: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest tokens of each row that asked for some, with their logprobs, best first."""
    most = max(wanted)
    if most == 0:
        return [()] * len(wanted)
    logp_BK, index_BK = logp_BV.topk(most)
    rows = zip(index_BK.tolist(), logp_BK.tolist(), wanted, strict=True)
    return [tuple(zip(ids[:k], logps[:k], strict=True)) for ids, logps, k in rows]
