"""The InferenceBackend seam: what every way of serving a base model with adapters promises.

Every backend passes `tests/contracts/test_inference_backend.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue

from claas.core.types import (
    ChatMessage,
    FinishReason,
    Frozen,
    LoraRuntimeRef,
    RoomPlan,
    SamplingParams,
    ServiceHealth,
    ToolCall,
)


class GenerationRequest(Frozen):
    """One reply to sample. Exactly one of `messages` and `prompt` is given; `adapter` None is the plain base model.

    `background` requests wait while a user's request wants the slot. `tools`, `tool_choice`, `parallel_tool_calls` and `response_format`
    are as OpenAI documents them, for chat only; a backend without them refuses them by name. Tools stand in the prompt, so they are also
    in `template_kwargs["tools"]`, which is what a rollout keeps.
    """

    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None
    template_kwargs: dict[str, JsonValue] = {}
    adapter: LoraRuntimeRef | None = None
    tools: tuple[dict[str, JsonValue], ...] = ()
    tool_choice: JsonValue = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, JsonValue] | None = None
    sampling: SamplingParams = SamplingParams()
    background: bool = False


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One sampled token: its id, its logprob in nats under the unmodified distribution, and the top alternatives if asked."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """A part of the `index`-th tool call. Its first piece has `id` and `name`; `arguments` go on from piece to piece."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """What one decoding step added. `text` may lag behind `tokens` (an unfinished character, a possible stop string).

    `reasoning` is what the model thinks before it answers, where the backend can tell; it is no part of `text`.
    The last chunk, and only it, has a `finish_reason`; its `text` completes the visible reply.
    """

    text: str
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCallPiece, ...] = ()


class TokenStream(ABC):
    """A running reply. Iterate for chunks; `aclose` (or leaving the iteration early and closing) frees its slot at once.

    `prompt_token_ids` are empty until they are known: with the first chunk at the latest.
    """

    prompt_token_ids: tuple[int, ...]

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[GenerationChunk]: ...

    @abstractmethod
    async def aclose(self) -> None:
        """Stop sampling and free the slot. Safe to call twice and after the end."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole reply: what `stream` yields, put together."""

    prompt_token_ids: tuple[int, ...]
    tokens: tuple[SampledToken, ...]
    text: str
    finish_reason: FinishReason
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(slots=True)
class Room:
    """What a backend did to make room for a step, filled in as it happens. `next` is set by whoever trains: it is loaded on waking."""

    slept: bool = False
    woke: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    next: LoraRuntimeRef | None = None


def joined_tool_calls(pieces: Iterable[ToolCallPiece]) -> tuple[ToolCall, ...]:
    """Whole tool calls, in the order of their index."""
    calls: dict[int, ToolCall] = {}
    for piece in pieces:
        call = calls.get(piece.index, ToolCall(id="", name="", arguments=""))
        calls[piece.index] = ToolCall(id=piece.id or call.id, name=piece.name or call.name, arguments=call.arguments + piece.arguments)
    return tuple(calls[index] for index in sorted(calls))


@dataclass(frozen=True, slots=True)
class Score:
    """Logprobs in nats of a given completion, token by token."""

    prompt_tokens: int
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]


class InferenceBackend(ABC):
    """Serves one base model and any number of adapter versions side by side."""

    kind: Literal["embedded", "vllm", "tinker", "modal"]

    async def begin(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Called once, before anything is served. Raises ConfigurationError for a backend that cannot serve this service."""

    @abstractmethod
    async def stream(self, request: GenerationRequest) -> TokenStream:
        """Admit the request and return its stream; sampling has not necessarily begun.

        Raises:
            ContextOverflow: the prompt (with `max_tokens`, if given) does not fit. Where that is known late, the stream may raise it.
            BadRequest: a parameter this backend cannot honour, named.
            NotFound: the adapter version is gone.
            Overloaded: the waiting queue is full.
            BackendUnavailable: closing or down.
        """

    async def complete(self, request: GenerationRequest) -> Generation:
        """`stream`, drained. If the caller is cancelled the slot is freed."""
        stream = await self.stream(request)
        try:
            chunks = [chunk async for chunk in stream]
        finally:
            await stream.aclose()
        return Generation(
            prompt_token_ids=stream.prompt_token_ids,
            tokens=tuple(token for chunk in chunks for token in chunk.tokens),
            text="".join(chunk.text for chunk in chunks),
            finish_reason=(chunks[-1].finish_reason if chunks else None) or "abort",
            reasoning="".join(chunk.reasoning for chunk in chunks),
            tool_calls=joined_tool_calls(piece for chunk in chunks for piece in chunk.tool_calls),
        )

    @abstractmethod
    async def score(self, request: GenerationRequest, completion: str | tuple[int, ...]) -> Score:
        """Logprobs of `completion`, a text or a reply's exact token ids, as the reply to the request's prompt. Raises like `stream`."""

    @abstractmethod
    async def reply_tokens(self, text: str) -> tuple[int, ...]:
        """`text` as the tokens of a whole reply, the one that ends it included. Raises BackendUnavailable."""

    @abstractmethod
    def token_text(self, token_id: int) -> str:
        """One token as text, special tokens included."""

    @abstractmethod
    def paused(self, plan: RoomPlan) -> AbstractAsyncContextManager[Room]:
        """Hold while a step trains, so that it has the device's memory. Backends that serve on through a step do nothing here.

        Leaving it, however that happens, ends with the backend serving. Raises BackendUnavailable before anything is trained if no room
        could be made.
        """

    @abstractmethod
    async def activate(self, ref: LoraRuntimeRef) -> None:
        """Load a version so that the next request for it starts at once. Raises if it cannot be served."""

    def in_use(self, lora_id: str, version: int) -> bool:
        """Whether the files of this version must stay, since a running reply speaks through them."""
        return False

    @asynccontextmanager
    async def leaving(self, lora_id: str) -> AsyncIterator[None]:
        """Hold while an adapter's files are removed. A backend that reads them during a reply lets its replies end first."""
        yield
        await self.forget(lora_id)

    @abstractmethod
    async def forget(self, lora_id: str) -> None:
        """Drop every cached version of an adapter that was deleted."""

    @abstractmethod
    async def health(self) -> ServiceHealth:
        """Whether a request could be served now; `detail` counts slots and waiting requests."""

    @abstractmethod
    async def aclose(self) -> None:
        """Stop serving; running replies end with "abort"."""
