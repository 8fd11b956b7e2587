"""`claas serve` as a process, over the doubles: `python -m tests.cli.serving FOLDER`. Replies stop after three tokens and hang."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from claas.cli import server
from claas.core.settings import Settings
from claas.services import Services
from tests.doubles.services import open_world


@asynccontextmanager
async def open_services(settings: Settings) -> AsyncIterator[Services]:
    async with open_world(settings.data_dir) as world:
        world.inference.steps = asyncio.Semaphore(3)
        yield world.services
    sys.stdout.write("closed\n")


def main() -> None:
    sock = server.bind("127.0.0.1", 0)

    def on_ready(_: server.Server, services: Services) -> None:
        sys.stdout.write(server.url_of(sock) + "\n")
        sys.stdout.flush()

    server.run(Settings(data_dir=Path(sys.argv[1])), open_services, sock, on_ready)


if __name__ == "__main__":
    main()
