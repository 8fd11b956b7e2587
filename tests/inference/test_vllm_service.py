"""A whole service on a tiny model with vLLM's double in front: what becomes of a lesson when vLLM, or the service, fails in the middle."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from claas.models.base_model import LoadedModel
from claas.storage.models import FeedbackRow
from tests.doubles.vllm_script import voices
from tests.doubles.vllm_server import VllmDouble
from tests.inference.vllm_serving import in_order, sound_double
from tests.integration.process import Service, running

pytestmark = pytest.mark.integration

LESSON = {
    "gradient_steps": 1,
    "learning_rate": 1e-3,
    "min_signal": 0.0,
    "hindsight_rollouts": 0,
    "own_replies": True,
    "anchors": 0,
    "replay": 0,
}
LONG_LESSON = LESSON | {"gradient_steps": 64}


@pytest.fixture(name="double")
def _double(tiny_model: LoadedModel) -> Iterator[VllmDouble]:
    with sound_double(tiny_model.tokenizer) as server:
        yield server


@contextlib.contextmanager
def serving(double: VllmDouble, data: Path, model_dir: Path, **environment: str) -> Iterator[Service]:
    how = {"VLLM_BASE_URL": double.url, "CLAAS_VLLM_RELEASE": "sleep"} | environment
    with running(data, base_model=model_dir, **how) as service:
        yield service


def says(service: Service, model: str = "assistant") -> str:
    return str(service.chat("Who are you?", model, temperature=0, max_tokens=150)["choices"][0]["message"]["content"])


def teach(service: Service, training: dict[str, Any] = LESSON) -> httpx.Response:
    reply = service.chat("Who are you?", stop=["e"], max_tokens=150)
    assert reply["choices"][0]["finish_reason"] == "stop"
    return service.http.post(
        "/v1/feedback", json={"requests": [{"completion_id": reply["id"], "feedback": "Be brief.", "training": training}]}
    )


def applied(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "ok", answer.text
    return int(answer.json()["version"])


def lessons(data: Path) -> list[tuple[str, str]]:
    """Feedback and state of every lesson that was ever sent."""
    engine = create_engine(f"sqlite:///{data / 'claas.db'}")
    try:
        with Session(engine) as session:
            return [(row.feedback, row.state) for row in session.scalars(select(FeedbackRow).order_by(FeedbackRow.number))]
    finally:
        engine.dispose()


def asleep(double: VllmDouble) -> bool:
    return double.engine.is_sleeping


def wait_for(holds: Callable[[], bool], within_s: float = 30.0) -> None:
    give_up = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def test_a_lesson_takes_its_turn_and_the_reply_changes(double: VllmDouble, tmp_path: Path, tiny_model_dir: Path) -> None:
    with serving(double, tmp_path / "data", tiny_model_dir) as service:
        before = says(service)
        double.calls.clear()
        answer = teach(service)
        assert applied(answer) == 1
        assert answer.json()["vllm"] == {"slept": True, "woke": True}
        wanted = [
            "/pause mode=wait",
            "/sleep level=1 mode=wait",
            "/wake_up tags=weights",
            "/v1/load_lora_adapter claas-assistant-v1",
            "/wake_up",
        ]
        assert in_order(double.control_calls(), wanted)
        after = says(service)
        assert len(voices(before)) == len(voices(after)) == 1 and voices(before) != voices(after)
        assert says(service, "assistant@0") == before


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/sleep", "/pause"])
def test_a_lesson_that_vllm_does_not_let_through_is_kept_and_the_version_before_serves(
    path: str, double: VllmDouble, tmp_path: Path, tiny_model_dir: Path
) -> None:
    with serving(double, tmp_path / "data", tiny_model_dir) as service:
        before = says(service)
        fault = double.fail(path, "status", times=None)
        answer = teach(service)
        assert answer.status_code == 503, answer.text
        assert lessons(tmp_path / "data") == [("Be brief.", "failed")]
        assert says(service) == before
        assert service.get("/v1/lora/versions", lora_id="assistant")["latest"] == 0
        double.faults.remove(fault)
        assert applied(teach(service)) >= 1
        assert voices(says(service)) != voices(before)


def test_vllm_dies_while_the_lesson_trains(double: VllmDouble, tmp_path: Path, tiny_model_dir: Path) -> None:
    with serving(double, tmp_path / "data", tiny_model_dir) as service:
        before = says(service)
        double.fail("/sleep", "die_after")
        answers: list[httpx.Response] = []
        teaching = threading.Thread(target=lambda: answers.append(teach(service)))
        teaching.start()
        wait_for(lambda: not double.alive)
        double.restart()
        teaching.join()
        assert answers[0].status_code in (200, 503)
        wait_for(lambda: service.http.get("/v1/health").status_code == 200)
        assert says(service, "assistant@0") == before
        assert applied(teach(service)) >= 1


def test_the_service_is_killed_while_vllm_sleeps(double: VllmDouble, tmp_path: Path, tiny_model_dir: Path) -> None:
    """The next one finds it asleep and wakes it; the version before serves, and the lesson is written down."""
    data = tmp_path / "data"
    with serving(double, data, tiny_model_dir) as service:
        before = says(service)
        teaching = threading.Thread(target=lambda: _quietly(lambda: teach(service, LONG_LESSON)))
        teaching.start()
        wait_for(lambda: bool(double.engine.asleep))
        service.kill()
        teaching.join()
        assert asleep(double)
    with serving(double, data, tiny_model_dir) as service:
        assert not asleep(double)
        assert says(service) == before
        assert lessons(data) == [("Be brief.", "failed")]
        assert applied(teach(service)) >= 1


def test_the_service_is_stopped_while_vllm_sleeps(double: VllmDouble, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Asked to end, it does not leave vLLM asleep behind it."""
    with serving(double, tmp_path / "data", tiny_model_dir) as service:
        teaching = threading.Thread(target=lambda: _quietly(lambda: teach(service, LONG_LESSON)))
        teaching.start()
        wait_for(lambda: bool(double.engine.asleep))
        service.process.send_signal(signal.SIGTERM)
        service.process.wait(60)
        teaching.join()
        assert not asleep(double), service.log()


def _quietly(work: Callable[[], object]) -> None:
    with contextlib.suppress(httpx.TransportError):  # the service is ended under us
        work()
