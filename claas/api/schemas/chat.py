"""`/v1/chat/completions`: every field of OpenAI's documentation is known here, those that cannot be honoured included."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    JsonValue,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from claas.api.schemas.base import SamplingRequest, TemplateKwargs, Usage, WireRequest, only, unsupported
from claas.core.types import ChatMessage, FinishReason


def _known_role(value: Any) -> Any:
    if value in ("tool", "function"):
        raise unsupported(f"cannot be {value!r}: tools are not supported by this service")
    return value


def _join_parts(value: Any) -> Any:
    """Content parts become one text, a line break between them."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in value:
        match part:
            case {"type": "text", "text": str(text), **rest} if not rest:
                texts.append(text)
            case {"type": str(kind)} if kind != "text":
                raise unsupported(f"holds a part of type {kind[:64]!r}: only text is supported by this service")
            case _:
                raise ValueError('every part must be {"type": "text", "text": "…"}')
    if not texts:
        raise ValueError("the list of parts is empty")
    return "\n".join(texts)


_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
                "additionalProperties": False,
            },
        },
    ]
}


class WireMessage(WireRequest):
    """One turn. An answer's `message` can be sent back as it came: the fields that are null there may be null here."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_known_role)]
    tool_calls: Annotated[JsonValue, only([])] = None
    tool_call_id: Annotated[JsonValue, only()] = None
    function_call: Annotated[JsonValue, only()] = None
    audio: Annotated[JsonValue, only()] = None
    refusal: Annotated[JsonValue, only()] = None
    annotations: Annotated[JsonValue, only([])] = None
    name: Annotated[str, StringConstraints(pattern=r"^[^\s<|\\/>]{1,64}$")] | None = None
    content: Annotated[str, BeforeValidator(_join_parts), WithJsonSchema(_CONTENT_SCHEMA)]

    def to_core(self) -> ChatMessage:
        return ChatMessage(role=self.role, content=self.content, name=self.name)


def _answerable(messages: list[WireMessage]) -> list[WireMessage]:
    if messages[-1].role == "assistant":
        raise ValueError("the last message is the assistant's: end with the turn that is to be answered")
    return messages


Messages = Annotated[list[WireMessage], Field(min_length=1, max_length=2048), AfterValidator(_answerable)]
MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class ChatCompletionRequest(SamplingRequest):
    """OpenAI's request. The first reply is kept under the answer's `id`, the i-th further one of `n` under `id:i`.

    Replies are always kept (bounded by age and count), whatever `store` says: feedback needs them.
    """

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    # Accepted, and without effect on the reply, as documented.
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    store: bool | None = None
    parallel_tool_calls: bool | None = None

    # Documented, and not supported: only what asks for nothing is accepted.
    tools: Annotated[JsonValue, only([])] = None
    tool_choice: Annotated[JsonValue, only("none")] = None
    functions: Annotated[JsonValue, only([])] = None
    function_call: Annotated[JsonValue, only("none")] = None
    response_format: Annotated[JsonValue, only({"type": "text"})] = None
    modalities: Annotated[JsonValue, only(["text"])] = None
    audio: Annotated[JsonValue, only()] = None
    prediction: Annotated[JsonValue, only()] = None
    reasoning_effort: Annotated[JsonValue, only("none")] = None
    verbosity: Annotated[JsonValue, only("medium")] = None
    service_tier: Annotated[JsonValue, only("auto", "default")] = None
    web_search_options: Annotated[JsonValue, only()] = None
    moderation: Annotated[JsonValue, only()] = None
    prompt_cache_options: Annotated[JsonValue, only()] = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise ValueError("it contradicts 'max_tokens': send one of them")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("it may be sent only with 'logprobs': true")
        return value


class TopLogprob(BaseModel):
    """One candidate token. `logprob` is in nats; -9999 stands for minus infinity, as at OpenAI."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """One sampled token. Every token is listed, those that end the reply and show no text included."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """`finish_reason` is the true one: "abort" says that the service ended the reply."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """A whole answer. `id` names the reply in `/v1/feedback`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a stream. `usage` is there only when it was asked for: null until the last chunk."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
