"""200 lessons nobody should give: each is learnt, or there is a reason why not, and nothing that was said is lost."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.adversarial import course, teach
from benchmarks.adversarial_lessons import EACH, KINDS, adversarial_lessons
from tests.api.conftest import on_socket
from tests.doubles.services import open_world
from tests.integration.process import Caller, running

LORA = "adversarial/assistant"


def test_the_lessons_are_the_same_every_time_and_all_kinds_stand_in_any_slice() -> None:
    lessons = adversarial_lessons()
    assert lessons == adversarial_lessons()
    assert Counter(lesson.kind for lesson in lessons) == dict.fromkeys(KINDS, EACH)
    assert len(lessons) == 200
    assert {lesson.kind for lesson in lessons[:8]} == set(KINDS)
    assert len({json.dumps([lesson.prompt, lesson.said]) for lesson in lessons}) == 200


async def test_all_of_them_go_through_and_whatever_is_not_learnt_has_a_reason(tmp_path: Path) -> None:
    out = tmp_path / "adversarial.json"
    async with open_world(tmp_path / "data") as world, on_socket(world) as url:
        world.inference.reply = lambda request: f"A reply to: {request.messages[-1].content or ''}"[:80]
        world.engine.undo_above = 2e-5  # every lesson takes its second try
        result = await asyncio.to_thread(course, Caller(url), adversarial_lessons(), 100, out, {})
        summary, rows = result["summary"], result["lessons"]
        assert summary["passed"], summary
        assert (summary["without_reason"], summary["server_errors"], summary["healthy"], summary["lessons"]) == ([], [], True, 200)
        assert json.loads(out.read_text()) == json.loads(json.dumps(result)), "written as it grows"

        accepted = [row for row in rows if row["status"] != "refused"]
        kept = await world.services.feedback.list(limit=1000)
        assert len(kept) == len(accepted), "nothing that was accepted is lost"
        assert Counter(row.state for row in kept) == Counter("applied" if row["status"] == "ok" else row["status"] for row in accepted)
        assert all(row.reason for row in kept if row.state != "applied")
        latest = await world.engine.lora_runtime_ref(LORA)
        assert latest.version == next(row["version"] for row in reversed(rows) if row["status"] == "ok")
        refused = {row["code"] for row in rows if row["status"] == "refused"}
        assert {"missing_required_parameter", "invalid_value", "context_length_exceeded", "body_too_large"} <= refused


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_real_service_takes_them_with_a_model_that_knows_nothing(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The tiny random model: its replies are noise from the start, and yet every lesson has an end and a reason."""
    with running(tmp_path / "data", base_model=tiny_model_dir) as service:
        rows = [teach(service, "assistant", lesson, number) for number, lesson in enumerate(adversarial_lessons()[:24])]
        assert all(row["reason"] for row in rows if row["status"] != "ok"), rows
        assert all(row.get("http", 0) < 500 for row in rows), rows
        assert service.http.get("/v1/health").status_code == 200
        assert "Traceback" not in service.log()
