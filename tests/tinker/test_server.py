"""What the connection to a Tinker server withstands."""

from __future__ import annotations

import asyncio

from claas.models.tinker_server import TinkerServer


async def test_a_server_that_closes_idle_connections_is_not_taken_for_silent() -> None:
    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")  # by which the connection is kept open
        await reader.read(1)  # the next request, or the end
        writer.close()

    async with await asyncio.start_server(answer_once, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        server = TinkerServer(base_url=f"http://127.0.0.1:{port}", api_key="tml-x", timeout_s=5.0, patience_s=1.0)
        try:
            for _ in range(3):
                await server.ping()
        finally:
            await server.aclose()
