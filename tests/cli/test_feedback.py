"""`claas feedback`."""

from __future__ import annotations

import json

import httpx

from claas.cli.client import Client
from tests.cli.conftest import KEY, Live
from tests.doubles.services import ADAPTER


def reply_id(live: Live) -> str:
    with Client(live.url, KEY) as client:
        return client.chat(ADAPTER, [{"role": "user", "content": "Hello"}]).id


def test_a_lesson_and_its_figures(live: Live) -> None:
    result = live.claas("feedback", reply_id(live), "Say my name.")
    assert result.code == 0
    headline, figures = result.out.splitlines()
    assert headline == "learnt: version 0 → 1, loss 0.5 → 0.25"
    assert figures.startswith("KL 0.125 nat/token, 1 steps on 1 tokens, ")
    (lesson,) = live.world.engine.lessons
    assert {sample.feedback for sample in lesson.samples} == {"Say my name."}


def test_a_rating_and_a_demonstration(live: Live) -> None:
    for said, kept in (
        (["--good"], ("", 1, None)),
        (["--bad"], ("", -1, None)),
        (["--demonstration", "Good day!"], ("", None, "Good day!")),
        (["Say good day.", "--bad", "--demonstration", "Good day!"], ("Say good day.", -1, "Good day!")),
    ):
        answer = json.loads(live.claas("feedback", reply_id(live), *said, "--json").out)
        with httpx.Client(base_url=live.url, headers={"authorization": f"Bearer {KEY}"}) as http:
            item = http.get(f"/v1/feedback/{answer['feedback_ids'][0]}").json()
        assert (item["feedback"], item["rating"], item["demonstration"]) == kept


def test_nothing_said_is_a_wrong_use(live: Live) -> None:
    result = live.claas("feedback", "chatcmpl-nobody")
    assert result.code == 2
    assert "--demonstration" in result.err
    assert live.world.engine.lessons == []


def test_show_prints_a_new_reply(live: Live) -> None:
    out = live.claas("feedback", reply_id(live), "Say my name.", "--show").out
    assert f"> Hello\nbefore: [{ADAPTER}@0] Hello\nafter:  [{ADAPTER}@1] Hello\n" in out


def test_a_contradiction_is_told_in_one_line(live: Live) -> None:
    live.world.inference.reply = lambda request: (request.messages[-1].content or "").rpartition("name is ")[2][:5] or "Hm."
    live.world.inference.surprise, live.world.inference.suggestible = 4.0, True
    with Client(live.url, KEY) as client:
        reply = client.chat(ADAPTER, [{"role": "user", "content": "Who are you?"}]).id
    settings = {"hindsight_rollouts": 1, "own_replies": False}
    body = {"requests": [{"completion_id": reply, "feedback": "Your name is Kuro.", "training": settings}]}
    httpx.post(f"{live.url}/v1/feedback", json=body, headers={"authorization": f"Bearer {KEY}"}).raise_for_status()
    result = live.claas("feedback", reply, "Your name is Maxi.")
    _, remark, figures = result.out.splitlines()
    assert remark == "this contradicts what was taught as version 1: the newer wins"
    assert figures.startswith("KL ")


def test_json_is_the_services_own_answer(live: Live) -> None:
    answer = json.loads(live.claas("feedback", reply_id(live), "Say my name.", "--json").out)
    assert (answer["status"], answer["lora_id"], answer["version"]) == ("ok", ADAPTER, 1)
    assert answer["distill_result"]["metadata"]["update"]["loss_before"] == 0.5


def test_a_step_that_changed_nothing_is_exit_code_1_with_its_reason(live: Live) -> None:
    live.world.engine.outcome = "undone"
    result = live.claas("feedback", reply_id(live), "Say my name.")
    assert result.code == 1
    assert result.out.startswith("undone, version 0 serves on: the double was told to answer 'undone'\n")
    assert "–" not in result.out.splitlines()[0]


def test_an_unknown_reply(live: Live) -> None:
    result = live.claas("feedback", "chatcmpl-nobody", "Say my name.")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("claas: ")
    assert "chatcmpl-nobody" in result.err
