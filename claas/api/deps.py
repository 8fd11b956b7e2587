"""How a route gets what it works with."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI, Request

from claas.services import Services


def services_of(app: FastAPI) -> Services:
    """The services that the app's lifespan opened."""
    services: Services = app.state.services
    return services


async def _services(request: Request) -> Services:  # were it not async, each request would wait for a thread
    return services_of(request.app)


ServicesDep = Annotated[Services, Depends(_services)]
