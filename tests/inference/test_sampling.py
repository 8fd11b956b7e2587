"""Sampling: the distribution it draws from, the logprobs it reports, and streams of random numbers that are a row's own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from claas.core.types import SamplingParams
from claas.inference.base import SampledToken
from claas.inference.sampling import Sampler, sample

PROBS = (0.5, 0.25, 0.15, 0.06, 0.04)


def logits(*probs: float) -> Tensor:
    return torch.tensor(probs).log()


def sampler(**params: object) -> Sampler:
    return Sampler(SamplingParams.model_validate(params))


def tokens_of(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[SampledToken]:
    """What is sampled where every row has a distribution."""
    tokens = sample(logits_BV, samplers)
    assert None not in tokens
    return [token for token in tokens if token is not None]


def draw(n: int, row_V: Tensor | None = None, **params: object) -> list[SampledToken]:
    row_V = logits(*PROBS) if row_V is None else row_V
    one = sampler(**{"seed": 1} | params)
    return [tokens_of(row_V[None], [one])[0] for _ in range(n)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert {token.id for token in draw(20, temperature=0.0)} == {0}


@pytest.mark.parametrize("temperature", [1e-38, 5e-324, 1e-6])
def test_a_temperature_next_to_zero_is_greedy_and_leaves_its_neighbours_alone(temperature: float) -> None:
    both = torch.stack([logits(*PROBS), logits(*reversed(PROBS))])
    first, second = sample(both, [sampler(temperature=temperature), sampler(temperature=1.0, seed=1)])
    assert first is not None and first.id == 0
    assert second == sample(both[1:], [sampler(temperature=1.0, seed=1)])[0]


@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_distribution_gets_no_token_and_its_neighbour_the_same_as_alone(damage: float, temperature: float) -> None:
    both = torch.stack([logits(*PROBS), logits(*PROBS)])
    both[0, 3] = damage
    how = {"temperature": temperature, "seed": 1, "top_p": 0.9, "top_logprobs": 2}
    assert sample(both, [sampler(**how), sampler(**how)]) == [None, sample(both[1:], [sampler(**how)])[0]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_at_their_temperature(temperature: float) -> None:
    n = 4000
    counts = Counter(token.id for token in draw(n, temperature=temperature))
    weights = [p ** (1 / temperature) for p in PROBS]
    for token, weight in enumerate(weights):
        expected = n * weight / sum(weights)
        assert abs(counts[token] - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize(("top_p", "kept"), [(0.05, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.9, 3), (0.97, 5), (1.0, 5)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    counts = Counter(token.id for token in draw(1500, top_p=top_p))
    assert set(counts) == set(range(kept))
    total = sum(PROBS[:kept])
    for token in range(kept):
        expected = 1500 * PROBS[token] / total
        assert abs(counts[token] - expected) < 5 * math.sqrt(expected)


def test_top_p_reaches_beyond_the_first_guess() -> None:
    flat = torch.zeros(2000)
    assert len({token.id for token in draw(1500, flat, top_p=0.5)}) > 500


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    for token in draw(50, temperature=0.3, top_p=0.8):
        assert token.logprob == pytest.approx(math.log(PROBS[token.id]), abs=1e-6)


def test_alternatives_are_the_likeliest_best_first_for_those_who_asked() -> None:
    asked, not_asked = tokens_of(torch.stack([logits(*PROBS)] * 2), [sampler(top_logprobs=3), sampler()])
    assert [i for i, _ in asked.top] == [0, 1, 2]
    assert [p for _, p in asked.top] == pytest.approx([math.log(p) for p in PROBS[:3]], abs=1e-6)
    assert not_asked.top == ()


@given(st.integers(0, 3), st.integers(-(2**63), 2**63 - 1))
def test_a_row_draws_the_same_whatever_is_beside_it(place: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(abs(seed) % 1000)
    rows_BV = torch.randn(4, 50, generator=generator)
    mine = sampler(seed=seed, temperature=0.9)
    alone = [tokens_of(rows_BV[place][None], [mine])[0] for _ in range(5)]
    others = [sampler(seed=9, temperature=0.0), sampler(top_p=0.5), sampler(temperature=2.0), sampler()]
    others[place] = sampler(seed=seed, temperature=0.9)
    together = [tokens_of(rows_BV, others)[place] for _ in range(5)]
    assert [t.id for t in together] == [t.id for t in alone]
    assert [t.logprob for t in together] == pytest.approx([t.logprob for t in alone])


def test_no_token_without_probability_is_ever_drawn() -> None:
    row = torch.full((64,), float("-inf"))
    row[10], row[20] = 0.0, -30.0
    assert {token.id for token in draw(500, row)} == {10}
    assert {token.id for token in draw(100, row, temperature=2.0, top_p=0.9)} == {10}


def test_bfloat16_logits_are_taken_to_float32_first() -> None:
    row = (torch.randn(1, 1000) * 3).bfloat16()
    token = tokens_of(row, [sampler(temperature=0.0)])[0]
    assert token.logprob == pytest.approx(row.float().log_softmax(-1)[0, token.id].item(), abs=1e-6)


def test_without_a_seed_replies_differ() -> None:
    assert len({tuple(sampler().uniform() for _ in range(3)) for _ in range(10)}) == 10
