"""Request bodies before anything else reads them: bounded in size, and JSON that every later room can hold.

What JSON allows and a database, a tokenizer or another JSON parser does not is refused here, once: nesting without end, NaN and infinities,
half characters (lone surrogates), NUL.
"""

from __future__ import annotations

import json
import math
from typing import Any, Never

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from claas.api.deps import services_of
from claas.core.errors import BadRequest, TooLarge

IMPORT_PATH = "/v1/lora/import"
MAX_IMPORT_BYTES = 512 * 2**20
MAX_DEPTH = 64


class BodyGuard:
    """Reads the whole body, counts it, checks it, and hands it on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        raw = scope["path"] == IMPORT_PATH
        limit = MAX_IMPORT_BYTES if raw else services_of(scope["app"]).settings.max_body_bytes
        headers = Headers(scope=scope)
        body = await _read(receive, limit, headers.get("content-length", ""))
        if body is None:
            return
        if body and not raw:
            check_json(body, headers.get("content-type", ""))
        await self._app(scope, _replay(body, receive), send)


async def _read(receive: Receive, limit: int, declared: str) -> bytes | None:
    """The body; None if the client left before its end. Raises TooLarge as soon as it is known."""
    too_large = TooLarge(f"the request body is over {limit} bytes")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    message: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replayed() -> Message:
        nonlocal message
        if message is None:
            return await receive()
        first, message = message, None
        return first

    return replayed


def check_json(body: bytes, content_type: str) -> None:
    """Raise BadRequest unless `body` is JSON that all later rooms can hold."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise BadRequest("send the body as JSON, with the header 'Content-Type: application/json'")
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise BadRequest("the request body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"the request body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise BadRequest(f"the request body is nested more than {MAX_DEPTH} levels deep") from None
    except BadRequest:
        raise
    except ValueError:
        raise BadRequest("the request body holds a number with too many digits") from None
    _check_values(value)


def _refuse_constant(name: str) -> Never:
    raise BadRequest(f"the request body is not valid JSON: {name} is not a JSON number")


def _check_values(root: Any) -> None:
    """Level by level, so that depth costs no stack."""
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                _check_text(value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise BadRequest("the request body holds a number that is too large")
            elif isinstance(value, int) and abs(value) >= 2**63:
                raise BadRequest("the request body holds a whole number of more than 64 bits")
            elif isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
        if not below:
            return
        level = below
    raise BadRequest(f"the request body is nested more than {MAX_DEPTH} levels deep")


def _check_text(text: str) -> None:
    if "\0" in text:
        raise BadRequest("the request body holds the NUL character, which no text may contain")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequest("the request body holds half a character (a lone surrogate such as \\ud800)") from None
