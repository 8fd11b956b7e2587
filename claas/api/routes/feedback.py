"""`/v1/feedback`: what the user said of a reply, made into a lesson."""

from __future__ import annotations

import uuid

from fastapi import APIRouter

from claas.api.deps import ServicesDep
from claas.api.schemas.base import OpaqueId
from claas.api.schemas.feedback import FeedbackRequest, FeedbackResponse
from claas.core.types import Feedback
from claas.learning.types import LessonRequest

router = APIRouter(tags=["feedback"])


@router.post("/v1/feedback", summary="Teach: say what was wrong or right with a reply")
async def give_feedback(body: FeedbackRequest, services: ServicesDep) -> FeedbackResponse:
    """Answers when the step is done. A client that leaves before does not stop it: `GET /v1/feedback/{id}` tells what came of it."""
    lesson = LessonRequest(
        request_id=f"lesson-{uuid.uuid4().hex}",
        items=tuple(entry.to_core() for entry in body.requests),
        show=body.show,
        room=body.orchestration.to_core(),
    )
    return FeedbackResponse.from_core(await services.learner.learn(lesson))


@router.get("/v1/feedback/{feedback_id}", summary="Where one feedback item stands")
async def get_feedback(feedback_id: OpaqueId, services: ServicesDep) -> Feedback:
    """Its state, the version it made, and the reason if it made none."""
    return await services.feedback.get(feedback_id)


@router.delete("/v1/feedback/{feedback_id}", status_code=202, summary="Retract a lesson")
async def retract_feedback(feedback_id: OpaqueId, services: ServicesDep) -> Feedback:
    """Rebuilds the adapter without this feedback, in the background, while the version in service serves on.

    The lesson's later siblings are taught again in order. `GET /v1/feedback/{id}` says "retracted" when the rebuilt version serves.
    """
    return await services.retraction.begin(feedback_id)
