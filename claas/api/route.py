"""A route on the way to a first token: FastAPI documents it like any other, and does nothing for its requests.

An endpoint of such a route takes a JSON body and the services, and gives a response. What FastAPI does besides (dependencies, forms,
response models) costs each request a good part of a millisecond, and none of it is used there.
"""

from __future__ import annotations

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from claas.api.deps import services_of


class BodyRoute(APIRoute):
    """Raises RequestValidationError where the body is not what the endpoint says, as FastAPI does."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)  # says so
            return
        assert self.body_field is not None, "the endpoint takes a body"
        request = Request(scope, receive)
        said = await request.json() if await request.body() else None
        body, errors = self.body_field.validate(said, {}, loc=("body",))
        if errors:
            raise RequestValidationError(errors, body=said)
        response: Response = await self.endpoint(body, services_of(scope["app"]))
        await response(scope, receive, send)
