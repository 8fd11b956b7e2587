"""What service and worker say to each other: JSON with the number of its schema, so that another version of either is told, not guessed.

It knows no SDK and no engine. Errors of ours travel as kind and message, and are raised again as what they were.
"""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import JsonValue, ValidationError

from claas import __version__
from claas.core.errors import (
    BackendUnavailable,
    BadRequest,
    ClaasError,
    Conflict,
    ContextOverflow,
    NotFound,
    StepFailed,
    StorageFull,
    TooLarge,
    Unteachable,
)
from claas.core.settings import Settings
from claas.core.types import DistillBatchRequestPayload, Frozen
from claas.models.default_model import DEFAULT_MODEL_ID

T = TypeVar("T", bound=Frozen)

SCHEMA = 2
VOLUME_VERSION = 2
"""Of the Volumes: version 1 is for few files and a handful of writers at once."""
OTHER_VERSION = "the worker on Modal was deployed by another version of CLaaS: run `claas modal deploy`"
GIVEN_UP = "given up"
_KINDS: dict[str, type[ClaasError]] = {
    kind.__name__: kind
    for kind in (BackendUnavailable, BadRequest, Conflict, ContextOverflow, NotFound, StepFailed, StorageFull, TooLarge, Unteachable)
}
_WITH_PARAM = (BadRequest, Conflict, NotFound)
_TAG_LENGTH = 63  # what Modal allows


class LessonCall(Frozen):
    """A lesson for the worker. `call` names it among the signs of life; `base_model` is what the service takes the worker's to be."""

    call: str
    base_model: str
    payload: DistillBatchRequestPayload


class WorkerFacts(Frozen):
    """What the worker says of itself. `seconds`: how long it was at this lesson; `gpu`: what it was deployed with, and is paid for."""

    seconds: float
    gpu: str
    device: str
    cold: bool
    started_at: str


class RemoteError(Frozen):
    """An error of the worker's: its class among ours, and what it says."""

    kind: str
    message: str
    param: str | None = None


class Answer(Frozen):
    """Either a `StepReport` as JSON, or why there is none."""

    report: dict[str, JsonValue] | None = None
    error: RemoteError | None = None
    worker: WorkerFacts


def encode(message: Frozen) -> str:
    """The message with its schema and the version of who sends it."""
    return json.dumps({"schema": SCHEMA, "claas": __version__, **message.model_dump(mode="json")})


def read_call(text: str) -> LessonCall:
    """Raises BackendUnavailable for one of another version."""
    return _read(text, LessonCall)


def read_answer(text: str) -> Answer:
    """Raises BackendUnavailable for one of another version."""
    answer = _read(text, Answer)
    if answer.report is None and answer.error is None:
        raise BackendUnavailable(OTHER_VERSION)
    return answer


def _read(text: str, kind: type[T]) -> T:
    try:
        said: dict[str, Any] = json.loads(text)
        schema = said.pop("schema")
        said.pop("claas")
        if schema == SCHEMA:
            return kind.model_validate_json(json.dumps(said))
    except (ValueError, LookupError, AttributeError, TypeError, ValidationError) as error:
        raise BackendUnavailable(OTHER_VERSION) from error
    raise BackendUnavailable(OTHER_VERSION)


def told(error: Exception) -> RemoteError:
    """An error as it travels. Of one that is not ours only the type: its words may hold paths."""
    if isinstance(error, ClaasError):
        kind = next((name for name in _KINDS if name == type(error).__name__), StepFailed.__name__)
        return RemoteError(kind=kind, message=error.message, param=error.param)
    return RemoteError(
        kind=StepFailed.__name__,
        message=f"the learning step broke on Modal ({type(error).__name__}): the version before it still serves; see the app's logs with "
        "`claas modal logs-hint`",
    )


def raised(error: RemoteError) -> ClaasError:
    """The error as it was, or as a StepFailed where this version knows none of that name."""
    kind = _KINDS.get(error.kind, StepFailed)
    return kind(error.message, param=error.param) if issubclass(kind, _WITH_PARAM) else kind(error.message)


def sign_of(call: str) -> str:
    """The key in the app's Dict under which a lesson's worker says that it has begun, and the service that it has given up."""
    return f"begun/{call}"


def tags_of(settings: Settings) -> dict[str, str]:
    """What a deployment tells of itself without a container: the versions, and the settings that lessons depend on."""
    told = {
        "claas": __version__,
        "schema": str(SCHEMA),
        "model": settings.modal_base_model or DEFAULT_MODEL_ID,
        "gpu": settings.modal_gpu,
        "serving": settings.modal_serving,
    }
    return {name: re.sub(r"[^A-Za-z0-9._-]", "_", value)[-_TAG_LENGTH:] for name, value in told.items()}
