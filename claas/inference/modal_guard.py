"""The guard in front of a vLLM on Modal: an ASGI app that asks for the key on every path and passes on only what CLaaS asks of a vLLM.

vLLM's own key guards `/v1` alone, and whoever may load adapters has it read any folder. So vLLM listens to its container only, and what
comes from outside comes through here. The guard knows no Modal: it is told how the Volume is looked at again, and what to do when vLLM is
gone. Where its caller leaves, the request at vLLM ends too.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from claas.core.errors import ConfigurationError
from claas.inference.vllm_http import KEEPALIVE_S

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOAD = "/v1/load_lora_adapter"
ROUTES = frozenset(
    {
        ("GET", "/health"),
        ("GET", "/version"),
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/tokenize"),
        ("POST", LOAD),
        ("POST", "/v1/unload_lora_adapter"),
    }
)
MAX_BODY_BYTES = 64 * 2**20
RETRY_AFTER_S = 5
LOOK_AGAIN_S = 0.25
HEALTH_TIMEOUT_S = 5.0
RELOAD_TRIES_S = (0.2, 0.5, 1.0, 2.0)  # a Volume is not reloaded while a file of it is open: vLLM may be reading another version

log = logging.getLogger(__name__)


class Vllm(Protocol):
    """The vLLM behind the guard."""

    @property
    def url(self) -> str: ...

    def alive(self) -> bool:
        """Whether its process runs."""


class _Refused(Exception):
    """What is answered in vLLM's stead."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers


class _CallerLeft(Exception):
    pass


class Guard:
    """The ASGI app. `reload` shows what others wrote under `mount`, blocking; `gone` is called when vLLM is found dead, blocking too.

    Raises ConfigurationError without a key.
    """

    def __init__(
        self, vllm: Vllm, key: str, *, mount: Path, reload: Callable[[], None], gone: Callable[[], None], ready_timeout_s: float
    ) -> None:
        if not key.strip():
            raise ConfigurationError("the guard of vLLM needs a key, and was given none: 'claas modal deploy' makes it")
        self._vllm = vllm
        self._key = hashlib.sha256(key.strip().encode()).digest()
        self._mount = mount
        self._reload = reload
        self._gone = gone
        self._ready_timeout_s = ready_timeout_s
        self._ready = False
        self._reloading = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "lifespan":
                await self._lifespan(receive, send)
            case "http":
                await self._http(scope, receive, send)
            case _:  # a websocket: CLaaS asks for none
                await receive()
                await send({"type": "websocket.close", "code": 1008})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=HEALTH_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        ) as self._session:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            self._check_key(scope)
            method, path = scope["method"], scope["path"]
            if (method, path) not in ROUTES:
                raise _Refused(404, "the guard of vLLM knows no such path")
            body = await _body_of(receive)
            await _while_there(receive, self._serve(method, path, body, send))
        except _Refused as refused:
            await _answer(send, refused)
        except _CallerLeft:
            pass

    def _check_key(self, scope: Message) -> None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, presented = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        same = hmac.compare_digest(hashlib.sha256(presented.strip()).digest(), self._key)  # equally long, however much of it is right
        if scheme.lower() != b"bearer" or not same:
            raise _Refused(401, "send the key of this vLLM as 'Authorization: Bearer KEY'", **{"www-authenticate": "Bearer"})

    async def _serve(self, method: str, path: str, body: bytes, send: Send) -> None:
        if path == LOAD:
            body = self._checked_load(body)
        await self._until_ready()
        if path == LOAD:
            await self._see_what_others_wrote()
        await self._pass_on(method, path, body, send)

    def _checked_load(self, body: bytes) -> bytes:
        """The same request in our own words, so that vLLM reads no other path than the one that was checked."""
        try:
            wanted = json.loads(body)
            name, path = wanted["lora_name"], wanted["lora_path"]
        except (ValueError, LookupError, TypeError):
            raise _Refused(400, "send lora_name and lora_path as JSON") from None
        if not isinstance(name, str) or not isinstance(path, str) or "\0" in path or not set(wanted) <= {"lora_name", "lora_path"}:
            raise _Refused(400, "lora_name and lora_path are texts, and all that can be said")
        folder, mount = Path(path), self._mount.resolve()
        if not folder.is_absolute() or ".." in folder.parts or mount not in folder.resolve().parents:
            raise _Refused(403, "lora_path is outside of the adapters' folder")
        return json.dumps({"lora_name": name, "lora_path": path}).encode()

    async def _until_ready(self) -> None:
        """Until vLLM has loaded its model."""
        give_up = time.monotonic() + self._ready_timeout_s
        while not self._ready:
            if not self._vllm.alive():
                raise await self._dead()
            if await self._healthy():
                self._ready = True
            elif time.monotonic() > give_up:
                raise _Refused(503, "vLLM is still loading the model: try again soon", **{"retry-after": str(RETRY_AFTER_S)})
            else:
                await asyncio.sleep(LOOK_AGAIN_S)

    async def _healthy(self) -> bool:
        assert self._session is not None
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S), self._session.get(f"{self._vllm.url}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _see_what_others_wrote(self) -> None:
        async with self._reloading:
            for wait_s in (*RELOAD_TRIES_S, None):
                try:
                    await asyncio.to_thread(self._reload)
                    return
                except Exception as error:  # the SDK has many
                    if wait_s is None:
                        log.warning("the Volume could not be reloaded", exc_info=error)
                        message = "the adapters' Volume could not be looked at again: try again soon"
                        raise _Refused(503, message, **{"retry-after": str(RETRY_AFTER_S)}) from error
                    await asyncio.sleep(wait_s)

    async def _pass_on(self, method: str, path: str, body: bytes, send: Send) -> None:
        """Each piece of the answer as it comes. One that breaks off in the middle breaks off at the caller's too."""
        assert self._session is not None
        headers = {"accept-encoding": "identity"} | ({"content-type": "application/json"} if method == "POST" else {})
        begun = False
        try:
            async with self._session.request(method, self._vllm.url + path, data=body or None, headers=headers) as response:
                said = [(name.lower().encode(), value.encode()) for name, value in response.headers.items() if name.lower() in _PASSED]
                begun = True
                await send({"type": "http.response.start", "status": response.status, "headers": said})
                async for piece in response.content.iter_any():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except aiohttp.ClientError as error:
            dead = await self._dead()
            if begun:
                raise
            raise dead from error

    async def _dead(self) -> _Refused:
        if not self._vllm.alive():
            await asyncio.to_thread(self._gone)
        return _Refused(503, "vLLM has ended, or does not answer: another one is started", **{"retry-after": str(RETRY_AFTER_S)})


_PASSED = frozenset({"content-type", "content-length", "cache-control", "retry-after"})


async def _body_of(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _CallerLeft
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise _Refused(413, f"the body is over {MAX_BODY_BYTES} bytes")
        if not message.get("more_body", False):
            return bytes(body)


async def _while_there(receive: Receive, work: Awaitable[None]) -> None:
    """`work`, but for when the caller leaves: then it is cancelled."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, refused: _Refused) -> None:
    """In vLLM's shape."""
    error = {"message": refused.message, "type": "Refused", "param": None, "code": refused.status}
    body = json.dumps({"error": error}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | refused.headers
    said = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": said})
    await send({"type": "http.response.body", "body": body, "more_body": False})
