"""Every mismatch of feedback and reply is an error of its own, raised before anything is stored."""

from __future__ import annotations

from typing import Any

import pytest

from claas.core.errors import BadRequest, ClaasError, Conflict, NotFound, Unteachable
from claas.core.types import ChatMessage, SamplingParams, TrainingConfig
from claas.learning.resolve import ResolvedLesson, resolve
from claas.learning.types import FeedbackItem
from claas.training.hindsight import DISLIKED
from tests.learning.conftest import LORA, School, lesson


async def resolved(school: School, *items: FeedbackItem) -> ResolvedLesson:
    return await resolve(lesson(*items), school.rollouts, school.engine.base_model, TrainingConfig())


async def test_a_completion_id_brings_the_exact_rollout(school: School) -> None:
    system = ChatMessage(role="system", content="Be kind.")
    rollout = await school.rollout(messages=(system, ChatMessage(role="user", content="Who are you?")), template_kwargs={"a": 1}, version=0)
    found = await resolved(school)
    (sample,) = found.payload(("fb-1",)).samples
    assert found.lora_id == LORA
    assert sample.messages == rollout.messages
    assert (sample.prompt_token_ids, sample.response_token_ids) == ((1, 2, 3), (4, 5))
    assert (sample.response_logprobs, sample.template_kwargs) == ((-0.5, -0.25), {"a": 1})
    assert (sample.prompt, sample.response, sample.feedback) == ("Who are you?", "I am SmolLM.", "Be Kuro.")
    assert (sample.version, sample.completion_id, sample.source) == (0, "chatcmpl-1", "sampled")


async def test_the_upstream_form_finds_the_same_rollout(school: School) -> None:
    await school.rollout()
    item = FeedbackItem(feedback="Be Kuro.", lora_id=LORA, prompt="Who are you?", response="I am SmolLM.")
    assert (await resolved(school, item)).rollouts[0].id == "chatcmpl-1"


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"lora_id": None, "version": None}, Unteachable, "chat with an adapter"),
        ({"finish_reason": "length"}, Unteachable, "cut off"),
        ({"finish_reason": "abort"}, Unteachable, "aborted"),
        ({"response_token_ids": (), "response_logprobs": ()}, Unteachable, "empty"),
        ({"messages": ()}, Unteachable, "no user message"),
        ({"base_model": "another/model"}, Unteachable, "another/model"),
    ],
)
async def test_replies_that_cannot_be_taught(school: School, changes: dict[str, Any], error: type[ClaasError], says: str) -> None:
    await school.rollout(**changes)
    with pytest.raises(error, match=says):
        await resolved(school)


@pytest.mark.parametrize(
    ("said", "feedback", "demonstration"),
    [
        ({"rating": -1}, DISLIKED, None),
        ({"rating": 1}, "", "I am SmolLM."),
        ({"rating": 1, "feedback": "So polite."}, "So polite.", None),
        ({"rating": -1, "demonstration": "I am Kuro."}, "", "I am Kuro."),
        ({"feedback": "Be Kuro.", "demonstration": "I am Kuro."}, "Be Kuro.", "I am Kuro."),
    ],
)
async def test_a_rating_speaks_where_nothing_else_does(
    school: School, said: dict[str, Any], feedback: str, demonstration: str | None
) -> None:
    await school.rollout()
    (sample,) = (await resolved(school, FeedbackItem(completion_id="chatcmpl-1", **said))).payload(("fb-1",)).samples
    assert (sample.feedback, sample.demonstration, sample.source, sample.response) == (feedback, demonstration, "sampled", "I am SmolLM.")


async def test_a_reply_that_shows_nothing_can_be_corrected_and_not_be_kept(school: School) -> None:
    await school.rollout(text=" ")
    with pytest.raises(Unteachable, match="nothing to keep"):
        await resolved(school, FeedbackItem(completion_id="chatcmpl-1", rating=1))
    for said in ({"rating": -1}, {"rating": 1, "demonstration": "I am Kuro."}, {"feedback": "Say something.", "rating": 1}):
        await resolved(school, FeedbackItem.model_validate({"completion_id": "chatcmpl-1"} | said))


def test_an_item_says_something() -> None:
    for said in ({}, {"feedback": ""}, {"demonstration": ""}):
        with pytest.raises(ValueError, match="all empty"):
            FeedbackItem.model_validate({"completion_id": "chatcmpl-1"} | said)


async def test_an_adapter_mismatch_is_named(school: School) -> None:
    await school.rollout()
    with pytest.raises(Unteachable, match="not 'you/other'"):
        await resolved(school, FeedbackItem(feedback="x", completion_id="chatcmpl-1", lora_id="you/other"))


async def test_unknown_replies(school: School) -> None:
    with pytest.raises(NotFound):
        await resolved(school, FeedbackItem(feedback="x", completion_id="chatcmpl-none"))
    with pytest.raises(NotFound):
        await resolved(school, FeedbackItem(feedback="x", lora_id=LORA, prompt="a", response="b"))
    with pytest.raises(BadRequest, match="name the reply"):
        await resolved(school, FeedbackItem(feedback="x", lora_id=LORA))


async def test_an_ambiguous_reply_must_be_named_by_id(school: School) -> None:
    await school.rollout("chatcmpl-1")
    await school.rollout("chatcmpl-2", prompt_token_ids=(9,))
    with pytest.raises(Conflict):
        await resolved(school, FeedbackItem(feedback="x", lora_id=LORA, prompt="Who are you?", response="I am SmolLM."))


async def test_one_request_teaches_one_adapter_with_one_setting(school: School) -> None:
    await school.rollout("chatcmpl-1")
    await school.rollout("chatcmpl-2", lora_id="you/other")
    one, two = (FeedbackItem(feedback="x", completion_id=f"chatcmpl-{n}") for n in (1, 2))
    with pytest.raises(BadRequest, match="one adapter"):
        await resolved(school, one, two)
    with pytest.raises(BadRequest, match="same training"):
        await resolved(school, one, one.model_copy(update={"training": {"alpha": 1.0}}))


async def test_training_settings_go_over_the_defaults_and_are_checked(school: School) -> None:
    await school.rollout()
    item = FeedbackItem(feedback="x", completion_id="chatcmpl-1", training={"alpha": 0.0, "gradient_steps": 3})
    found = await resolved(school, item)
    assert (found.training.alpha, found.training.gradient_steps, found.training.is_clip) == (0.0, 3, 5.0)
    for wrong in ({"alpha": 2}, {"learning_rat": 1}):
        with pytest.raises(BadRequest) as caught:
            await resolved(school, item.model_copy(update={"training": wrong}))
        assert caught.value.param == f"requests.0.training.{next(iter(wrong))}"


async def test_logprobs_under_a_grammar_are_of_no_version(school: School) -> None:
    """The grammar left fewer tokens to choose from, so an importance ratio against them would be wrong."""
    await school.rollout(version=0, sampling=SamplingParams(constrained=True))
    (sample,) = (await resolved(school)).payload(("fb-1",)).samples
    assert sample.version is None and sample.response_logprobs == (-0.5, -0.25)
