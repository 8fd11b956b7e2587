"""Answers as they come into being: server-sent events, and clients that leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from claas.api.errors import body_of, unforeseen
from claas.api.formats import Format
from claas.api.serving import Replies
from claas.core.errors import ClaasError

log = logging.getLogger(__name__)
T = TypeVar("T")


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns, or None if the client leaves first: then `work` is cancelled, and its cleaning up is awaited.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_wait_until_left(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _wait_until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class ReplyStream(Response):
    """Replies as server-sent events, each sent when it is sampled. Owns the replies: they are closed whatever happens."""

    media_type = "text/event-stream"

    def __init__(self, replies: Replies, wording: Format, *, include_usage: bool, headers: Mapping[str, str]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._replies = replies
        self._wording = wording
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._replies:
            await unless_left(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._events()) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            return  # how some servers say that the client left

    async def _events(self) -> AsyncGenerator[bytes]:
        try:
            for reply in self._replies.replies:
                for event in self._wording.opening(reply.index):
                    yield self._event(event)
            async for index, chunk in self._replies:
                for event in self._wording.pieces(index, chunk):
                    yield self._event(event)
            if self._include_usage:
                yield self._event(self._wording.usage(self._replies))
            yield b"data: [DONE]\n\n"
        except ClaasError as error:
            yield _data(body_of(error).model_dump_json())
        except Exception:
            log.exception("%s broke while it was streamed", self._replies.ask.id)
            yield _data(unforeseen(self._replies.ask.id).model_dump_json())

    def _event(self, event: BaseModel) -> bytes:
        # OpenAI: with include_usage every chunk but the last says usage: null
        return _data(event.model_dump_json(exclude_unset=True))


def _data(json: str) -> bytes:
    return f"data: {json}\n\n".encode()
