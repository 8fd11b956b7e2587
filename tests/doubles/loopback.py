"""The life of a double that is an HTTP server: uvicorn in a thread on a loopback port, killed without a goodbye, started again."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Self

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp

from claas.cli.server import bind


class Loopback(ABC):
    """A server whose port stays the same from its first start on."""

    def __init__(self) -> None:
        self.port = 0
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @abstractmethod
    def app(self) -> ASGIApp:
        """The application of a new life."""

    def start(self) -> None:
        listener = bind("127.0.0.1", self.port)  # as the service does: else each second write would wait 40 ms
        self.port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(self.app(), log_level="critical", lifespan="on"))
        self._server, self._thread = server, threading.Thread(target=self._run, args=(server, listener), daemon=True)
        self._thread.start()
        while not server.started:
            assert self._thread.is_alive(), "the double did not start"
            time.sleep(0.002)

    def kill(self) -> None:
        """As `kill -9`: connections break, nothing is finished. Safe to call twice."""
        if self._thread is not None and self._loop is not None:
            with suppress(RuntimeError):  # its loop has ended already
                self._loop.call_soon_threadsafe(self.cut)
            self._thread.join(timeout=10)
            assert not self._thread.is_alive(), "the double did not end"
        self._server = self._thread = self._loop = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def cut(self) -> None:
        """In the server's loop: close every socket at once."""
        if (server := self._server) is None:
            return
        server.should_exit = server.force_exit = True
        for listening in server.servers:
            listening.close()
        for connection in list(server.server_state.connections):
            connection.transport.abort()

    async def break_connection(self, http: Request) -> None:
        assert self._server is not None
        await asyncio.sleep(0.01)  # let what was sent leave
        for connection in list(self._server.server_state.connections):
            if connection.client == tuple(http.client or ()):  # type: ignore[union-attr]
                connection.transport.abort()

    def _run(self, server: uvicorn.Server, listener: socket.socket) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await server.serve(sockets=[listener])

        asyncio.run(serve())
