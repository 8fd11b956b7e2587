"""What ASGI servers may do that neither uvicorn nor a test client does at will: failing sends, and cancelling."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import pytest
from starlette.types import ASGIApp, Message

from claas.api.app import create_app
from tests.api.wire import CHAT, HELLO
from tests.doubles.inference import Steps
from tests.doubles.services import World

SCOPE: dict[str, Any] = {
    "type": "http",
    "method": "POST",
    "path": CHAT,
    "query_string": b"",
    "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
}


@pytest.fixture
async def app(world: World) -> AsyncIterator[ASGIApp]:
    app = create_app(lambda: nullcontext(world.services))
    async with app.router.lifespan_context(app):
        yield app


class Connection:
    """One request that sends `body` and then stays until `left`; what the app sends is counted, and fails after `sends`."""

    def __init__(self, body: dict[str, Any], sends: int = 1000) -> None:
        self._messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self._sends = sends
        self.left = asyncio.Event()
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if len(self.sent) >= self._sends:
            raise OSError("the client left")
        self.sent.append(message)


@pytest.mark.parametrize("sends", [0, 1, 5])
async def test_a_send_that_fails_means_that_the_client_left(
    app: ASGIApp, world: World, caplog: pytest.LogCaptureFixture, sends: int
) -> None:
    world.inference.reply = lambda _: "x" * 100
    connection = Connection(HELLO | {"stream": True, "n": 2}, sends)
    await app(SCOPE | {"asgi": {"version": "3.0", "spec_version": "2.4"}}, connection.receive, connection.send)
    assert len(connection.sent) == sends
    assert [rollout.finish_reason for rollout in world.rollouts.kept.values()] == ["abort", "abort"]
    assert not world.inference.running
    assert not caplog.records


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_the_server_cancels_is_stored(app: ASGIApp, world: World, stream: bool) -> None:
    world.inference.steps = steps = Steps(3)
    connection = Connection(HELLO | {"stream": stream})
    serving = asyncio.ensure_future(app(SCOPE, connection.receive, connection.send))
    await asyncio.wait_for(steps.blocked.wait(), 10)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    (rollout,) = world.rollouts.kept.values()
    assert (rollout.finish_reason, len(rollout.response_token_ids)) == ("abort", 3)
    assert not world.inference.running


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_while_it_waits_to_be_admitted(app: ASGIApp, world: World, stream: bool) -> None:
    world.inference.doors = Steps(1)  # of three replies one is let in
    connection = Connection(HELLO | {"stream": stream, "n": 3})
    serving = asyncio.ensure_future(app(SCOPE, connection.receive, connection.send))
    for _ in range(3):
        await asyncio.wait_for(world.inference.asked.get(), 10)
    connection.left.set()
    await asyncio.wait_for(serving, 10)
    assert [message.get("status") for message in connection.sent[:1]] == [499]
    assert not world.inference.running
    assert not world.rollouts.kept
    world.inference.doors.release()
    await asyncio.wait_for(world.inference.doors.acquire(), 10)  # nobody else waits there any more


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_the_server_cancels_while_it_is_admitted(app: ASGIApp, world: World, stream: bool) -> None:
    world.inference.doors = doors = Steps(1)
    connection = Connection(HELLO | {"stream": stream, "n": 2})
    serving = asyncio.ensure_future(app(SCOPE, connection.receive, connection.send))
    await asyncio.wait_for(doors.blocked.wait(), 10)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert not world.inference.running
    assert not connection.sent
