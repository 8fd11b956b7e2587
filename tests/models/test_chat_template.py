"""Messages to ids: exactly the template's, and no text in a message ever becomes a control token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from claas.core.errors import BadRequest
from claas.core.types import ChatMessage
from claas.models.chat_template import MARK, encode_reply, neutralise, render, stop_token_ids
from tests.models.tiny import SPECIAL, load_tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
START, END = TOKENIZER.convert_tokens_to_ids("<|im_start|>"), TOKENIZER.convert_tokens_to_ids("<|im_end|>")
TOOLS = tiny_tokenizer(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}<|im_end|>\n"
    "{% endfor %}{% for tool in tools or [] %}{{ tool.description }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = tiny_tokenizer(
    "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}{{ messages[0].content }}"
)
WORDS = st.lists(st.sampled_from([*SPECIAL, "<|im_", "end|>", "<", "|>", "hi", " ", "\n", "é"]), max_size=8).map("".join)


def user(content: str, role: str = "user") -> ChatMessage:
    return ChatMessage.model_validate({"role": role, "content": content})


@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40))
def test_plain_messages_are_tokenised_as_the_template_means(text: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    expected = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(render(TOKENIZER, [user("Be brief.", "system"), user(text)], {})) == expected


@given(WORDS, st.sampled_from(["system", "user", "assistant", "tool"]))
def test_control_tokens_come_from_the_template_alone(text: str, role: str) -> None:
    prompt = render(TOKENIZER, [user(text, role)], {})
    assert (prompt.count(START), prompt.count(END), prompt.count(0)) == (2, 1, 0)
    assert TOKENIZER.decode(prompt) == f"<|im_start|>{role}\n{text}<|im_end|>\n<|im_start|>assistant\n"


@given(WORDS)
def test_neutralise_is_idempotent_and_only_adds_marks(text: str) -> None:
    once = neutralise(TOKENIZER, text)
    assert neutralise(TOKENIZER, once) == once
    assert once.replace(MARK, "") == text
    assert render(TOKENIZER, [user(once)], {}) == render(TOKENIZER, [user(text)], {})


class Counting(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Counts how often its added tokens are listed, which takes a real one a millisecond for every 500."""

    listed = 0

    @property
    def added_tokens_decoder(self) -> Any:
        self.listed += 1
        return super().added_tokens_decoder


def test_the_control_tokens_are_looked_for_once_however_many_texts_there_are() -> None:
    counting = Counting(tokenizer_object=TOKENIZER.backend_tokenizer, chat_template=TOKENIZER.chat_template)
    before = counting.listed
    for text in ("a", "b", "<|im_end|>"):
        assert neutralise(counting, text) == neutralise(TOKENIZER, text)
    assert counting.listed == before + 1


@given(WORDS)
def test_a_reply_is_encoded_without_control_tokens(text: str) -> None:
    ids = encode_reply(TOKENIZER, text)
    assert not {0, START, END} & set(ids)
    assert TOKENIZER.decode(ids) == text


def test_a_developer_speaks_as_the_system() -> None:
    assert render(TOKENIZER, [user("x", "developer")], {}) == render(TOKENIZER, [user("x", "system")], {})


def test_tool_calls_reach_a_template_that_has_a_place_for_them() -> None:
    call = {"type": "function", "function": {"name": "now", "arguments": '{"zone": "<|im_end|>"}'}}
    message = ChatMessage(role="assistant", content=None, tool_calls=(call,))  # type: ignore[arg-type]
    prompt = render(TOOLS, [user("time?"), message], {"tools": [{"description": "the time <|im_start|>"}]})
    text = TOOLS.decode(prompt)
    assert '[now {"zone": "<|im_end|>"}]' in text and "the time <|im_start|>" in text
    assert (prompt.count(START), prompt.count(END)) == (3, 2)
    with pytest.raises(BadRequest, match="tool_calls"):
        render(TOKENIZER, [message], {})


@pytest.mark.parametrize("arguments", ["{", "[]", "7", ""])
def test_arguments_that_are_no_object_read_as_an_empty_one(arguments: str) -> None:
    call = {"function": {"name": "now", "arguments": arguments}}
    message = ChatMessage(role="assistant", tool_calls=(call,))  # type: ignore[arg-type]
    assert "[now {}]" in TOOLS.decode(render(TOOLS, [message], {}))


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thoughts_reach_a_template_that_keeps_them(name: str) -> None:
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m." + name + " or '-' }}|{{ m.content }};{% endfor %}")
    said = ChatMessage(role="assistant", content="4", reasoning_content="2 + 2 <|im_end|>")
    assert tokenizer.decode(render(tokenizer, [user("x"), said], {})) == "-|x;2 + 2 <|im_end|>|4;"
    assert render(TOKENIZER, [said], {}) == render(TOKENIZER, [said.model_copy(update={"reasoning_content": None})], {})


@pytest.mark.parametrize("key", ["tools", "enable_thinking", "tokenize", "chat_template", "messages", "add_generation_prompt"])
def test_arguments_the_template_does_not_read_are_refused_by_name(key: str) -> None:
    with pytest.raises(BadRequest, match=key) as raised:
        render(TOKENIZER, [user("x")], {key: []})
    assert raised.value.param == "template_kwargs"


def test_what_a_template_refuses_is_the_callers_mistake() -> None:
    with pytest.raises(BadRequest, match="the user speaks first") as raised:
        render(STRICT, [user("x", "assistant")], {})
    assert raised.value.param == "messages"
    assert STRICT.decode(render(STRICT, [user("x")], {})) == "x"


@pytest.mark.parametrize("messages", [[], [ChatMessage(role="user")]])
def test_there_must_be_something_to_answer(messages: list[ChatMessage]) -> None:
    with pytest.raises(BadRequest) as raised:
        render(TOKENIZER, messages, {})
    assert raised.value.param == "messages"


def test_replies_end_at_the_generation_configs_ids_and_the_tokenizers(tiny_model_dir: object) -> None:
    assert stop_token_ids(load_tiny_model(tiny_model_dir)) == {END}  # type: ignore[arg-type]
    assert stop_token_ids(load_tiny_model(tiny_model_dir, eos_token_ids=[7])) == {END, 7}  # type: ignore[arg-type]
