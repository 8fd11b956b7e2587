"""What all wire schemas share."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from claas.core.adapter_id import parse_adapter_id


class WireRequest(BaseModel):
    """A request body. Types are taken as they are (no "3" for 3), and an unknown field is an error that names it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WireQuery(BaseModel):
    """A query string. Its values arrive as text, so numbers are parsed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _opaque_id(value: str) -> str:
    if not 1 <= len(value) <= 200 or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("use 1 to 200 printable ASCII characters, without spaces")
    return value


AdapterId = Annotated[str, AfterValidator(parse_adapter_id)]
OpaqueId = Annotated[str, AfterValidator(_opaque_id), Field(json_schema_extra={"minLength": 1, "maxLength": 200})]
Version = Annotated[int, Field(ge=0, le=999_999_999)]
TemplateKwargs = dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")], JsonValue]


def unsupported(message: str) -> PydanticCustomError:
    """An error that names its field, and then says `message`."""
    return PydanticCustomError("unsupported_parameter", "{message}", {"message": message})


def missing(message: str) -> PydanticCustomError:
    """An error that names its field, and then says `message`, for one that must be there because of what the others say."""
    return PydanticCustomError("missing_one_of", "{message}", {"message": message})


def only(*neutral: JsonValue) -> Any:
    """For a documented field this service cannot honour: null and `neutral` pass, since they ask for nothing; all else is refused."""

    def check(value: Any) -> Any:
        if value is None or value in neutral:
            return value
        instead = " or send ".join(["leave it out", *map(json.dumps, neutral)])
        raise unsupported(f"is not supported by this service: {instead}")

    return BeforeValidator(check)


class Usage(BaseModel):
    """Tokens of the request: the prompt's, counted once, and those of all replies."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class StreamOptions(WireRequest):
    """`include_usage` adds one last chunk with the token counts."""

    include_usage: bool = False
    include_obfuscation: Annotated[JsonValue, only(False)] = None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_STOP_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}, {"type": "null"}]}
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class SamplingRequest(WireRequest):
    """What chat and text completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=512, description="The base model, `lora_id` (its latest version) or `lora_id@3`.")]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: int | None = None
    stop: Annotated[list[StopString] | None, Field(max_length=4), BeforeValidator(_as_list), WithJsonSchema(_STOP_SCHEMA)] = None
    user: Annotated[str, Field(max_length=512)] | None = None
    presence_penalty: Annotated[JsonValue, only(0)] = None
    frequency_penalty: Annotated[JsonValue, only(0)] = None
    logit_bias: Annotated[JsonValue, only({})] = None

    @field_validator("stream_options")
    @classmethod
    def _only_when_streaming(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("it may be sent only with 'stream': true")
        return value

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage
