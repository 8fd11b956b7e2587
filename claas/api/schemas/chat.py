"""`/v1/chat/completions`: every field of OpenAI's documentation is known here, those that cannot be honoured included."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from pydantic import BaseModel, Field, JsonValue, StringConstraints, ValidationInfo, field_validator

from claas.api.schemas.base import SamplingRequest, TemplateKwargs, Usage, only
from claas.api.schemas.messages import Messages
from claas.api.schemas.tools import MadeToolCall, ResponseFormat, ToolChoice, Tools
from claas.core.types import FinishReason

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
    tools: Tools | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    # Accepted, and without effect on the reply, as documented.
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    store: bool | None = None

    # Documented, and not supported: only what asks for nothing is accepted.
    functions: Annotated[JsonValue, only([])] = None
    function_call: Annotated[JsonValue, only("none")] = None
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

    @field_validator("chat_template_kwargs")
    @classmethod
    def _tools_stand_once(cls, value: TemplateKwargs | None, info: ValidationInfo) -> TemplateKwargs | None:
        if value and "tools" in value and info.data.get("tools"):
            raise ValueError("it holds 'tools', which are sent beside it: leave one of them out")
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


def _is_none(value: object) -> bool:
    return value is None


class AssistantMessage(BaseModel):
    """What is said, thought and called. `content` is null where nothing but calls came."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: Annotated[str | None, Field(exclude_if=_is_none)] = None
    tool_calls: Annotated[list[MadeToolCall] | None, Field(exclude_if=_is_none)] = None


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


class FunctionDelta(TypedDict, total=False):
    name: str
    arguments: str


class ToolCallDelta(TypedDict, total=False):
    """A piece of the `index`-th call: the first one has all but the rest of `arguments`."""

    index: int
    id: str
    type: Literal["function"]
    function: FunctionDelta


class Delta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[ToolCallDelta]


class ChunkChoice(TypedDict):
    """The one choice of an event. Plain dicts: there is one for every token."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
