"""The arithmetic of `benchmarks.proxy`, on replies whose times are known."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.paced import PacedEngine, PacedVllm, first_token_waits
from benchmarks.proxy import AIMS, EXACT, Aim, Block, compare, cpu_of, summarise
from benchmarks.stack import ask, read
from claas.core.types import ChatMessage
from claas.inference.base import GenerationRequest
from claas.inference.vllm_wire import route_and_body
from tests.benchmarks.made_up import reply
from tests.doubles.vllm_script import Said
from tests.models.tiny import tiny_tokenizer


def block(first_s: float, token_s: float, *, seconds: float = 1.0, proxy_cpu_s: float = 0.0, waits: Sequence[float] = (0.0,) * 3) -> Block:
    """Three replies of five tokens each, one asked after another; what each waited in a stand-in comes on top of `first_s`."""
    begun = [(asked, asked + waited + first_s) for asked, waited in zip((0.0, 2.0, 4.0), waits, strict=True)]
    replies = [reply(asked, [first + n * token_s for n in range(5)]) for asked, first in begun]
    return Block(tuple(replies), seconds, {"client": 0.1, "proxy": proxy_cpu_s}, tuple(waits))


def test_figures_ratios_and_differences_with_their_intervals() -> None:
    direct = [block(0.100, 0.010, seconds=1.0)] * 4
    claas = [block(0.103, 0.011, seconds=1.25)] * 4
    compared = compare(direct, claas, np.random.default_rng(0), draws=50)
    assert compared["first_token_ms_mean"]["direct"] == 100.0
    assert compared["first_token_ms_mean"]["difference"] == [3.0, 3.0, 3.0], "replies that are all alike leave no doubt"
    assert compared["token_ms_median"]["ratio"] == [1.1, 1.1, 1.1]
    assert compared["tokens_per_s"]["claas"] == 12.0
    assert compared["tokens_per_s"]["ratio"] == [0.8, 0.8, 0.8]


def test_what_a_stand_in_kept_them_waiting_stands_beside_and_counts() -> None:
    direct = [block(0.004, 0.010, waits=(0.0, 0.019, 0.007))] * 2
    claas = [block(0.005, 0.010, waits=(0.012, 0.001, 0.0))] * 2
    (row,) = summarise({(1, "base", "direct"): direct, (1, "base", "claas"): claas})
    assert row["stand_in_wait_ms_mean"] == {"direct": 8.667, "claas": 4.333}
    assert row["first_token_ms_mean"]["direct"] == pytest.approx(8.667 + 4.0, abs=1e-3)


async def test_a_stand_in_tells_how_long_each_prompt_waited() -> None:
    """Who comes to an idle one is served at once, who comes into a step waits for its end."""
    script = Said("word " * 8)
    with PacedVllm(tiny_tokenizer(), engine_class=PacedEngine, script=lambda _: script, step_s=1.0) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=30.0) as client:
            how: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0}
            first = asyncio.create_task(ask(client, "tiny", "The first.", **how))
            await asyncio.sleep(0.1)
            second = await ask(client, "tiny", "The second.", **how)
            replies = [read(await first), read(second)]
        waits = await asyncio.to_thread(first_token_waits, server.url, [reply.prompt for reply in replies])
        assert waits[0] < 0.4 < waits[1] <= replies[1].first_token_s
        assert await asyncio.to_thread(first_token_waits, server.url, []) == []
        with pytest.raises(ValueError, match="not enough values"):
            await asyncio.to_thread(first_token_waits, server.url, ["The first."])  # told once


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
