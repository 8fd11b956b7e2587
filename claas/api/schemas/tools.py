"""Tools, and the form that an answer must have: what OpenAI documents of them, checked before any backend sees it."""

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

from claas.api.schemas.base import WireRequest
from claas.core.types import ToolCall

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
ToolCallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]
JsonSchema = dict[str, JsonValue]


def _of_an_object(schema: JsonSchema) -> JsonSchema:
    if schema.get("type", "object") != "object":
        raise ValueError('it must be the JSON schema of an object: {"type": "object", "properties": {…}}')
    return schema


class FunctionTool(WireRequest):
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: Annotated[JsonSchema, AfterValidator(_of_an_object)] | None = None
    strict: bool | None = None


class Tool(WireRequest):
    """One tool. Only functions are known."""

    type: Literal["function"]
    function: FunctionTool

    def to_core(self) -> dict[str, JsonValue]:
        """As chat templates read it: what was left out is null, but `strict`, which is no part of a prompt."""
        return self.model_dump(exclude={"function": {"strict"}} if self.function.strict is None else None)


def _distinct(tools: list[Tool]) -> list[Tool]:
    names = [tool.function.name for tool in tools]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two tools are called {doubled[0]!r}: give each a name of its own")
    return tools


Tools = Annotated[list[Tool], Field(max_length=128), AfterValidator(_distinct)]


def _choice(value: Any, info: ValidationInfo) -> Any:
    if "tools" not in info.data:
        return value  # they are wrong themselves, which is told first
    known = [tool.function.name for tool in info.data["tools"] or ()]
    match value:
        case None | "none":
            return value
        case "auto" | "required" if known:
            return value
        case {"type": "function", "function": {"name": str(name), **beside}, **rest} if known and not rest and not beside:
            if name not in known:
                raise ValueError(f"no tool {name[:64]!r} is among 'tools'")
            return value
        case "auto" | "required" | {"type": "function"} if not known:
            raise ValueError("it may be sent only with 'tools'")
    raise ValueError('send "none", "auto", "required" or {"type": "function", "function": {"name": "…"}}')


_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "function"],
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}
ToolChoice = Annotated[JsonValue, BeforeValidator(_choice), WithJsonSchema(_CHOICE_SCHEMA)]
"""Which tool is called. Declare it after `tools`, which it is checked against."""


class AnswerSchema(WireRequest):
    """The JSON schema that an answer must follow."""

    name: Name
    description: str | None = None
    schema_: Annotated[JsonSchema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(WireRequest):
    """The form of an answer: free text, any JSON object, or JSON after a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: AnswerSchema | None = Field(default=None, validate_default=True)

    @field_validator("json_schema")
    @classmethod
    def _goes_with_its_type(cls, value: AnswerSchema | None, info: ValidationInfo) -> AnswerSchema | None:
        if "type" in info.data and (value is not None) != (info.data["type"] == "json_schema"):
            raise ValueError("it goes with 'type': 'json_schema', and only with it")
        return value

    def to_core(self) -> dict[str, JsonValue] | None:
        """As the seam takes it: None asks for nothing."""
        return None if self.type == "text" else self.model_dump(by_alias=True, exclude_none=True)


class CalledFunction(WireRequest):
    """What is called, with its arguments as the model wrote them: JSON, if it did well."""

    name: str
    arguments: str


class SentToolCall(WireRequest):
    """A call of an earlier answer, sent back as it came."""

    id: ToolCallId
    type: Literal["function"]
    function: CalledFunction


class MadeToolCall(BaseModel):
    """A call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    @classmethod
    def of(cls, call: ToolCall) -> MadeToolCall:
        return cls(id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments))
