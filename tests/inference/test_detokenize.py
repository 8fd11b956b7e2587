"""The detokenizer: any text, any tokens, any stop strings: pieces that are never taken back add up to the whole, cut at the stop."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from claas.inference.detokenize import UNFINISHED, Detokenizer
from tests.models.tiny import tiny_tokenizer

TOKENIZER: PreTrainedTokenizerFast = tiny_tokenizer()
TOKEN = st.integers(0, len(TOKENIZER) - 1)
TEXT = st.text(st.sampled_from("ab the\n€é😀\ufffd"), max_size=30)
STOPS = st.lists(st.text(st.sampled_from("ab the\n€😀"), min_size=1, max_size=4), max_size=4)


def visible(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def byte_tokens(text: str) -> list[int]:
    """The text with one token for each byte: every character above ASCII is split."""
    return [
        TOKENIZER.convert_tokens_to_ids(piece)
        for char in text
        for piece in TOKENIZER.backend_tokenizer.pre_tokenizer.pre_tokenize_str(char)[0][0]
    ]


def spoken(ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    """What is given out token by token, and whether a stop string ended it."""
    detokenizer = Detokenizer(visible, stop)
    pieces = []
    for token in ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            return pieces, True
    return [*pieces, detokenizer.finish()], False


@given(st.lists(TOKEN, max_size=40))
def test_any_tokens_add_up_to_their_decoding(ids: list[int]) -> None:
    assert "".join(spoken(ids)[0]) == visible(ids)


@given(TEXT)
def test_a_character_comes_whole_or_not_at_all(text: str) -> None:
    ids = byte_tokens(text)
    assert visible(ids) == text
    pieces, _ = spoken(ids)
    assert "".join(pieces) == text
    assert "".join(pieces).count(UNFINISHED) == text.count(UNFINISHED)


@given(TEXT, STOPS, st.booleans())
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str], by_bytes: bool) -> None:
    ids = byte_tokens(text) if by_bytes else TOKENIZER(text)["input_ids"]
    pieces, stopped = spoken(ids, stop)
    # The reference: the reply ends with the first token after which the text, as far as it is certain, holds a stop string.
    for n in range(1, len(ids) + 1):
        certain = visible(ids[:n]).rstrip(UNFINISHED)
        places = [at for at in map(certain.find, stop) if at >= 0]
        if places:
            assert (stopped, len(pieces)) == (True, n)
            assert "".join(pieces) == certain[: min(places)]
            return
    assert not stopped
    assert "".join(pieces) == text


@given(TEXT, STOPS)
def test_nothing_is_held_back_without_need(text: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(visible, stop)
    given = ""
    for n, token in enumerate(ids := byte_tokens(text)):
        given += detokenizer.push(token)
        if detokenizer.stopped:
            return
        held = visible(ids[: n + 1]).rstrip(UNFINISHED)[len(given) :]
        assert held == "" or any(s.startswith(held) for s in stop)


def test_control_tokens_show_as_nothing_and_cost_nothing() -> None:
    detokenizer = Detokenizer(visible)
    end = TOKENIZER.eos_token_id
    assert [detokenizer.push(end) for _ in range(1000)] == [""] * 1000
    assert detokenizer.push(TOKENIZER.convert_tokens_to_ids("a")) == "a"


def test_decoders_that_need_context_get_it() -> None:
    words = ["▁one", "▁two", "three", "▁four"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    detokenizer = Detokenizer(decode)
    assert [detokenizer.push(i) for i in range(4)] == ["one", " two", "three", " four"]
