"""The service as the command line sees it: HTTP calls, and the server's own words when one fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx

from claas.core.errors import ClaasError

Message = dict[str, str]
CONNECT_TIMEOUT_S = 5.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PREFERRED_ADAPTER = "assistant"


class ServiceError(ClaasError):
    """The service answered with an error; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(ClaasError):
    """No service answers there, or it broke off."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply. `speaker` is `lora_id@version`, None for the base model."""

    id: str
    text: str
    finish_reason: str
    speaker: str | None


class Client:
    """One service. Every method raises ServiceError or Unreachable, and blocks for as long as the service takes."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(
            base_url=self.url,
            headers={b"authorization": f"Bearer {api_key}".encode()} if api_key else None,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            trust_env=_host(self.url) not in LOOPBACK,  # a proxy does not lead to this machine
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    # --- Chat ---

    def chat(self, model: str, messages: Sequence[Message], **sampling: Any) -> Reply:
        """A whole reply. `sampling` holds OpenAI's fields; those that are None are left out."""
        response = self._send("POST", "/v1/chat/completions", json=_body(model, messages, sampling))
        body = response.json()
        choice = body["choices"][0]
        return Reply(body["id"], choice["message"]["content"], choice["finish_reason"], response.headers.get("x-claas-adapter"))

    def stream(self, model: str, messages: Sequence[Message], on_text: Callable[[str], None], **sampling: Any) -> Reply:
        """Like `chat`, and `on_text` gets each piece as it comes. Interrupting it frees the service's slot."""
        reply_id, finish_reason, text = "", None, []
        with self._stream("POST", "/v1/chat/completions", json=_body(model, messages, sampling) | {"stream": True}) as response:
            for event in _events(response.iter_lines()):
                if "error" in event:
                    raise ServiceError(event["error"]["message"], response.status_code)
                reply_id = event["id"]
                for choice in event["choices"]:
                    if piece := choice["delta"].get("content"):
                        text.append(piece)
                        on_text(piece)
                    finish_reason = choice["finish_reason"] or finish_reason
        if finish_reason is None:
            raise Unreachable("the reply broke off before its end")
        return Reply(reply_id, "".join(text), finish_reason, response.headers.get("x-claas-adapter"))

    def feedback(
        self,
        completion_ids: Sequence[str],
        feedback: str | None = None,
        *,
        rating: int | None = None,
        demonstration: str | None = None,
        show: bool = False,
    ) -> dict[str, Any]:
        """Teach one lesson: the same feedback on each of these replies, in words, as a rating (1 or -1) or as the reply that was wanted.

        Returns the service's whole answer once the step is done.
        """
        said = _given({"feedback": feedback, "rating": rating, "demonstration": demonstration})
        entries = [{"completion_id": completion_id} | said for completion_id in completion_ids]
        return self._json("POST", "/v1/feedback", json={"requests": entries, "show": show})

    def feedback_state(self, feedback_id: str) -> dict[str, Any]:
        """Where a feedback item stands."""
        return self._json("GET", f"/v1/feedback/{quote(feedback_id, safe='')}")

    def retract(self, feedback_id: str) -> dict[str, Any]:
        """Begin to take a lesson back; where its feedback stands."""
        return self._json("DELETE", f"/v1/feedback/{quote(feedback_id, safe='')}")

    # --- Models and adapters ---

    def models(self) -> list[str]:
        """Everything a request's `model` may name."""
        return [card["id"] for card in self._json("GET", "/v1/models")["data"]]

    def default_model(self) -> str:
        """The adapter that is meant when none is named: the only one, or the one every service creates at its first start."""
        adapters = self.adapters()
        if len(adapters) == 1:
            return adapters[0]
        if PREFERRED_ADAPTER in adapters:
            return PREFERRED_ADAPTER
        known = ", ".join(adapters) or "none yet: 'claas adapters init NAME' creates one"
        raise ClaasError(f"name an adapter with --model (there are: {known})")

    def adapters(self, prefix: str = "") -> list[str]:
        """Ids of all adapters."""
        loras: list[str] = self._json("GET", "/v1/lora", params={"prefix": prefix})["loras"]
        return loras

    def init(self, lora_id: str, **fields: Any) -> dict[str, Any]:
        """A new adapter; `fields` are rank, alpha and the like, those that are None are left out."""
        return self._json("POST", "/v1/lora/init", json={"lora_id": lora_id} | _given(fields))

    def versions(self, lora_id: str) -> dict[str, Any]:
        """`latest` and `versions`, oldest first."""
        return self._json("GET", "/v1/lora/versions", params={"lora_id": lora_id})

    def rollback(self, lora_id: str, version: int) -> dict[str, Any]:
        """Serve this version from now on."""
        return self._json("POST", "/v1/lora/rollback", json={"lora_id": lora_id, "version": version})

    def export(self, lora_id: str, version: int | None) -> bytes:
        """A zip in PEFT's layout."""
        return self._send("GET", "/v1/lora/export", params=_given({"lora_id": lora_id, "version": version})).content

    def import_(self, lora_id: str, archive: bytes) -> dict[str, Any]:
        """A new adapter from a zip in PEFT's layout."""
        zipped = {"content-type": "application/zip"}
        return self._json("POST", "/v1/lora/import", params={"lora_id": lora_id}, content=archive, headers=zipped)

    def delete(self, lora_id: str) -> None:
        """Remove an adapter and all that was kept of it."""
        self._send("DELETE", "/v1/lora", params={"lora_id": lora_id})

    def health(self) -> dict[str, Any]:
        """Each part's health, whatever it is."""
        with self._connected():
            body: dict[str, Any] = self._http.get("/v1/health").json()
        return body

    # --- HTTP ---

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        with self._connected():
            body: dict[str, Any] = self._send(method, path, **request).json()
        return body

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        with self._connected():
            return _checked(self._http.request(method, path, **request))

    @contextmanager
    def _stream(self, method: str, path: str, **request: Any) -> Iterator[httpx.Response]:
        with self._connected(), self._http.stream(method, path, **request) as response:
            if not response.is_success:
                response.read()
            yield _checked(response)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unreachable(f"no service answers at {self.url}: start one with 'claas serve', or name another with --url") from error
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            raise Unreachable(f"{self.url} did not answer as a CLaaS service does: {str(error) or type(error).__name__}") from error


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.hostname
    except ValueError:  # a port or a bracket that makes no sense
        pass
    raise Unreachable(f"{url!r} is no address of a service: write http://host:port")


def _body(model: str, messages: Sequence[Message], sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": model, "messages": list(messages)} | _given(sampling)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):  # not our error shape: something else listens there
        message = f"HTTP {response.status_code} without an explanation"
    raise ServiceError(message, response.status_code)


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream, up to `[DONE]`."""
    for line in lines:
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        if line.startswith("data:"):
            yield json.loads(data)
