"""`/v1/lora`: adapters from birth to deletion."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from claas.api.body import IMPORT_PATH
from claas.api.deps import ServicesDep
from claas.api.schemas.adapters import (
    AdapterList,
    AdapterQuery,
    AdapterRef,
    Deleted,
    ExportQuery,
    InitRequest,
    ListQuery,
    RollbackRequest,
    VersionList,
)
from claas.core.errors import BadRequest
from claas.core.types import LoraInitRequest

router = APIRouter(tags=["adapters"])

ZIP_TYPES = ("application/zip", "application/x-zip-compressed", "application/octet-stream")
_ZIP_BODY = {"required": True, "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}}}
_ZIP_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "The zip", "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}}}
}


@router.post("/v1/lora/init", summary="Create an adapter")
async def init_adapter(body: InitRequest, services: ServicesDep) -> AdapterRef:
    """Its version 0 has no effect: it answers as the base model does, until it is taught."""
    modules = None if body.target_modules is None else tuple(body.target_modules)
    created = await services.lifecycle.init(LoraInitRequest(**body.model_dump(exclude={"target_modules"}), target_modules=modules))
    return AdapterRef(lora_id=created.lora_id, version=created.version)


@router.get("/v1/lora", summary="List adapters")
async def list_adapters(query: Annotated[ListQuery, Query()], services: ServicesDep) -> AdapterList:
    """Ids that begin with `prefix`, sorted."""
    return AdapterList(loras=await services.lifecycle.adapters(query.prefix))


@router.delete("/v1/lora", summary="Delete an adapter")
async def delete_adapter(query: Annotated[AdapterQuery, Query()], services: ServicesDep) -> Deleted:
    """With all its versions, replies, feedback and steps. Cannot be undone: export it first."""
    await services.lifecycle.delete(query.lora_id)
    return Deleted(deleted=True)


@router.get("/v1/lora/export", summary="Download an adapter", response_class=Response, responses=_ZIP_ANSWER)
async def export_adapter(query: Annotated[ExportQuery, Query()], services: ServicesDep) -> Response:
    """A zip that PEFT and vLLM load: the latest version, unless one is named."""
    payload = await services.lifecycle.export(query.lora_id, query.version)
    filename = re.sub(r"[^A-Za-z0-9._~-]", "_", payload.filename)
    return Response(payload.content, media_type="application/zip", headers={"content-disposition": f'attachment; filename="{filename}"'})


@router.post(IMPORT_PATH, summary="Upload an adapter", openapi_extra={"requestBody": _ZIP_BODY})
async def import_adapter(query: Annotated[AdapterQuery, Query()], request: Request, services: ServicesDep) -> AdapterRef:
    """The body is the zip itself, in PEFT's layout: `curl --data-binary @adapter.zip -H 'Content-Type: application/zip' …`."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in ZIP_TYPES:
        raise BadRequest("send the zip itself as the body, with the header 'Content-Type: application/zip'")
    archive = await request.body()
    if not archive:
        raise BadRequest("the request body is empty: send the zip itself")
    created = await services.lifecycle.import_(query.lora_id, archive)
    return AdapterRef(lora_id=created.lora_id, version=created.version)


@router.get("/v1/lora/versions", summary="An adapter's history")
async def list_versions(query: Annotated[AdapterQuery, Query()], services: ServicesDep) -> VersionList:
    """Every version with its parent, the feedback that made it, its figures and its size."""
    latest, versions = await services.lifecycle.versions(query.lora_id)
    return VersionList(lora_id=query.lora_id, latest=latest, versions=versions)


@router.post("/v1/lora/rollback", summary="Serve another version")
async def rollback(body: RollbackRequest, services: ServicesDep) -> AdapterRef:
    """From the next request on. The version left stays, so this too can be undone."""
    ref = await services.lifecycle.rollback(body.lora_id, body.version)
    return AdapterRef(lora_id=ref.lora_id, version=ref.version)
