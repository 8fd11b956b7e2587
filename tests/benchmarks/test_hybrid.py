"""The arithmetic of `benchmarks.hybrid`, on replies and updates whose times are known; and its whole course, over the doubles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.hybrid import COLOURS, Update, choose, longest_silence, run, summarise, timeline, tokens_in
from benchmarks.lessons import LESSONS
from benchmarks.one_version import mixed, named, sample
from claas.core.types import LoraInitRequest
from tests.api.conftest import on_socket
from tests.benchmarks.made_up import reply
from tests.doubles.services import open_world

SLEPT = {"total": 9000, "rollouts": 1000, "contradictions": 500, "drain": 2000, "sleep": 250, "distill": 3000, "wake": 750, "check": 1000}


def update(began: float, timing_ms: dict[str, int], version: int = 1, **answer: Any) -> Update:
    return Update(began, began + timing_ms["total"] / 1000, "fact", {"status": "ok", "version": version, "timing_ms": timing_ms} | answer)


def test_phases_lie_one_after_the_other_and_the_gate_is_shut_from_drain_to_wake() -> None:
    slept = update(100.0, SLEPT | {"save": 0, "logprobs": 0})
    assert slept.phases() == [
        ("rollouts", 100.0, 101.0),
        ("contradictions", 101.0, 101.5),
        ("anchors", 101.5, 102.0),
        ("drain", 102.0, 104.0),
        ("sleep", 104.0, 104.25),
        ("distill", 104.25, 107.25),
        ("wake", 107.25, 108.0),
        ("check", 108.0, 109.0),
    ]
    assert slept.shut() == (102.0, 108.0)
    assert {phase for phase, *_ in slept.phases()} <= set(COLOURS)


def test_an_update_beside_the_server_shuts_no_gate_and_one_that_failed_has_no_phases() -> None:
    beside = update(0.0, {"total": 4000, "distill": 3000, "check": 500})
    assert [phase for phase, *_ in beside.phases()] == ["anchors", "distill", "check"]
    assert beside.shut() is None
    failed = Update(0.0, 5.0, "fact", {"error": {"message": "no room"}})
    assert (failed.phases(), failed.shut()) == ([], None)


def test_tokens_are_counted_where_they_came() -> None:
    replies = [reply(0.0, [1.0, 2.0, 3.0]), reply(0.0, [2.5]), reply(0.0, [])]
    assert tokens_in(replies, [(1.0, 3.0)]) == 3
    assert tokens_in(replies, [(0.0, 1.5), (2.9, 9.0)]) == 2
    assert longest_silence(replies, (0.5, 8.0)) == 5.0


def test_the_summary_keeps_waiting_at_the_gate_apart() -> None:
    one, two = update(10.0, SLEPT), update(30.0, SLEPT, version=2)
    replies = [
        reply(-5.0, [-4.0]),  # warming up
        reply(1.0, [1.5, 2.5]),
        reply(10.5, [11.5]),  # while the lesson's rollouts are sampled
        reply(13.0, [18.5, 19.5], version=1),  # at the gate
        reply(20.0, [20.25], version=1),
        reply(33.0, [], failure="status 503"),
        reply(34.0, [39.0], version=1, failure="ended with None"),
        reply(45.0, [45.25], version=2),
    ]
    found = summarise(replies, [one, two], began=0.0, over=50.0)
    waits = {where: (wait["n"], wait["median"]) for where, wait in found["first_token_s"].items()}
    assert waits == {"outside": (3, 0.25), "during_gate_open": (1, 1.0), "gate_shut": (2, 5.25)}
    assert (found["refused"], found["cut"], found["without_one_version"]) == (["status 503"], ["ended with None"], 0)
    assert found["throughput"]["before"] == {"seconds": 10.0, "tokens_per_s": 0.2}
    assert found["throughput"]["during"] == {"seconds": 18.0, "tokens_per_s": round(2 / 18, 2)}
    assert found["throughput"]["between"]["seconds"] == 11.0
    assert found["gate_shut_s"] == [6.0, 6.0]
    assert found["phase_s_median"]["drain"] == 2.0
    shown = timeline(replies, [one, two], began=0.0, over=50.0)
    assert len(shown["tokens_per_s"]) == 50
    assert sum(shown["tokens_per_s"]) == sum(r.tokens for r in replies[1:])
    assert ["distill", 14.25, 17.25] in shown["phases"]
    assert [45.0, 0.25] in shown["first_token_s"]
    late = timeline(replies, [one, two], began=10.0, over=50.0)
    assert ["distill", 4.25, 7.25] in late["phases"], "all is told from the beginning on"


def test_a_lesson_that_was_tried_twice_says_so() -> None:
    said = [{"metadata": {"first_try": why}} for why in (None, "it was a loop")]
    updates = [update(10.0 * (1 + n), SLEPT, distill_result=result) for n, result in enumerate(said)]
    assert [told["tries"] for told in summarise([], updates, began=0.0, over=50.0)["updates"]] == [1, 2]


def test_feedback_goes_to_the_newest_reply_that_ended_by_itself_rather_of_a_lesson_not_taught() -> None:
    dog, bye = LESSONS[1].prompts[0], LESSONS[3].prompts[0]
    replies = [
        reply(1.0, [1.5], prompt=dog),
        reply(2.0, [2.5], prompt=bye),
        reply(3.0, [3.5], prompt=bye, finish="length"),
        reply(4.0, [4.5], prompt=bye, failure="ended with None"),
    ]
    assert choose(replies, []) == ("chatcmpl-2", "rule")
    assert choose(replies, ["rule"]) == ("chatcmpl-1", "fact")
    assert choose(replies, ["rule", "fact"]) == ("chatcmpl-2", "rule")
    assert choose(replies[2:], []) is None


def test_a_reply_of_two_versions_is_found_by_its_halves() -> None:
    old, new = [-1.0, -2.0, -3.0, -4.0], [-1.5, -2.5, -3.5, -4.5]
    scored = {0: old, 1: new}
    assert not mixed(old, scored, 0)
    assert mixed(old, scored, 1)
    assert mixed([*old[:2], *new[2:]], scored, 0)
    assert not mixed([x + 0.01 for x in old], {0: old, 1: [x + 0.012 for x in old]}, 0), "less than the noise tells nothing"


def test_replies_that_ran_through_a_change_are_looked_at_first() -> None:
    replies = [reply(float(n), [n + 0.5, n + 0.75]) for n in range(10)] + [reply(4.0, [4.5, 9.5]), reply(0.0, [], failure="refused")]
    assert sample(replies, [7.1], most=1) == [replies[7]]
    chosen = sample(replies, [9.0], most=4)
    assert chosen[0] is replies[10]
    assert len(chosen) == 4
    assert [named(r) for r in (replies[0], replies[-1])] == [0, None]


async def test_the_whole_course_over_the_doubles(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world, on_socket(world) as url:
        await world.services.lifecycle.init(LoraInitRequest(lora_id="assistant"))
        how = {"max_tokens": 200, "temperature": 0.0}
        found = await run(url, clients=3, updates=2, seconds=0.1, training={"min_signal": 0.0}, how=how, checked=4)
    assert (found["refused"], found["cut"], found["without_one_version"]) == ([], [], 0)
    assert [(u["status"], u["version"]) for u in found["updates"]] == [("ok", 1), ("ok", 2)]
    assert set(found["speakers"]) >= {"assistant@0", "assistant@1", "assistant@2"}
    assert found["one_version"]["looked_at"] == 4
    assert found["one_version"]["mixed"] == []
    assert found["one_version"]["gap_to_named_nats"]["max"] == pytest.approx(0.0)
