"""A small, honest double of the Tinker API, for the true SDK 0.24 over HTTP: real weights, gradients, moments and checkpoints of a tiny
Llama, futures that are polled for, faults on demand, and a choice of the ways in which real servers differ.

It can be killed without a goodbye and started again on the same port: checkpoints are there, models in memory are gone.
`tests/tinker/test_protocol.py` asks it and a real server the same questions.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from claas.models.base_model import LoadedModel
from tests.doubles.loopback import Loopback
from tests.doubles.tinker_engine import Failed, Refused, TinkerEngine
from tests.doubles.tinker_faults import CLOUD, Call, Fault, Ways
from tests.doubles.tinker_proto import PROTOBUF, as_protobuf
from tests.doubles.tinker_routes import Json, Routes
from tests.doubles.tinker_routes import Route as Answering

KEY = "tml-the-double"
Handler = Callable[[HttpRequest], Awaitable[Response]]
Work = Callable[[], Json]
# What changes a model: if one fails, its state is in doubt until a checkpoint is loaded.
STEP = ("forward_backward", "optim_step")


@dataclass(slots=True)
class Future:
    """A request that was accepted. `taken` once its answer was fetched."""

    name: str
    model_id: str | None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    answer: Json | None = None
    failure: Failed | None = None
    taken: bool = False


class TinkerDouble(Loopback):
    """The server. `calls`, `faults` and `violations` outlive its lives, and so does what `engine` keeps on disk.

    A request for a future's answer that is not there yet is told to come again after `poll_s` seconds.
    """

    def __init__(self, model: LoadedModel, ways: Ways = CLOUD, *, api_key: str | None = KEY, poll_s: float = 10.0) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.faults: list[Fault] = []
        self.violations: list[str] = []
        self.ways, self.model = ways, model
        self.engine = TinkerEngine(model, ways, self.violations)
        self.futures: dict[str, Future] = {}
        self._api_key, self.poll_s = api_key, poll_s
        self._routes = Routes(self.engine, self.submit)
        self._work = ThreadPoolExecutor(1)
        self._doing: set[asyncio.Task[None]] = set()

    # Life

    def start(self) -> None:
        self.engine.live.clear()
        for future in self.futures.values():
            if not future.done.is_set():
                future.failure = Failed("not done: it was asked of the server before", "server")
                future.done = asyncio.Event()
                future.done.set()
        self._work = ThreadPoolExecutor(1, "tinker-double")
        super().start()

    def kill(self) -> None:
        super().kill()
        self._work.shutdown(cancel_futures=True)

    # What a test asks

    def fail(self, name: str, do: str, **how: Any) -> Fault:
        fault = Fault(name, do, **how)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def called(self, *names: str) -> list[str]:
        """The routes that were called, in order; only these, if any are given."""
        return [call.name for call in self.calls if not names or call.name in names]

    def unawaited(self) -> list[str]:
        """Requests whose answer nobody fetched: a failure among them went unseen."""
        return [future.name for future in self.futures.values() if not future.taken]

    def pass_time(self, seconds: float) -> None:
        """For what expires."""
        self.engine.late_s += seconds

    # The application

    def app(self) -> Starlette:
        handlers = {where: self._answering(route) for where, route in self._routes.table().items()}
        handlers["POST", "/api/v1/retrieve_future"] = self._guarded("retrieve_future", self._retrieve)
        listed = [Route(path, handler, methods=[method]) for (method, path), handler in handlers.items()]
        return Starlette(routes=listed, lifespan=self._lifespan, exception_handlers={HTTPException: _detail})

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        for task in self._doing:
            task.cancel()

    def _answering(self, route: Answering) -> Handler:
        async def answer(http: HttpRequest) -> Response:
            found = route(http.state.body, http)
            return found if isinstance(found, Response) else JSONResponse(found)

        return self._guarded(route.__name__, answer)

    def _guarded(self, name: str, handler: Handler) -> Handler:
        async def guarded(http: HttpRequest) -> Response:
            http.state.body = json.loads(await http.body() or b"{}")
            self.calls.append(Call(name, http.url.path, http.state.body))
            if self._api_key and http.headers.get("x-api-key") != self._api_key and name not in ("healthz", "download"):
                return JSONResponse({"detail": "Invalid API key"}, 401)
            http.state.fault = next((fault for fault in list(self.faults) if fault.strikes(name)), None)
            try:
                return await self._faulty(handler, http)
            except Refused as refused:
                return JSONResponse({"detail": refused.detail}, refused.status)
            except ValidationError as error:
                return JSONResponse({"detail": json.loads(error.json(include_url=False, include_context=False))}, 422)

        return guarded

    async def _faulty(self, handler: Handler, http: HttpRequest) -> Response:
        fault: Fault | None = http.state.fault
        match fault.do if fault else None:
            case "status":
                assert fault is not None
                headers = {"retry-after": f"{fault.retry_after:g}"} if fault.retry_after is not None else None
                return JSONResponse({"detail": fault.text}, fault.status, headers)
            case "hang":
                await asyncio.Event().wait()
            case "delay":
                assert fault is not None
                await asyncio.sleep(fault.seconds)
            case "die":
                self.cut()
                return Response()
            case "lost":
                await handler(http)
                await self.break_connection(http)
                return Response()
        return await handler(http)

    # Futures

    def submit(self, name: str, work: Work, http: HttpRequest, *, once: str | None, model_id: str | None) -> str:
        """The id of the future that does this work, after all that was submitted before it. What `once` names is done once."""
        request_id = once if once is not None and self.ways.once else f"{len(self.futures) + 1}"
        if request_id not in self.futures:
            self.futures[request_id] = future = Future(name, model_id)
            doing = asyncio.create_task(self._do(future, work, http.state.fault))
            self._doing.add(doing)
            doing.add_done_callback(self._doing.discard)
        return request_id

    async def _do(self, future: Future, work: Work, fault: Fault | None) -> None:
        # Taken at once, so that requests are done in the order they came in.
        computed = asyncio.get_running_loop().run_in_executor(self._work, self._compute, work, fault)
        try:
            future.answer = await computed
        except Failed as failed:
            future.failure = failed
        except Refused as refused:
            future.failure = Failed(refused.detail)
        if future.failure is not None and future.name in STEP and (live := self.engine.live.get(future.model_id or "")):
            live.broken = True
        if fault is not None and fault.do == "slow":
            await asyncio.sleep(fault.seconds)
        future.done.set()

    def _compute(self, work: Work, fault: Fault | None) -> Json:
        if fault is not None and fault.do == "fail":
            raise Failed(fault.text, fault.category)
        if fault is not None and fault.do == "crash":
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self.cut)
            raise Failed("the double died at it", "server")
        return work()

    async def _retrieve(self, http: HttpRequest) -> Response:
        request_id = http.state.body["request_id"]
        if (future := self.futures.get(request_id)) is None:
            raise Refused(404, "Future not found")
        try:
            async with asyncio.timeout(self.poll_s):
                await future.done.wait()
        except TimeoutError:
            return JSONResponse({"type": "try_again", "request_id": request_id, "queue_state": "active"}, 408)
        future.taken = True
        if (failed := future.failure) is not None:
            if self.ways.failures == "status":
                raise Refused(400, failed.text)
            return JSONResponse({"error": failed.text, "category": failed.category})
        assert future.answer is not None
        if self.ways.protobuf and PROTOBUF in http.headers.get("accept", ""):
            return Response(as_protobuf(future.answer), media_type=PROTOBUF)
        return JSONResponse(future.answer)


async def _detail(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code)
