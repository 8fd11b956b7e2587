"""Asking a vLLM over HTTP where Modal holds the request until a container is there, and tells to ask again (303)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from claas.core.errors import BackendUnavailable, ContextOverflow, UpstreamRefused
from claas.inference.vllm_http import MAX_WAITS, VllmHttp
from tests.doubles.http import Answering, handled_by

CHAT = "/v1/chat/completions"


class Front(Answering):
    """Sends on `waits` times, then answers; `seen` is what it was asked, in order."""

    protocol_version = "HTTP/1.1"
    waits = 1
    to = "{path}?__modal_function_call_id=fc-{n}"
    status, answer_body = 200, b'{"said": 1}'
    dropped = 0
    seen: list[tuple[str, str, str | None, bytes]]

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers["content-length"])))

    def _serve(self, body: bytes) -> None:
        kind = type(self)
        kind.seen.append((self.command, self.path, self.headers["authorization"], body))
        if "fc-" in self.path and kind.dropped:
            kind.dropped -= 1
            self.close_connection = True
        elif kind.waits:
            kind.waits -= 1
            self.send_response(303)
            self.send_header("location", kind.to.format(path=self.path.partition("?")[0], n=len(kind.seen)))
            self.send_header("content-length", "0")
            self.end_headers()
        else:
            self.answer(kind.status, kind.answer_body)


@contextmanager
def fronted(**how: object) -> Iterator[tuple[str, type[Front]]]:
    kind = type("Handler", (Front,), {"seen": [], **how})
    with handled_by(kind) as url:
        yield url, kind


async def test_it_asks_for_the_answer_where_it_is_told() -> None:
    with fronted(waits=3) as (url, front):
        vllm = VllmHttp(url, "key")
        assert await vllm.ask("POST", CHAT, {"n": 1}, params={"a": "b"}) == {"said": 1}
        await vllm.aclose()
    (method, path, key, body), *waits = front.seen
    assert (method, path, key, json.loads(body)) == ("POST", f"{CHAT}?a=b", "Bearer key", {"n": 1}), "sent once, whole"
    assert waits == [("GET", f"{CHAT}?__modal_function_call_id=fc-{n}", "Bearer key", b"") for n in (1, 2, 3)]


async def test_events_come_from_there_too() -> None:
    with fronted(answer_body=b"data: one\n\ndata: [DONE]\n\n") as (url, _):
        vllm = VllmHttp(url, None)
        async with vllm.events(CHAT, b"{}") as events:
            assert [event async for event in events] == [b"one", b"[DONE]"]
        await vllm.aclose()


async def test_a_wait_that_is_cut_off_is_asked_again_and_the_request_is_not() -> None:
    with fronted(dropped=1) as (url, front):
        vllm = VllmHttp(url, None)
        assert await vllm.ask("POST", CHAT, {}) == {"said": 1}
        await vllm.aclose()
    assert [method for method, *_ in front.seen] == ["POST", "GET", "GET"]


@pytest.mark.parametrize(("status", "error"), [(400, UpstreamRefused), (503, BackendUnavailable), (400, ContextOverflow)])
async def test_what_is_refused_there_is_refused(status: int, error: type[Exception]) -> None:
    said = b'{"error": {"message": "over the context length"}}' if error is ContextOverflow else b'{"error": {"message": "no"}}'
    with fronted(status=status, answer_body=said) as (url, _):
        vllm = VllmHttp(url, None)
        with pytest.raises(error):
            await vllm.ask("POST", CHAT, {})
        await vllm.aclose()


async def test_it_is_sent_on_to_nobody_else() -> None:
    """Not to another host, another port or without encryption: the key would go with it."""
    with fronted(waits=0) as (elsewhere, other), fronted(waits=99, to="will be set") as (url, front):
        local = f"http://localhost:{url.rpartition(':')[2]}/v1"
        for there in (f"{elsewhere}/v1", "https://127.0.0.1/v1", "//example.test/v1", local, "ftp:x", "http://["):
            front.to = there
            vllm = VllmHttp(url, "key")
            with pytest.raises(BackendUnavailable, match="another one"):
                await vllm.ask("GET", "/version")
            await vllm.aclose()
    assert other.seen == []


async def test_it_does_not_wait_for_ever() -> None:
    with fronted(waits=9999) as (url, front):
        vllm = VllmHttp(url, None)
        with pytest.raises(BackendUnavailable, match="keeps us waiting"):
            await vllm.ask("GET", "/version")
        await vllm.aclose()
    assert len(front.seen) == MAX_WAITS + 1
