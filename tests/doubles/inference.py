"""A serving engine of characters: one token for each, ids are code points, and a function says what is thought, replied and called.

It knows every field of a request, and refuses none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal

from claas.core.errors import BackendUnavailable, ContextOverflow, Overloaded
from claas.core.types import FinishReason, LoraRuntimeRef, RoomPlan, ServiceHealth, ToolCall
from claas.inference.base import (
    GenerationChunk,
    GenerationRequest,
    InferenceBackend,
    Room,
    SampledToken,
    Score,
    TokenStream,
    ToolCallPiece,
)

EOS = 0
EOS_TEXT = "<eos>"


@dataclass(frozen=True, slots=True)
class Said:
    """A reply with more to it than text."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def echo(request: GenerationRequest) -> str:
    """Says who speaks and repeats the last turn, so that a test sees which adapter was asked, and what."""
    speaker = f"{request.adapter.lora_id}@{request.adapter.version}" if request.adapter else "base"
    return f"[{speaker}] {request.messages[-1].content if request.messages else request.prompt}"


class Steps(asyncio.Semaphore):
    """Lets tokens be sampled one by one. `blocked` is set once a reply had to wait for a release."""

    def __init__(self, released: int = 0) -> None:
        super().__init__(released)
        self.blocked = asyncio.Event()

    async def acquire(self) -> Literal[True]:
        if self.locked():
            self.blocked.set()
        return await super().acquire()

    def release_many(self, tokens: int) -> None:
        for _ in range(tokens):
            self.release()


class CharStream(TokenStream):
    """Emits the script one character a step, and a call's name whole. Counts as running until it ends or is closed."""

    def __init__(self, backend: CharInference, request: GenerationRequest) -> None:
        self.prompt_token_ids = prompt_ids(request)
        self._backend = backend
        self._request = request
        self._chunks = self._generate()

    def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        return self._chunks

    async def aclose(self) -> None:
        self._backend.running.discard(self)
        await self._chunks.aclose()

    async def _generate(self) -> AsyncGenerator[GenerationChunk]:
        steps, finish = script(self._request, self._backend.reply(self._request))
        for position, (token_ids, step) in enumerate(steps):
            if self._backend.steps is not None:
                await self._backend.steps.acquire()
            else:
                await asyncio.sleep(0)
            if self._backend.broken_after is not None and position >= self._backend.broken_after:
                raise self._backend.breakage
            last = self._backend.closed or position == len(steps) - 1
            if last:
                self._backend.running.discard(self)
            tokens = tuple(map(self._sampled, token_ids))
            ending: FinishReason = "abort" if self._backend.closed else finish
            yield replace(step, tokens=tokens, finish_reason=ending if last else None)
            if last:
                return

    def _sampled(self, token_id: int) -> SampledToken:
        top = tuple((token_id + rank, logprob_of(token_id) - rank) for rank in range(self._request.sampling.top_logprobs))
        return SampledToken(token_id, logprob_of(token_id), top)


class CharInference(InferenceBackend):
    """`reply` scripts the answers. With `steps`, every token waits for one release of it. `broken_after` tokens, `breakage` is raised.

    With `doors`, every admission waits for one release of it; `asked` has one entry for each that came to them.
    """

    kind: Literal["embedded", "vllm", "tinker", "modal"] = "embedded"

    def __init__(
        self,
        reply: Callable[[GenerationRequest], str | Said] = echo,
        *,
        steps: asyncio.Semaphore | None = None,
        max_context: int = 4096,
        max_running: int = 64,
    ) -> None:
        self.reply = reply
        self.steps = steps
        self.max_context = max_context
        self.max_running = max_running
        self.doors: asyncio.Semaphore | None = None
        self.asked: asyncio.Queue[GenerationRequest] = asyncio.Queue()
        self.requests: list[GenerationRequest] = []
        self.running: set[CharStream] = set()
        self.active: list[LoraRuntimeRef] = []
        self.closed = False
        self.unhealthy: str | None = None
        self.broken_after: int | None = None
        self.surprise = 0.0
        self.suggestible = False
        self.garbage: tuple[str, ...] = ()
        self.opposed: tuple[str, ...] = ()
        self.favoured: tuple[str, ...] = ()
        self.breakage: Exception = BackendUnavailable("the engine broke")

    async def stream(self, request: GenerationRequest) -> TokenStream:
        if self.closed:
            raise BackendUnavailable("the service is closing")
        wanted = len(prompt_ids(request)) + (request.sampling.max_tokens or 1)
        if wanted > self.max_context:
            raise ContextOverflow(f"{wanted} tokens are asked for and the context holds {self.max_context}: shorten the conversation")
        self.asked.put_nowait(request)
        if self.doors is not None:
            await self.doors.acquire()
        if len(self.running) >= self.max_running:
            raise Overloaded("all slots are taken: try again soon", retry_after_s=3)
        self.requests.append(request)
        stream = CharStream(self, request)
        self.running.add(stream)
        return stream

    async def score(self, request: GenerationRequest, completion: str | tuple[int, ...]) -> Score:
        """Text that the reply function would not have said of its own accord is `surprise` nats a token less likely.

        If `suggestible`, only for the share of its words that the prompt does not hold. What begins as any of `garbage` is 20 nats a token
        less likely, unless the prompt holds it. An adapter makes every token a nat less likely after a prompt that holds any of `opposed`,
        and a nat likelier after one that holds any of `favoured`.
        """
        ids = tuple(map(ord, completion)) if isinstance(completion, str) else completion
        prompt, text = "".join(map(chr, prompt_ids(request))), "".join(chr(i) for i in ids if i != EOS)
        unheard = [word not in prompt for word in text.split()]
        drop = self.surprise * (sum(unheard) / len(unheard) if self.suggestible else 1.0)
        drop += 20.0 * any(text.startswith(start) and start not in prompt for start in self.garbage)
        if request.adapter is not None:
            drop += any(words in prompt for words in self.opposed) - any(words in prompt for words in self.favoured)
        return Score(len(prompt_ids(request)), ids, tuple(map(self.token_text, ids)), tuple(logprob_of(i) - drop for i in ids))

    async def reply_tokens(self, text: str) -> tuple[int, ...]:
        return (*map(ord, text), EOS)

    def token_text(self, token_id: int) -> str:
        return EOS_TEXT if token_id == EOS else chr(token_id)

    @asynccontextmanager
    async def paused(self, plan: RoomPlan) -> AsyncIterator[Room]:
        yield Room()

    async def activate(self, ref: LoraRuntimeRef) -> None:
        self.active.append(ref)

    async def forget(self, lora_id: str) -> None:
        self.active = [ref for ref in self.active if ref.lora_id != lora_id]

    async def health(self) -> ServiceHealth:
        status: Literal["healthy", "unhealthy"] = "unhealthy" if self.unhealthy or self.closed else "healthy"
        return ServiceHealth(status=status, error=self.unhealthy, detail={"running": len(self.running)})

    async def aclose(self) -> None:
        self.closed = True
        if self.steps is not None:
            for _ in self.running:
                self.steps.release()


def prompt_ids(request: GenerationRequest) -> tuple[int, ...]:
    text = request.prompt if request.prompt is not None else "".join(f"{m.role}:{m.content or ''}\n" for m in request.messages)
    return tuple(map(ord, text))


def logprob_of(token_id: int) -> float:
    """Any fixed, exactly representable function of the id will do."""
    return -(token_id % 64) / 64


Step = tuple[list[int], GenerationChunk]


def script(request: GenerationRequest, said: str | Said) -> tuple[list[Step], FinishReason]:
    """What each step samples and shows, and how it ends, under the request's stop strings and length limit."""
    said = Said(said) if isinstance(said, str) else said
    steps: list[Step] = [([ord(char)], GenerationChunk("", (), reasoning=char)) for char in said.reasoning]
    finish: FinishReason = "tool_calls" if said.tool_calls else "stop"
    cuts = [(said.text.find(stop), stop) for stop in request.sampling.stop if stop in said.text]
    if cuts:
        at, stop = min(cuts)
        steps += [([ord(char)], GenerationChunk(char, ())) for char in said.text[:at]]
        steps += [([ord(char)], GenerationChunk("", ())) for char in stop]
        finish = "stop"
    else:
        steps += [([ord(char)], GenerationChunk(char, ())) for char in said.text]
        for index, call in enumerate(said.tool_calls):
            steps.append(([*map(ord, call.name)], GenerationChunk("", (), tool_calls=(ToolCallPiece(index, "", call.id, call.name),))))
            steps += [([ord(char)], GenerationChunk("", (), tool_calls=(ToolCallPiece(index, char),))) for char in call.arguments]
        steps.append(([EOS], GenerationChunk("", ())))
    return within(request.sampling.max_tokens, steps, finish)


def within(limit: int | None, steps: list[Step], finish: FinishReason) -> tuple[list[Step], FinishReason]:
    """The steps whose tokens the limit allows."""
    kept: list[Step] = []
    left = sum(len(ids) for ids, _ in steps) if limit is None else limit
    for ids, chunk in steps:
        if not left:
            return kept, "length"
        kept.append((ids[:left], chunk))
        left -= len(kept[-1][0])
    return kept, finish
