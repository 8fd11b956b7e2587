"""The guard in front of a vLLM on Modal: who is let through, with what, and what becomes of those whose vLLM or caller is gone."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from claas.core.errors import ConfigurationError
from claas.inference.modal_guard import LOAD, ROUTES, Guard
from claas.models.base_model import LoadedModel
from tests.doubles.vllm_server import CHAT, CONTROL, VllmDouble
from tests.inference.gate import until
from tests.inference.guarding import BEARER, KEY, Behind, Guarded
from tests.inference.vllm_serving import sound_double
from tests.models.tiny import TARGETS, write_adapter

LONG = {"model": "tiny", "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 400, "ignore_eos": True, "stream": True}
OTHER_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "PURGE")


@pytest.fixture(name="double")
def _double(tiny_model: LoadedModel) -> Iterator[VllmDouble]:
    with sound_double(tiny_model.tokenizer, step_s=0.005) as server:
        yield server


@pytest.fixture(name="mount")
def _mount(tmp_path: Path, tiny_model: LoadedModel) -> Path:
    write_adapter(tmp_path / "adapters" / "me~a" / "v1", tiny_model, seed=1, targets=TARGETS)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "adapters" / "way-out").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "adapters"


@pytest.fixture(name="guard")
def _guard(double: VllmDouble, mount: Path) -> Iterator[Guarded]:
    with Guarded(double, mount) as guard:
        yield guard


def asked(double: VllmDouble) -> list[str]:
    """What reached vLLM but for the guard's own looks whether it is ready."""
    return [call.path for call in double.calls if call.path != "/health"]


# The key


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "Bearer wrong")],
        [("authorization", KEY)],
        [("authorization", f"Basic {KEY}")],
        [("authorization", f"Bearer {KEY}é".encode())],
        [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer wrong")],
        [("x-api-key", KEY)],
    ],
)
def test_nothing_is_passed_on_without_the_key(guard: Guarded, double: VllmDouble, headers: list[tuple[str, Any]]) -> None:
    with httpx.Client(base_url=guard.url, headers=headers) as client:
        for method, path in [*ROUTES, ("GET", "/metrics"), ("POST", "/sleep"), ("PURGE", "/v1/models"), ("GET", f"/v1/models?key={KEY}")]:
            answer = client.request(method, path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert double.calls == []


def test_the_scheme_may_be_written_in_any_case(guard: Guarded) -> None:
    assert httpx.get(f"{guard.url}/version", headers={"authorization": f"bearer {KEY}"}).json() == {"version": "0.32.0"}


def test_there_is_no_guard_without_a_key(double: VllmDouble, mount: Path) -> None:
    for key in ("", "  "):
        with pytest.raises(ConfigurationError, match="claas modal deploy"):
            Guard(Behind(double), key, mount=mount, reload=lambda: None, gone=lambda: None, ready_timeout_s=1)


async def test_a_websocket_is_closed_whatever_it_says(double: VllmDouble, mount: Path) -> None:
    guard = Guard(Behind(double), KEY, mount=mount, reload=lambda: None, gone=lambda: None, ready_timeout_s=1)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await guard({"type": "websocket", "path": "/v1/realtime", "headers": [(b"authorization", f"Bearer {KEY}".encode())]}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}] and double.calls == []


# What is passed on


def test_only_what_claas_asks_is_passed_on(guard: Guarded, double: VllmDouble) -> None:
    paths = {path for _, path in ROUTES}
    others = [(method, path) for path in paths for method in OTHER_METHODS if (method, path) not in ROUTES]
    others += [("POST", path) for path in (*CONTROL, "/v1/embeddings", "/collective_rpc", "/v1/load_lora_adapter/", "//v1/completions")]
    others += [("GET", path) for path in ("/", "/metrics", "/server_info", "/is_sleeping", "/docs", "/v1", "/health/../metrics", "/Health")]
    with httpx.Client(base_url=guard.url, headers=BEARER) as client:
        for method, path in others:
            assert client.request(method, path).status_code == 404, (method, path)
    assert double.calls == []


def test_what_vllm_says_comes_back_as_it_is(guard: Guarded, double: VllmDouble) -> None:
    with httpx.Client(base_url=guard.url, headers=BEARER) as client, httpx.Client(base_url=double.url) as direct:
        for path in ("/version", "/v1/models"):
            assert client.get(path).json() == direct.get(path).json()
        assert client.get("/health").status_code == 200
        body = {"model": "tiny", "prompt": "one two"}
        assert client.post("/tokenize", json=body).json() == direct.post("/tokenize", json=body).json()
        refused = client.post(CHAT, json={"model": "nobody", "messages": []})
        assert refused.status_code == 404 and refused.json() == direct.post(CHAT, json={"model": "nobody", "messages": []}).json()
        done = client.post(CHAT, json=LONG | {"stream": False, "max_tokens": 3})
        assert done.json()["usage"]["completion_tokens"] == 3 and done.headers["content-type"] == "application/json"


def test_a_query_goes_no_further(guard: Guarded, double: VllmDouble) -> None:
    httpx.get(f"{guard.url}/version?config_format=json", headers=BEARER).raise_for_status()
    assert double.calls[-1].query == {}


# Adapters


def test_an_adapter_is_loaded_after_the_volume_was_looked_at_again(guard: Guarded, double: VllmDouble, mount: Path) -> None:
    guard.reload_fails = 2
    with httpx.Client(base_url=guard.url, headers=BEARER) as client:
        client.post(LOAD, json={"lora_name": "one", "lora_path": str(mount / "me~a" / "v1")}).raise_for_status()
        assert guard.events == ["reloaded"] and list(double.engine.adapters) == ["one"]
        client.post("/v1/unload_lora_adapter", json={"lora_name": "one"}).raise_for_status()
    assert guard.events == ["reloaded"] and not double.engine.adapters


def test_a_volume_that_cannot_be_looked_at_again_is_said_so(guard: Guarded, double: VllmDouble, mount: Path) -> None:
    guard.reload_fails = 99
    answer = httpx.post(f"{guard.url}{LOAD}", headers=BEARER, json={"lora_name": "one", "lora_path": str(mount / "me~a/v1")}, timeout=30)
    assert answer.status_code == 503 and answer.headers["retry-after"] and asked(double) == []


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("{mount}/../elsewhere", 403),
        ("{mount}/me~a/../../elsewhere", 403),
        ("{mount}/me~a/../me~a/v1", 403),
        ("{mount}/way-out", 403),
        ("{mount}/way-out/v1", 403),
        ("{mount}", 403),
        ("{mount}-2/v1", 403),
        ("/etc", 403),
        ("me~a/v1", 403),
        ("someone/on-the-hub", 403),
        ("", 403),
        ("{mount}/me~a/v1\0", 400),
        (7, 400),
        (None, 400),
    ],
)
def test_no_other_folder_is_read(guard: Guarded, double: VllmDouble, mount: Path, path: Any, status: int) -> None:
    wanted = path.format(mount=mount) if isinstance(path, str) else path
    answer = httpx.post(f"{guard.url}{LOAD}", headers=BEARER, json={"lora_name": "one", "lora_path": wanted})
    assert answer.status_code == status and str(mount) not in answer.text
    assert asked(double) == [] and guard.events == []


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b'"text"', b"{}", b'{"lora_name": "one"}'])
def test_a_load_that_says_nothing_is_refused(guard: Guarded, double: VllmDouble, body: bytes) -> None:
    assert httpx.post(f"{guard.url}{LOAD}", headers=BEARER, content=body).status_code == 400
    assert asked(double) == []


def test_vllm_reads_what_the_guard_has_read(guard: Guarded, double: VllmDouble, mount: Path) -> None:
    """A name that comes twice is read otherwise by other parsers; one that is loaded in place would speak with stale weights."""
    good = str(mount / "me~a" / "v1")
    twice = f'{{"lora_name": "one", "lora_path": "/etc", "lora_path": {json.dumps(good)}}}'
    assert httpx.post(f"{guard.url}{LOAD}", headers=BEARER, content=twice).status_code == 200
    assert double.calls[-1].body == {"lora_name": "one", "lora_path": good}
    in_place = {"lora_name": "one", "lora_path": good, "load_inplace": True}
    assert httpx.post(f"{guard.url}{LOAD}", headers=BEARER, json=in_place).status_code == 400


# Streams


async def test_a_stream_is_passed_on_as_it_comes(guard: Guarded, double: VllmDouble) -> None:
    async with httpx.AsyncClient(base_url=guard.url, headers=BEARER) as client, client.stream("POST", CHAT, json=LONG) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream") and "content-length" not in answer.headers
        events = answer.aiter_lines()
        first = [await anext(events) for _ in range(9)]
        assert any('"content":' in line for line in first) and len(double.engine.running) == 1, "it is still being said"
        rest = [line async for line in events]
    assert rest[-2:] == ["data: [DONE]", ""] and len(rest) > 400


@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_who_leaves_ends_the_request_at_vllm(guard: Guarded, double: VllmDouble, stream: bool) -> None:
    async def runs() -> bool:
        return len(double.engine.running) == 1

    async def idle() -> bool:
        return not double.engine.running

    async with httpx.AsyncClient(base_url=guard.url, headers=BEARER) as client:
        asking = asyncio.create_task(client.post(CHAT, json=LONG | {"stream": stream}))
        await until(runs)
        (run,) = double.engine.running
        asking.cancel()
        await until(idle)
    assert len(run.tokens) < 400, "vLLM was told, and did not go on to the end"


# A vLLM that is not there


def test_requests_wait_for_a_vllm_that_loads_its_model(tiny_model: LoadedModel, mount: Path) -> None:
    with VllmDouble(tiny_model.tokenizer) as double:
        double.kill()
        with Guarded(double, mount) as guard:
            guard.vllm.starting = True
            starting = threading.Timer(0.5, double.start)
            starting.start()
            assert httpx.get(f"{guard.url}/version", headers=BEARER, timeout=20).json() == {"version": "0.32.0"}
            starting.join()
            assert guard.events == []


def test_one_that_loads_for_too_long_is_to_be_asked_again(tiny_model: LoadedModel, mount: Path) -> None:
    with VllmDouble(tiny_model.tokenizer) as double:
        double.kill()
        with Guarded(double, mount, ready_timeout_s=0.1) as guard:
            guard.vllm.starting = True
            answer = httpx.get(f"{guard.url}/version", headers=BEARER)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5") and "loading" in answer.json()["error"]["message"]
            assert guard.events == []


@pytest.mark.parametrize("ready", [True, False])
def test_a_dead_one_is_found_by_the_next_request(guard: Guarded, double: VllmDouble, ready: bool) -> None:
    if ready:
        httpx.get(f"{guard.url}/version", headers=BEARER).raise_for_status()
    double.kill()
    answer = httpx.get(f"{guard.url}/version", headers=BEARER)
    assert (answer.status_code, answer.headers["retry-after"], guard.events) == (503, "5", ["gone"])


def test_one_that_breaks_off_breaks_off_at_the_callers_too(guard: Guarded, double: VllmDouble) -> None:
    """An answer that ended as if it were whole would be taken for one."""
    with httpx.Client(base_url=guard.url, headers=BEARER) as client, client.stream("POST", CHAT, json=LONG) as answer:
        lines = answer.iter_lines()
        next(lines)
        double.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    assert guard.events == ["gone"]
