"""A small, honest double of vLLM 0.32's HTTP server: the same routes, shapes, states and refusals, scripted text, faults on demand.

It can be killed without a goodbye and started again on the same port with no adapter loaded. It writes down every call in order.
`tests/vllm/test_protocol.py` asks it and a real vLLM the same questions.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, get_args

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from tests.doubles import vllm_wire as wire
from tests.doubles.loopback import Loopback
from tests.doubles.vllm_engine import Mode, Refused, VllmEngine
from tests.doubles.vllm_faults import Call, Fault
from tests.doubles.vllm_script import Step

VERSION = "0.32.0"
CONTROL = ("/pause", "/resume", "/sleep", "/wake_up", "/release_kv_cache_memory", "/reset_prefix_cache", "/collective_rpc")
ADAPTERS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
Handler = Callable[[HttpRequest], Awaitable[Response]]


class VllmDouble(Loopback):
    """The server. `engine` is that of the present life; `calls`, `faults` and `violations` outlive it.

    `chunk_tokens` tokens go into one streamed chunk, as when a client reads slowly. Other options are the engine's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        api_key: str | None = None,
        dev_mode: bool = True,
        runtime_loras: bool = True,
        parsers: wire.Parsers = wire.Parsers(),  # noqa: B008 - frozen
        chunk_tokens: int = 1,
        engine_class: type[VllmEngine] = VllmEngine,
        **engine: Any,
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.faults: list[Fault] = []
        self.violations: list[str] = []
        self.chunk_tokens = chunk_tokens
        self._new_engine: Callable[[], VllmEngine] = lambda: engine_class(tokenizer, violations=self.violations, **engine)
        self.engine = self._new_engine()
        self._api_key, self._dev_mode, self._runtime_loras, self._parsers = api_key, dev_mode, runtime_loras, parsers
        self._draws = 0

    # Life

    def start(self) -> None:
        """A new life with no adapter loaded."""
        self.engine = self._new_engine()
        self.engine.on_death = self.cut
        super().start()

    @property
    def alive(self) -> bool:
        return not self.engine.dead and self.running

    def cut(self) -> None:
        self.engine.dead = True
        super().cut()

    # What a test asks

    def control_calls(self) -> list[str]:
        """Pause, sleep, wake and adapter calls in their order, with their query or adapter."""
        return [str(call) for call in self.calls if call.path in (*CONTROL, *ADAPTERS) and call.method == "POST"]

    def fail(self, path: str, do: str, **how: Any) -> Fault:
        fault = Fault(path, do, **how)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    # The application

    def app(self) -> Starlette:
        routes = {
            ("GET", "/health"): self._health,
            ("GET", "/version"): self._version,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/v1/models"): self._models,
            ("POST", CHAT): self._chat,
            ("POST", TEXT): self._text,
            ("POST", "/tokenize"): self._tokenize,
        }
        if self._runtime_loras:
            routes |= {("POST", ADAPTERS[0]): self._load, ("POST", ADAPTERS[1]): self._unload}
        if self._dev_mode:
            routes |= {("POST", path): self._control for path in CONTROL}
            routes |= {("GET", "/is_paused"): self._is_paused, ("GET", "/is_sleeping"): self._is_sleeping}
            routes |= {("GET", "/server_info"): self._server_info}
        listed = [Route(path, self._guarded(handler), methods=[method]) for (method, path), handler in routes.items()]
        return Starlette(routes=listed, lifespan=self._lifespan, exception_handlers={HTTPException: _detail})

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        scheduling = asyncio.create_task(self.engine.loop())
        yield
        scheduling.cancel()

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(http: HttpRequest) -> Response:
            raw = await http.body()
            try:
                body = json.loads(raw) if raw else {}
            except ValueError:
                return JSONResponse(wire.error_body(Refused(400, "Bad Request", "1 validation error:\n  invalid JSON", "body")), 400)
            path = http.url.path
            self.calls.append(Call(http.method, path, dict(http.query_params), body))
            if self._api_key and path.startswith("/v1") and http.headers.get("authorization") != f"Bearer {self._api_key}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            http.state.body = body
            http.state.fault = next((fault for fault in list(self.faults) if fault.strikes(path)), None)
            try:
                return await self._faulty(handler, http)
            except Refused as refused:
                after = BackgroundTask(self.break_connection, http) if refused.breaks else None
                return JSONResponse(wire.error_body(refused), refused.status, background=after)

        return guarded

    async def _faulty(self, handler: Handler, http: HttpRequest) -> Response:
        fault: Fault | None = http.state.fault
        match fault.do if fault else None:
            case "status":
                assert fault is not None
                raise Refused(fault.status, "InternalServerError", fault.text)
            case "hang":
                await asyncio.Event().wait()
            case "delay":
                assert fault is not None
                await asyncio.sleep(fault.seconds)
            case "half":
                assert fault is not None
                await self.engine.sleep_half()
                raise Refused(fault.status, "InternalServerError", fault.text)
            case "die":
                self.cut()
            case "die_after" | "lost" as end:
                await handler(http)
                if end == "lost":
                    await self.break_connection(http)
                else:
                    self.cut()
        return await handler(http) if fault is None or fault.do in ("delay", "drop", "error") else Response()

    # Routes

    async def _health(self, http: HttpRequest) -> Response:
        return Response(status_code=503 if self.engine.dead else 200)

    async def _version(self, http: HttpRequest) -> Response:
        return JSONResponse({"version": VERSION})

    async def _models(self, http: HttpRequest) -> Response:
        engine = self.engine
        card = {"object": "model", "created": int(engine.started), "owned_by": "vllm"}
        base = card | {"id": engine.model, "root": engine.model, "parent": None, "max_model_len": engine.max_model_len}
        adapters = [
            card | {"id": adapter.name, "root": adapter.path, "parent": engine.model, "max_model_len": None}
            for adapter in engine.adapters.values()
        ]
        return JSONResponse({"object": "list", "data": [base, *adapters]})

    async def _tokenize(self, http: HttpRequest) -> Response:
        body = http.state.body
        tokens = self.engine.tokenizer.encode(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))
        answer = {"count": len(tokens), "max_model_len": self.engine.max_model_len, "tokens": tokens, "token_strs": None}
        return JSONResponse(answer | {"offset_mapping": None})

    async def _metrics(self, http: HttpRequest) -> Response:
        engine = self.engine
        labels = f'engine="0",model_name="{engine.model}"'
        states = ("awake", "weights_offloaded", "discard_all")
        lines = [f"process_start_time_seconds {engine.started!r}"]
        lines += [f'vllm:engine_sleep_state{{{labels},sleep_state="{name}"}} {float(engine.gauge == name)}' for name in states]
        lines += [f"vllm:num_requests_running{{{labels}}} {float(len(engine.running))}"]
        lines += [f"vllm:num_requests_waiting{{{labels}}} {float(len(engine.waiting))}"]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def _is_paused(self, http: HttpRequest) -> Response:
        return JSONResponse({"is_paused": self.engine.paused is not None})

    async def _is_sleeping(self, http: HttpRequest) -> Response:
        return JSONResponse({"is_sleeping": self.engine.is_sleeping})

    async def _server_info(self, http: HttpRequest) -> Response:
        if http.query_params.get("config_format") != "json":
            raise NotImplementedError("the double says it as JSON only")
        return JSONResponse({"vllm_config": {"lora_config": self.engine.lora_config}, "vllm_env": {}, "system_env": {}})

    async def _control(self, http: HttpRequest) -> Response:
        query, engine = http.query_params, self.engine
        mode: Mode = query.get("mode", "abort")  # type: ignore[assignment]
        level = int(query.get("level", "1"))
        if mode not in get_args(Mode):
            raise _not_valid("query.mode", "literal_error", "Input should be 'abort', 'wait' or 'keep'", mode)
        if level > 2:
            raise _not_valid("query.level", "less_than_equal", "Input should be less than or equal to 2", str(level))
        match http.url.path:
            case "/pause":
                await engine.pause(mode)
                return JSONResponse({"status": "paused"})
            case "/resume":
                engine.resume()
                return JSONResponse({"status": "resumed"})
            case "/sleep":
                await engine.sleep(level, mode)
                return JSONResponse({"status": "sleeping", "level": level})
            case "/collective_rpc":
                if http.state.body != {"method": "wake_up"}:
                    raise NotImplementedError("the double has this one method")
                engine.wake_workers()
                return JSONResponse({"results": [None]})
            case "/release_kv_cache_memory":
                engine.release_kv_cache()
                return JSONResponse({"status": "kv_cache_released"})
            case "/wake_up":
                tags = query.getlist("tags") or None
                return JSONResponse({"status": "awake" if engine.wake(tags) else "sleeping", "tags": tags})
        return JSONResponse({"success": engine.reset_prefix_cache()})

    async def _load(self, http: HttpRequest) -> Response:
        body = http.state.body
        for name in ("lora_name", "lora_path"):
            if name not in body:
                raise wire.missing(name, body)
        self.engine.load(body["lora_name"], body["lora_path"], in_place=bool(body.get("load_inplace")))
        return Response(f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

    async def _unload(self, http: HttpRequest) -> Response:
        self.engine.unload(http.state.body.get("lora_name", ""))
        return Response(f"Success: LoRA adapter '{http.state.body['lora_name']}' removed successfully.")

    async def _chat(self, http: HttpRequest) -> Response:
        return await self._generate(http, "chat", f"chatcmpl-{self._request_id(http)}")

    async def _text(self, http: HttpRequest) -> Response:
        return await self._generate(http, "text", f"cmpl-{self._request_id(http)}")

    def _request_id(self, http: HttpRequest) -> str:
        self._draws += 1
        return http.headers.get("x-request-id", f"{self._draws:016x}")

    async def _generate(self, http: HttpRequest, kind: wire.Kind, request_id: str) -> Response:
        request = wire.read(self.engine, kind, http.state.body, request_id, self._parsers, self._draws, int(time.time()))
        for run in request.runs:
            self.engine.add(run)
        if request.body.get("stream"):
            return StreamingResponse(self._events(http, request), media_type="text/event-stream")
        gone = asyncio.ensure_future(_left(http))
        whole = asyncio.ensure_future(self._whole(request))
        try:
            await asyncio.wait({gone, whole}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await whole) if whole.done() else Response()
        finally:
            gone.cancel()
            whole.cancel()
            for run in request.runs:
                self.engine.drop(run)

    async def _whole(self, request: wire.Request) -> dict[str, Any]:
        steps: list[list[Step]] = [[] for _ in request.runs]
        for index, run in enumerate(request.runs):
            while not (steps[index] and steps[index][-1].finish):
                steps[index].append(_step(await run.out.get()))
        return wire.whole(request, self.engine, steps)

    async def _events(self, http: HttpRequest, request: wire.Request) -> AsyncIterator[bytes]:
        """The stream as vLLM sends it: nothing before the first step of any choice, and `[DONE]` even after an abort or an error."""
        head = wire.head(request, self.engine, chunk=True)
        fault: Fault | None = http.state.fault
        began, sent = False, 0
        try:
            async for index, steps in _merged(request, max(self.chunk_tokens, request.body.get("stream_interval") or 1)):
                if request.kind == "chat" and not began:
                    for choice in range(len(request.runs)):
                        yield wire.event(head | wire.first_chunk(request, choice))
                began = True
                if (chunk := wire.next_chunk(request, self.engine, index, steps)) is not None:
                    yield wire.event(head | chunk)
                    sent += len(steps)
                if fault and fault.do == "drop" and sent >= fault.tokens:
                    await self.break_connection(http)
                    await asyncio.Event().wait()
                if fault and fault.do == "error" and sent >= fault.tokens:
                    raise Refused(fault.status, "InternalServerError", fault.text)
            if (request.body.get("stream_options") or {}).get("include_usage"):
                yield wire.event(head | {"choices": [], "usage": wire.usage(request)})
        except Refused as refused:
            yield wire.event(wire.error_body(refused))
        finally:
            for run in request.runs:
                self.engine.drop(run)
        yield wire.event("[DONE]")


async def _merged(request: wire.Request, chunk_tokens: int) -> AsyncIterator[tuple[int, list[Step]]]:
    """Steps of all choices as they come: the first of each alone, then `chunk_tokens` of one choice together, and the rest at its end."""
    getting = {asyncio.ensure_future(run.out.get()): index for index, run in enumerate(request.runs)}
    held: list[list[Step]] = [[] for _ in request.runs]
    begun: set[int] = set()
    try:
        while getting:
            done, _ = await asyncio.wait(getting, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=getting.__getitem__):
                index = getting.pop(future)
                held[index].append(step := _step(future.result()))
                if not step.finish:
                    getting[asyncio.ensure_future(request.runs[index].out.get())] = index
                if step.finish or index not in begun or len(held[index]) >= chunk_tokens:
                    begun.add(index)
                    yield index, held[index]
                    held[index] = []
    finally:
        for future in getting:
            future.cancel()


def _step(item: Step | Refused) -> Step:
    if isinstance(item, Refused):
        raise item
    return item


async def _left(http: HttpRequest) -> None:
    """Returns when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _not_valid(where: str, kind: str, message: str, value: str) -> Refused:
    detail = {"type": kind, "loc": where, "msg": message, "input": value}
    return Refused(400, "Bad Request", f"1 validation error:\n  {detail}", where)


async def _detail(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code)
