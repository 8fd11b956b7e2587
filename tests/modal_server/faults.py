"""What goes wrong on demand, one thing at a time, each for as many calls as the test says."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grpclib import Status
from modal_proto import api_pb2 as pb

from tests.modal_server.rpc import refuse


def crashed() -> pb.GenericResult:
    """What becomes of an input by default when its container dies."""
    return pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE, exception="the container ended unexpectedly")


@dataclass
class _Refusal:
    status: Status
    text: str
    times: int


@dataclass
class _Delay:
    seconds: float
    times: int


@dataclass
class Faults:
    """The gate of the control plane, and what the scheduler asks before it does its work.

    Only whoever knows the token gets in; containers show their task instead.
    """

    token: tuple[str, str]
    # No container comes, as where no GPU is to be had.
    no_containers: bool = False
    # No outputs are there any more, as a week later.
    outputs_expired: bool = False
    # What becomes of an input whose container dies.
    crash: pb.GenericResult = field(default_factory=crashed)
    _refusals: dict[str, _Refusal] = field(default_factory=dict)
    _lost: Counter[str] = field(default_factory=Counter)
    _delays: dict[str, _Delay] = field(default_factory=dict)
    _results: list[pb.GenericResult] = field(default_factory=list)

    def refuse(self, method: str, status: Status, text: str, times: int = 1) -> None:
        """The next `times` calls of this method, such as "FunctionMap", end with this status."""
        self._refusals[method] = _Refusal(status, text, times)

    def unavailable(self, method: str, times: int = 1) -> None:
        """The next `times` calls of this method fail as where the network blips."""
        self.refuse(method, Status.UNAVAILABLE, "the control plane is unavailable", times)

    def lose_answer(self, method: str, times: int = 1) -> None:
        """The next `times` calls of this method are done, but who asked is told that the network failed."""
        self._lost[method] = times

    def delay(self, method: str, seconds: float, times: int = 1) -> None:
        """The next `times` calls of this method are answered this much later."""
        self._delays[method] = _Delay(seconds, times)

    def result(self, status: pb.GenericResult.GenericStatus.ValueType, text: str = "") -> None:
        """The next input reaches no container: this is its result."""
        self._results.append(pb.GenericResult(status=status, exception=text))

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        self.no_containers = self.outputs_expired = False
        self.crash = crashed()
        self._refusals.clear()
        self._lost.clear()
        self._delays.clear()
        self._results.clear()

    def take_result(self) -> pb.GenericResult | None:
        """The result that the next input gets instead of running."""
        return self._results.pop(0) if self._results else None

    async def admit(self, method: str, headers: Mapping[str, Any]) -> None:
        """See `Gate`."""
        delay = self._delays.get(method)
        if delay and delay.times > 0:
            delay.times -= 1
            await asyncio.sleep(delay.seconds)
        shown = (headers.get("x-modal-token-id"), headers.get("x-modal-token-secret"))
        if not headers.get("x-task-id") and shown != self.token:
            raise refuse(Status.UNAUTHENTICATED, "Token ID is malformed, or the token is invalid")
        refusal = self._refusals.get(method)
        if refusal and refusal.times > 0:
            refusal.times -= 1
            raise refuse(refusal.status, refusal.text)

    def deliver(self, method: str) -> None:
        """See `Gate`."""
        if self._lost[method] > 0:
            self._lost[method] -= 1
            raise refuse(Status.UNAVAILABLE, "the answer was lost")
