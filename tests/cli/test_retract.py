"""`claas retract`."""

from __future__ import annotations

import json

from claas.core.errors import StepFailed
from tests.cli.conftest import Live
from tests.cli.test_feedback import reply_id


def taught(live: Live) -> str:
    answer = json.loads(live.claas("feedback", reply_id(live), "Say my name.", "--json").out)
    return str(answer["feedback_ids"][0])


def test_one_lesson_goes_and_the_later_one_stays(live: Live) -> None:
    first, second = taught(live), taught(live)
    result = live.claas("retract", first)
    assert (result.code, result.out) == (0, f"retracted feedback {first}\n")
    again = live.world.engine.lessons[-1]
    assert (again.parent, again.feedback_ids) == (0, (second,))
    assert live.claas("retract", first).code == 0, "once retracted, it stays so"


def test_what_stands_in_the_way_is_said_and_a_second_try_may_do(live: Live) -> None:
    first = taught(live)
    taught(live)
    live.world.engine.failure = StepFailed("the step broke")
    result = live.claas("retract", first)
    assert (result.code, result.out) == (1, "could not be retracted, ask again: the step broke\n")
    live.world.engine.failure = None
    assert live.claas("retract", first).code == 0


def test_without_waiting(live: Live) -> None:
    result = live.claas("retract", taught(live), "--no-wait")
    assert (result.code, result.out) == (0, "under way: the lesson still serves until the adapter without it is ready\n")


def test_an_unknown_feedback(live: Live) -> None:
    result = live.claas("retract", "fb-../nobody?x")
    assert (result.code, result.out) == (1, "")
    assert "claas: " in result.err
