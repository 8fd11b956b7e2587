"""Column types that give back exactly what was put in, on every database. They know nothing of any table."""

from __future__ import annotations

import json
import math
import re
import struct
from datetime import UTC, datetime
from typing import Any

from pydantic import JsonValue
from sqlalchemy import DateTime, Dialect, LargeBinary, String, Text
from sqlalchemy.types import TypeDecorator, TypeEngine

# PostgreSQL refuses NUL in text and no driver encodes lone surrogates, yet both are valid JSON strings, so chats may hold them.
_UNSTORABLE = re.compile("[\\\\\x00\ud800-\udfff]")
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")


def to_json(value: JsonValue) -> str:
    """ASCII JSON; NaN and the infinities, which JSON has no word for, become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


class UtcDateTime(TypeDecorator[datetime]):
    """An instant. Goes in with any time zone and comes back in UTC, on SQLite too, which keeps none."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without its time zone cannot be stored")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class _Escaped(TypeDecorator[str]):
    """Any Python string: what a database cannot hold is written as \\uXXXX, and so is the backslash, so that equal means equal."""

    impl: TypeEngine[str] | type[TypeEngine[str]] = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else _UNSTORABLE.sub(lambda m: f"\\u{ord(m[0]):04x}", value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else _ESCAPE.sub(lambda m: chr(int(m[1], 16)), value)


class AnyText(_Escaped):
    """Text of any length and content."""

    impl = Text
    cache_ok = True


class Name(_Escaped):
    """A short string that is looked up by an index."""

    impl = String(255)
    cache_ok = True


class TokenIds(TypeDecorator[tuple[int, ...]]):
    """Token ids, four bytes each, little-endian."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: tuple[int, ...] | None, dialect: Dialect) -> bytes | None:
        return None if value is None else struct.pack(f"<{len(value)}I", *value)

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> tuple[int, ...] | None:
        return None if value is None else struct.unpack(f"<{len(value) // 4}I", value)


class Logprobs(TypeDecorator[tuple[float, ...]]):
    """Floats, eight bytes each, little-endian: bit for bit what the engine reported."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: tuple[float, ...] | None, dialect: Dialect) -> bytes | None:
        return None if value is None else struct.pack(f"<{len(value)}d", *value)

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> tuple[float, ...] | None:
        return None if value is None else struct.unpack(f"<{len(value) // 8}d", value)
