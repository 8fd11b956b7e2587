"""Asks a vLLM over HTTP: JSON in and out, server-sent events, and its errors as ours. It knows no route and no adapter.

A request that never reached vLLM, or got no byte of an answer, is sent again: sampling leaves nothing behind that a second try could
double. What has begun to answer is never repeated. Where Modal holds a request that waits for a container, it says where to ask for the
answer (303), and is asked there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from pydantic_core import to_json
from yarl import URL

from claas.core.errors import BackendUnavailable, ClaasError, ContextOverflow, NotFound, Overloaded, UpstreamRefused

CONNECT_TIMEOUT_S = 5.0
KEEPALIVE_S = 3.0  # shorter than the server's own, so that it never closes a connection that is about to be used
PROBE_AFTER_S, PROBES = 15, 4  # of TCP, where nothing comes: a machine that is gone says no goodbye
RETRY_AFTER_S = 5
JSON = {"content-type": "application/json"}
TRIES_S = (0.1, 0.4)
MAX_WAITS = 40
"""Times that an answer may be asked for elsewhere; Modal gives one after 150 s."""

log = logging.getLogger(__name__)


class VllmDown(BackendUnavailable):
    """No answer at all: not running, still starting, or gone in the middle of one."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=RETRY_AFTER_S)


class UnknownToVllm(NotFound):
    """vLLM knows no such model or route."""


class VllmHttp:
    """One vLLM. Make it on the event loop that will use it."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        self._base_url = base_url.rstrip("/")
        self._session = aiohttp.ClientSession(
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, socket_factory=_probed_socket),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # a proxy of the environment must not see prompts
        )

    async def ask(
        self, method: str, path: str, body: object = None, params: Mapping[str, str] | None = None, timeout_s: float | None = 30.0
    ) -> Any:
        """The answer's JSON; its text if it is none. `timeout_s` None waits as long as it takes.

        Raises:
            VllmDown: no answer.
            NotFound, ContextOverflow, UpstreamRefused, Overloaded, BackendUnavailable: what vLLM answered instead.
        """
        try:
            content = None if body is None else to_json(body)
            async with asyncio.timeout(timeout_s), await self._send(method, path, content, params) as response:
                answer = await _content_of(response)
        except TimeoutError:
            raise BackendUnavailable(f"vLLM did not answer {path!r} within {timeout_s:g} s", retry_after_s=RETRY_AFTER_S) from None
        try:
            return json.loads(answer)
        except ValueError:
            return answer.decode(errors="replace")

    @asynccontextmanager
    async def events(self, path: str, content: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """The data of each server-sent event, as it comes, in answer to this JSON. Leaving the context ends the request there.

        Raises like `ask`.
        """
        async with await self._send("POST", path, content) as response:
            yield _data_of_events(response)

    async def aclose(self) -> None:
        await self._session.close()

    async def _send(self, method: str, path: str, content: bytes | None, params: Mapping[str, str] | None = None) -> aiohttp.ClientResponse:
        """The response, its body not read yet, if it is a success."""
        url = URL(self._base_url + path)
        response = await self._reach(method, url.update_query(params) if params else url, content)
        for _ in range(MAX_WAITS):
            if response.status != 303:
                break
            response.release()
            response = await self._reach("GET", _same_server(url, response.headers.get("location", "")), None)
        if response.status < 300:
            return response
        async with response:
            raise error_of(response.status, await _content_of(response))

    async def _reach(self, method: str, url: URL, content: bytes | None) -> aiohttp.ClientResponse:
        """Whatever is answered, its body not read yet. Raises VllmDown."""
        headers = {} if content is None else JSON
        for wait_s in TRIES_S:
            try:
                return await self._session.request(method, url, data=content, headers=headers, allow_redirects=False)
            except aiohttp.ClientError:
                await asyncio.sleep(wait_s)
        try:
            return await self._session.request(method, url, data=content, headers=headers, allow_redirects=False)
        except aiohttp.ClientError as error:
            raise VllmDown("vLLM does not answer: it is starting, stopped, or somewhere else than VLLM_BASE_URL says") from error


def _same_server(url: URL, location: str) -> URL:
    """Where an answer is asked for. Raises BackendUnavailable for another server: the key and the reply are not for it."""
    try:
        there = url.join(URL(location))
    except ValueError:
        there = URL()
    if (there.scheme, there.host, there.port) != (url.scheme, url.host, url.port):
        raise BackendUnavailable("vLLM's address sends on to another one: set VLLM_BASE_URL to where it serves")
    return there


def _probed_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket that finds out when the other machine is gone, however long an answer takes."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", PROBE_AFTER_S), ("TCP_KEEPINTVL", PROBE_AFTER_S), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, option):  # each system has its own
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return made


async def _content_of(response: aiohttp.ClientResponse) -> bytes:
    try:
        return await response.read()
    except aiohttp.ClientError as error:
        raise _broke_off(error) from error


async def _data_of_events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    rest = b""
    try:
        async for piece in response.content.iter_any():
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield event[6:]
    except aiohttp.ClientError as error:
        raise _broke_off(error) from error


def _broke_off(error: Exception) -> VllmDown:
    return VllmDown(f"vLLM broke off in the middle of an answer ({type(error).__name__}): send the request again")


def error_of(status: int, content: bytes) -> ClaasError:
    """An answer that is no success, as an error of ours: 4xx keep their status and text, and nothing that looks like a path goes out."""
    message, param = _said(content)
    if status >= 500:
        log.warning("vLLM answered %d: %s", status, message)
    message = re.sub(r"(?<![\w/])/[\w.~-]+(/[\w.~-]+)+", "…", message)[:1000]
    if status < 400:
        return BackendUnavailable("vLLM's address sends on to another one, or keeps us waiting: set VLLM_BASE_URL to where it serves")
    if status == 404:
        return UnknownToVllm(f"vLLM: {message}", param=param)
    if status in (401, 403):
        return BackendUnavailable("vLLM refuses the key of this service: set VLLM_API_KEY to the one that it was started with")
    if status == 429:
        return Overloaded(f"vLLM: {message}", retry_after_s=RETRY_AFTER_S)
    if status < 500 and re.search(r"max_model_len|context length|max_tokens must be at least 1", message):
        return ContextOverflow(message)
    if status < 500:
        return UpstreamRefused(message, status=status, param=param)
    return BackendUnavailable(f"vLLM failed with status {status}: {message}", retry_after_s=RETRY_AFTER_S)


def _said(content: bytes) -> tuple[str, str | None]:
    """Message and field of an error body, whatever its shape."""
    try:
        body = json.loads(content)
        error = body.get("error", body) if isinstance(body, dict) else body
        if isinstance(error, dict):
            return str(error.get("message") or error.get("detail") or error), error.get("param")
        return str(error), None
    except ValueError:
        return content.decode(errors="replace"), None
