"""`/health` and `/v1/health`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from claas import __version__
from tests.api.conftest import in_process
from tests.doubles.services import BASE_MODEL, World, open_world

HEALTHY: dict[str, Any] = {"status": "healthy", "error": None, "detail": {}}


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
async def test_each_part_is_told(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 200
    assert response.json() == {
        "status": "healthy",
        "engine": HEALTHY,
        "inference": HEALTHY | {"detail": {"running": 0}},
        "store": HEALTHY,
        "model": BASE_MODEL,
        "versions": {"claas": __version__},
    }
    assert (await client.head(path)).status_code == 200


async def test_one_part_that_is_ill_makes_503(client: httpx.AsyncClient, world: World) -> None:
    world.engine.unhealthy = "out of memory"
    response = await client.get("/health")
    assert response.status_code == 503
    assert (response.json()["status"], response.json()["engine"]["error"]) == ("unhealthy", "out of memory")
    assert response.json()["inference"]["status"] == "healthy"


async def test_a_store_that_is_closed_is_unhealthy(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world, in_process(world) as client:
        world.database.close()
        response = await client.get("/health")
        assert response.status_code == 503
        assert response.json()["store"] == {"status": "unhealthy", "error": "the service is closing", "detail": {}}


async def test_a_check_that_breaks_or_hangs_is_unhealthy(client: httpx.AsyncClient, world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.engine.breakage = RuntimeError("secret detail")
    response = await client.get("/health")
    assert response.status_code == 503
    assert response.json()["engine"]["error"] == "internal error; the server's log has it"
    assert "secret detail" in caplog.text


async def test_without_a_key_only_the_status_is_told(tmp_path: Path) -> None:
    async with open_world(tmp_path, api_keys=("s3cret",)) as world, in_process(world) as client:
        assert (await client.get("/v1/health")).json() == {"status": "healthy"}
        assert (await client.get("/v1/health", headers={"authorization": "Bearer wrong"})).json() == {"status": "healthy"}
        full = await client.get("/v1/health", headers={"authorization": "Bearer s3cret"})
        assert full.json()["model"] == BASE_MODEL
        world.engine.unhealthy = "out of memory"
        response = await client.get("/v1/health")
        assert (response.status_code, response.json()) == (503, {"status": "unhealthy"})
