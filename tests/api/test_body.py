"""Bodies that are too large, or not what they should be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from claas.api import body as body_module
from tests.api.wire import CHAT, HELLO, assert_error
from tests.doubles.services import World

JSON = {"content-type": "application/json"}


def padded(size: int) -> bytes:
    """A valid chat of exactly `size` bytes."""
    empty = len(json.dumps(HELLO | {"user": ""}))
    return json.dumps(HELLO | {"user": "x" * (size - empty)}).encode()


async def test_the_limit_is_exact(client: httpx.AsyncClient, world: World) -> None:
    limit = world.services.settings.max_body_bytes
    assert_error(await client.post(CHAT, content=padded(limit), headers=JSON), 400, param="user")  # read, and judged by its content
    response = await client.post(CHAT, content=padded(limit + 1), headers=JSON)
    assert assert_error(response, 413, says=str(limit))["code"] == "body_too_large"


async def test_a_body_of_unsaid_length_is_counted(client: httpx.AsyncClient, world: World) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 65536
            yield b" " * 65536

    assert_error(await client.post(CHAT, content=endless(), headers=JSON), 413)
    assert sent <= world.services.settings.max_body_bytes + 2 * 65536


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_10_mb_prompt_over_a_socket(live: str, chunked: bool) -> None:
    body = padded(10_000_000)

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 65536):
            yield body[at : at + 65536]

    async with httpx.AsyncClient(base_url=live) as client:
        assert_error(await client.post(CHAT, content=pieces() if chunked else body, headers=JSON), 413)
        assert (await client.get("/health")).status_code == 200


def test_the_import_limit_leaves_room_for_adapters_but_not_for_all_memory() -> None:
    assert 2**28 <= body_module.MAX_IMPORT_BYTES <= 2**30


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "JSON object"),
        (b"{", "line 1, column 2"),
        (b'{"model": }', "not valid JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b'"text"', "JSON object"),
        (b"\xff\xfe", "UTF-8"),
        (json.dumps(HELLO).encode("utf-16"), "UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"temperature": 1e999}', "too large"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"seed": 9223372036854775808}', "64 bits"),
        (rb'{"model": "\ud800"}', "surrogate"),
        (rb'{"\udc00": 1}', "surrogate"),
        (rb'{"model": "a\u0000b"}', "NUL"),
    ],
)
async def test_what_no_later_room_could_hold_is_refused(client: httpx.AsyncClient, content: bytes, says: str) -> None:
    for path in (CHAT, "/v1/completions", "/v1/feedback", "/v1/lora/init"):
        assert_error(await client.post(path, content=content, headers=JSON), 400, says=says)


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "multipart/form-data; boundary=x"]
)
async def test_bodies_that_are_not_said_to_be_json(client: httpx.AsyncClient, content_type: str) -> None:
    response = await client.post(CHAT, content=json.dumps(HELLO), headers={"content-type": content_type})
    assert_error(response, 400, says="Content-Type: application/json")
    assert_error(await client.post(CHAT, content=json.dumps(HELLO)), 400, says="Content-Type: application/json")


async def test_json_may_name_its_charset(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, content=json.dumps(HELLO), headers={"content-type": "Application/JSON; charset=utf-8"})
    assert response.status_code == 200


async def test_a_client_that_leaves_while_it_sends_is_no_error(live: str, world: World, caplog: pytest.LogCaptureFixture) -> None:
    host, _, port = live.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    await writer.wait_closed()
    assert not world.inference.requests
    assert "Traceback" not in caplog.text
