"""`create_app`: the routes over services that somebody else opens. Holds no global state, so several apps can live in one process."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from claas import __version__
from claas.api.auth import Gate
from claas.api.body import BodyGuard
from claas.api.errors import Boundary, ErrorBody, on_http_exception, on_validation_error
from claas.api.routes import adapters, chat, completions, feedback, health, models, score
from claas.services import Services

_TAGS = [
    {"name": "serving", "description": "OpenAI-compatible: point any OpenAI client at this service."},
    {"name": "feedback", "description": "What was wrong or right with a reply becomes weights."},
    {"name": "adapters", "description": "Each adapter is a line of immutable versions."},
    {"name": "health", "description": "Is it well?"},
]


def create_app(open_services: Callable[[], AbstractAsyncContextManager[Services]]) -> FastAPI:
    """The service as an ASGI app. `open_services` is entered at startup and left at shutdown."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services() as services:
            app.state.services = services
            app.state.started = int(time.time())
            yield

    app = FastAPI(
        title="CLaaS",
        version=__version__,
        summary="Continual learning as a service: chat, say what was wrong, and the model has learned it.",
        openapi_tags=_TAGS,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        middleware=[Middleware(Boundary), Middleware(Gate), Middleware(BodyGuard)],  # outermost first
        responses={"default": {"model": ErrorBody, "description": "An error, in OpenAI's shape"}},
        exception_handlers={HTTPException: on_http_exception, RequestValidationError: on_validation_error},
    )
    for group in (chat, completions, models, score, feedback, adapters, health):
        app.include_router(group.router)
    return app
