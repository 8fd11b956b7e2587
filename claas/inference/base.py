"""The InferenceBackend seam: what every way of serving a base model with adapters promises.

Every backend passes `tests/contracts/test_inference_backend.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from claas.core.types import ChatMessage, FinishReason, Frozen, LoraRuntimeRef, SamplingParams, ServiceHealth


class GenerationRequest(Frozen):
    """One reply to sample. Exactly one of `messages` and `prompt` is given; `adapter` None is the plain base model.

    `background` requests wait while a user's request wants the slot.
    """

    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None
    template_kwargs: dict[str, JsonValue] = {}
    adapter: LoraRuntimeRef | None = None
    sampling: SamplingParams = SamplingParams()
    background: bool = False


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One sampled token: its id, its logprob in nats under the unmodified distribution, and the top alternatives if asked."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """What one decoding step added. `text` may lag behind `tokens` (an unfinished character, a possible stop string).

    The last chunk, and only it, has a `finish_reason`; its `text` completes the visible reply.
    """

    text: str
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None


class TokenStream(ABC):
    """A running reply. Iterate for chunks; `aclose` (or leaving the iteration early and closing) frees its slot at once."""

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

    @abstractmethod
    async def stream(self, request: GenerationRequest) -> TokenStream:
        """Admit the request and return its stream; sampling has not necessarily begun.

        Raises:
            ContextOverflow: the prompt (with `max_tokens`, if given) does not fit.
            BadRequest: a parameter this backend cannot honour, named.
            NotFound: the adapter version is gone.
            Overloaded: the waiting queue is full.
            BackendUnavailable: closing or down.
        """

    async def complete(self, request: GenerationRequest) -> Generation:
        """`stream`, drained. If the caller is cancelled the slot is freed."""
        stream = await self.stream(request)
        text: list[str] = []
        tokens: list[SampledToken] = []
        finish: FinishReason = "abort"
        try:
            async for chunk in stream:
                text.append(chunk.text)
                tokens.extend(chunk.tokens)
                finish = chunk.finish_reason or finish
        finally:
            await stream.aclose()
        return Generation(stream.prompt_token_ids, tuple(tokens), "".join(text), finish)

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
    def paused(self) -> AbstractAsyncContextManager[None]:
        """Hold while a step trains. Backends that serve on through a step do nothing here."""

    @abstractmethod
    async def activate(self, ref: LoraRuntimeRef) -> None:
        """Load a version so that the next request for it starts at once. Raises if it cannot be served."""

    @abstractmethod
    async def forget(self, lora_id: str) -> None:
        """Drop every cached version of an adapter that was deleted."""

    @abstractmethod
    async def health(self) -> ServiceHealth:
        """Whether a request could be served now; `detail` counts slots and waiting requests."""

    @abstractmethod
    async def aclose(self) -> None:
        """Stop serving; running replies end with "abort"."""
