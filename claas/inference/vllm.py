"""The vLLM backend: a server that the operator runs, asked over HTTP, with every reply's exact tokens kept as they pass through.

Requests go through `vllm_control`'s gate, speak through one adapter version (`vllm_adapters`) from the first token to the last, and are
put into vLLM's words by `vllm_wire`. Prompts are rendered there for chat; scoring renders here, with the same tokenizer and template.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from pydantic import JsonValue, SecretStr
from pydantic_core import to_json
from transformers import PreTrainedTokenizerBase

from claas.core.errors import BackendUnavailable, BadRequest, ClaasError, ConfigurationError, ContextOverflow
from claas.core.settings import Settings
from claas.core.types import LoraRuntimeRef, RoomPlan, ServiceHealth
from claas.inference.base import GenerationChunk, GenerationRequest, InferenceBackend, Room, Score, TokenStream
from claas.inference.vllm_adapters import SharedFolder, VllmAdapters
from claas.inference.vllm_control import CONTROL_TIMEOUT_S, DOWN, HEALTH_TIMEOUT_S, DeviceMemory, ReleasePolicy, VllmControl
from claas.inference.vllm_http import UnknownToVllm, VllmDown, VllmHttp
from claas.inference.vllm_wire import EventReader, route_and_body, score_body, scored
from claas.models.chat_template import encode_reply, render

BACKGROUND_AT_ONCE = 8
LEAST_VERSION = (0, 31)
TEMPLATE_TOKENS = 1024
"""More than a chat template adds of its own."""
SPECIMEN = "CLaaS: naïve façade, 12 345 £ and 你好 — def f(x): return x<0"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VllmPeer:
    """A vLLM: where it is, and how this service gets on with it.

    `policy`: how it makes room for a step. `folder`: where adapters are; None: their refs say it, and other services use it too.
    `on_demand`: it starts when it is asked for something, and is paid for: requests wait for it, and nobody asks just to see how it is.
    """

    url: str
    api_key: str | None
    policy: ReleasePolicy
    folder: SharedFolder | None
    max_adapters: int
    drain_timeout_s: float
    gate_timeout_s: float
    on_demand: bool = False


def vllm_of(settings: Settings) -> VllmPeer:
    """The one that the operator runs, at `vllm_base_url`."""
    assert settings.vllm_base_url is not None
    return VllmPeer(
        url=settings.vllm_base_url,
        api_key=_secret(settings.vllm_api_key),
        policy=settings.vllm_release,
        folder=SharedFolder(settings.adapters_dir, settings.vllm_lora_root or settings.adapters_dir.resolve()),
        max_adapters=settings.vllm_max_adapters,
        drain_timeout_s=settings.feedback_drain_timeout_s,
        gate_timeout_s=settings.vllm_gate_timeout_s,
    )


def vllm_on_modal(settings: Settings, url: str) -> VllmPeer:
    """The one of the app on Modal, at `url`: it has a GPU of its own and the Volume in sight, and ends when nobody asks it anything."""
    return VllmPeer(
        url=url.rstrip("/"),
        api_key=_secret(settings.vllm_api_key),
        policy="none",
        folder=None,
        max_adapters=settings.vllm_max_adapters,
        drain_timeout_s=settings.feedback_drain_timeout_s,
        gate_timeout_s=settings.modal_start_timeout_s,
        on_demand=True,
    )


def _secret(key: SecretStr | None) -> str | None:
    return key.get_secret_value() if key else None


class VllmInference(InferenceBackend):
    """Serves what the vLLM `server` serves. Make it on the event loop that will use it, and `begin`."""

    kind: Literal["vllm"] = "vllm"

    def __init__(
        self,
        server: VllmPeer,
        tokenizer: PreTrainedTokenizerBase,
        memory: DeviceMemory,
        *,
        control_timeout_s: float = CONTROL_TIMEOUT_S,
    ) -> None:
        self._server = server
        self._http = VllmHttp(server.url, server.api_key)
        self._adapters = VllmAdapters(self._http, server.max_adapters, server.folder)
        self._control = VllmControl(
            self._http,
            memory,
            policy=server.policy,
            drain_timeout_s=server.drain_timeout_s,
            gate_timeout_s=server.gate_timeout_s,
            adapters=self._adapters,
            look=self._look,
            control_timeout_s=control_timeout_s,
            on_demand=server.on_demand,
        )
        self._tokenizer = tokenizer
        self._base_model = ""
        self._max_context = 0
        self._background = asyncio.Semaphore(BACKGROUND_AT_ONCE)
        self._streams: set[VllmStream] = set()
        self._closing = False

    async def begin(self) -> None:
        """Find vLLM, and wake it if need be. One that is not there yet is looked for from then on."""
        await self._control.begin()

    async def stream(self, request: GenerationRequest) -> TokenStream:
        return await self._known_there(request.adapter, lambda: self._open(request))

    async def score(self, request: GenerationRequest, completion: str | tuple[int, ...]) -> Score:
        prompt = self._prompt(request)
        targets = encode_reply(self._tokenizer, completion) if isinstance(completion, str) else completion
        if not targets:
            raise BadRequest("completion is empty: there is nothing to score", param="completion")

        async def ask() -> Any:
            async with AsyncExitStack() as stack:
                model = await self._speaker(request, stack)
                return await self._http.ask("POST", "/v1/completions", score_body(model, (*prompt, *targets)), timeout_s=None)

        answer = await self._known_there(request.adapter, ask)
        return Score(len(prompt), targets, tuple(map(self.token_text, targets)), scored(answer, targets))

    async def reply_tokens(self, text: str) -> tuple[int, ...]:
        return (*encode_reply(self._tokenizer, text), self._tokenizer.eos_token_id)

    def token_text(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def paused(self, plan: RoomPlan) -> AbstractAsyncContextManager[Room]:
        return self._control.room(plan)

    async def activate(self, ref: LoraRuntimeRef) -> None:
        async with self._control.admitted(background=True):
            await self._adapters.load(ref)

    def in_use(self, lora_id: str, version: int) -> bool:
        return self._adapters.in_use(lora_id, version)

    @asynccontextmanager
    async def leaving(self, lora_id: str) -> AsyncIterator[None]:
        async with self._adapters.leaving(lora_id):
            yield

    async def forget(self, lora_id: str) -> None:
        await self._adapters.forget(lora_id)

    async def health(self) -> ServiceHealth:
        detail: dict[str, JsonValue] = {
            "state": self._control.state,
            "running": self._control.running,
            "waiting": self._control.waiting,
            "loaded_adapters": len(self._adapters),
        }
        if self._closing or self._control.state == "down":
            return ServiceHealth(status="unhealthy", error="the service is closing" if self._closing else DOWN, detail=detail)
        if self._server.on_demand:
            return ServiceHealth(status="healthy", detail=detail)
        try:
            await self._http.ask("GET", "/health", timeout_s=HEALTH_TIMEOUT_S)
        except ClaasError as error:
            return ServiceHealth(status="unhealthy", error=error.message, detail=detail)
        return ServiceHealth(status="healthy", detail=detail)

    async def aclose(self) -> None:
        self._closing = True
        await asyncio.gather(*(stream.abort() for stream in list(self._streams)))
        await self._control.aclose()
        await self._adapters.aclose()
        await self._http.aclose()

    async def _known_there(self, ref: LoraRuntimeRef | None, work: Callable[[], Awaitable[T]]) -> T:
        """`work`, and once more if vLLM has forgotten the version, which it does when it is restarted: then it is loaded anew."""
        try:
            return await work()
        except UnknownToVllm:
            if ref is None:
                raise
            return await work()

    async def _open(self, request: GenerationRequest) -> VllmStream:
        async with AsyncExitStack() as stack:
            model = await self._speaker(request, stack)
            route, body = route_and_body(request, model, self._tokenizer, self._max_context)
            content, max_tokens = to_json(body), request.sampling.max_tokens or 0
            events = await stack.enter_async_context(self._http.events(route, content))
            check = partial(self._check_fits, max_tokens=max_tokens)
            stream = VllmStream(events, EventReader(request.sampling.top_logprobs), check, self._control)
            if len(content) + TEMPLATE_TOKENS + max_tokens > self._max_context:  # else it fits: no token is shorter than a byte
                await stream.begin()
            self._streams.add(stream)
            stack.callback(self._streams.discard, stream)
            stream.owns(stack.pop_all())
        return stream

    def _check_fits(self, prompt: Sequence[int], max_tokens: int) -> None:
        """vLLM cuts a max_tokens that does not fit in silence. Raises ContextOverflow."""
        if len(prompt) + max_tokens > self._max_context:
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens and {max_tokens} are to be sampled, but the context holds {self._max_context}: send "
                "a shorter one or ask for fewer max_tokens"
            )

    async def _speaker(self, request: GenerationRequest, stack: AsyncExitStack) -> str:
        """The name in vLLM of who is to speak; admitted and loaded until the stack is closed."""
        if self._closing:
            raise BackendUnavailable("the service is closing: try again later")
        if request.background:
            await stack.enter_async_context(self._background)
        await stack.enter_async_context(self._control.admitted(background=request.background))
        return await stack.enter_async_context(self._adapters.using(request.adapter)) if request.adapter else self._base_model

    def _prompt(self, request: GenerationRequest) -> tuple[int, ...]:
        if request.prompt is not None:
            return tuple(self._tokenizer(request.prompt)["input_ids"])
        return render(self._tokenizer, request.messages, request.template_kwargs)

    async def _look(self) -> None:
        """Whether this is a vLLM that can serve us. Raises ConfigurationError if not, BackendUnavailable if there is none."""
        version = str((await self._http.ask("GET", "/version"))["version"])
        if (found := re.match(r"(\d+)\.(\d+)", version)) and tuple(map(int, found.groups())) < LEAST_VERSION:
            raise ConfigurationError(f"vLLM {version} is too old: CLaaS needs {'.'.join(map(str, LEAST_VERSION))} or newer")
        cards = (await self._http.ask("GET", "/v1/models"))["data"]
        card, *_ = (card for card in cards if card["parent"] is None)
        self._base_model, self._max_context = card["id"], card["max_model_len"]
        body = {"model": self._base_model, "prompt": SPECIMEN, "add_special_tokens": False}
        theirs = (await self._http.ask("POST", "/tokenize", body))["tokens"]
        if tuple(theirs) != tuple(self._tokenizer(SPECIMEN, add_special_tokens=False)["input_ids"]):
            raise ConfigurationError(
                f"vLLM serves {self._base_model!r}, which reads text otherwise than the model trained here: start it with the base model "
                "that CLAAS_BASE_MODEL_ID names"
            )
        await self._adapters.begin()


class VllmStream(TokenStream):
    """One reply as vLLM sends it. `check` refuses a prompt that is too long, once vLLM has told its tokens: with the first event."""

    def __init__(
        self, events: AsyncIterator[bytes], reader: EventReader, check: Callable[[Sequence[int]], None], control: VllmControl
    ) -> None:
        self.prompt_token_ids = ()
        self._events = events
        self._reader = reader
        self._check = check
        self._control = control
        self._resources = AsyncExitStack()
        self._ahead: GenerationChunk | None = None
        self._ended = self._aborted = False

    async def begin(self) -> None:
        """Wait for vLLM's first word, so that what does not fit is refused before anything is answered."""
        while self._ahead is None and not self.prompt_token_ids:
            self._ahead = await self._read()

    def owns(self, resources: AsyncExitStack) -> None:
        """What is let go when the stream is closed."""
        self._resources = resources

    def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        return self

    async def __anext__(self) -> GenerationChunk:
        if self._ended:
            raise StopAsyncIteration
        try:
            chunk, self._ahead = self._ahead, None
            while chunk is None:
                chunk = await self._read()
        except ClaasError as error:
            await self.aclose()
            if self._aborted:
                return GenerationChunk(text="", tokens=(), finish_reason="abort")
            if isinstance(error, VllmDown):
                await self._control.lost()
            raise
        if chunk.finish_reason is not None:
            with suppress(ClaasError):  # what is left says nothing; read to its end, the connection can be used again
                async for _ in self._events:
                    pass
            await self.aclose()  # now, not when the last byte has been read by who asked: an update may be waiting
        return chunk

    async def _read(self) -> GenerationChunk | None:
        """What the next event adds, if anything."""
        data = await anext(self._events, b"[DONE]")
        if data == b"[DONE]":
            raise BackendUnavailable("vLLM ended a reply without saying how: send the request again")
        chunk = self._reader.read(data)
        if not self.prompt_token_ids:
            self.prompt_token_ids = self._reader.prompt_token_ids
            self._check(self.prompt_token_ids)
        return chunk

    async def abort(self) -> None:
        """End it from outside: whoever iterates gets a last chunk that says "abort"."""
        self._aborted = True
        await self._resources.aclose()

    async def aclose(self) -> None:
        self._ended = True
        await self._resources.aclose()
