"""What chat and text completions have in common: admit, then answer whole or as a stream."""

from __future__ import annotations

from urllib.parse import quote

from fastapi import Request
from starlette.responses import Response

from claas.api.formats import Format
from claas.api.serving import Ask, admit
from claas.api.streaming import ReplyStream, unless_left
from claas.services import Services

CLIENT_LEFT = 499  # nobody reads it but the access log


async def answer(request: Request, services: Services, ask: Ask, wording: Format, *, stream: bool, include_usage: bool) -> Response:
    """Sample the replies and answer. A client that leaves frees its slots."""
    replies = await admit(services, ask)
    headers = {"x-claas-adapter": quote(replies.speaker, safe="/@:.~_- ")}
    if stream:
        return ReplyStream(replies, wording, include_usage=include_usage, headers=headers)
    async with replies:
        if await unless_left(request.receive, replies.drain()) is None:
            return Response(status_code=CLIENT_LEFT)
    return Response(wording.whole(replies).model_dump_json(), media_type="application/json", headers=headers)
