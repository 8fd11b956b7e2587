"""Errors on the wire: one table from error class to status, and OpenAI's shape for every answer that is not a success.

Only what was written for the caller leaves the server: an unforeseen error is logged with its traceback and answered with a request id.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from claas.core.errors import (
    AdapterBusy,
    AuthenticationFailed,
    BackendUnavailable,
    BadRequest,
    ClaasError,
    ConfigurationError,
    Conflict,
    ContextOverflow,
    NotFound,
    Overloaded,
    StepFailed,
    StorageFull,
    TooLarge,
    Unteachable,
    UpstreamRefused,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kind:
    """How a class of errors is answered. `code` stands where the error has none of its own."""

    status: int
    type: str
    code: str | None = None
    retry_after_s: int | None = None


class Forbidden(ClaasError):
    """Refused whatever the key: only this room raises it, so it is not drawn in the tree."""


TABLE: dict[type[ClaasError], Kind] = {
    ClaasError: Kind(500, "server_error"),
    ConfigurationError: Kind(500, "server_error", "configuration"),
    BadRequest: Kind(400, "invalid_request_error"),
    ContextOverflow: Kind(400, "invalid_request_error", "context_length_exceeded"),
    UpstreamRefused: Kind(400, "invalid_request_error", "upstream_refused"),
    AuthenticationFailed: Kind(401, "authentication_error", "invalid_api_key"),
    Forbidden: Kind(403, "permission_error", "forbidden"),
    NotFound: Kind(404, "invalid_request_error", "not_found"),
    Conflict: Kind(409, "conflict_error", "conflict"),
    AdapterBusy: Kind(409, "conflict_error", "adapter_busy", retry_after_s=10),
    TooLarge: Kind(413, "invalid_request_error", "body_too_large"),
    Unteachable: Kind(422, "invalid_request_error", "unteachable"),
    Overloaded: Kind(429, "rate_limit_error", "overloaded"),
    BackendUnavailable: Kind(503, "service_unavailable_error", "backend_unavailable", retry_after_s=5),
    StorageFull: Kind(503, "service_unavailable_error", "storage_full"),
    StepFailed: Kind(500, "server_error", "step_failed"),
}


class ErrorDetail(BaseModel):
    """What went wrong, for the person (`message`) and for the program (`type`, `code`, `param`: the field, as a dotted path)."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's error shape."""

    error: ErrorDetail


def kind_of(error: ClaasError) -> Kind:
    """The table's row for the error's class, or its nearest listed ancestor's, with what the error itself knows better."""
    kind = next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)
    match error:
        case UpstreamRefused(status=status):
            return replace(kind, status=status)
        case Overloaded(retry_after_s=int(seconds)) | BackendUnavailable(retry_after_s=int(seconds)):
            return replace(kind, retry_after_s=seconds)
    return kind


def body_of(error: ClaasError) -> ErrorBody:
    """The error as it goes over the wire."""
    kind = kind_of(error)
    return ErrorBody(error=ErrorDetail(message=error.message, type=kind.type, param=error.param, code=error.code or kind.code))


def unforeseen(request_id: str) -> ErrorBody:
    """The answer to an error nobody raised on purpose. Says nothing of it: the log does, under the same id."""
    message = f"internal error; the server's log has it under {request_id!r}"
    return ErrorBody(error=ErrorDetail(message=message, type="server_error", code="internal_error"))


def response_to(error: ClaasError) -> JSONResponse:
    """The whole answer, with `Retry-After` and `WWW-Authenticate` where they belong."""
    kind = kind_of(error)
    headers: dict[str, str] = {}
    if kind.retry_after_s is not None:
        headers["retry-after"] = str(kind.retry_after_s)
    if kind.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body_of(error).model_dump(), kind.status, headers)


class Boundary:
    """Outermost middleware: gives every answer an `x-request-id`, and turns what was raised inside into an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        started = False

        async def tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        response: Response
        try:
            await self._app(scope, receive, tagged)
            return
        except ClaasError as error:
            if kind_of(error).status >= 500:
                log.warning("%s %r failed (%s)", scope["method"], scope["path"], request_id, exc_info=error)
            response = response_to(error)
        except Exception:
            log.exception("%s %r broke (%s)", scope["method"], scope["path"], request_id)
            response = JSONResponse(unforeseen(request_id).model_dump(), 500)
        if not started:
            await response(scope, receive, tagged)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own refusals: an unknown URL, a method that the URL does not take."""
    assert isinstance(error, HTTPException)
    here = f"{request.method} {request.url.path[:200]!r}"
    messages = {404: f"Unknown request URL: {here}. GET /docs lists what there is", 405: f"{here} is not allowed"}
    detail = ErrorDetail(message=messages.get(error.status_code, str(error.detail)), type="invalid_request_error")
    detail.code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return JSONResponse(ErrorBody(error=detail).model_dump(), error.status_code, error.headers)


async def on_validation_error(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with the request, with its field as a dotted path."""
    assert isinstance(error, RequestValidationError)
    return response_to(_as_bad_request(error.errors()[0]))


def _as_bad_request(error: Mapping[str, Any]) -> BadRequest:
    param = _dotted(error["loc"][1:])
    if param is None:
        return BadRequest("the request needs a JSON object as its body" if error["type"] != "value_error" else _sentence(error))
    match error["type"]:
        case "extra_forbidden":
            return BadRequest(f"unknown field {param!r}", param=param, code="unknown_parameter")
        case "missing":
            return BadRequest(f"{param!r} is missing", param=param, code="missing_required_parameter")
        case "missing_one_of":
            return BadRequest(f"{param!r} {error['msg']}", param=param, code="missing_required_parameter")
        case "unsupported_parameter":
            return BadRequest(f"{param!r} {error['msg']}", param=param, code="unsupported_parameter")
        case kind:
            code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
            return BadRequest(f"{param!r} is wrong: {_sentence(error)}", param=param, code=code)


def _dotted(loc: Sequence[str | int]) -> str | None:
    return ".".join(str(part)[:64] for part in loc)[:256] or None


def _sentence(error: Mapping[str, Any]) -> str:
    if error["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return "input should be an object"
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
