"""Answers of Modal's double that get lost on the way: what was asked for is done, and the caller is told that the network failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grpclib import Status

from tests.modal_server.rpc import Caller, Unary, refuse
from tests.modal_server.server import ModalDouble


def lose_answers(server: ModalDouble, method: str, times: int) -> None:
    """The next `times` calls of a Dict's or Volume's method are done, but not answered."""
    done = (server.dicts.rpcs() | server.volumes.rpcs())[method]
    left = [times]

    async def answer(request: Any, caller: Caller) -> Any:
        answered = await done(request, caller)
        if left[0] > 0:
            left[0] -= 1
            raise refuse(Status.UNAVAILABLE, "the answer got lost")
        return answered

    lossy: dict[str, Unary] = {method: answer}
    server._plane.answer(lossy)


def meanwhile(server: ModalDouble, method: str, happens: Callable[[], None]) -> None:
    """Once, after the next call of a Volume's method is done and before it is answered."""
    done = server.volumes.rpcs()[method]
    left = [happens]

    async def answer(request: Any, caller: Caller) -> Any:
        answered = await done(request, caller)
        if left:
            left.pop()()
        return answered

    server._plane.answer({method: answer})


SDK_GIVES_UP = 100
"""More times than the SDK tries again by itself."""
