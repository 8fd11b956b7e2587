"""The gRPC side of the double: every call of Modal's control plane, those it answers and those it does not.

A handler gets the request and who asks, and returns the answer; it raises `refuse(...)` where Modal would say no.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpclib.const
import grpclib.server
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb


@dataclass(frozen=True)
class Caller:
    """Who asks: a container by its task, or a client, which has no task."""

    task_id: str | None


Unary = Callable[[Any, Caller], Awaitable[Message]]
Streaming = Callable[[Any, Caller], AsyncIterator[Message]]
Handlers = Mapping[str, Unary | Streaming]


class Gate(Protocol):
    """Looks at each call before it is answered, and raises where it must not be."""

    async def admit(self, method: str, headers: Mapping[str, Any]) -> None: ...

    def deliver(self, method: str) -> None:
        """What was asked for is done: raises where the caller is not to hear of it."""


class Ids:
    """Names for objects, as long as Modal's, in the order they are made."""

    def __init__(self) -> None:
        self._next: defaultdict[str, itertools.count[int]] = defaultdict(lambda: itertools.count(1))

    def new(self, prefix: str) -> str:
        return f"{prefix}-{next(self._next[prefix]):022d}"


def refuse(status: Status, text: str) -> GRPCError:
    """The error that ends a call with this status."""
    return GRPCError(status, text)


def not_found(text: str) -> GRPCError:
    """Modal knows no such object."""
    return refuse(Status.NOT_FOUND, text)


class ControlPlane:
    """What grpclib serves: all the methods of `ModalClient`."""

    def __init__(self, gate: Gate) -> None:
        self.calls: Counter[str] = Counter()
        self.unimplemented: list[str] = []
        self._gate = gate
        self._unary: dict[str, Unary] = {}
        self._streaming: dict[str, Streaming] = {}

    def answer(self, handlers: Mapping[str, Unary]) -> None:
        """These calls have one answer each."""
        self._unary |= handlers

    def stream(self, handlers: Mapping[str, Streaming]) -> None:
        """These calls have any number of answers."""
        self._streaming |= handlers

    def __mapping__(self) -> dict[str, grpclib.const.Handler]:
        service = pb.DESCRIPTOR.services_by_name["ModalClient"]
        return {f"/{service.full_name}/{method.name}": self._handler(method) for method in service.methods}

    def _handler(self, method: Any) -> grpclib.const.Handler:
        name, streams = method.name, method.server_streaming
        shapes = {
            (False, False): grpclib.const.Cardinality.UNARY_UNARY,
            (False, True): grpclib.const.Cardinality.UNARY_STREAM,
            (True, False): grpclib.const.Cardinality.STREAM_UNARY,
            (True, True): grpclib.const.Cardinality.STREAM_STREAM,
        }

        async def serve(stream: grpclib.server.Stream[Any, Any]) -> None:
            await self._serve(name, stream)

        shape = shapes[method.client_streaming, streams]
        return grpclib.const.Handler(serve, shape, GetMessageClass(method.input_type), GetMessageClass(method.output_type))

    async def _serve(self, name: str, stream: grpclib.server.Stream[Any, Any]) -> None:
        self.calls[name] += 1
        headers: Mapping[str, Any] = stream.metadata or {}
        request = await stream.recv_message()
        await self._gate.admit(name, headers)
        caller = Caller(task_id=_text(headers.get("x-task-id")))
        if name in self._streaming:
            async for answer in self._streaming[name](request, caller):
                await stream.send_message(answer)
        elif name in self._unary:
            answer = await self._unary[name](request, caller)
            self._gate.deliver(name)
            await stream.send_message(answer)
        else:
            self.unimplemented.append(name)
            raise refuse(Status.UNIMPLEMENTED, f"the double does not answer {name}")


def _text(value: object) -> str | None:
    return None if value is None else str(value)
