"""Feedback and rollout → a payload to train on. Every mismatch fails here, before any lock is taken or anything is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from claas.core.errors import BadRequest, Unteachable
from claas.core.types import DistillBatchItem, DistillBatchRequestPayload, Rollout, TrainingConfig
from claas.learning.types import FeedbackItem, LessonRequest
from claas.rollouts.store import RolloutStore
from claas.training.hindsight import DISLIKED

FINISH_TROUBLES = {
    "length": "was cut off at its token limit: ask again with a larger max_tokens and give feedback on that reply",
    "abort": "was aborted before it ended: ask again and give feedback on that reply",
}


@dataclass(frozen=True, slots=True)
class ResolvedLesson:
    """One adapter's lesson: the replies it is about, one for each item, and how to train."""

    request: LessonRequest
    lora_id: str
    rollouts: tuple[Rollout, ...]
    training: TrainingConfig

    def payload(self, feedback_ids: tuple[str, ...]) -> DistillBatchRequestPayload:
        """The lesson as the engine takes it, with the replies as served."""
        return DistillBatchRequestPayload(
            lora_id=self.lora_id,
            training=self.training,
            samples=[
                _sample(item, rollout).model_copy(update={"feedback_id": feedback_id})
                for item, rollout, feedback_id in zip(self.request.items, self.rollouts, feedback_ids, strict=True)
            ],
            feedback_ids=feedback_ids,
        )


async def resolve(request: LessonRequest, rollouts: RolloutStore, base_model_id: str, defaults: TrainingConfig) -> ResolvedLesson:
    """Find each item's rollout and check that the lesson can be taught.

    Raises:
        NotFound: an unknown completion id, or no reply with that prompt and response.
        Conflict: prompt and response fit several different replies.
        BadRequest: items for different adapters or with different training settings, or a wrong training setting.
        Unteachable: the reply was cut off or aborted, is the base model's, of another adapter or base model, or has no messages or text.
    """
    found = tuple([await _rollout(item, at, rollouts, base_model_id) for at, item in enumerate(request.items)])
    lora_ids = {rollout.lora_id for rollout in found if rollout.lora_id is not None}
    if len(lora_ids) > 1:
        raise BadRequest(
            f"one request teaches one adapter, these replies are of {sorted(lora_ids)}: send one request for each", param="requests"
        )
    if any(item.training != request.items[0].training for item in request.items):
        raise BadRequest("all items of a request are one step: give them the same training settings", param="requests.1.training")
    return ResolvedLesson(request, lora_ids.pop(), found, _training(defaults, request.items[0].training))


async def _rollout(item: FeedbackItem, at: int, rollouts: RolloutStore, base_model_id: str) -> Rollout:
    if item.completion_id is not None:
        rollout = await rollouts.get(item.completion_id)
    elif item.lora_id is not None and item.prompt is not None and item.response is not None:
        rollout = await rollouts.find(item.lora_id, item.prompt, item.response)
    else:
        raise BadRequest("name the reply: completion_id, or lora_id, prompt and response", param=f"requests.{at}.completion_id")
    if trouble := _trouble(rollout, item, base_model_id):
        raise Unteachable(f"reply {rollout.id!r} {trouble}", param=f"requests.{at}")
    return rollout


def _trouble(rollout: Rollout, item: FeedbackItem, base_model_id: str) -> str | None:
    """Why this reply cannot be learnt from; None if it can."""
    if rollout.lora_id is None:
        return f"came from the base model {rollout.base_model!r}, which does not learn: chat with an adapter as `model`"
    if item.lora_id is not None and item.lora_id != rollout.lora_id:
        return f"is of adapter {rollout.lora_id!r}, not {item.lora_id!r}"
    if rollout.base_model != base_model_id:
        return f"was sampled on base model {rollout.base_model!r}, and {base_model_id!r} is served now"
    if rollout.finish_reason in FINISH_TROUBLES:
        return FINISH_TROUBLES[rollout.finish_reason]
    if not rollout.response_token_ids:
        return "is empty"
    if not any(message.role == "user" for message in rollout.messages):
        return "has no user message: only chat completions can be learnt from"
    if item.rating == 1 and not (item.feedback or item.demonstration):
        if rollout.finish_reason == "tool_calls":
            return "ends in tool calls, which a good rating cannot keep: say in words what was good about it"
        if not rollout.text.strip():
            return "shows no text, so a good rating has nothing to keep"
    return None


def _hindsight(item: FeedbackItem, rollout: Rollout) -> tuple[str, str | None]:
    """Feedback and demonstration as the teacher is shown them. A rating speaks where nothing else does: a good reply shows itself."""
    if item.feedback or item.demonstration:
        return item.feedback, item.demonstration
    return ("", rollout.text) if item.rating == 1 else (DISLIKED, None)


def _sample(item: FeedbackItem, rollout: Rollout) -> DistillBatchItem:
    feedback, demonstration = _hindsight(item, rollout)
    return DistillBatchItem(
        prompt=rollout.prompt,
        response=rollout.text,
        feedback=feedback,
        demonstration=demonstration,
        response_logprobs=rollout.response_logprobs,
        prompt_token_ids=rollout.prompt_token_ids,
        response_token_ids=rollout.response_token_ids,
        messages=rollout.messages,
        template_kwargs=rollout.template_kwargs,
        version=None if rollout.sampling.constrained else rollout.version,
        completion_id=rollout.id,
    )


def _training(defaults: TrainingConfig, overrides: dict[str, Any]) -> TrainingConfig:
    try:
        return TrainingConfig.model_validate(defaults.model_dump() | overrides)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"training.{field}: {first['msg']}", param=f"requests.0.training.{field}") from error
