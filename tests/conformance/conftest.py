"""Every test of this room runs on every backend; on those of one mode if CLAAS_DISTILL_EXECUTION_MODE names it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from claas.core.settings import Settings
from claas.models.base_model import LoadedModel
from tests.conformance.backends import BACKENDS, Backend, asked

MODE = os.environ.get("CLAAS_DISTILL_EXECUTION_MODE")
CHOSEN = [backend for backend in BACKENDS if MODE in (None, backend.mode)]
if not CHOSEN:  # pytest would skip all tests, and be content
    raise pytest.UsageError(f"no backend is tried in {MODE!r} mode: CLAAS_DISTILL_EXECUTION_MODE is local, tinker or modal, or unset")


PARAMS = [pytest.param(backend, id=backend.name, marks=[pytest.mark.integration] if backend.mode == "modal" else []) for backend in CHOSEN]


@pytest.fixture(params=PARAMS)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    return chosen


@pytest.fixture
def settings(
    request: pytest.FixtureRequest, backend: Backend, tiny_model: LoadedModel, tiny_model_dir: Path, tmp_path: Path
) -> Iterator[Settings]:
    """Of a service that can be opened again and again: it finds what it left."""
    if backend.mode == "modal":
        request.getfixturevalue("modal_double")
    with backend.opening(tiny_model, tiny_model_dir, tmp_path / "data") as chosen:
        yield chosen


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with asked(settings) as client:
        yield client
