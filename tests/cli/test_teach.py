"""`claas teach` against a service whose adapter knows its name from version 1 on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from claas.inference.base import GenerationRequest
from tests.cli.conftest import Live, claas
from tests.doubles.services import ADAPTER

LESSON = (
    "teach",
    "--feedback",
    "Your name is Kuro.",
    "--prompt",
    "Who are you?",
    "--prompt",
    "Hi!",
    "--probe",
    "Your name?",
    "--probe",
    "And you are?",
)


def knows_its_name_from(version: int) -> Any:
    def reply(request: GenerationRequest) -> str:
        assert request.adapter is not None
        name = "Kuro" if request.adapter.version >= version else "an assistant"
        return f"I am {name}."

    return reply


@pytest.fixture
def learning(live: Live) -> Live:
    live.world.inference.reply = knows_its_name_from(1)
    return live


def taught(live: Live, *options: str) -> dict[str, Any]:
    result = live.claas(*LESSON, *options, "--json")
    report: dict[str, Any] = json.loads(result.out)
    assert result.err == ""
    assert result.code == (0 if report["learnt"] else 1)
    return report


def test_one_feedback_request_for_all_prompts_and_probes_from_both_sides(learning: Live) -> None:
    report = taught(learning, "--expect", "Kuro", "--unrelated", "Capital of France?")
    assert (report["model"], report["learnt"], report["expect"]) == (ADAPTER, True, "Kuro")
    assert (report["matched_before"], report["matched_after"]) == (0, 2)
    assert report["probes"] == [
        {"question": question, "before": "I am an assistant.", "after": "I am Kuro.", "matches": True}
        for question in ("Your name?", "And you are?")
    ]
    assert report["unrelated"] == [{"question": "Capital of France?", "before": "I am an assistant.", "after": "I am Kuro."}]
    (lesson,) = learning.world.engine.lessons
    assert [(sample.prompt, sample.feedback) for sample in lesson.samples] == [
        ("Who are you?", "Your name is Kuro."),
        ("Hi!", "Your name is Kuro."),
    ]
    (one,) = report["rounds"]
    assert [reply["completion_id"] for reply in one["replies"]] == [sample.completion_id for sample in lesson.samples]
    assert one["result"]["version"] == 1


def test_probes_are_greedy_and_prompts_are_sampled_with_seeds_of_their_own(learning: Live) -> None:
    taught(learning, "--seed", "7", "--temperature", "0.9")
    asked = [r for r in learning.world.inference.requests if not r.background]  # those of the check are
    probes = [r for r in asked if r.messages[-1].content in ("Your name?", "And you are?")]
    prompts = [r for r in asked if r.messages[-1].content in ("Who are you?", "Hi!")]
    assert [(r.sampling.temperature, r.sampling.seed) for r in probes] == [(0.0, None)] * 4
    assert [r.sampling.temperature for r in prompts] == [0.9, 0.9]
    seeds = {r.sampling.seed for r in prompts}
    assert len(seeds) == 2
    assert None not in seeds


def test_rounds_go_on_until_every_probe_matches(live: Live) -> None:
    live.world.inference.reply = knows_its_name_from(2)
    report = taught(live, "--expect", "Kuro", "--rounds", "5")
    assert [one["result"]["version"] for one in report["rounds"]] == [1, 2]
    assert (report["learnt"], report["matched_after"]) == (True, 2)


def test_rounds_end_when_a_step_changes_nothing(live: Live) -> None:
    live.world.engine.outcome = "skipped"
    report = taught(live, "--rounds", "5")
    assert len(report["rounds"]) == 1
    assert report["learnt"] is False


def test_not_learnt_unless_more_probes_match_than_before(live: Live) -> None:
    assert taught(live, "--expect", "never said")["learnt"] is False
    live.world.inference.reply = knows_its_name_from(0)
    report = taught(live, "--expect", "Kuro")
    assert (report["matched_before"], report["matched_after"], report["learnt"]) == (2, 2, False)


def test_without_expectation_an_applied_step_is_enough(learning: Live) -> None:
    report = taught(learning)
    assert (report["learnt"], report["expect"], report["matched_after"]) == (True, None, 0)


def test_cut_off_replies_are_asked_again_and_then_left_out(learning: Live) -> None:
    def reply(request: GenerationRequest) -> str:
        return "on and on and on" if request.messages[-1].content == "Hi!" else "Kuro."

    learning.world.inference.reply = reply
    report = taught(learning, "--max-tokens", "8")
    (one,) = report["rounds"]
    assert (one["cut_off"], [r["prompt"] for r in one["replies"]]) == (["Hi!"], ["Who are you?"])
    assert [r.messages[-1].content for r in learning.world.inference.requests].count("Hi!") == 3
    assert "not taught on, its reply did not end by itself: Hi!" in learning.claas(*LESSON, "--max-tokens", "8").out


def test_nothing_usable_is_told(learning: Live) -> None:
    result = learning.claas(*LESSON, "--max-tokens", "2", "--json")
    assert (result.code, result.out) == (1, "")
    assert "raise --max-tokens" in result.err


def test_the_table_shows_both_sides_and_the_figures(learning: Live) -> None:
    result = learning.claas(*LESSON, "--expect", "Kuro", "--unrelated", "2 + 2?")
    assert result.code == 0
    for text in ("Your name?", "I am an assistant.", "I am Kuro.", "2 + 2?", "(unrelated)"):
        assert text in result.out
    assert "round 1: learnt: version 0 → 1, loss 0.5 → 0.25" in result.out
    assert "'Kuro': 0 of 2 probes before, 2 of 2 after" in result.out


def test_prompts_and_probes_have_defaults(learning: Live) -> None:
    report = json.loads(learning.claas("teach", "--feedback", "Your name is Kuro.", "--json").out)
    assert len(report["probes"]) == 5
    asked = {probe["question"] for probe in report["probes"]}
    assert asked.isdisjoint(reply["prompt"] for reply in report["rounds"][0]["replies"])


def test_a_bad_expression_is_a_usage_error() -> None:
    result = claas("teach", "--feedback", "x", "--expect", "(")
    assert result.code == 2
    assert "no regular expression" in result.err


def test_another_adapter_learns_when_named(learning: Live) -> None:
    learning.claas("adapters", "init", "me/second")
    assert taught(learning, "--model", "me/second")["model"] == "me/second"
    assert learning.world.engine.lessons[0].lora_id == "me/second"
