"""`kill -9` at random moments of a lesson: nothing that was stored is lost, nothing half written is seen."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load_file
from sqlalchemy import create_engine, select
from sqlalchemy import text as sql
from sqlalchemy.orm import Session

from claas.adapters.store import CONFIG, MANIFEST, OPTIMIZER, WEIGHTS
from claas.storage.models import FeedbackRow, RolloutRow
from tests.integration.process import Service, running

KILLS = 20
LESSON = {
    "gradient_steps": 40,
    "learning_rate": 1e-3,
    "min_signal": 0.0,
    "hindsight_rollouts": 2,
    "own_replies": True,
    "anchors": 2,
    "imagined_prompts": 0,
}


def teach_in_background(service: Service, completion_id: str, text: str) -> threading.Thread:
    def teach() -> None:
        body = {"requests": [{"completion_id": completion_id, "feedback": text, "training": LESSON}]}
        with contextlib.suppress(httpx.TransportError):  # it is killed under us: that is the point
            httpx.post(f"{service.url}/v1/feedback", json=body, timeout=60)

    thread = threading.Thread(target=teach)
    thread.start()
    return thread


def check_versions(adapter: Path, listed: dict[str, Any]) -> None:
    """Every version that can be seen is whole, and no leftover lies beside them."""
    numbers = {version["version"] for version in listed["versions"]}
    assert listed["latest"] in numbers
    assert {path.name for path in adapter.iterdir() if path.is_dir()} == {f"v{number}" for number in numbers}
    for number in numbers:
        folder = adapter / f"v{number}"
        assert json.loads((folder / MANIFEST).read_text())["version"] == number
        json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
        assert weights and all(tensor.size for tensor in weights.values())
        if number:
            assert len(load_file(folder / OPTIMIZER)) == 3 * len(weights)


def stored(data: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Rollouts (id to text) and feedback (id to text) as the database has them."""
    engine = create_engine(f"sqlite:///{data / 'claas.db'}")
    try:
        with Session(engine) as session:
            assert session.execute(sql("PRAGMA integrity_check")).scalar() == "ok"
            rollouts = {row.id: row.text for row in session.scalars(select(RolloutRow))}
            return rollouts, {row.id: row.feedback for row in session.scalars(select(FeedbackRow))}
    finally:
        engine.dispose()


def check_nothing_hangs(service: Service, listed: dict[str, Any], feedback_ids: Iterable[str]) -> int:
    """Every lesson has ended, applied ones have their version. Returns how many were applied."""
    rows = [service.get(f"/v1/feedback/{feedback_id}") for feedback_id in feedback_ids]
    assert all(row["state"] in ("applied", "failed") for row in rows)
    numbers = {version["version"] for version in listed["versions"]}
    applied = [row for row in rows if row["state"] == "applied"]
    assert all(row["version"] in numbers for row in applied)
    return len(applied)


@pytest.mark.integration
@pytest.mark.timeout(1500)
def test_twenty_kills_in_mid_lesson(tmp_path: Path, tiny_model_dir: Path) -> None:
    moments = random.Random(2026)
    data = tmp_path / "data"
    rollouts: dict[str, str] = {}
    feedback: dict[str, str] = {}
    latest, lesson_s = 0, 2.0
    for kill in range(KILLS):
        with running(data, base_model=tiny_model_dir, CLAAS_KEEP_VERSIONS="100") as service:
            found_rollouts, found_feedback = stored(data)
            assert rollouts.items() <= found_rollouts.items(), "every reply that was answered is still there"
            assert feedback.items() <= found_feedback.items(), "every feedback that was stored is still there"
            feedback = found_feedback
            listed = service.get("/v1/lora/versions", lora_id="assistant")
            assert listed["latest"] >= latest, "the last published version serves"
            latest = listed["latest"]
            check_versions(data / "adapters" / "assistant", listed)
            check_nothing_hangs(service, listed, feedback)

            # An untrained model never ends its reply by itself; a stop string does, and such a reply can be learnt from.
            reply = service.chat(f"Question {kill}?", max_tokens=200, stop=["a", "e", "o", "t"], seed=kill)
            assert reply["choices"][0]["finish_reason"] == "stop"
            rollouts[reply["id"]] = reply["choices"][0]["message"]["content"]
            if kill == 0:  # one lesson in peace tells how long one takes
                began = time.monotonic()
                teach_in_background(service, reply["id"], "Lesson in peace").join()
                lesson_s = time.monotonic() - began
            teaching = teach_in_background(service, reply["id"], f"Lesson {kill}")
            time.sleep(moments.uniform(0.0, 1.2 * lesson_s))
            service.kill()
            teaching.join()
            feedback = stored(data)[1]
    with running(data, base_model=tiny_model_dir, CLAAS_KEEP_VERSIONS="100") as service:
        listed = service.get("/v1/lora/versions", lora_id="assistant")
        check_versions(data / "adapters" / "assistant", listed)
        applied = check_nothing_hangs(service, listed, feedback)
        assert rollouts.items() <= stored(data)[0].items()
        assert len(feedback) > KILLS // 2, "the kills came in mid-lesson, not before"
        assert 0 < applied < len(feedback), "some lessons were finished and some were cut"
