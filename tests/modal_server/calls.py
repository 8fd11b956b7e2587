"""Function calls: their inputs, their outputs and the data streamed beside them, and who waits for what."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb

from tests.modal_server.faults import Faults
from tests.modal_server.functions import Functions
from tests.modal_server.rpc import Caller, Ids, Streaming, Unary, not_found

TERMINATED = pb.GenericResult.GENERIC_STATUS_TERMINATED


@dataclass
class Input:
    """One input of a call; `done` once it has a result."""

    id: str
    call: Call
    index: int
    message: pb.FunctionInput
    done: bool = False


@dataclass
class Call:
    """One call of a function, with all that is known of it."""

    id: str
    function_id: str
    kind: pb.FunctionCallInvocationType.ValueType
    inputs: list[Input] = field(default_factory=list)
    outputs: list[pb.FunctionGetOutputsItem] = field(default_factory=list)
    data_in: list[pb.DataChunk] = field(default_factory=list)
    data_out: list[pb.DataChunk] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def unfinished(self) -> int:
        return sum(not entry.done for entry in self.inputs)

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def wait_for(self, true: Callable[[], bool], seconds: float) -> bool:
        """Whether it came true in this time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self.changed:
                await self.changed.wait_for(true)
        return true()


class Scheduler(Protocol):
    """Who brings inputs to containers."""

    async def enqueue(self, entry: Input) -> None: ...

    async def cancel(self, entry: Input, kill: bool) -> None: ...


class Calls:
    """Each call under its id."""

    def __init__(self, ids: Ids, functions: Functions, faults: Faults) -> None:
        self._ids = ids
        self._functions = functions
        self._faults = faults
        self._calls: dict[str, Call] = {}
        self._scheduler: Scheduler | None = None

    def schedule_with(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def rpcs(self) -> dict[str, Unary]:
        return {
            "FunctionMap": self._map,
            "FunctionPutInputs": self._put_inputs,
            "FunctionFinishInputs": self._finish_inputs,
            "FunctionGetOutputs": self._get_outputs,
            "FunctionCallCancel": self._cancel,
            "FunctionCallFromId": self._from_id,
            "FunctionCallPutDataOut": self._put_data_out,
        }

    def streams(self) -> dict[str, Streaming]:
        return {"FunctionCallGetDataIn": self._get_data_in, "FunctionCallGetDataOut": self._get_data_out}

    def get(self, call_id: str) -> Call:
        if call_id not in self._calls:
            raise not_found(f"FunctionCall {call_id} not found")
        return self._calls[call_id]

    def create(self, function_id: str, kind: pb.FunctionCallInvocationType.ValueType) -> Call:
        """A call without inputs yet."""
        self._functions.get(function_id)
        call = Call(self._ids.new("fc"), function_id, kind)
        self._calls[call.id] = call
        return call

    async def put(self, call: Call, items: Iterable[pb.FunctionPutInputsItem]) -> list[pb.FunctionPutInputsResponseItem]:
        """Hands inputs over to the scheduler, except for those whose result a test decided."""
        assert self._scheduler is not None
        entries = [Input(self._ids.new("in"), call, item.idx, item.input) for item in items]
        for entry in entries:
            call.inputs.append(entry)
            if result := self._faults.take_result():
                await self.finish(entry, result)
            else:
                await self._scheduler.enqueue(entry)
        return [pb.FunctionPutInputsResponseItem(idx=entry.index, input_id=entry.id, input_jwt=entry.id) for entry in entries]

    async def finish(
        self, entry: Input, result: pb.GenericResult, data_format: pb.DataFormat.ValueType = pb.DATA_FORMAT_UNSPECIFIED, task_id: str = ""
    ) -> None:
        """The first result of an input is the one that counts."""
        if entry.done:
            return
        entry.done = True
        now = time.time()
        entry.call.outputs.append(
            pb.FunctionGetOutputsItem(
                result=result, idx=entry.index, input_id=entry.id, data_format=data_format, task_id=task_id, output_created_at=now
            )
        )
        await entry.call.notify()

    async def _map(self, request: pb.FunctionMapRequest, caller: Caller) -> pb.FunctionMapResponse:
        call = self.create(request.function_id, request.function_call_invocation_type)
        accepted = await self.put(call, request.pipelined_inputs)
        return pb.FunctionMapResponse(
            function_call_id=call.id,
            function_call_jwt=call.id,
            pipelined_inputs=accepted,
            retry_policy=self._functions.get(request.function_id).definition.retry_policy,
            max_inputs_outstanding=1000,
        )

    async def _put_inputs(self, request: pb.FunctionPutInputsRequest, caller: Caller) -> pb.FunctionPutInputsResponse:
        return pb.FunctionPutInputsResponse(inputs=await self.put(self.get(request.function_call_id), request.inputs))

    async def _finish_inputs(self, request: pb.FunctionFinishInputsRequest, caller: Caller) -> Empty:
        return Empty()

    async def _get_outputs(self, request: pb.FunctionGetOutputsRequest, caller: Caller) -> pb.FunctionGetOutputsResponse:
        call = self.get(request.function_call_id)
        if self._faults.outputs_expired:
            return pb.FunctionGetOutputsResponse(last_entry_id="0-0", num_unfinished_inputs=0)
        await call.wait_for(lambda: bool(call.outputs), request.timeout)
        first, last = (request.start_idx, request.end_idx) if request.HasField("start_idx") else (0, len(call.inputs))
        wanted = [output for output in call.outputs if first <= output.idx <= last]
        return pb.FunctionGetOutputsResponse(outputs=wanted, last_entry_id="0-0", num_unfinished_inputs=call.unfinished)

    async def _cancel(self, request: pb.FunctionCallCancelRequest, caller: Caller) -> Empty:
        assert self._scheduler is not None
        for entry in self.get(request.function_call_id).inputs:
            if not entry.done:
                await self._scheduler.cancel(entry, kill=request.terminate_containers)
                await self.finish(entry, pb.GenericResult(status=TERMINATED, exception="the function call was cancelled"))
        return Empty()

    async def _from_id(self, request: pb.FunctionCallFromIdRequest, caller: Caller) -> pb.FunctionCallFromIdResponse:
        call = self.get(request.function_call_id)
        metadata = pb.FunctionCallHandleMetadata(app_id=self._functions.get(call.function_id).app_id, function_id=call.function_id)
        return pb.FunctionCallFromIdResponse(function_call_id=call.id, num_inputs=len(call.inputs), metadata=metadata)

    async def _put_data_out(self, request: pb.FunctionCallPutDataRequest, caller: Caller) -> Empty:
        call = self.get(request.function_call_id)
        call.data_out.extend(request.data_chunks)
        await call.notify()
        return Empty()

    async def _get_data_in(self, request: pb.FunctionCallGetDataRequest, caller: Caller) -> AsyncIterator[pb.DataChunk]:
        call = self.get(request.function_call_id)
        async for chunk in follow(call, call.data_in, request.last_index):
            yield chunk

    async def _get_data_out(self, request: pb.FunctionCallGetDataRequest, caller: Caller) -> AsyncIterator[pb.DataChunk]:
        call = self.get(request.function_call_id)
        async for chunk in follow(call, call.data_out, request.last_index):
            yield chunk


async def follow(call: Call, chunks: list[pb.DataChunk], after: int = 0) -> AsyncIterator[pb.DataChunk]:
    """The chunks that come after this index, as they come, until the call is over."""
    sent = after

    def more() -> bool:
        return len(chunks) > sent or not call.unfinished

    while True:
        await call.wait_for(more, 55)
        while len(chunks) > sent:
            sent += 1
            yield chunks[sent - 1]
        if not call.unfinished:
            return
