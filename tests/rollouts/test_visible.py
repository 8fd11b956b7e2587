"""What the user sees of a raw reply."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claas.rollouts.visible import visible_text

PLAIN = st.text().filter(lambda text: "<" not in text and ">" not in text)
THOUGHT = PLAIN
SAID = PLAIN.map(str.strip).filter(bool)


@pytest.mark.parametrize(
    ("raw", "visible"),
    [
        ("", ""),
        ("Hello.", "Hello."),
        ("  Hello.\n", "  Hello.\n"),
        ("<think>hm</think>Hello.", "Hello."),
        ("<think>\nhm\n</think>\n\nHello.\n", "Hello.\n"),
        ("<think></think>Hello.", "Hello."),
        ("<think>a</think><think>b</think>Hello.", "Hello."),
        ("<think>a</think>One. <think>b</think>Two.", "One. Two."),
        ("<think>a</think>", ""),
        ("<think>cut off", ""),
        ("\n <think>cut off", ""),
        ("<think>a</think>\n<think>cut off", ""),
        ("hm</think>Hello.", "Hello."),
        ("hm</think>\n\n<think>again</think>Hello.", "Hello."),
        ("</think>Hello.", "Hello."),
        ("<think>a <think> b</think>Hello.", "Hello."),
        ("Write <think> to begin.", "Write <think> to begin."),
        ("<think>a</think>Close it with </think> again.", "Close it with </think> again."),
        ("<think>a</think>Open it with <think>, then go on.", "Open it with <think>, then go on."),
        ("a < b and <thinking> is no tag", "a < b and <thinking> is no tag"),
    ],
)
def test_thinking(raw: str, visible: str) -> None:
    assert visible_text(raw) == visible


@pytest.mark.parametrize(
    ("raw", "visible"),
    [
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|return|>", "Hello."),
        ("<|start|>assistant<|channel|>final<|message|>Hello.<|end|>", "Hello."),
        ("<|channel|>final<|message|>Hello, cut o", "Hello, cut o"),
        ("<|channel|>analysis<|message|>cut off", ""),
        ("<|channel|>analysis", ""),
        ("<|channel|>final", ""),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=functions.now<|message|>{}<|call|>", ""),
        ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", "{}"),
        ("<|channel|>analysis<|message|>the final word<|end|><|start|>assistant<|channel|>final<|message|> Yes.", " Yes."),
        ("<|channel|>final<|message|>Say <think>.<|return|>", "Say <think>."),
        ("The marker <|channel|>final<|message|> is gpt-oss's.", "The marker <|channel|>final<|message|> is gpt-oss's."),
    ],
)
def test_channels(raw: str, visible: str) -> None:
    assert visible_text(raw) == visible


@given(PLAIN)
def test_text_without_markup_comes_back_as_it_is(text: str) -> None:
    assert visible_text(text) == text


@given(thoughts=st.lists(THOUGHT, min_size=1, max_size=4), said=SAID, opened=st.booleans())
def test_no_thought_before_the_reply_is_seen(thoughts: list[str], said: str, opened: bool) -> None:
    raw = "\n".join(f"<think>{thought}</think>" for thought in thoughts) + "\n\n" + said
    assert visible_text(raw if opened else raw.removeprefix("<think>")) == said


@given(thought=THOUGHT, said=SAID)
def test_channels_show_the_final_one_only(thought: str, said: str) -> None:
    raw = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{said}<|return|>"
    assert visible_text(raw) == said


@given(
    raw=st.lists(
        st.sampled_from(["<think>", "</think>", "a", " ", "\n", "<|channel|>", "final", "<|message|>", "<|end|>"]), max_size=12
    ).map("".join)
)
def test_nothing_is_invented(raw: str) -> None:
    """The visible text is what is left after taking pieces out of the raw one, in its order."""
    letters = iter(raw)
    assert all(letter in letters for letter in visible_text(raw))


@given(thought=THOUGHT, said=SAID, cut=st.integers(0, 200))
def test_a_reply_that_is_still_being_written_never_shows_a_whole_thought_as_text(thought: str, said: str, cut: int) -> None:
    """Every beginning of a thinking reply shows a beginning of what is said, or the begun tag itself."""
    begun = f"<think>{thought}</think>{said}"[:cut]
    assert said.startswith(visible_text(begun)) or "<think>".startswith(begun)


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "<think></think>", "<thi<think></think>nk>", "<|channel|>", "<|channel|>final<|message|>"]
)
def test_a_hostile_reply_takes_linear_time(piece: str) -> None:
    raw = piece * (2_000_000 // len(piece))
    start = time.process_time()
    visible_text(raw)
    assert time.process_time() - start < 5  # a quadratic pass over it takes hours
