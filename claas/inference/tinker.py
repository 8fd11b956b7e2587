"""The Tinker backend: replies are sampled on a Tinker server, each through the checkpoint of the version that speaks.

Prompts are rendered here, and tokens are turned into text here. Tinker's API answers with whole replies: the chunks of a stream come
together, when the reply has been sampled to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal, TypeVar

import tinker
from pydantic import JsonValue
from tinker import types

from claas.adapters.tinker import TinkerAdapters
from claas.core.errors import BackendUnavailable, BadRequest, ContextOverflow, Overloaded, UpstreamRefused
from claas.core.types import FinishReason, LoraRuntimeRef, RoomPlan, SamplingParams, ServiceHealth
from claas.core.usage import account
from claas.inference.base import GenerationChunk, GenerationRequest, InferenceBackend, Room, SampledToken, Score, TokenStream
from claas.inference.detokenize import Detokenizer
from claas.models.chat_template import encode_reply, render
from claas.models.tinker_model import TinkerModel
from claas.models.tinker_runs import TinkerRuns
from claas.models.tinker_server import TinkerServer

BACKGROUND_AT_ONCE = 16
RETRY_AFTER_S = 5

T = TypeVar("T")


class TinkerInference(InferenceBackend):
    """Serves `model` and the versions that `runs` knows. Make it on the event loop that will use it."""

    kind: Literal["tinker"] = "tinker"

    def __init__(
        self, server: TinkerServer, runs: TinkerRuns, adapters: TinkerAdapters, model: TinkerModel, *, max_queue: int, top_k: int
    ) -> None:
        self._server = server
        self._runs = runs
        self._adapters = adapters
        self._model = model
        self._max_queue = max_queue
        self._top_k = top_k
        self._background = asyncio.Semaphore(BACKGROUND_AT_ONCE)
        self._streams: set[TinkerStream] = set()
        self._closing = False

    async def stream(self, request: GenerationRequest) -> TokenStream:
        self._refuse_unsupported(request)
        prompt = await self._in_thread(lambda: self._prompt(request))
        if len(self._streams) >= self._max_queue:
            raise Overloaded(f"{len(self._streams)} replies are being sampled already: try again soon", retry_after_s=RETRY_AFTER_S)
        stream = TinkerStream(prompt, asyncio.ensure_future(self._reply(request, prompt)), self._streams)
        self._streams.add(stream)
        return stream

    async def score(self, request: GenerationRequest, completion: str | tuple[int, ...]) -> Score:
        prompt = await self._in_thread(lambda: self._prompt(request))
        targets = encode_reply(self._model.tokenizer, completion) if isinstance(completion, str) else completion
        if not targets:
            raise BadRequest("completion is empty: there is nothing to score", param="completion")
        if len(prompt) + len(targets) > self._model.max_context:
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens and the completion {len(targets)}, but the context holds {self._model.max_context}",
                param="completion",
            )
        scored = await self._speak(request, lambda sampler: self._server.score(sampler, prompt, targets))
        return Score(len(prompt), targets, tuple(map(self.token_text, targets)), scored.logprobs)

    async def reply_tokens(self, text: str) -> tuple[int, ...]:
        return (*await self._in_thread(lambda: encode_reply(self._model.tokenizer, text)), self._model.tokenizer.eos_token_id)

    def token_text(self, token_id: int) -> str:
        return str(self._model.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    @asynccontextmanager
    async def paused(self, plan: RoomPlan) -> AsyncIterator[Room]:
        """Nothing to pause: a lesson is trained in a run of its own."""
        yield Room()

    async def activate(self, ref: LoraRuntimeRef) -> None:
        async with self._runs.speaking(ref):
            pass

    async def forget(self, lora_id: str) -> None:
        """Whoever deletes an adapter's checkpoints drops who speaks through them."""

    async def health(self) -> ServiceHealth:
        detail: dict[str, JsonValue] = {"running": len(self._streams), "samplers": len(self._runs), "runs": self._runs.held}
        if self._closing:
            return ServiceHealth(status="unhealthy", error="the service is closing", detail=detail)
        try:
            await self._server.ping()
        except BackendUnavailable as error:
            return ServiceHealth(status="unhealthy", error=error.message, detail=detail)
        return ServiceHealth(status="healthy", detail=detail)

    async def aclose(self) -> None:
        self._closing = True
        for stream in list(self._streams):
            stream.abort()

    # --- a reply ---

    async def _reply(self, request: GenerationRequest, prompt: Sequence[int]) -> list[GenerationChunk]:
        """A whole reply, token by token as other backends stream it."""
        sampling = request.sampling
        limit = sampling.max_tokens or self._model.max_context - len(prompt)
        stop = [] if sampling.ignore_eos else sorted(self._model.stop_ids)
        params = types.SamplingParams(
            max_tokens=limit, seed=sampling.seed, stop=stop or None, temperature=sampling.temperature, top_p=sampling.top_p
        )
        async with AsyncExitStack() as stack:
            if request.background:
                await stack.enter_async_context(self._background)
            ids, logprobs, reason = await self._speak(request, lambda sampler: self._server.sample(sampler, prompt, params))
            tops = await self._tops(request, prompt, ids)
        tokens = [SampledToken(*token) for token in zip(ids, logprobs, tops, strict=True)]
        return _chunks(tokens, sampling, "stop" if reason == "stop" else "length", self._visible)

    async def _tops(self, request: GenerationRequest, prompt: Sequence[int], ids: Sequence[int]) -> Sequence[tuple[tuple[int, float], ...]]:
        """The alternatives to each token. The server tells them of prompts only, so the reply is read once more."""
        wanted = request.sampling.top_logprobs
        if not wanted or not ids:
            return [()] * len(ids)
        scored = await self._speak(request, lambda sampler: self._server.score(sampler, prompt, ids, top_k=wanted))
        if scored.top is None:
            raise BadRequest("top_logprobs is not supported by this Tinker server: leave it out", param="top_logprobs")
        return scored.top

    async def _speak(self, request: GenerationRequest, work: Callable[[tinker.SamplingClient], Awaitable[T]]) -> T:
        """`work` with the version's sampler, and once more if the server has forgotten it, as one does that was restarted."""
        if self._closing:
            raise BackendUnavailable("the service is closing: try again later")
        speaker = request.adapter.lora_id if request.adapter else None
        async with self._adapters.charged(account() or speaker):
            try:
                async with self._runs.speaking(request.adapter) as sampler:
                    return await work(sampler)
            except UpstreamRefused:
                await self._runs.renew(request.adapter)
                async with self._runs.speaking(request.adapter) as sampler:
                    return await work(sampler)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._closing:
            raise BackendUnavailable("the service is closing: try again later")
        return await asyncio.to_thread(work)

    def _prompt(self, request: GenerationRequest) -> tuple[int, ...]:
        """The request's prompt as token ids. Raises BadRequest, ContextOverflow."""
        if request.prompt is None:
            field, ids = "messages", render(self._model.tokenizer, request.messages, request.template_kwargs)
        else:
            field, ids = "prompt", tuple(self._model.tokenizer(request.prompt)["input_ids"])
        if not ids:
            raise BadRequest(f"{field} is empty: there is no token to begin with", param=field)
        wanted = request.sampling.max_tokens or 1
        if len(ids) + wanted > self._model.max_context:
            raise ContextOverflow(
                f"the {field} has {len(ids)} tokens and at least {wanted} are to be sampled, but the context holds "
                f"{self._model.max_context}: send a shorter one" + (" or ask for fewer max_tokens" if wanted > 1 else ""),
                param=field,
            )
        return ids

    def _refuse_unsupported(self, request: GenerationRequest) -> None:
        """What only a serving engine with parsers and grammars can honour. Raises BadRequest."""
        asked = {"tools": request.tools, "tool_choice": request.tool_choice, "response_format": request.response_format}
        for field, value in asked.items():
            if value:
                raise BadRequest(f"{field} is not supported in Tinker mode: leave it out, or serve with vLLM (VLLM_BASE_URL)", param=field)
        if request.sampling.top_logprobs > self._top_k:
            raise BadRequest(f"top_logprobs is at most {self._top_k} here: ask for fewer", param="top_logprobs")

    def _visible(self, ids: Sequence[int]) -> str:
        return str(self._model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _chunks(
    tokens: Sequence[SampledToken], sampling: SamplingParams, reason: FinishReason, decode: Callable[[Sequence[int]], str]
) -> list[GenerationChunk]:
    """The reply in pieces, cut after the token that completes a stop string."""
    detokenizer = Detokenizer(decode, sampling.stop)
    chunks: list[GenerationChunk] = []
    for token in tokens:
        chunks.append(GenerationChunk(text=detokenizer.push(token.id), tokens=(token,)))
        if detokenizer.stopped:
            reason = "stop"
            break
    last = chunks.pop() if chunks else GenerationChunk(text="", tokens=())
    rest = "" if detokenizer.stopped else detokenizer.finish()
    reason = "stop" if detokenizer.stopped else reason
    return [*chunks, GenerationChunk(text=last.text + rest, tokens=last.tokens, finish_reason=reason)]


class TinkerStream(TokenStream):
    """One reply, which is there whole or not yet."""

    def __init__(self, prompt: tuple[int, ...], reply: asyncio.Future[list[GenerationChunk]], open_streams: set[TinkerStream]) -> None:
        self.prompt_token_ids = prompt
        self._reply = reply
        self._given = 0
        self._ended = self._aborted = False
        self._open_streams = open_streams

    def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        return self

    async def __anext__(self) -> GenerationChunk:
        if self._ended:
            raise StopAsyncIteration
        try:
            chunks = await asyncio.shield(self._reply)
        except asyncio.CancelledError:
            if not self._aborted:
                raise
            chunks = []
        except BaseException:
            await self.aclose()
            raise
        if self._aborted:
            await self.aclose()
            return GenerationChunk(text="", tokens=(), finish_reason="abort")
        chunk = chunks[self._given]
        self._given += 1
        if chunk.finish_reason is not None:
            await self.aclose()
        return chunk

    def abort(self) -> None:
        """End it from outside: whoever iterates gets a last chunk that says "abort"."""
        self._aborted = True
        self._reply.cancel()

    async def aclose(self) -> None:
        self._ended = True
        self._open_streams.discard(self)
        self._reply.cancel()
