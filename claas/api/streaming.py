"""Answers on their way: whole, or as server-sent events while they come into being; and clients that leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Self
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from claas.api.errors import body_of, unforeseen
from claas.api.formats import Format
from claas.api.serving import Ask, Replies
from claas.core.errors import ClaasError
from claas.services import Services

CLIENT_LEFT = 499  # nobody reads it but the access log

log = logging.getLogger(__name__)


class UnlessLeft:
    """A block that is cancelled, its cleaning up awaited, when the client leaves: nothing is raised then, and `left` is true.

    The request's body must have been read.
    """

    def __init__(self, receive: Receive) -> None:
        self.left = False
        self._receive = receive

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "it runs in a task"
        self._task, self._cancelled_before = task, task.cancelling()
        self._watch = asyncio.create_task(self._wait_until_left())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._watch.cancel()
        if not self.left:
            return False
        others = self._task.uncancel() > self._cancelled_before  # such as the end of the service
        return kind is asyncio.CancelledError and not others

    async def _wait_until_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self._task.cancel()


class Answer(Response):
    """Samples the replies that were asked for and sends them. A client that leaves, whenever it does, frees what it held.

    What is raised before a byte was sent is the app's to answer; after that it is the stream's last event.
    """

    media_type = "text/event-stream"

    def __init__(self, services: Services, ask: Ask, wording: Format, *, stream: bool) -> None:
        self.status_code = 200
        self.background = None
        self._services = services
        self._ask = ask
        self._wording = wording
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with Replies(self._services, self._ask) as replies, UnlessLeft(receive) as client:
            await replies.admit()
            headers = {"x-claas-adapter": quote(replies.speaker, safe="/@:.~_- ")}
            if self._stream:
                await self._send_events(replies, headers, send)
                return
            await replies.drain()
            response = Response(self._wording.whole(replies).model_dump_json(), media_type="application/json", headers=headers)
        await (Response(status_code=CLIENT_LEFT) if client.left else response)(scope, receive, send)

    async def _send_events(self, replies: Replies, headers: Mapping[str, str], send: Send) -> None:
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._body(replies)) as body:
                async for piece in body:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            return  # how some servers say that the client left

    async def _body(self, replies: Replies) -> AsyncGenerator[bytes]:
        """Events that are there at once go out at once, in one piece: the closing with the last token."""
        try:
            if opening := _framed(self._wording.opening()):
                yield opening
            unsent: list[bytes] = []
            unfinished = self._ask.n
            async for sampled in replies:
                unsent = [event for index, chunk in sampled for event in self._wording.pieces(index, chunk)]
                unfinished -= sum(chunk.finish_reason is not None for _, chunk in sampled)
                if unsent and unfinished:
                    yield _framed(unsent)
            yield _framed([*unsent, *self._wording.closing(replies), b"[DONE]"])
        except ClaasError as error:
            yield _framed([body_of(error).model_dump_json().encode()])
        except Exception:
            log.exception("%s broke while it was streamed", self._ask.id)
            yield _framed([unforeseen(self._ask.id).model_dump_json().encode()])


def _framed(events: Iterable[bytes]) -> bytes:
    return b"".join([b"data: %b\n\n" % event for event in events])
