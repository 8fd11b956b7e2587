"""`GET /v1/models`: what a request's `model` may name."""

from __future__ import annotations

from fastapi import APIRouter, Request

from claas.api.deps import ServicesDep
from claas.api.schemas.models import ModelCard, ModelList

router = APIRouter(tags=["serving"])


@router.get("/v1/models", summary="The base model and every adapter")
async def list_models(request: Request, services: ServicesDep) -> ModelList:
    """Each id is usable as `model`. An adapter's means its latest version; `id@3` pins one."""
    names = [services.base_model_id, *await services.lifecycle.adapters()]
    return ModelList(data=[ModelCard(id=name, created=request.app.state.started) for name in names])


@router.get("/v1/models/{model:path}", summary="One model or adapter")
async def get_model(model: str, request: Request, services: ServicesDep) -> ModelCard:
    """404 for what no request could name."""
    await services.lifecycle.resolve_model(model)
    return ModelCard(id=model, created=request.app.state.started)
