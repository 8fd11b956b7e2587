"""The turns of a conversation, as they are sent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, StringConstraints, ValidationInfo, WithJsonSchema, field_validator

from claas.api.schemas.base import WireRequest, missing, only, unsupported
from claas.api.schemas.tools import SentToolCall, ToolCallId
from claas.core.types import ChatMessage


def _known_role(value: Any) -> Any:
    if value == "function":
        raise unsupported("cannot be 'function': send tools, and their results as messages of role 'tool'")
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
        {"type": "null"},
    ]
}


class WireMessage(WireRequest):
    """One turn. An answer's `message` can be sent back as it came: the fields that are null there may be null here."""

    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_known_role)]
    tool_calls: Annotated[list[SentToolCall], Field(max_length=128)] | None = None
    tool_call_id: ToolCallId | None = Field(default=None, validate_default=True)
    reasoning_content: str | None = None
    function_call: Annotated[JsonValue, only()] = None
    audio: Annotated[JsonValue, only()] = None
    refusal: Annotated[JsonValue, only()] = None
    annotations: Annotated[JsonValue, only([])] = None
    name: Annotated[str, StringConstraints(pattern=r"^[^\s<|\\/>]{1,64}$")] | None = None
    content: Annotated[str | None, BeforeValidator(_join_parts), WithJsonSchema(_CONTENT_SCHEMA)] = Field(
        default=None, validate_default=True
    )

    @field_validator("tool_calls", "reasoning_content")
    @classmethod
    def _is_the_assistant_s(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("role", "assistant") != "assistant":
            raise ValueError("only an assistant's message has it")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _is_the_tool_s(cls, value: str | None, info: ValidationInfo) -> str | None:
        role = info.data.get("role")
        if value is None and role == "tool":
            raise missing("is missing: say which tool call this message answers")
        if value is not None and role not in (None, "tool"):
            raise ValueError("only a tool's message has it")
        return value

    @field_validator("content")
    @classmethod
    def _says_something(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and not info.data.get("tool_calls"):
            raise missing("is missing: send a string, or parts of text (only an assistant's message with tool_calls may have none)")
        return value

    def to_core(self) -> ChatMessage:
        calls = tuple(call.model_dump() for call in self.tool_calls or ())
        return ChatMessage(
            role=self.role,
            content=self.content,
            reasoning_content=self.reasoning_content,
            name=self.name,
            tool_calls=calls or None,
            tool_call_id=self.tool_call_id,
        )


def _answerable(messages: list[WireMessage]) -> list[WireMessage]:
    called: set[str] = set()
    for at, message in enumerate(messages):
        called.update(call.id for call in message.tool_calls or ())
        if message.tool_call_id is not None and message.tool_call_id not in called:
            raise ValueError(f"message {at} answers the tool call {message.tool_call_id!r}, which no assistant's message before it made")
    if messages[-1].role == "assistant":
        raise ValueError("the last message is the assistant's: end with the turn that is to be answered")
    return messages


Messages = Annotated[list[WireMessage], Field(min_length=1, max_length=2048), AfterValidator(_answerable)]
