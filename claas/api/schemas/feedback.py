"""`/v1/feedback`: the upstream body, and completion ids in place of prompt and response."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, JsonValue, StringConstraints, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from claas.api.schemas.base import AdapterId, OpaqueId, WireRequest, missing, unsupported
from claas.core.types import DistillResponse, Rating, RoomPlan, TrainingConfig
from claas.learning.types import FeedbackItem, LessonResult, Shown

MAX_FEEDBACK_CHARS = 8000
MAX_DEMONSTRATION_CHARS = 32_000
TIMINGS = ("sleep", "distill", "save", "wake", "logprobs", "total")

FeedbackText = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_FEEDBACK_CHARS)]
DemonstrationText = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_DEMONSTRATION_CHARS)]


def _whole_number(value: Any) -> Any:
    if type(value) is not int:  # True and 1.0 equal 1
        raise PydanticCustomError("int_type", "Input should be 1 or -1")
    return value


class FeedbackEntry(WireRequest):
    """What was wrong or right with one reply, named by `completion_id`, or by `lora_id`, `prompt` (the last user turn) and `response`.

    At least one of `feedback` (in words), `rating` (1: good, -1: bad) and `demonstration` (the reply that was wanted); a rating beside one
    of the others is kept, and they are what is learnt. `training` overrides the adapter's lesson settings, field by field. The same
    `idempotency_key` twice is one lesson.
    """

    rating: Annotated[Rating, BeforeValidator(_whole_number)] | None = None
    demonstration: DemonstrationText | None = None
    feedback: FeedbackText | None = Field(default=None, validate_default=True)  # after the other two, which it looks at
    completion_id: OpaqueId | None = None
    lora_id: AdapterId | None = None
    prompt: str | None = None
    response: str | None = None
    training: TrainingConfig = TrainingConfig()
    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    idempotency_key: OpaqueId | None = None

    @field_validator("feedback")
    @classmethod
    def _says_something(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("rating") is None and info.data.get("demonstration") is None:
            raise missing("is missing: send 'feedback', 'rating' or 'demonstration'")
        return value

    @model_validator(mode="after")
    def _names_one_reply(self) -> Self:
        spelled = {"lora_id": self.lora_id, "prompt": self.prompt, "response": self.response}
        missing = [name for name, value in spelled.items() if value is None]
        if self.completion_id is None and missing:
            raise ValueError(f"name the reply by 'completion_id', or by 'lora_id', 'prompt' and 'response' ({missing[0]!r} is missing)")
        if self.completion_id is not None and (self.prompt is not None or self.response is not None):
            raise ValueError("name the reply once: by 'completion_id', or by 'prompt' and 'response'")
        return self

    def to_core(self) -> FeedbackItem:
        return FeedbackItem(
            feedback=self.feedback or "",
            rating=self.rating,
            demonstration=self.demonstration,
            completion_id=self.completion_id,
            lora_id=self.lora_id,
            prompt=self.prompt,
            response=self.response,
            training=self.training.model_dump(exclude_unset=True),
            metadata=self.metadata,
            idempotency_key=self.idempotency_key,
        )


def _refuse_but(allowed: JsonValue, why: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value != allowed or isinstance(value, bool) != isinstance(allowed, bool):
            raise unsupported(why)
        return value

    return BeforeValidator(check)


_never_left_asleep = _refuse_but(True, "can only be true: a serving engine that is left asleep would answer nobody")
_weights_kept = _refuse_but(1, "can only be 1: at level 2 the serving engine would lose its weights")


class Orchestration(WireRequest):
    """How a serving engine on the trainer's GPU makes room for a step; without one this has no effect.

    `sleep_before` false trains beside it. It is always woken, and never forgets its weights: the other values of upstream are refused.
    """

    sleep_before: bool = True
    wake_after: Annotated[Literal[True], _never_left_asleep] = True
    wake_on_failure: Annotated[Literal[True], _never_left_asleep] = True
    sleep_level: Annotated[Literal[1], _weights_kept] = 1

    def to_core(self) -> RoomPlan:
        return RoomPlan(sleep_before=self.sleep_before)


class FeedbackRequest(WireRequest):
    """One lesson: all entries are learnt in one step, so they are about one adapter. `show` asks for new replies to the same prompts."""

    requests: Annotated[list[FeedbackEntry], Field(min_length=1, max_length=64)]
    orchestration: Orchestration = Orchestration()
    wait: bool = True
    show: bool = False

    @field_validator("wait")
    @classmethod
    def _synchronous(cls, value: bool) -> bool:
        if not value:
            raise unsupported("cannot be false: asynchronous feedback is not available yet")
        return value


class VllmState(BaseModel):
    slept: bool = False
    woke: bool = False


class FeedbackResponse(BaseModel):
    """What came of the lesson. `version` is the one that serves now, `distill_result.metadata` the step's own report.

    `contradicts` are versions that were taught something else: the newer lesson wins, what they taught of it is no longer rehearsed.

    `status` is "ok" for a step that was applied; "skipped" and "undone" changed nothing and give their `reason`.
    """

    status: Literal["ok", "skipped", "undone"]
    reason: str | None
    request_id: str
    lora_id: str
    version: int
    contradicts: list[int]
    feedback_ids: list[str]
    distill_result: DistillResponse
    vllm: VllmState
    feedback_log_path: str
    timing_ms: dict[str, int]
    batch_size: int
    shown: list[Shown]

    @classmethod
    def from_core(cls, result: LessonResult) -> Self:
        return cls(
            status="ok" if result.outcome == "applied" else result.outcome,
            reason=result.reason,
            request_id=result.request_id,
            lora_id=result.lora_id,
            version=result.version,
            contradicts=result.distill_result.metadata.get("contradicts", []),
            feedback_ids=list(result.feedback_ids),
            distill_result=result.distill_result,
            vllm=VllmState.model_validate(result.distill_result.metadata.get("room", {})),
            feedback_log_path=result.log_path,
            timing_ms=dict.fromkeys(TIMINGS, 0) | result.timing_ms,
            batch_size=result.batch_size,
            shown=list(result.shown),
        )
