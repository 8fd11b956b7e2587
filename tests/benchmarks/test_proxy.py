"""The arithmetic of `benchmarks.proxy`, on replies whose times are known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.proxy import AIMS, EXACT, Aim, Block, compare, cpu_of, summarise
from claas.core.types import ChatMessage
from claas.inference.base import GenerationRequest
from claas.inference.vllm_wire import route_and_body
from tests.benchmarks.made_up import reply
from tests.models.tiny import tiny_tokenizer


def block(first_s: float, token_s: float, *, seconds: float = 1.0, proxy_cpu_s: float = 0.0) -> Block:
    """Three replies of five tokens each, one asked after another."""
    replies = [reply(asked, [asked + first_s + n * token_s for n in range(5)]) for asked in (0.0, 2.0, 4.0)]
    return Block(tuple(replies), seconds, {"client": 0.1, "proxy": proxy_cpu_s})


def test_figures_ratios_and_differences_with_their_intervals() -> None:
    direct = [block(0.100, 0.010, seconds=1.0)] * 4
    claas = [block(0.103, 0.011, seconds=1.25)] * 4
    compared = compare(direct, claas, np.random.default_rng(0), draws=50)
    assert compared["first_token_ms_mean"]["direct"] == 100.0
    assert compared["first_token_ms_mean"]["difference"] == [3.0, 3.0, 3.0], "replies that are all alike leave no doubt"
    assert compared["token_ms_median"]["ratio"] == [1.1, 1.1, 1.1]
    assert compared["tokens_per_s"]["claas"] == 12.0
    assert compared["tokens_per_s"]["ratio"] == [0.8, 0.8, 0.8]


def test_rounds_that_differ_widen_the_interval_and_what_they_share_does_not() -> None:
    slower_and_slower = [0.1, 0.2, 0.4, 0.8]
    direct = [block(0.1, token_s) for token_s in slower_and_slower]
    alike = [block(0.1, 1.02 * token_s) for token_s in slower_and_slower]
    uneven = [block(0.1, factor * token_s) for factor, token_s in zip((0.5, 2.0, 1.0, 1.0), slower_and_slower, strict=True)]
    rng = np.random.default_rng(0)
    assert compare(direct, alike, rng, draws=200)["token_ms_median"]["ratio"] == [1.02, 1.02, 1.02]
    ratio, low, high = compare(direct, uneven, rng, draws=200)["token_ms_median"]["ratio"]
    assert low < ratio < high


def test_an_aim_is_met_or_missed_only_if_the_whole_interval_is() -> None:
    most = Aim("x", "ratio", 1.03)
    least = Aim("x", "ratio", 0.97, at_most=False)
    assert [most.judge(*interval) for interval in ((0.9, 1.03), (1.0, 1.1), (1.04, 1.1))] == ["met", "open", "missed"]
    assert [least.judge(*interval) for interval in ((0.97, 1.1), (0.9, 1.0), (0.8, 0.96))] == ["met", "open", "missed"]
    assert [str(aim) for aim in AIMS] == ["≤ +2 ms", "≤ 1.03 times", "≥ 0.97 times"]


def test_cpu_seconds_are_for_a_thousand_tokens() -> None:
    assert cpu_of([block(0.1, 0.01, proxy_cpu_s=0.03)] * 2) == {"client": pytest.approx(6.6667), "proxy": 2.0}


def test_a_row_for_each_concurrency_and_model() -> None:
    good, bad = block(0.1, 0.01), block(0.2, 0.02, seconds=2.0)
    rows = summarise(
        {
            (1, "adapter", "direct"): [good] * 2,
            (1, "adapter", "claas"): [good] * 2,
            (4, "base", "direct"): [good] * 2,
            (4, "base", "claas"): [bad] * 2,
        }
    )
    assert [(row["concurrency"], row["model"], row["rounds"], row["replies"]) for row in rows] == [
        (1, "adapter", 2, {"direct": 6, "claas": 6}),
        (4, "base", 2, {"direct": 6, "claas": 6}),
    ]
    assert [set(row["aims"].values()) for row in rows] == [{"met"}, {"missed"}]


def test_the_stand_in_is_asked_directly_for_what_claas_asks_it() -> None:
    request = GenerationRequest(messages=(ChatMessage(role="user", content="Hello"),))
    _, body = route_and_body(request, "model", tiny_tokenizer(), 512)
    assert {key: body[key] for key in EXACT} == EXACT
