"""`/health` and `/v1/health`: whether a request could be served and a lesson taught now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from claas import __version__
from claas.api.auth import has_key
from claas.api.deps import ServicesDep
from claas.core.errors import ClaasError
from claas.core.types import ServiceHealth
from claas.services import Services

router = APIRouter(tags=["health"])
log = logging.getLogger(__name__)

TIMEOUT_S = 5.0


class Health(BaseModel):
    """All but `status` is left out for callers without a key, where keys are set."""

    status: Literal["healthy", "unhealthy"]
    engine: ServiceHealth | None = None
    inference: ServiceHealth | None = None
    store: ServiceHealth | None = None
    model: str | None = None
    versions: dict[str, str] | None = None


@router.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False, response_model=Health)
@router.get("/v1/health", response_model=Health, summary="How each part is", responses={503: {"model": Health}})
@router.head("/v1/health", include_in_schema=False)
async def health(request: Request, services: ServicesDep) -> Response:
    """200 if all parts are healthy, else 503 with the same body. Needs no key, but says more with one."""
    engine, inference, store = await asyncio.gather(
        _checked("engine", services.engine.health()),
        _checked("inference", services.inference.health()),
        _checked("store", _store_health(services)),
    )
    well = all(part.status == "healthy" for part in (engine, inference, store))
    report = Health(
        status="healthy" if well else "unhealthy",
        engine=engine,
        inference=inference,
        store=store,
        model=services.base_model_id,
        versions={"claas": __version__},
    )
    keys = services.settings.api_keys
    told = {"status"} if keys and not has_key(request.headers, keys) else None
    return Response(report.model_dump_json(include=told), 200 if well else 503, media_type="application/json")


async def _checked(part: str, check: Awaitable[ServiceHealth]) -> ServiceHealth:
    """The part's own answer; a part that fails to give one is unhealthy."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await check
    except TimeoutError:
        return ServiceHealth(status="unhealthy", error=f"no answer within {TIMEOUT_S:g} s")
    except ClaasError as error:
        return ServiceHealth(status="unhealthy", error=error.message)
    except Exception:
        log.exception("the health check of the %s broke", part)
        return ServiceHealth(status="unhealthy", error="internal error; the server's log has it")


async def _store_health(services: Services) -> ServiceHealth:
    await services.journal.steps(limit=1)
    return ServiceHealth(status="healthy")
