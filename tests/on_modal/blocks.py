"""Blocks of files that Modal's double no longer has when they are fetched, as where the file was replaced or removed meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.modal_server.rpc import Caller
from tests.modal_server.server import ModalDouble


def lose_blocks(server: ModalDouble, happens: Callable[[], object]) -> None:
    """The next file that is read is gone when its blocks are asked for; `happens` is what made it so."""
    find = server.volumes.rpcs()["VolumeGetFile2"]
    left = [happens]

    async def answer(request: Any, caller: Caller) -> Any:
        answered: Any = await find(request, caller)
        if left:
            left.pop()()
            answered.get_urls[:] = [f"{url}-gone" for url in answered.get_urls]
        return answered

    server._plane.answer({"VolumeGetFile2": answer})
