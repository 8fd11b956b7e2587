"""Web functions: plain HTTP in front of a container."""

from __future__ import annotations

import asyncio
import time

import httpx
import modal
import pytest

from tests.modal_server.server import ModalDouble

pytestmark = pytest.mark.integration


@pytest.fixture
def url(client: modal.Client) -> str:
    found = modal.Cls.from_name("sample", "Web", client=client)().web.get_web_url()
    assert isinstance(found, str) and found.startswith("http://127.0.0.1:")
    return found


def test_a_request_arrives_whole_and_so_does_the_answer(url: str) -> None:
    answer = httpx.post(f"{url}/v1/x?q=1&q=2", content=b"body", headers=[("x-echo", "a"), ("x-echo", "b")], timeout=60)
    assert answer.status_code == 200 and answer.text == "POST /v1/x?q=1&q=2\nbody"
    assert answer.headers["x-path"] == "/v1/x" and answer.headers.get_list("x-echo") == ["a", "b"]
    assert httpx.get(f"{url}/teapot", timeout=60).status_code == 418


def test_an_answer_streams_chunk_by_chunk(url: str) -> None:
    with httpx.stream("GET", f"{url}/slow", timeout=60) as answer:
        seen = [time.monotonic() for _ in answer.iter_raw()]
    assert len(seen) >= 4 and seen[-1] - seen[0] > 0.8


def test_a_volume_mounted_to_be_read_is_not_written(url: str) -> None:
    assert httpx.get(f"{url}/write", timeout=60).text.endswith("Read-only file system")


async def test_requests_share_the_one_container(server: ModalDouble, url: str) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        begun = time.monotonic()
        answers = await asyncio.gather(*(http.get(f"{url}/slow") for _ in range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4 and time.monotonic() - begun < 4 * 1.2
    web = server.apps.function_id("sample", "Web.*")
    assert len(server.containers.live(function_id=web)) == 1


def test_a_request_that_waits_long_for_a_container_is_told_where_to_wait(server: ModalDouble, url: str) -> None:
    server.kill_containers("sample")
    server.faults.no_containers = True
    server.fronts.wait_s = 0.3
    try:
        answer = httpx.post(f"{url}/here", content=b"kept", timeout=60)
        assert answer.status_code == 303 and answer.headers["location"].startswith("/here?")
        assert httpx.get(url + answer.headers["location"], timeout=60).status_code == 303
        server.faults.no_containers = False
        server.fronts.wait_s = 30
        assert httpx.get(url + answer.headers["location"], timeout=60).text == "POST /here?\nkept"
    finally:
        server.fronts.wait_s = 20


def test_a_container_that_dies_cuts_the_answer_off(server: ModalDouble, url: str) -> None:
    with pytest.raises(httpx.RemoteProtocolError), httpx.stream("GET", f"{url}/slow", timeout=60) as answer:  # noqa: PT012
        for _ in answer.iter_raw():
            server.kill_containers("sample")
    assert httpx.get(f"{url}/again", timeout=60).status_code == 200
