"""Keys, and, without keys, what may talk to a service on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import in_process
from tests.api.wire import CHAT, HELLO, assert_error
from tests.doubles.services import open_world

KEYS = ("first-key", "zweiter-schlüssel")


@pytest.fixture
async def locked(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with open_world(tmp_path, api_keys=KEYS, host="0.0.0.0") as world, in_process(world) as client:
        yield client


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
async def test_every_key_opens(locked: httpx.AsyncClient, key: str, scheme: str) -> None:
    headers = {b"authorization": f"{scheme} {key}".encode()}
    assert (await locked.get("/v1/models", headers=headers)).status_code == 200
    assert (await locked.post(CHAT, json=HELLO, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "header", ["Bearer wrong", "Bearer ", "Bearer", "first-key", "Basic first-key", "Bearer first-key2", "Bearer first-ke"]
)
async def test_a_wrong_key(locked: httpx.AsyncClient, header: str) -> None:
    response = await locked.get("/v1/models", headers={"authorization": header})
    assert assert_error(response, 401, says="not valid")["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/lora", "/v1/feedback/x", "/nothing", "/v1/health/"])
async def test_no_key(locked: httpx.AsyncClient, path: str) -> None:
    assert_error(await locked.get(path), 401, says="Authorization: Bearer KEY")


async def test_no_body_is_read_without_a_key(locked: httpx.AsyncClient) -> None:
    assert_error(await locked.post(CHAT, content=b"{" * 10_000_000), 401)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
async def test_the_documentation_is_open(locked: httpx.AsyncClient, path: str) -> None:
    assert (await locked.get(path)).status_code == 200


async def test_with_keys_any_host_and_origin_may_call(locked: httpx.AsyncClient) -> None:
    headers = {"authorization": "Bearer first-key", "host": "claas.example.org", "origin": "https://app.example.org"}
    assert (await locked.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8080", "localhost:9000", "LOCALHOST", "[::1]:8080"])
async def test_without_keys_this_machine_s_names_are_answered(client: httpx.AsyncClient, host: str) -> None:
    assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "x@127.0.0.1",
        "",
        "192.168.0.7",
        "[::1",
        "127.0.0.1:x",
    ],
)
async def test_without_keys_other_names_are_refused(client: httpx.AsyncClient, host: str) -> None:
    for path in ("/v1/models", "/health"):
        response = await client.get(path, headers={"host": host})
        assert assert_error(response, 403, says="CLAAS_API_KEYS")["type"] == "permission_error"


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1", "http://[::1]:8080"])
async def test_without_keys_pages_of_this_machine_are_answered(client: httpx.AsyncClient, origin: str) -> None:
    assert (await client.post(CHAT, json=HELLO, headers={"origin": origin})).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example", "file://", "http://localhost:x"])
async def test_without_keys_other_pages_are_refused(client: httpx.AsyncClient, origin: str) -> None:
    assert_error(await client.post(CHAT, json=HELLO, headers={"origin": origin}), 403, says="another origin")
