"""`/v1/lora`: adapters and their versions."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints

from claas.api.schemas.base import AdapterId, Version, WireQuery, WireRequest
from claas.core.types import AdapterVersion

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]{1,64}$")]


class InitRequest(WireRequest):
    """A new adapter. What is left out takes the default for the base model's size."""

    lora_id: AdapterId
    base_model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    lora_r: Annotated[int, Field(ge=1, le=256)] | None = None
    lora_alpha: Annotated[int, Field(ge=1, le=1024)] | None = None
    target_modules: Annotated[list[ModuleName], Field(min_length=1, max_length=64)] | None = None


class RollbackRequest(WireRequest):
    lora_id: AdapterId
    version: Version


class AdapterRef(BaseModel):
    """An adapter and the version of it that now serves."""

    lora_id: str
    version: int


class AdapterList(BaseModel):
    loras: list[str]


class Deleted(BaseModel):
    deleted: bool


class VersionList(BaseModel):
    """All versions, oldest first; `latest` is the one that serves."""

    lora_id: str
    latest: int
    versions: list[AdapterVersion]


class AdapterQuery(WireQuery):
    lora_id: AdapterId


class ExportQuery(AdapterQuery):
    version: Version | None = None


class ListQuery(WireQuery):
    prefix: Annotated[str, Field(max_length=128)] = ""
