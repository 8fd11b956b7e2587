"""`/v1/completions`: plain text in, plain text on. Its replies have no conversation, so they are kept but cannot be taught."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, JsonValue, WithJsonSchema

from claas.api.schemas.base import SamplingRequest, Usage, only
from claas.core.types import FinishReason


def _one_prompt(value: Any) -> Any:
    match value:
        case [str(text)]:
            return text
        case list():
            raise ValueError("send one text (or a list of one text); lists of prompts and token ids are not supported by this service")
        case _:
            return value


_ONE_TEXT = {"type": "string", "minLength": 1}
_PROMPT_SCHEMA = {"anyOf": [_ONE_TEXT, {"type": "array", "items": _ONE_TEXT, "minItems": 1, "maxItems": 1}]}


class CompletionRequest(SamplingRequest):
    """OpenAI's request. Replies are kept as for chats."""

    prompt: Annotated[str, Field(min_length=1), BeforeValidator(_one_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Annotated[JsonValue, only(False)] = None
    suffix: Annotated[JsonValue, only("")] = None
    best_of: Annotated[JsonValue, only(1)] = None


class TextLogprobs(BaseModel):
    """Parallel lists, one entry for each sampled token; offsets count characters of the reply's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
