"""How an answer is worded: OpenAI's chat and text completions, whole and in pieces. Knows nothing of how it is sent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

from pydantic import BaseModel
from pydantic_core import to_json

from claas.api.schemas.base import Usage
from claas.api.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    FunctionDelta,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)
from claas.api.schemas.completions import Completion, TextChoice, TextLogprobs
from claas.api.schemas.tools import MadeToolCall
from claas.api.serving import Ask, Replies, Reply
from claas.core.types import FinishReason
from claas.inference.base import GenerationChunk, SampledToken, ToolCallPiece

MINUS_INFINITY = -9999.0
TokenText = Callable[[int], str]


class Format(ABC):
    """Words the answer to one request. The events of its stream are JSON; what they have in common is written once."""

    event_kind: ClassVar[str]

    def __init__(self, ask: Ask, token_text: TokenText, *, logprobs: bool, include_usage: bool) -> None:
        self._ask = ask
        self._token_text = token_text
        self._logprobs = logprobs
        self._include_usage = include_usage
        common = {"id": ask.id, "object": self.event_kind, "created": ask.created, "model": ask.model}
        self._head = to_json(common).removesuffix(b"}") + b',"choices":['
        self._tail = b'],"usage":null}' if include_usage else b"]}"  # OpenAI: null in every event but the last

    @abstractmethod
    def opening(self) -> Iterator[bytes]:
        """What a stream says before its first token."""

    @abstractmethod
    def pieces(self, index: int, chunk: GenerationChunk) -> Iterator[bytes]:
        """What a stream says of one decoding step. A step that shows nothing yet says nothing, unless logprobs were asked for."""

    def closing(self, replies: Replies) -> Iterator[bytes]:
        """What a stream says when all replies have ended: the token counts, if they were asked for."""
        if self._include_usage:
            yield b'%b],"usage":%b}' % (self._head, to_json(usage_of(replies)))

    @abstractmethod
    def whole(self, replies: Replies) -> BaseModel:
        """The answer in one piece."""

    def _event(self, choice: Mapping[str, object] | BaseModel) -> bytes:
        return self._head + to_json(choice) + self._tail


class ChatFormat(Format):
    """`chat.completion` and `chat.completion.chunk`."""

    event_kind = "chat.completion.chunk"

    def opening(self) -> Iterator[bytes]:
        for index in range(self._ask.n):
            yield self._event(ChunkChoice(index=index, delta=Delta(role="assistant", content=""), logprobs=None, finish_reason=None))

    def pieces(self, index: int, chunk: GenerationChunk) -> Iterator[bytes]:
        logprobs = self._choice_logprobs(chunk.tokens) if chunk.tokens else None
        delta = Delta()
        if chunk.reasoning:
            delta["reasoning_content"] = chunk.reasoning
        if chunk.tool_calls:
            delta["tool_calls"] = list(map(_tool_call_delta, chunk.tool_calls))
        if chunk.text or (logprobs and not delta):
            delta["content"] = chunk.text
        if delta:
            yield self._event(ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=None))
        if chunk.finish_reason is not None:
            yield self._event(ChunkChoice(index=index, delta=Delta(), logprobs=None, finish_reason=chunk.finish_reason))

    def whole(self, replies: Replies) -> BaseModel:
        choices = [
            ChatChoice(
                index=reply.index,
                message=_message(reply),
                logprobs=self._choice_logprobs(reply.tokens),
                finish_reason=_finished(reply),
            )
            for reply in replies.replies
        ]
        return ChatCompletion(id=self._ask.id, created=self._ask.created, model=self._ask.model, choices=choices, usage=usage_of(replies))

    def _choice_logprobs(self, tokens: Sequence[SampledToken]) -> ChoiceLogprobs | None:
        if not self._logprobs:
            return None
        return ChoiceLogprobs(content=[self._token(token) for token in tokens])

    def _token(self, token: SampledToken) -> TokenLogprob:
        sampled = self._candidate(token.id, token.logprob)
        return TokenLogprob(
            token=sampled.token,
            logprob=sampled.logprob,
            bytes=sampled.bytes,
            top_logprobs=[self._candidate(other, logprob) for other, logprob in token.top],
        )

    def _candidate(self, token_id: int, logprob: float) -> TopLogprob:
        text = self._token_text(token_id)
        return TopLogprob(token=text, logprob=max(logprob, MINUS_INFINITY), bytes=list(text.encode()))


class TextFormat(Format):
    """`text_completion`."""

    event_kind = "text_completion"

    def __init__(self, ask: Ask, token_text: TokenText, *, logprobs: bool, include_usage: bool) -> None:
        super().__init__(ask, token_text, logprobs=logprobs, include_usage=include_usage)
        self._offsets = [0] * ask.n

    def opening(self) -> Iterator[bytes]:
        yield from ()

    def pieces(self, index: int, chunk: GenerationChunk) -> Iterator[bytes]:
        logprobs = self._text_logprobs(index, chunk.tokens) if chunk.tokens else None
        if chunk.text or logprobs or chunk.finish_reason is not None:
            yield self._event(TextChoice(index=index, text=chunk.text, logprobs=logprobs, finish_reason=chunk.finish_reason))

    def whole(self, replies: Replies) -> BaseModel:
        choices = [
            TextChoice(
                index=reply.index,
                text=reply.text,
                logprobs=self._text_logprobs(reply.index, reply.tokens),
                finish_reason=_finished(reply),
            )
            for reply in replies.replies
        ]
        return Completion(id=self._ask.id, created=self._ask.created, model=self._ask.model, choices=choices, usage=usage_of(replies))

    def _text_logprobs(self, index: int, tokens: Sequence[SampledToken]) -> TextLogprobs | None:
        if not self._logprobs:
            return None
        texts = [self._token_text(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return TextLogprobs(
            tokens=texts,
            token_logprobs=[max(token.logprob, MINUS_INFINITY) for token in tokens],
            top_logprobs=[{self._token_text(other): max(logprob, MINUS_INFINITY) for other, logprob in token.top} for token in tokens],
            text_offset=offsets,
        )


def _message(reply: Reply) -> AssistantMessage:
    calls = list(map(MadeToolCall.of, reply.tool_calls)) or None
    return AssistantMessage(content=reply.text or (None if calls else ""), reasoning_content=reply.reasoning or None, tool_calls=calls)


def _tool_call_delta(piece: ToolCallPiece) -> ToolCallDelta:
    if piece.id is None and piece.name is None:
        return ToolCallDelta(index=piece.index, function=FunctionDelta(arguments=piece.arguments))
    function = FunctionDelta(name=piece.name or "", arguments=piece.arguments)
    return ToolCallDelta(index=piece.index, id=piece.id or "", type="function", function=function)


def usage_of(replies: Replies) -> Usage:
    prompt, completion = replies.prompt_tokens, replies.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _finished(reply: Reply) -> FinishReason:
    assert reply.finish_reason is not None, "an answer is worded whole only when all replies have ended"
    return reply.finish_reason
