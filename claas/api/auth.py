"""Who may call: bearer keys, or, where none is set, this machine's own programs only.

Without a key the service listens on loopback, but a web page can still reach it: through a name of its own that resolves to 127.0.0.1, or
by posting across origins. Both show in headers that a browser does not let a page choose.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from claas.api.deps import services_of
from claas.api.errors import Forbidden
from claas.core.errors import AuthenticationFailed
from claas.core.settings import LOOPBACK_HOSTS

HEALTH_PATHS = frozenset({"/health", "/v1/health"})
OPEN_PATHS = HEALTH_PATHS | {"/docs", "/openapi.json"}


class Gate:
    """Refuses requests without a valid key (401), or, where no key is set, those that do not come from this machine (403)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            keys = services_of(scope["app"]).settings.api_keys
            headers = Headers(scope=scope)
            if not keys:
                refuse_strangers(headers)
            elif scope["path"] not in OPEN_PATHS and not has_key(headers, keys):
                raise AuthenticationFailed(
                    "that API key is not valid here" if "authorization" in headers else "send your API key as 'Authorization: Bearer KEY'"
                )
        await self._app(scope, receive, send)


def has_key(headers: Headers, keys: Sequence[SecretStr]) -> bool:
    """Whether the request carries one of `keys`. Takes equally long whichever it is, and however much of it is right."""
    scheme, _, presented = headers.get("authorization", "").partition(" ")
    # Starlette reads header bytes as Latin-1; encoding so gives back the bytes that were sent. Equal lengths, so that time tells nothing.
    digest = hashlib.sha256(presented.strip().encode("latin-1")).digest()
    matches = [hmac.compare_digest(digest, hashlib.sha256(key.get_secret_value().strip().encode()).digest()) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


def refuse_strangers(headers: Headers) -> None:
    """Raise Forbidden unless `Host`, and `Origin` where there is one, name this machine."""
    hosts = headers.getlist("host")
    if not hosts or not all(_is_loopback(f"//{host}") for host in hosts):
        raise Forbidden("without an API key this service answers to 127.0.0.1, localhost and [::1] only: set CLAAS_API_KEYS to open it")
    if not all(_is_loopback(origin) for origin in headers.getlist("origin")):
        raise Forbidden("without an API key this service answers no web page of another origin: set CLAAS_API_KEYS to open it")


@lru_cache(maxsize=256)
def _is_loopback(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.hostname in LOOPBACK_HOSTS and parts.username is None and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
