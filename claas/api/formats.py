"""How an answer is worded: OpenAI's chat and text completions, whole and in pieces. Knows nothing of how it is sent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from pydantic import BaseModel

from claas.api.schemas.base import Usage
from claas.api.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    TokenLogprob,
    TopLogprob,
)
from claas.api.schemas.completions import Completion, TextChoice, TextLogprobs
from claas.api.serving import Ask, Replies, Reply
from claas.core.types import FinishReason
from claas.inference.base import GenerationChunk, SampledToken

MINUS_INFINITY = -9999.0
TokenText = Callable[[int], str]


class Format(ABC):
    """Words the answer to one request."""

    def __init__(self, ask: Ask, token_text: TokenText, *, logprobs: bool, include_usage: bool) -> None:
        self._ask = ask
        self._token_text = token_text
        self._logprobs = logprobs
        self._include_usage = include_usage

    @abstractmethod
    def opening(self, index: int) -> Iterator[BaseModel]:
        """What a stream says of a choice before its first token."""

    @abstractmethod
    def pieces(self, index: int, chunk: GenerationChunk) -> Iterator[BaseModel]:
        """What a stream says of one decoding step. A step that shows no text yet says nothing, unless logprobs were asked for."""

    @abstractmethod
    def usage(self, replies: Replies) -> BaseModel:
        """The token counts, as the last chunk of a stream."""

    @abstractmethod
    def whole(self, replies: Replies) -> BaseModel:
        """The answer in one piece."""


class ChatFormat(Format):
    """`chat.completion` and `chat.completion.chunk`."""

    def opening(self, index: int) -> Iterator[BaseModel]:
        yield self._chunk([ChunkChoice(index=index, delta=Delta(role="assistant", content=""), logprobs=None, finish_reason=None)])

    def pieces(self, index: int, chunk: GenerationChunk) -> Iterator[BaseModel]:
        logprobs = self._choice_logprobs(chunk.tokens) if chunk.tokens else None
        if chunk.text or logprobs:
            yield self._chunk([ChunkChoice(index=index, delta=Delta(content=chunk.text), logprobs=logprobs, finish_reason=None)])
        if chunk.finish_reason is not None:
            yield self._chunk([ChunkChoice(index=index, delta=Delta(), logprobs=None, finish_reason=chunk.finish_reason)])

    def usage(self, replies: Replies) -> BaseModel:
        return self._chunk([], usage_of(replies))

    def whole(self, replies: Replies) -> BaseModel:
        choices = [
            ChatChoice(
                index=reply.index,
                message=AssistantMessage(content=reply.text),
                logprobs=self._choice_logprobs(reply.tokens),
                finish_reason=_finished(reply),
            )
            for reply in replies.replies
        ]
        return ChatCompletion(id=self._ask.id, created=self._ask.created, model=self._ask.model, choices=choices, usage=usage_of(replies))

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._ask.id, object="chat.completion.chunk", created=self._ask.created, model=self._ask.model, choices=choices
        )
        return chunk.model_copy(update={"usage": usage}) if self._include_usage else chunk

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

    def __init__(self, ask: Ask, token_text: TokenText, *, logprobs: bool, include_usage: bool) -> None:
        super().__init__(ask, token_text, logprobs=logprobs, include_usage=include_usage)
        self._offsets = [0] * ask.n

    def opening(self, index: int) -> Iterator[BaseModel]:
        yield from ()

    def pieces(self, index: int, chunk: GenerationChunk) -> Iterator[BaseModel]:
        logprobs = self._text_logprobs(index, chunk.tokens) if chunk.tokens else None
        if chunk.text or logprobs or chunk.finish_reason is not None:
            yield self._completion([TextChoice(index=index, text=chunk.text, logprobs=logprobs, finish_reason=chunk.finish_reason)])

    def usage(self, replies: Replies) -> BaseModel:
        return self._completion([], usage_of(replies))

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
        return self._completion(choices).model_copy(update={"usage": usage_of(replies)})

    def _completion(self, choices: list[TextChoice], usage: Usage | None = None) -> Completion:
        completion = Completion(
            id=self._ask.id, object="text_completion", created=self._ask.created, model=self._ask.model, choices=choices
        )
        return completion.model_copy(update={"usage": usage}) if self._include_usage else completion

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


def usage_of(replies: Replies) -> Usage:
    prompt, completion = replies.prompt_tokens, replies.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _finished(reply: Reply) -> FinishReason:
    assert reply.finish_reason is not None, "an answer is worded whole only when all replies have ended"
    return reply.finish_reason
