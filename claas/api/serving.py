"""From a request to its replies: admitted, relayed token by token, and recorded.

Every reply is in the rollout store before the last of it is handed on, so feedback on its id works at once. A reply that nobody reads to
its end is stopped, and what was sampled of it is stored with `finish_reason` "abort". Knows nothing of how an answer is worded.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Literal, Self

from pydantic import JsonValue

from claas.core.errors import ContextOverflow
from claas.core.types import ChatMessage, FinishReason, LoraRuntimeRef, Rollout, SamplingParams
from claas.inference.base import GenerationChunk, GenerationRequest, SampledToken, TokenStream
from claas.rollouts.visible import visible_text
from claas.services import Services

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A parsed request for `n` replies. Exactly one of `messages` and `prompt` is given.

    `sampling.max_tokens` None: the service's default length, or what the context still holds if that is less.
    """

    model: str
    sampling: SamplingParams
    n: int = 1
    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None
    template_kwargs: dict[str, JsonValue] = field(default_factory=dict)
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        kind: Literal["chatcmpl", "cmpl"] = "chatcmpl" if self.prompt is None else "cmpl"
        object.__setattr__(self, "id", f"{kind}-{uuid.uuid4().hex}")

    def reply_id(self, index: int) -> str:
        """Under which the reply is stored and takes feedback."""
        return f"{self.id}:{index}" if index else self.id


@dataclass(slots=True)
class Reply:
    """One running reply, and all of it so far."""

    index: int
    request: GenerationRequest
    stream: TokenStream
    text: str = ""
    tokens: list[SampledToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Replies:
    """The running replies to one request. Use as `async with`: leaving stops and stores those that are unfinished.

    Iterate, once, for (index, chunk) in the order of sampling.
    """

    def __init__(self, services: Services, ask: Ask, ref: LoraRuntimeRef | None, replies: list[Reply]) -> None:
        self.ask = ask
        self.replies = replies
        self.speaker = f"{ref.lora_id}@{ref.version}" if ref else services.base_model_id
        self._services = services
        self._events: asyncio.Queue[tuple[int, GenerationChunk] | Exception] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def prompt_tokens(self) -> int:
        return len(self.replies[0].stream.prompt_token_ids)

    @property
    def completion_tokens(self) -> int:
        return sum(len(reply.tokens) for reply in self.replies)

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._relay(reply)) for reply in self.replies]
        return self

    async def __aiter__(self) -> AsyncIterator[tuple[int, GenerationChunk]]:
        unfinished = len(self.replies)
        while unfinished:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            unfinished -= event[1].finish_reason is not None

    async def drain(self) -> bool:
        """Wait for the end of all replies."""
        async for _ in self:
            pass
        return True

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
                reply.text += chunk.text
                reply.tokens.extend(chunk.tokens)
                reply.finish_reason = chunk.finish_reason
                if chunk.finish_reason is not None:
                    await self._services.rollouts.put(self._rollout(reply, chunk.finish_reason))
                self._events.put_nowait((reply.index, chunk))
        except Exception as error:  # noqa: BLE001 - whoever iterates gets it
            self._events.put_nowait(error)

    async def _store_abandoned(self, reply: Reply) -> None:
        try:
            await self._services.rollouts.put(self._rollout(reply, "abort"))
        except Exception:  # nobody is left to be told
            log.exception("the abandoned reply %s could not be stored", self.ask.reply_id(reply.index))

    def _rollout(self, reply: Reply, finish_reason: FinishReason) -> Rollout:
        adapter = reply.request.adapter
        return Rollout(
            id=self.ask.reply_id(reply.index),
            lora_id=adapter.lora_id if adapter else None,
            version=adapter.version if adapter else None,
            base_model=self._services.base_model_id,
            messages=reply.request.messages,
            template_kwargs=reply.request.template_kwargs,
            prompt_token_ids=reply.stream.prompt_token_ids,
            response_token_ids=tuple(token.id for token in reply.tokens),
            response_logprobs=tuple(token.logprob for token in reply.tokens),
            sampling=reply.request.sampling,
            finish_reason=finish_reason,
            text=visible_text(reply.text),
        )


async def admit(services: Services, ask: Ask) -> Replies:
    """Start all replies, or none. Raises what `resolve_model` and `InferenceBackend.stream` raise."""
    ref = await services.lifecycle.resolve_model(ask.model)
    replies: list[Reply] = []
    async with AsyncExitStack() as on_failure:
        for index in range(ask.n):
            request = GenerationRequest(
                messages=ask.messages,
                prompt=ask.prompt,
                template_kwargs=ask.template_kwargs,
                adapter=ref,
                sampling=_sampling_of(ask.sampling, index),
            )
            reply = await _start(services, request, index)
            on_failure.push_async_callback(reply.stream.aclose)
            replies.append(reply)
        on_failure.pop_all()
    return Replies(services, ask, ref, replies)


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
