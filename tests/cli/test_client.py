"""What the client makes of servers that refuse, break off, or are something else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from claas.cli.client import Client, ServiceError, Unreachable
from claas.core.errors import ClaasError, StepFailed
from tests.cli.conftest import KEY, Live, claas
from tests.doubles.http import Answering, handled_by
from tests.doubles.services import ADAPTER, BASE_MODEL

HELLO = [{"role": "user", "content": "Hello"}]


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """Some other server, which says the same to everyone."""

    class Handler(Answering):
        def do_GET(self) -> None:
            self.answer(status, body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.do_GET()

    with handled_by(Handler) as url:
        yield url


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def test_nobody_there_says_how_to_start() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = claas("adapters", "list", "--url", url)
    assert (result.code, result.out) == (1, "")
    assert result.err == f"claas: no service answers at {url}: start one with 'claas serve', or name another with --url\n"


def test_url_and_key_come_from_the_environment(live: Live) -> None:
    assert claas("adapters", "list", CLAAS_URL=live.url, CLAAS_API_KEY=KEY).out.split() == [ADAPTER]


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://127.0.0.1", "http://[", ""])
def test_a_bad_url_is_told(url: str) -> None:
    with pytest.raises(Unreachable, match="http://host:port"), Client(url) as client:
        client.models()


def test_openai_base_urls_are_understood(live: Live) -> None:
    with Client(f"{live.url}/v1/", KEY) as client:
        assert client.models() == [BASE_MODEL, ADAPTER]


def test_a_wrong_key_is_told_in_the_servers_words(live: Live) -> None:
    with Client(live.url, "wrong") as client, pytest.raises(ServiceError, match="API key is not valid") as caught:
        client.models()
    assert caught.value.status == 401


def test_another_kind_of_server_is_told() -> None:
    with answering(502, b"<html>bad gateway</html>") as url, Client(url) as client, pytest.raises(ServiceError, match="HTTP 502"):
        client.models()
    with answering(200, b"<html>hello</html>") as url, Client(url) as client, pytest.raises(Unreachable, match="did not answer as a CLaaS"):
        client.models()


def test_whole_and_streamed_replies_agree(live: Live) -> None:
    pieces: list[str] = []
    with Client(live.url, KEY) as client:
        whole = client.chat(ADAPTER, HELLO, max_tokens=100, seed=None)
        streamed = client.stream(ADAPTER, HELLO, pieces.append, max_tokens=100)
    assert (whole.text, whole.finish_reason, whole.speaker) == (f"[{ADAPTER}@0] Hello", "stop", f"{ADAPTER}@0")
    assert (streamed.text, streamed.finish_reason, streamed.speaker) == (whole.text, "stop", whole.speaker)
    assert "".join(pieces) == whole.text
    assert len(pieces) > 5
    assert {whole.id, streamed.id} == set(live.world.rollouts.kept)


def test_a_stream_that_breaks_is_an_error(live: Live) -> None:
    live.world.inference.broken_after = 4
    pieces: list[str] = []
    with Client(live.url, KEY) as client, pytest.raises(ServiceError, match="the engine broke"):
        client.stream(ADAPTER, HELLO, pieces.append)
    assert len("".join(pieces)) == 4


def test_a_stream_that_just_ends_is_an_error() -> None:
    chunk = b'data: {"id": "x", "choices": [{"delta": {"content": "Hel"}, "finish_reason": null}]}\n\n'
    with answering(200, chunk) as url, Client(url) as client, pytest.raises(Unreachable, match="broke off"):
        client.stream(ADAPTER, HELLO, lambda _: None)


def test_an_interrupted_stream_frees_its_slot(live: Live) -> None:
    live.world.inference.steps = asyncio.Semaphore(3)

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with Client(live.url, KEY) as client:
        with pytest.raises(KeyboardInterrupt):
            client.stream(ADAPTER, HELLO, stop)
        assert any(client.health()["inference"]["detail"]["running"] == 0 for _ in range(1000))


def test_a_failed_step_is_told(live: Live) -> None:
    live.world.engine.failure = StepFailed("the step broke; version 0 still serves")
    with Client(live.url, KEY) as client:
        reply = client.chat(ADAPTER, HELLO)
        with pytest.raises(ServiceError, match="version 0 still serves") as caught:
            client.feedback([reply.id], "be brief")
    assert caught.value.status == 500


def test_the_default_model_is_the_only_adapter_or_the_one_every_service_has(live: Live) -> None:
    with Client(live.url, KEY) as client:
        assert client.default_model() == ADAPTER
        client.init("me/second")
        with pytest.raises(ClaasError, match=r"--model.*me/assistant, me/second"):
            client.default_model()
        client.init("assistant")
        assert client.default_model() == "assistant"
