"""Messages → token ids, the one place. It knows the tokenizer and its template; it does not know who asks or what is sampled.

**Control tokens come from the template alone.** Text such as `<|im_end|>` inside a message is split by a mark (a code point that
Unicode reserves for private use inside a program) before the template is rendered, and the rendered prompt is tokenised piece by
piece between the marks. So the model reads the very characters that were written, as plain text, and every prompt without such
text is tokenised exactly as the template's authors meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from pydantic import JsonValue
from transformers import PreTrainedTokenizerBase

from claas.core.errors import BadRequest
from claas.core.types import ChatMessage

if TYPE_CHECKING:
    from claas.models.base_model import LoadedModel

MARK = "\ufdd0"
RESERVED_KWARGS = frozenset({"messages", "conversation", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"})


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage], template_kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The prompt that asks for the next assistant turn, as token ids.

    Raises:
        BadRequest: no messages, a template argument the template does not know, or messages it refuses (`param` names the field).
    """
    if not messages:
        raise BadRequest("messages is empty: send at least one", param="messages")
    template = _template_source(tokenizer)
    _check_kwargs(template, template_kwargs)
    turns = [_turn(tokenizer, message, template) for message in messages]
    kwargs = {key: _neutral(tokenizer, value) for key, value in template_kwargs.items()}
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise BadRequest(f"the model's chat template refuses these messages: {str(error)[:300]}", param="messages") from error
    return _tokenise(tokenizer, text)


def encode_reply(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Plain text as the tokens of a reply: no control token can come of it, none is added."""
    return _tokenise(tokenizer, neutralise(tokenizer, text))


def neutralise(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """`text` with every control token in it split by the mark, so that `render` tokenises it as plain text. Idempotent."""
    control = _control_tokens(tokenizer)
    while control.search(text):
        text = control.sub(lambda found: found[0][0] + MARK + found[0][1:], text)
    return text


def stop_token_ids(model: LoadedModel) -> frozenset[int]:
    """The ids that end a reply: those of the model's generation config and the tokenizer's end of sequence."""
    configured = model.module.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, model.tokenizer.eos_token_id) if i is not None)


def _turn(tokenizer: PreTrainedTokenizerBase, message: ChatMessage, template: str) -> dict[str, Any]:
    if message.tool_calls and "tool_calls" not in template:
        raise BadRequest("this model's chat template has no place for tool_calls", param="messages")
    if message.content is None and not message.tool_calls:
        raise BadRequest(f"a message of role {message.role!r} has no content", param="messages")
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    turn["content"] = None if message.content is None else neutralise(tokenizer, message.content)
    if message.tool_calls:
        turn["tool_calls"] = [_neutral(tokenizer, _parsed_arguments(call)) for call in message.tool_calls]
    optional = {"name": message.name, "tool_call_id": message.tool_call_id}
    thought = dict.fromkeys(("reasoning_content", "reasoning"), message.reasoning_content)  # templates know it by either name
    turn |= {key: neutralise(tokenizer, value) for key, value in (optional | thought).items() if value is not None}
    return turn


def _parsed_arguments(call: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Templates expect a call's arguments as an object; on the wire they are its JSON text.

    A model wrote that text. Where it is no object it reads as an empty one, as serving engines do, or the conversation would be stuck.
    """
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(str(function["arguments"]))
    except ValueError:
        arguments = {}
    return {**call, "function": {**function, "arguments": arguments if isinstance(arguments, dict) else {}}}


def _neutral(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
    """`neutralise` on every string inside a JSON value, keys included."""
    if isinstance(value, str):
        return neutralise(tokenizer, value)
    if isinstance(value, Mapping):
        return {neutralise(tokenizer, key): _neutral(tokenizer, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_neutral(tokenizer, item) for item in value]
    return value


def _check_kwargs(template: str, kwargs: Mapping[str, Any]) -> None:
    """An argument the template never reads would be dropped in silence, so it is refused by name."""
    for key in kwargs:
        if key in RESERVED_KWARGS or not re.search(rf"\b{re.escape(key)}\b", template):
            raise BadRequest(f"this model's chat template takes no argument {key[:100]!r}", param="template_kwargs")


def _template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    source = tokenizer.chat_template
    return "\n".join(source.values()) if isinstance(source, dict) else str(source)


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    pieces = (tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in text.split(MARK) if piece)
    return tuple(token for piece in pieces for token in piece)


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Every control token that can be split, the longest first: one character cannot be.

    Looked for once: to list the added tokens takes longer than to read a message. A tokenizer in use is given no further ones.
    """
    literals = sorted((str(t) for t in tokenizer.added_tokens_decoder.values() if t.special and len(str(t)) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, literals)) if literals else r"(?!)")
