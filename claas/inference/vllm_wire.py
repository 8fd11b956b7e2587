"""vLLM's wire: a request of ours as its JSON, and its streamed JSON as our chunks.

Exact tokens: every event carries the ids that it stands for (`token_ids`), and each logprob its own id (`token_id:N` in place of text).
Both are kept and must agree, whatever a tool or reasoning parser made of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import JsonValue
from pydantic_core import from_json
from transformers import PreTrainedTokenizerBase

from claas.core.errors import BackendUnavailable
from claas.core.types import ChatMessage, FinishReason
from claas.inference.base import GenerationChunk, GenerationRequest, SampledToken, ToolCallPiece
from claas.inference.vllm_http import error_of
from claas.models.chat_template import MARK, neutralise

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
BACKGROUND_INTERVAL = 32
"""Tokens an event of a background reply stands for: nobody reads along."""
ZERO_WIDTH_SPACE = "\u200b"
_FINISHED: Mapping[str, FinishReason] = {reason: reason for reason in get_args(FinishReason)}


def route_and_body(
    request: GenerationRequest, model: str, tokenizer: PreTrainedTokenizerBase, max_context: int
) -> tuple[str, dict[str, Any]]:
    """Where to post the request, and what. Everything that vLLM might take from the model's own generation config is said."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": _int64(sampling.seed),
        "stop": list(sampling.stop),
        "ignore_eos": sampling.ignore_eos,
        "max_tokens": sampling.max_tokens,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream_interval": BACKGROUND_INTERVAL if request.background else None,
    }
    if request.prompt is not None:
        prompt = tokenizer(request.prompt)["input_ids"]
        limit = sampling.max_tokens or max(1, max_context - len(prompt))  # None means 16 there
        return TEXT, body | {"prompt": prompt, "logprobs": sampling.top_logprobs, "max_tokens": limit}
    body |= {"messages": [_message(tokenizer, message) for message in request.messages], "logprobs": True}
    body |= {"top_logprobs": sampling.top_logprobs, "chat_template_kwargs": _template_kwargs(request, tokenizer)}
    if tools := request.tools or request.template_kwargs.get("tools"):  # the latter stand in the prompt, and are not to be called
        body |= {"tools": _safe(tokenizer, tools), "tool_choice": (request.tool_choice or "auto") if request.tools else "none"}
        body |= {} if request.parallel_tool_calls is None else {"parallel_tool_calls": request.parallel_tool_calls}
    return CHAT, body | ({"response_format": request.response_format} if request.response_format else {})


def score_body(model: str, ids: Sequence[int]) -> dict[str, Any]:
    """Asks for the logprob of every given token."""
    return {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


def scored(answer: Mapping[str, Any], ids: Sequence[int]) -> tuple[float, ...]:
    """The logprobs of the last `len(ids)` prompt tokens, from the answer to `score_body`."""
    entries = answer["choices"][0]["prompt_logprobs"][-len(ids) :]
    return tuple(float(entry[str(token)]["logprob"]) for entry, token in zip(entries, ids, strict=True))


class EventReader:
    """One streamed reply's events as chunks. `prompt_token_ids` is there after the first one."""

    def __init__(self, top_logprobs: int) -> None:
        self._top_logprobs = top_logprobs
        self.prompt_token_ids: tuple[int, ...] = ()

    def read(self, data: bytes) -> GenerationChunk | None:
        """What the event adds; None for one that adds nothing. Raises what an error event says, BackendUnavailable for unequal ids."""
        event = from_json(data)
        if "error" in event:
            code = event["error"].get("code")
            raise error_of(code if isinstance(code, int) and code >= 400 else 500, data)
        if not event["choices"]:
            return None
        choice = event["choices"][0]
        prompt = event.get("prompt_token_ids") or choice.get("prompt_token_ids")
        if prompt:
            self.prompt_token_ids = tuple(prompt)
        tokens = self._text_tokens(choice) if "text" in choice else self._chat_tokens(choice)
        if [token.id for token in tokens] != (choice.get("token_ids") or []):
            raise BackendUnavailable("vLLM's token ids and logprobs do not match: start it with a version that CLaaS knows (0.31 or newer)")
        delta = choice.get("delta", choice)
        text, reasoning = delta.get("text") or delta.get("content") or "", delta.get("reasoning") or ""
        calls, finish = delta.get("tool_calls"), choice["finish_reason"]
        if not (tokens or text or reasoning or finish or calls):
            return None
        return GenerationChunk(
            text=text,
            tokens=tokens,
            finish_reason=None if finish is None else _FINISHED.get(finish, "abort"),
            reasoning=reasoning,
            tool_calls=tuple(map(_tool_call, calls)) if calls else (),
        )

    def _chat_tokens(self, choice: Mapping[str, Any]) -> tuple[SampledToken, ...]:
        logprobs = choice.get("logprobs")
        return tuple([self._chat_token(entry) for entry in logprobs["content"] or ()]) if logprobs else ()

    def _chat_token(self, entry: Mapping[str, Any]) -> SampledToken:
        best = self._best((top["token"], top["logprob"]) for top in entry["top_logprobs"]) if self._top_logprobs else ()
        return SampledToken(_id(entry["token"]), entry["logprob"], best)

    def _text_tokens(self, choice: Mapping[str, Any]) -> tuple[SampledToken, ...]:
        logprobs = choice["logprobs"]
        if not logprobs:
            return ()
        columns = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        return tuple(SampledToken(_id(token), logprob, self._best((top or {}).items())) for token, logprob, top in columns)

    def _best(self, top: Iterable[tuple[str, float]]) -> tuple[tuple[int, float], ...]:
        """Best first; vLLM adds the sampled token where it is not among them."""
        ordered = sorted(((_id(token), logprob) for token, logprob in top), key=lambda pair: -pair[1])
        return tuple(ordered[: self._top_logprobs])


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def _tool_call(call: Mapping[str, Any]) -> ToolCallPiece:
    function = call.get("function") or {}
    return ToolCallPiece(index=call["index"], arguments=function.get("arguments") or "", id=call.get("id"), name=function.get("name"))


def _message(tokenizer: PreTrainedTokenizerBase, message: ChatMessage) -> dict[str, Any]:
    turn = message.model_dump(exclude_none=True)
    turn["role"] = "system" if message.role == "developer" else message.role
    return {key: value if key == "role" else _safe(tokenizer, value) for key, value in turn.items()}


def _template_kwargs(request: GenerationRequest, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {key: _safe(tokenizer, value) for key, value in request.template_kwargs.items() if key != "tools"}


def _safe(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
    """The same JSON with a zero-width space in every control token that a text spells: vLLM would read it as control."""
    if isinstance(value, str):
        return neutralise(tokenizer, value).replace(MARK, ZERO_WIDTH_SPACE)
    if isinstance(value, dict):
        return {_safe(tokenizer, key): _safe(tokenizer, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_safe(tokenizer, item) for item in value]
    return value


def _int64(seed: int | None) -> JsonValue:
    """OpenAI's seeds are any integers, vLLM's are 64 bits wide."""
    return None if seed is None else (seed + 2**63) % 2**64 - 2**63
