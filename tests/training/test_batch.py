"""Samples are checked when prepared, grouped within their budget, and padded without a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from claas.core.errors import Unteachable
from claas.core.types import ChatMessage, DistillBatchItem, TeacherKind
from claas.training.batch import collate
from claas.training.hindsight import DEMONSTRATED, HINDSIGHT_BLOCK, hindsight_messages
from claas.training.samples import Sample, micro_batches, prepare
from tests.training.conftest import sample

ITEM = DistillBatchItem(
    prompt="Hi",
    response="Yo",
    feedback="Be polite.",
    response_logprobs=(-0.5, -0.5),
    prompt_token_ids=(5, 6, 7),
    response_token_ids=(8, 9),
    messages=(ChatMessage(role="user", content="Hi"),),
    version=2,
)


def render(messages: Sequence[ChatMessage], template_kwargs: Mapping[str, JsonValue]) -> tuple[int, ...]:
    """One id for each message, then one for each character: enough to see what was rendered."""
    return (*(len(m.content or "") for m in messages), len(template_kwargs))


def prepared(
    parent: int = 2,
    max_context: int = 100,
    teacher: TeacherKind = "live",
    hindsight_teacher: TeacherKind = "base",
    guided: bool = False,
    **changes: Any,
) -> Sample:
    return prepare(
        ITEM.model_copy(update=changes),
        render,
        teacher=teacher,
        hindsight_teacher=hindsight_teacher,
        parent=parent,
        vocab_size=10,
        max_context=max_context,
        control_feedback="Weather.",
        guided=guided,
    )


def test_the_student_reads_the_served_ids_and_the_teacher_a_longer_prompt() -> None:
    found = prepared()
    assert found.student_prompt == (5, 6, 7) and found.response == (8, 9)
    assert found.teacher_prompt[0] > found.control_prompt[0] > 2  # type: ignore[index]
    assert (found.teacher, found.on_policy, found.age) == ("live", True, 0)


def test_an_older_version_is_off_policy_and_counts_its_age() -> None:
    found = prepared(parent=5)
    assert (found.on_policy, found.age) == (False, 3)


def test_only_own_replies_have_a_live_teacher_a_ratio_and_a_control() -> None:
    for source in ("hindsight", "anchor"):
        found = prepared(source=source, response_logprobs=(), parent=5)
        assert (found.teacher, found.on_policy, found.age, found.control_prompt) == ("base", True, 0, None)
    assert prepared(source="anchor").teacher_prompt == (5, 6, 7)
    assert prepared(feedback="  ").teacher_prompt == (5, 6, 7)


def test_guided_hindsight_rollouts_have_a_control_rehearsed_or_not() -> None:
    control = prepared().control_prompt
    for replayed in (False, True):
        assert prepared(guided=True, source="hindsight", replayed=replayed).control_prompt == control is not None
    assert prepared(guided=True, source="anchor").control_prompt is None
    assert prepared(guided=True, source="hindsight", feedback=" ").control_prompt is None, "nobody moved it"
    assert prepared(guided=True, source="hindsight", demonstration="Hello!").control_prompt is None, "that is as far as it goes"
    assert prepared(guided=True, replayed=True).control_prompt is None


@pytest.mark.parametrize("kind", ["live", "base", "ema", "snapshot"])
def test_each_source_has_its_own_teacher(kind: TeacherKind) -> None:
    assert prepared(teacher=kind, hindsight_teacher="base").teacher == kind
    assert prepared(source="hindsight", teacher="live", hindsight_teacher=kind).teacher == kind
    assert prepared(source="anchor", teacher=kind, hindsight_teacher=kind).teacher == "base"


def test_the_book_is_read_by_the_base_model_before_the_feedback_and_by_no_other_teacher() -> None:
    book, plain = ("Be Kuro.", "I live in Lisbon."), prepared()
    found = prepared(teacher="book", book=book)
    more = len("Be Kuro.\nI live in Lisbon.\n")
    assert found.teacher == "base"
    assert found.teacher_prompt == (plain.teacher_prompt[0] + more, 0)
    assert found.control_prompt is not None and plain.control_prompt is not None
    assert found.control_prompt[0] == plain.control_prompt[0] + more, "its control differs in the feedback alone"
    assert prepared(book=book) == plain
    hindsight: dict[str, Any] = {"source": "hindsight", "book": book, "teacher": "book"}
    assert prepared(**hindsight).teacher_prompt == plain.teacher_prompt
    assert prepared(**hindsight, hindsight_teacher="book").teacher_prompt == found.teacher_prompt
    assert prepared(teacher="book", book=book, feedback="").teacher_prompt == ITEM.prompt_token_ids
    read = hindsight_messages(ITEM.messages, ITEM.feedback, book=book)[0].content
    assert read is not None and "Be Kuro.\nI live in Lisbon.\nBe polite." in read


def test_a_demonstration_alone_is_something_to_read() -> None:
    """The ids of `render` begin with the length of what is read."""
    said = DEMONSTRATED.replace("{demonstration}", "Hello!")
    shown = len("Hi" + HINDSIGHT_BLOCK.replace("{feedback}", said))
    for source in ("sampled", "hindsight"):
        assert prepared(source=source, feedback="", demonstration="Hello!").teacher_prompt == (shown, 0)
    both = prepared(demonstration="Hello!")
    assert both.teacher_prompt == (shown + len(f"{ITEM.feedback}\n"), 0)
    assert both.control_prompt == prepared().control_prompt


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"response_token_ids": (8, 10)}, "vocabulary"),
        ({"prompt_token_ids": (-1, 2)}, "vocabulary"),
        ({"response_logprobs": (-0.5, float("nan"))}, "logprobs"),
        ({"response_logprobs": (-0.5, float("-inf"))}, "logprobs"),
        ({"response_logprobs": (-0.5, 0.5)}, "logprobs"),
        ({"messages": (ChatMessage(role="system", content="x"),)}, "no user message"),
        ({"prompt_token_ids": (1,) * 99}, "shorten"),
    ],
)
def test_what_cannot_be_taught_says_why(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Unteachable, match=says):
        prepared(**changes)


def test_a_length_mismatch_is_an_error_when_the_item_is_built() -> None:
    with pytest.raises(ValueError, match="2 response tokens but 1 logprobs"):
        DistillBatchItem.model_validate(ITEM.model_dump() | {"response_logprobs": (-0.5,)})


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(20, 200))
def test_groups_keep_every_sample_within_the_budget(lengths: list[int], budget: int) -> None:
    samples = [sample(n, prompt=1, response=length) for n, length in enumerate(lengths)]
    groups = micro_batches(samples, budget)
    assert sorted(map(id, samples)) == sorted(id(s) for group in groups for s in group)
    for group in groups:
        assert len(group) == 1 or len(group) * max(s.length for s in group) <= budget


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=20), st.integers(20, 200))
def test_what_prompts_share_takes_no_room_of_its_own(shapes: list[tuple[int, int]], budget: int) -> None:
    samples = [
        replace(sample(n, prompt=1, response=r), student_prompt=(*range(p), 99), teacher_prompt=(*range(p), 98, 99))
        for n, (p, r) in enumerate(shapes)
    ]
    for group in micro_batches(samples, budget, sharing=True):
        for prompts in ([s.student_prompt for s in group], [s.teacher_prompt for s in group]):
            batch = collate(prompts, [s.response for s in group])
            assert len(group) == 1 or len(batch.shared_P) + batch.own_BS.numel() <= budget
    assert len(micro_batches(samples, budget, sharing=True)) <= len(micro_batches(samples, budget))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), st.integers(0, 5), st.booleans())
def test_every_response_token_is_predicted_one_position_earlier(shapes: list[tuple[int, int]], common: int, alike: bool) -> None:
    prompts = [(*range(common), *range(first := 20 if alike else 20 * (1 + row), first + p)) for row, (p, _) in enumerate(shapes)]
    responses = [tuple(range(200, 200 + r)) for _, r in shapes]
    batch = collate(prompts, responses)
    shared, whole = len(batch.shared_P), batch.whole()
    assert all(whole[row, : len(p) + len(r)].tolist() == [*p, *r] for row, (p, r) in enumerate(zip(prompts, responses, strict=True)))
    assert torch.equal(whole[:, shared:].flatten()[batch.predict_N + 1], batch.targets_N)
    # As much as can be is shared, but never the last token of a prompt, which predicts the first of the response.
    shortest = min(map(len, prompts)) - 1
    assert shared == (0 if len(shapes) == 1 else shortest if alike else min(common, shortest))
    assert batch.targets_N.tolist() == [token for response in responses for token in response]
