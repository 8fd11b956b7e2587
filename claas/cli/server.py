"""Runs the service: opens it, binds its address, and ends it within seconds however many replies are open.

Knows no backend: what it serves is opened by the `OpenServices` it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import Any

import uvicorn
from uvicorn.loops.auto import auto_loop_factory

from claas.api.app import create_app
from claas.core.errors import ConfigurationError
from claas.core.settings import Settings
from claas.services import Services

OpenServices = Callable[[Settings], AbstractAsyncContextManager[Services]]
GRACE_S = 3  # what open replies get to end by themselves
LAST_RESORT_S = 15  # then requests are cancelled
KEEPALIVE_S = 75  # longer than clients do: httpx keeps an idle connection for 5 s, and uvicorn would close it just then


class Server(uvicorn.Server):
    """uvicorn's server, which says when it listens, and ends what is open by closing the backends rather than by cancelling requests.

    Signals are ours: uvicorn raises them again after its end, which would cancel the closing of the services.
    """

    def __init__(self, config: uvicorn.Config, services: Services, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._services = services
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.freeze()  # what is loaded by now stays: looking through it for garbage would hold every stream back by a quarter of a second
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(self._end_what_is_open())
        await super().shutdown(sockets)
        closing.cancel()

    async def _end_what_is_open(self) -> None:
        """Replies end with "abort" and lessons with 503, so that every client gets a whole answer."""
        await asyncio.sleep(GRACE_S)
        await self._services.inference.aclose()
        await self._services.engine.aclose()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded, so that a taken port is known at once. Raises ConfigurationError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named: asyncio turns Nagle's algorithm off on such sockets alone, which would hold streamed tokens back by 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere it would let two services share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen()
    except OSError as error:
        sock.close()
        raise ConfigurationError(f"cannot listen on {host}:{port} ({error.strerror}): choose another with --host or --port") from error
    return sock


def url_of(sock: socket.socket) -> str:
    """Where the service bound to `sock` is reached from this machine."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound here, but told
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    settings: Settings,
    open_services: OpenServices,
    sock: socket.socket,
    on_ready: Callable[[Server, Services], None],
    *,
    verbose: bool = False,
    signals: bool = True,
) -> None:
    """Serve until told to stop: by Ctrl-C or SIGTERM where `signals`, else by `Server.should_exit`. Raises what opening raises."""

    async def serve() -> None:
        async with open_services(settings) as services:
            config = uvicorn.Config(
                create_app(lambda: nullcontext(services)),
                log_config=None,
                access_log=verbose,
                lifespan="on",
                timeout_graceful_shutdown=LAST_RESORT_S,
                timeout_keep_alive=KEEPALIVE_S,
                server_header=False,
            )
            server = Server(config, services, lambda: on_ready(server, services))
            with _stop_on_signals(server) if signals else nullcontext():
                await server.serve(sockets=[sock])

    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        runner.run(serve())


def quieten(*, verbose: bool) -> None:
    """Log what matters to standard error; of the libraries' own warnings nothing."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if not verbose:
        warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|huggingface_hub)\b")


@contextmanager
def _stop_on_signals(server: Server) -> Iterator[None]:
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def in_background(settings: Settings, open_services: OpenServices) -> Iterator[str]:
    """The whole service in a thread of this process, for as long as the block lasts; yields its URL. Raises what opening raises."""
    ready: Future[Server] = Future()
    with contextlib.closing(bind(settings.host, settings.port)) as sock:
        url = url_of(sock)

        def serve() -> None:
            try:
                run(settings, open_services, sock, lambda server, _: ready.set_result(server), signals=False)
            except BaseException as error:
                if ready.done():
                    raise
                ready.set_exception(error)

        thread = threading.Thread(target=serve, name="claas-service", daemon=True)
        thread.start()
        server = ready.result()
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()


def hint(url: str, services: Services) -> dict[str, Any]:
    """What to do with a service that has just begun to listen: label to line."""
    settings = services.settings
    body = f'{{"model": "{settings.default_adapter}", "messages": [{{"role": "user", "content": "Who are you?"}}]}}'
    key = ' -H "authorization: Bearer $CLAAS_API_KEY"' if settings.api_keys else ""
    return {
        "model": services.base_model_id,
        "adapter": settings.default_adapter,
        "chat": f"claas chat --url {url}",
        "curl": f"curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{body}'",
        "openai": f'OpenAI(base_url="{url}/v1", api_key={"..." if settings.api_keys else "none"!r})',
        "docs": f"{url}/docs",
    }
