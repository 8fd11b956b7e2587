"""What service and worker say to each other: errors come back as what they were, and another version is told, whoever is older."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from claas.core.errors import (
    BackendUnavailable,
    BadRequest,
    ClaasError,
    ConfigurationError,
    ContextOverflow,
    NotFound,
    StepFailed,
    StorageFull,
    Unteachable,
)
from claas.core.modal_prices import price_per_second
from claas.core.settings import Settings
from claas.core.types import DistillBatchRequestPayload
from claas.core.usage import count_machine, metered
from claas.training.engine.modal_wire import (
    GIVEN_UP,
    OTHER_VERSION,
    SCHEMA,
    Answer,
    LessonCall,
    WorkerFacts,
    encode,
    raised,
    read_answer,
    read_call,
    sign_of,
    told,
)
from claas.training.engine.modal_worker import Worker
from tests.models.tiny import save_tiny_model
from tests.on_modal.lessons import A, lesson

FACTS = WorkerFacts(seconds=1.5, gpu="H100", device="cuda:0", cold=True, started_at="then")
OURS = [
    BadRequest("bad", param="training.alpha"), ContextOverflow("too long"), NotFound("none", param="version"), Unteachable("no"),
    StepFailed("broke"), StorageFull("full"), BackendUnavailable("down"),
]  # fmt: skip


@pytest.mark.parametrize("error", OURS, ids=lambda error: type(error).__name__)
def test_an_error_of_ours_is_what_it_was(error: ClaasError) -> None:
    read = read_answer(encode(Answer(error=told(error), worker=FACTS)))
    assert read.error is not None
    again = raised(read.error)
    assert (type(again), again.message, again.param) == (type(error), error.message, error.param)


def test_an_error_that_is_not_ours_says_its_type_and_no_path() -> None:
    error = raised(told(OSError("/a/secret/path is gone")))
    assert isinstance(error, StepFailed)
    assert "OSError" in error.message and "secret" not in error.message and "claas modal logs-hint" in error.message


def test_a_kind_that_this_version_does_not_know_is_a_step_that_failed() -> None:
    error = raised(told(ConfigurationError("odd")))
    assert (type(error), error.message) == (StepFailed, "odd")


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(encode(Answer(error=told(NotFound("none")), worker=FACTS))), **fields})


@pytest.mark.parametrize(
    "text",
    [changed(schema=SCHEMA + 1), changed(schema=None), changed(news="of a later version"), changed(error=None), "", "null", "[]", "{}"],
    ids=["later", "none", "field", "neither", "empty", "null", "list", "object"],
)
def test_what_another_version_says_is_not_guessed(text: str) -> None:
    for read in (read_answer, read_call):
        with pytest.raises(BackendUnavailable) as caught:
            read(text)
        assert caught.value.message == OTHER_VERSION and "claas modal deploy" in OTHER_VERSION


class Signs(dict[str, str]):
    def put(self, key: str, value: str) -> None:
        self[key] = value


@pytest.fixture(name="worker")
def _worker(tmp_path: Path) -> Worker:
    """Of another deployment than the service's: the GPU that it was deployed with is its own."""
    settings = Settings(
        distill_execution_mode="modal", modal_serving="embedded", base_model_id=str(save_tiny_model(tmp_path / "tiny")), dtype="float32",
        device="cpu", modal_gpu="H100", modal_volume_path=PurePosixPath(tmp_path / "adapters"),
    )  # fmt: skip
    worker = Worker(settings, None, Signs())
    worker.start()
    return worker


def answered(worker: Worker, text: str) -> Answer:
    answer = read_answer(worker.distill(text))
    assert answer.error is not None and answer.report is None
    return answer


def call(payload: DistillBatchRequestPayload, base_model: str = "tiny") -> str:
    return encode(LessonCall(call="one", base_model=base_model, payload=payload))


def test_what_a_worker_refuses(worker: Worker) -> None:
    other = answered(worker, json.dumps({**json.loads(call(lesson())), "schema": 99}))
    assert other.error is not None and other.error.message == OTHER_VERSION
    model = answered(worker, call(lesson(), base_model="gpt-4"))
    assert model.error is not None and "'gpt-4'" in model.error.message and "claas modal deploy" in model.error.message
    nobody = answered(worker, call(lesson()))
    assert nobody.error is not None and (nobody.error.kind, nobody.error.param) == ("NotFound", "lora_id") and A in nobody.error.message
    assert (nobody.worker.gpu, nobody.worker.cold) == ("H100", False)


def test_a_lesson_that_was_given_up_is_not_begun(worker: Worker) -> None:
    signs = Signs({sign_of("one"): GIVEN_UP})
    again = Worker(worker._settings, None, signs)
    again.start()
    answer = answered(again, call(lesson()))
    assert answer.error is not None and "given up" in answer.error.message
    assert signs == {sign_of("one"): GIVEN_UP}


def test_what_a_second_costs() -> None:
    settings = Settings(modal_prices={"L40S": 0.5, "MI300": 1.0})
    prices = [price_per_second(settings, gpu) for gpu in ("L40S", "l40s:2", "H100!", "A100", "MI300", "GTX", "H100:many")]
    assert prices == [0.5, 1.0, 0.001097, 0.000583, 1.0, None, None]
    with metered() as usage:
        count_machine("L40S", 2.0, 0.5)
        count_machine("L40S", 1.0, 0.5)
    assert usage.anything and usage.told() == {"gpu_seconds": {"L40S": 3.0}, "price": 1.5}
    with metered() as usage:
        count_machine("GTX", 2.0, None)
    assert usage.told() == {"gpu_seconds": {"GTX": 2.0}, "price": None}
