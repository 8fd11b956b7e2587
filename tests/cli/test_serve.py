"""`claas serve`: what it says, what it refuses, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from claas.cli import server
from claas.cli.client import Client
from claas.core.errors import ConfigurationError
from claas.core.settings import Settings
from claas.services import Services
from tests.cli.conftest import KEY, Live, claas, running
from tests.cli.curl import curl
from tests.doubles.services import ADAPTER, open_world


@pytest.mark.integration
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ends_within_seconds_though_a_stream_is_open(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.cli.serving", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        body = {"model": ADAPTER, "messages": [{"role": "user", "content": "Hello"}], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as reply:
            lines = reply.iter_lines()
            next(lines)
            start = time.monotonic()
            process.send_signal(how)
            try:
                rest = [line for line in lines if line]
                process.wait(20)
            finally:
                process.kill()
            assert time.monotonic() - start < 15
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
        assert rest[-1] == "data: [DONE]"
        assert process.returncode == 0
        assert process.stdout.read() == "closed\n"
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_taken_port_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = claas("serve", "--port", port, "--data-dir", str(tmp_path))
    assert (result.code, result.out) == (2, "")
    assert result.err == f"claas: cannot listen on 127.0.0.1:{port} (Address already in use): choose another with --host or --port\n"


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1:0"):
        server.bind("192.0.2.1", 0)


def test_an_open_host_needs_a_key(tmp_path: Path) -> None:
    result = claas("serve", "--host", "0.0.0.0", "--data-dir", str(tmp_path))
    assert result.code == 2
    assert "CLAAS_API_KEYS" in result.err
    assert len(result.err.splitlines()) == 1


def test_a_misspelt_setting_is_told(tmp_path: Path) -> None:
    result = claas("serve", "--data-dir", str(tmp_path), CLAAS_PROT="1")
    assert (result.code, result.err) == (2, "claas: CLAAS_PROT is not a setting: did you mean CLAAS_PORT?\n")


def test_a_vllm_url_is_a_setting(tmp_path: Path) -> None:
    result = claas("serve", "--vllm-url", "127.0.0.1:8000", "--data-dir", str(tmp_path))
    assert (result.code, result.out) == (2, "")
    assert "'127.0.0.1:8000' is no URL such as http://127.0.0.1:8000" in result.err


def test_the_gate_is_more_patient_than_the_drain(tmp_path: Path) -> None:
    """A request that came as the drain began would be refused before the update has even begun."""
    how: dict[str, Any] = {"data_dir": tmp_path, "vllm_base_url": "http://127.0.0.1:1"}
    assert Settings(**how).vllm_gate_timeout_s >= 1.5 * Settings(**how).feedback_drain_timeout_s
    environment = {"FEEDBACK_DRAIN_TIMEOUT_S": "200", "VLLM_BASE_URL": "http://127.0.0.1:1"}
    result = claas("serve", "--data-dir", str(tmp_path), **environment)
    assert (result.code, result.out) == (2, "")
    assert "CLAAS_VLLM_GATE_TIMEOUT_S (180) must be more than FEEDBACK_DRAIN_TIMEOUT_S (200)" in result.err
    never_pauses = Settings(**how, feedback_drain_timeout_s=200, vllm_release="none")
    assert never_pauses.vllm_gate_timeout_s == 180


def test_a_mode_that_does_not_exist_is_a_usage_error() -> None:
    result = claas("serve", "--mode", "cloud")
    assert result.code == 2
    assert "cloud" in result.err


def test_urls_can_be_opened_from_this_machine() -> None:
    for host, expected in [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")]:
        with server.bind(host, 0) as sock:
            assert server.url_of(sock) == f"{expected}{sock.getsockname()[1]}"


async def test_streamed_tokens_leave_at_once() -> None:
    """Nagle's algorithm would keep all but the first until the client has confirmed that one, 40 ms later."""
    undelayed: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        undelayed.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    sock = server.bind("127.0.0.1", 0)
    async with await asyncio.start_server(connected, sock=sock):
        _, writer = await asyncio.open_connection(*sock.getsockname())
        assert await undelayed != 0
        writer.close()


@pytest.mark.integration
def test_a_connection_that_idles_is_kept_for_longer_than_clients_keep_it(live: Live) -> None:
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"))  # which connects again only when told that the server closes
    for pause in (0, 6):
        time.sleep(pause)
        connection.request("GET", "/v1/health")
        assert connection.getresponse().read()
    connection.close()


async def test_the_hint_speaks_of_what_is_served(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        hint = server.hint("http://127.0.0.1:9", world.services)
    assert hint["model"] == "tiny/base"
    assert hint["chat"] == "claas chat --url http://127.0.0.1:9"
    assert "Bearer" not in hint["curl"]
    async with open_world(tmp_path, api_keys=(SecretStr("secret"),)) as world:
        hint = server.hint("http://127.0.0.1:9", world.services)
    assert "Bearer $CLAAS_API_KEY" in hint["curl"]
    assert "secret" not in "".join(hint.values())


def test_the_hinted_request_works_as_it_is(live: Live, tmp_path: Path) -> None:
    with Client(live.url, KEY) as client:
        client.init(live.world.services.settings.default_adapter)
    hint = server.hint(live.url, live.world.services)
    answer = curl(hint["curl"].replace("$CLAAS_API_KEY", KEY), tmp_path)
    assert answer.json()["choices"][0]["message"]["content"] == "[assistant@0] Who are you?"


def test_what_opening_raises_reaches_the_caller(tmp_path: Path) -> None:
    def broken(settings: Settings) -> AbstractAsyncContextManager[Services]:
        raise ConfigurationError("the model is not there")

    settings = Settings(data_dir=tmp_path, port=0)
    with pytest.raises(ConfigurationError, match="the model is not there"), server.in_background(settings, broken):
        pass


def test_in_background_is_gone_afterwards(tmp_path: Path) -> None:
    gc.unfreeze()
    with running(tmp_path) as live, Client(live.url, KEY) as client:
        assert gc.get_freeze_count() > 0
        port = int(live.url.rsplit(":", 1)[1])
        assert client.health()["status"] == "healthy"
        with pytest.raises(ConfigurationError):
            server.bind("127.0.0.1", port)
    assert live.world.engine.closed
    server.bind("127.0.0.1", port).close()


@pytest.mark.model
def test_the_real_service_starts_answers_and_stops(model_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "claas", "serve", "--port", "0", "--data-dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told = process.stdout.readline()
            url = told.split()[3]
            assert told == f"CLaaS listens on {url} (Ctrl-C stops it)\n"
            with Client(url) as client:
                assert client.health()["status"] == "healthy"
                reply = client.chat(
                    client.default_model(), [{"role": "user", "content": "What is the capital of France?"}], temperature=0.0
                )
            assert (reply.speaker, "Paris" in reply.text) == ("assistant@0", True)
            process.send_signal(signal.SIGINT)
            process.wait(60)
            assert process.stderr is not None
            rest, errors = process.stdout.read(), process.stderr.read()  # communicate() would miss what readline() has buffered
        finally:
            process.kill()
        assert process.returncode == 0
        assert "model   SmolLM2-135M-Instruct" in rest
        assert rest.endswith("Stopped.\n")
        assert errors == ""
