"""From a request to its replies: admitted, relayed token by token, and recorded.

Every reply is in the rollout store before the last of it is handed on, so feedback on its id works at once. A reply that nobody reads to
its end is stopped, and what was sampled of it is stored with `finish_reason` "abort". Knows nothing of how an answer is worded.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import JsonValue

from claas.core.errors import ContextOverflow
from claas.core.types import ChatMessage, FinishReason, LoraRuntimeRef, Rollout, SamplingParams, ToolCall
from claas.inference.base import GenerationChunk, GenerationRequest, SampledToken, TokenStream, joined_tool_calls
from claas.rollouts.visible import visible_text
from claas.services import Services

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A parsed request for `n` replies. Exactly one of `messages` and `prompt` is given; tools and their like are as the seam takes them.

    `sampling.max_tokens` None: the service's default length, or what the context still holds if that is less.
    """

    model: str
    sampling: SamplingParams
    n: int = 1
    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None
    template_kwargs: dict[str, JsonValue] = field(default_factory=dict)
    tools: tuple[dict[str, JsonValue], ...] = ()
    tool_choice: JsonValue = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, JsonValue] | None = None
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        kind: Literal["chatcmpl", "cmpl"] = "chatcmpl" if self.prompt is None else "cmpl"
        object.__setattr__(self, "id", f"{kind}-{uuid.uuid4().hex}")

    def reply_id(self, index: int) -> str:
        """Under which the reply is stored and takes feedback."""
        return f"{self.id}:{index}" if index else self.id

    def request(self, index: int, adapter: LoraRuntimeRef | None) -> GenerationRequest:
        """What a backend is asked for the `index`-th reply. Tools stand in the prompt, so they are template arguments too."""
        return GenerationRequest(
            messages=self.messages,
            prompt=self.prompt,
            template_kwargs=self.template_kwargs | ({"tools": list(self.tools)} if self.tools else {}),
            adapter=adapter,
            tools=self.tools,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.response_format,
            sampling=_sampling_of(self.sampling, index),
        )


@dataclass(slots=True)
class Reply:
    """One running reply, and all of it so far."""

    index: int
    request: GenerationRequest
    stream: TokenStream
    chunks: list[GenerationChunk] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def reasoning(self) -> str:
        return "".join(chunk.reasoning for chunk in self.chunks)

    @property
    def tokens(self) -> tuple[SampledToken, ...]:
        return tuple(token for chunk in self.chunks for token in chunk.tokens)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return joined_tool_calls(piece for chunk in self.chunks for piece in chunk.tool_calls)


class Replies:
    """The replies to one request. Use as `async with`, and `admit` them: leaving stops and stores those that are unfinished.

    Iterate, once, for what was sampled since the last time: (index, chunk) in the order of sampling.
    """

    def __init__(self, services: Services, ask: Ask) -> None:
        self.ask = ask
        self.replies: list[Reply] = []
        self.speaker = ""
        self._services = services
        self._sampled: list[tuple[int, GenerationChunk]] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def prompt_tokens(self) -> int:
        return len(self.replies[0].stream.prompt_token_ids)

    @property
    def completion_tokens(self) -> int:
        return sum(len(chunk.tokens) for reply in self.replies for chunk in reply.chunks)

    async def admit(self) -> None:
        """Start all replies at once, or none. Raises what `resolve_model` and `InferenceBackend.stream` raise."""
        ref = await self._services.lifecycle.resolve_model(self.ask.model)
        self.speaker = f"{ref.lora_id}@{ref.version}" if ref else self._services.base_model_id
        self.replies = await _all_or_none([_start(self._services, self.ask.request(index, ref), index) for index in range(self.ask.n)])
        self._tasks = [asyncio.create_task(self._relay(reply)) for reply in self.replies]

    async def __aenter__(self) -> Self:
        return self

    async def __aiter__(self) -> AsyncIterator[Sequence[tuple[int, GenerationChunk]]]:
        unfinished = len(self.replies)
        while unfinished:
            await self._news.wait()
            self._news.clear()
            sampled, self._sampled = self._sampled, []
            yield sampled
            if self._error is not None:
                raise self._error
            unfinished -= sum(chunk.finish_reason is not None for _, chunk in sampled)

    async def drain(self) -> None:
        """Wait for the end of all replies."""
        async for _ in self:
            pass

    async def __aexit__(self, *_: object) -> None:
        for task, reply in zip(self._tasks, self.replies, strict=True):
            if reply.finish_reason is None:  # else it is being stored, which must not be cut short
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for reply in self.replies:
            await reply.stream.aclose()
            if reply.finish_reason is None:
                await self._store_abandoned(reply)

    async def _relay(self, reply: Reply) -> None:
        try:
            async for chunk in reply.stream:
                reply.chunks.append(chunk)
                reply.finish_reason = chunk.finish_reason
                if chunk.finish_reason is not None:
                    await self._store(reply, chunk.finish_reason)
                self._sampled.append((reply.index, chunk))
                self._news.set()
        except Exception as error:  # noqa: BLE001 - whoever iterates gets it
            self._error = self._error or error
            self._news.set()

    async def _store_abandoned(self, reply: Reply) -> None:
        try:
            await self._store(reply, "abort")
        except Exception:  # nobody is left to be told
            log.exception("the abandoned reply %s could not be stored", self.ask.reply_id(reply.index))

    async def _store(self, reply: Reply, finish_reason: FinishReason) -> None:
        """Of an adapter that was deleted while it spoke nothing is kept, nor of a reply that ended before its prompt was read."""
        if not reply.stream.prompt_token_ids:
            return
        await self._services.rollouts.put(self._rollout(reply, finish_reason))
        adapter = reply.request.adapter
        if adapter is not None and await self._services.lifecycle.is_gone(adapter.lora_id):  # looked for only now: so none slips through
            await self._services.rollouts.delete_adapter(adapter.lora_id)

    def _rollout(self, reply: Reply, finish_reason: FinishReason) -> Rollout:
        adapter, tokens = reply.request.adapter, reply.tokens
        return Rollout(
            id=self.ask.reply_id(reply.index),
            lora_id=adapter.lora_id if adapter else None,
            version=adapter.version if adapter else None,
            base_model=self._services.base_model_id,
            messages=reply.request.messages,
            template_kwargs=reply.request.template_kwargs,
            prompt_token_ids=reply.stream.prompt_token_ids,
            response_token_ids=tuple(token.id for token in tokens),
            response_logprobs=tuple(token.logprob for token in tokens),
            sampling=reply.request.sampling.model_copy(update={"constrained": _constrained(reply.request)}),
            finish_reason=finish_reason,
            text=visible_text(reply.text),
        )


def _constrained(request: GenerationRequest) -> bool:
    """Whether a grammar may have forbidden tokens: of an answer of a given form, of calls that are forced, strict, or one at most."""
    if request.response_format is not None:
        return True
    if not request.tools or request.tool_choice == "none":
        return False
    forced = request.tool_choice not in (None, "auto")
    return forced or request.parallel_tool_calls is False or any(map(_strict, request.tools))


def _strict(tool: Mapping[str, JsonValue]) -> bool:
    match tool:
        case {"function": {"strict": True}}:
            return True
    return False


async def _all_or_none(starts: Sequence[Coroutine[Any, Any, Reply]]) -> list[Reply]:
    """All at once. If one fails, or this is cancelled, the others are stopped before that is raised."""
    if len(starts) == 1:
        return [await starts[0]]
    tasks = [asyncio.create_task(start) for start in starts]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Reply):
                await outcome.stream.aclose()
        raise


async def _start(services: Services, request: GenerationRequest, index: int) -> Reply:
    if request.sampling.max_tokens is None:
        try:
            default = _with_max_tokens(request, services.settings.default_max_tokens)
            return Reply(index, default, await services.inference.stream(default))
        except ContextOverflow:
            pass  # the prompt may fit with a shorter reply, which is what None stands for
    return Reply(index, request, await services.inference.stream(request))


def _with_max_tokens(request: GenerationRequest, max_tokens: int) -> GenerationRequest:
    return request.model_copy(update={"sampling": request.sampling.model_copy(update={"max_tokens": max_tokens})})


def _sampling_of(sampling: SamplingParams, index: int) -> SamplingParams:
    """Choice `index`'s own seed: the same seed for all would give the same reply n times."""
    if sampling.seed is None or index == 0:
        return sampling
    return sampling.model_copy(update={"seed": (sampling.seed + index) % 2**63})
