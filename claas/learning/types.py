"""What a lesson is before it is resolved, and what came of it."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, JsonValue, model_validator

from claas.core.types import DistillResponse, Frozen, Rating, RoomPlan, StepOutcome


class FeedbackItem(Frozen):
    """One feedback as it arrives: what was said (at least one of `feedback`, `rating` and `demonstration`), and which reply it is about.

    The reply is named by `completion_id` or, as in the upstream API, by `lora_id`, `prompt` (last user turn) and `response` (visible text).
    """

    feedback: str = ""
    rating: Rating | None = None
    demonstration: str | None = None
    completion_id: str | None = None
    lora_id: str | None = None
    prompt: str | None = None
    response: str | None = None
    training: dict[str, Any] = {}
    metadata: dict[str, JsonValue] = {}
    idempotency_key: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.feedback and not self.demonstration and self.rating is None:
            raise ValueError("feedback, rating and demonstration are all empty")
        return self


class LessonRequest(Frozen):
    """All feedback of one request: one step, so one adapter."""

    request_id: str
    items: tuple[FeedbackItem, ...] = Field(min_length=1)
    show: bool = False
    room: RoomPlan = RoomPlan()


class Shown(Frozen):
    """A new reply to a prompt of the lesson, sampled from the version that now serves."""

    completion_id: str
    prompt: str
    before: str
    after: str


class LessonResult(Frozen):
    """What the learner did. `version` is the one that serves now; `log_path` is relative to the log folder."""

    request_id: str
    lora_id: str
    outcome: StepOutcome
    reason: str | None
    parent: int
    version: int
    feedback_ids: tuple[str, ...]
    distill_result: DistillResponse
    timing_ms: dict[str, int]
    batch_size: int
    log_path: str
    shown: tuple[Shown, ...] = ()
