"""The app over the doubles: in this process (`client`), and behind a real server on a socket (`live`)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path

import httpx
import pytest
import uvicorn

from claas.api.app import create_app
from claas.cli.server import bind
from tests.doubles.services import World, open_world

LOCAL = "http://127.0.0.1"


class Server(uvicorn.Server):
    """uvicorn's, which says when it listens and leaves this process's signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def in_process(world: World, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app that needs no socket."""
    app = create_app(lambda: nullcontext(world.services))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=LOCAL, headers=headers) as client,
    ):
        yield client


@asynccontextmanager
async def on_socket(world: World) -> AsyncIterator[str]:
    """The app behind uvicorn on a free port of 127.0.0.1; yields its URL."""
    with bind("127.0.0.1", 0) as sock:
        app = create_app(lambda: nullcontext(world.services))
        server = Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5))
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        await server.listening.wait()
        try:
            yield f"{LOCAL}:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as world:
        yield world


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with in_process(world) as client:
        yield client


@pytest.fixture
async def live(world: World) -> AsyncIterator[str]:
    async with on_socket(world) as url:
        yield url
