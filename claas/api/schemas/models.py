"""`/v1/models` and `/v1/score`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from claas.api.schemas.base import TemplateKwargs, WireRequest
from claas.api.schemas.messages import Messages


class ModelCard(BaseModel):
    """Something a request's `model` may name. `created` is when this service began to offer it, in Unix seconds."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["claas"] = "claas"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ScoreRequest(WireRequest):
    """How likely is `completion` as the reply to `messages`?"""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: Messages
    completion: Annotated[str, Field(min_length=1)]
    chat_template_kwargs: TemplateKwargs | None = None


class ScoreResponse(BaseModel):
    """Logprobs in nats, one for each of the completion's tokens, and their sum."""

    model: str
    prompt_tokens: int
    completion_tokens: int
    tokens: list[str]
    token_ids: list[int]
    logprobs: list[float]
    logprob_sum: float
