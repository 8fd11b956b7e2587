"""The web addresses of functions: HTTP in front, Modal's own protocol for web functions behind, chunk by chunk both ways.

A request whose answer takes longer to begin than Modal waits is redirected to where it can go on waiting.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator

from aiohttp import web
from modal_proto import api_pb2 as pb

from tests.modal_server.calls import Call, Calls, follow

POLL = "__modal_function_call_id"
HOP_BY_HOP = {"transfer-encoding", "content-length", "connection", "date", "server"}


class Fronts:
    """One small HTTP server for each web function, as on Modal each has a host name of its own."""

    def __init__(self, wait_s: float) -> None:
        self.wait_s = wait_s
        self._calls: Calls | None = None
        self._runners: list[web.AppRunner] = []
        self._pending: dict[str, AsyncIterator[pb.Asgi]] = {}

    def serve(self, calls: Calls) -> None:
        self._calls = calls

    async def open(self, function_id: str, method: str) -> str:
        """Starts one, and says where it is."""

        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._handle(request, function_id, method)

        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", handle)
        return await self.listen(app)

    async def listen(self, app: web.Application) -> str:
        """Serves an application on a free port."""
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        self._runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        return f"http://{host}:{port}"

    async def close(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _handle(self, request: web.Request, function_id: str, method: str) -> web.StreamResponse:
        assert self._calls is not None
        call_id = request.query.get(POLL, "")
        if call_id not in self._pending:
            call = await self._begin(self._calls, request, function_id, method)
            call_id, self._pending[call.id] = call.id, _messages(call)
        call, messages = self._calls.get(call_id), self._pending[call_id]
        await call.wait_for(lambda: bool(call.data_out) or not call.unfinished, self.wait_s)
        if not call.data_out and call.unfinished:
            return web.Response(status=303, headers={"Location": f"{request.path}?{POLL}={call_id}"})
        del self._pending[call_id]
        return await self._answer(request, call, messages)

    async def _begin(self, calls: Calls, request: web.Request, function_id: str, method: str) -> Call:
        call = calls.create(function_id, pb.FUNCTION_CALL_INVOCATION_TYPE_SYNC)
        peer = request.transport.get_extra_info("peername") if request.transport else None
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "https",
            "path": request.path,
            "raw_path": request.raw_path.partition("?")[0].encode(),
            "root_path": "",
            "query_string": request.query_string.encode(),
            "headers": [(name.lower(), value) for name, value in request.raw_headers],
            "client": tuple(peer[:2]) if peer else None,
            "server": None,
        }
        body = pb.Asgi(http_request=pb.Asgi.HttpRequest(body=await request.read(), more_body=False))
        _send(call, body)
        message = pb.FunctionInput(args=pickle.dumps(((scope,), {})), data_format=pb.DATA_FORMAT_PICKLE, method_name=method)
        await calls.put(call, [pb.FunctionPutInputsItem(idx=0, input=message)])
        return call

    async def _answer(self, request: web.Request, call: Call, messages: AsyncIterator[pb.Asgi]) -> web.StreamResponse:
        response: web.StreamResponse | None = None
        try:
            async for message in messages:
                if message.HasField("http_response_start"):
                    response = web.StreamResponse(status=message.http_response_start.status)
                    for name, value in _headers(message.http_response_start):
                        if name.lower() not in HOP_BY_HOP:
                            response.headers.add(name, value)
                    await response.prepare(request)
                elif message.HasField("http_response_body") and response is not None:
                    await response.write(message.http_response_body.body)
                    if not message.http_response_body.more_body:
                        await response.write_eof()
                        return response
        except (asyncio.CancelledError, ConnectionError):
            _send(call, pb.Asgi(http_disconnect=pb.Asgi.HttpDisconnect()))
            await call.notify()
            raise
        if response is None:
            return web.Response(status=500, text="modal-http: internal error: function call failed")
        # The container is gone in the middle of its answer: so is the connection.
        if request.transport is not None:
            request.transport.abort()
        return response


def _send(call: Call, message: pb.Asgi) -> None:
    chunk = pb.DataChunk(data_format=pb.DATA_FORMAT_ASGI, data=message.SerializeToString(), index=len(call.data_in) + 1)
    call.data_in.append(chunk)


async def _messages(call: Call) -> AsyncIterator[pb.Asgi]:
    async for chunk in follow(call, call.data_out):
        yield pb.Asgi.FromString(chunk.data)


def _headers(start: pb.Asgi.HttpResponseStart) -> list[tuple[str, str]]:
    flat = [header.decode("latin-1") for header in start.headers]
    return list(zip(flat[::2], flat[1::2], strict=True))
