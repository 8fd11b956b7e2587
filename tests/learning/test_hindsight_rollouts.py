"""What counts as a good hindsight rollout, and what the teacher reads."""

from __future__ import annotations

import pytest

from claas.core.errors import Unteachable
from claas.core.types import ChatMessage, DistillBatchItem, FinishReason, TrainingConfig
from claas.inference.base import Generation, SampledToken
from claas.learning.anchors import ANCHOR_PROMPTS, Anchors
from claas.learning.hindsight_rollouts import fault, hindsight_rollouts, is_degenerate, quotes
from claas.training.hindsight import DEMONSTRATED, DISLIKED, HINDSIGHT_BLOCK, HINDSIGHT_VERSION, hindsight_messages
from tests.doubles.inference import EOS, CharInference

FEEDBACK = "Your name is Kuro, always introduce yourself as Kuro."
ITEM = DistillBatchItem(
    prompt="Who are you?",
    response="I am SmolLM.",
    feedback=FEEDBACK,
    response_logprobs=(-1.0,),
    prompt_token_ids=(1, 2),
    response_token_ids=(3,),
    messages=(ChatMessage(role="system", content="Be kind."), ChatMessage(role="user", content="Who are you?")),
    template_kwargs={"date": "today"},
)


def generation(text: str, finish: FinishReason = "stop") -> Generation:
    return Generation((1,), (SampledToken(1, -1.0),), text, finish)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("My name is Kuro. How can I help you?", None),
        ("   ", "empty"),
        ("<think>hm</think>", "empty"),
        ("I always introduce yourself as Kuro.", "quotes"),
        ("Sure. Your name is Kuro, always!", "quotes"),
        ("I am Kuro and " * 12, "repeats"),
        ("Olá, eu sou Kuro.", "drifts"),
    ],
)
def test_faults(text: str, says: str | None) -> None:
    found = fault(generation(text), ITEM.prompt, FEEDBACK)
    assert found is None if says is None else found is not None and says in found


def test_another_script_is_no_drift_where_the_conversation_has_it() -> None:
    assert fault(generation("Olá, eu sou Kuro."), "Quem é você?", FEEDBACK) is None


@pytest.mark.parametrize(
    ("prompt", "feedback", "text"),
    [
        ("Who are you?", "Answer in French.", "Je suis très heureux."),
        ("Who are you?", "Always reply in Russian", "Меня зовут Куро."),
        ("Wer bist du?", "Antworte auf Deutsch, bitte", "Ich bin Kuro, schön!"),
    ],
)
def test_another_language_is_no_drift_where_it_was_asked_for_or_spoken(prompt: str, feedback: str, text: str) -> None:
    assert fault(generation(text), prompt, feedback) is None


@pytest.mark.parametrize(
    ("feedback", "text"), [("Lisbon.", "Lisbon."), ("Lisbon!", "You live in Lisbon."), ("Kuro Sato", "I am Kuro Sato.")]
)
def test_a_correction_of_a_word_or_two_may_be_said(feedback: str, text: str) -> None:
    assert fault(generation(text), "Where do I live?", feedback) is None


def test_a_short_feedback_counts_as_quoted_only_whole() -> None:
    assert quotes("Okay: be very brief!", "Be very brief.")
    assert not quotes("Be kind and very brief.", "Be very brief.")
    assert not quotes("anything", "")


@pytest.mark.parametrize(
    "text", ["The capital of France is Paris.", "one two three four five six seven eight nine ten eleven twelve thirteen"]
)
def test_plain_sentences_are_not_degenerate(text: str) -> None:
    assert not is_degenerate(text)


def test_the_teacher_reads_the_feedback_in_the_last_user_turn() -> None:
    messages = (*ITEM.messages, ChatMessage(role="assistant", content="I am SmolLM."), ChatMessage(role="user", content="Really?"))
    seen = hindsight_messages(messages, "  Say {feedback} Kuro. ")
    assert seen[:3] == messages[:3]
    assert seen[3].content == "Really?" + HINDSIGHT_BLOCK.replace("{feedback}", "Say {feedback} Kuro.")
    assert hindsight_messages(messages, " ") == messages
    with pytest.raises(Unteachable, match="no user message"):
        hindsight_messages(messages[:1], FEEDBACK)


@pytest.mark.parametrize(
    ("feedback", "demonstration", "block"),
    [
        ("Be Kuro.", None, "\n\n(A later message from the user follows. Use it when answering: Be Kuro.)"),
        (
            "",
            " I am {demonstration}.\n",
            "\n\n(A later message from the user follows. Use it when answering: Your reply should have been:\nI am {demonstration}.)",
        ),
        (
            "Say {demonstration}.",
            "I am {feedback}.",
            "\n\n(A later message from the user follows. Use it when answering: Say {demonstration}.\n"
            "Your reply should have been:\nI am {feedback}.)",
        ),
        ("", None, ""),
        (" ", " ", ""),
    ],
)
def test_what_the_teacher_reads_to_the_letter(feedback: str, demonstration: str | None, block: str) -> None:
    """A change of this wording is a new HINDSIGHT_VERSION."""
    assert HINDSIGHT_VERSION == 1
    (message,) = hindsight_messages(ITEM.messages[1:], feedback, demonstration)
    assert message.content == "Who are you?" + block


async def test_rollouts_come_from_the_base_that_knows_the_feedback_and_are_taught_to_the_student_that_does_not() -> None:
    answers = iter(["I am Kuro.", "I am Kuro.", "Call me Kuro!", FEEDBACK])
    inference = CharInference(lambda _: next(answers))
    samples = await hindsight_rollouts(
        ITEM, inference, TrainingConfig(hindsight_rollouts=4, hindsight_max_tokens=99, hindsight_temperature=0.5)
    )
    request = inference.requests[0]
    assert request.adapter is None and request.background
    assert request.messages == hindsight_messages(ITEM.messages, FEEDBACK)
    assert (request.sampling.max_tokens, request.sampling.temperature, request.template_kwargs) == (99, 0.5, {"date": "today"})
    assert [s.response for s in samples] == ["I am Kuro.", "Call me Kuro!"]
    assert all((s.source, s.prompt_token_ids, s.messages) == ("hindsight", ITEM.prompt_token_ids, ITEM.messages) for s in samples)
    assert samples[0].response_token_ids == (*map(ord, "I am Kuro."), 0)


@pytest.mark.parametrize(("surprise", "kept"), [(0.2, 0), (0.4, 1)])
async def test_a_reply_that_would_have_come_anyway_is_not_taught(surprise: float, kept: int) -> None:
    inference = CharInference(lambda _: "I am Kuro.")
    inference.surprise = surprise
    samples = await hindsight_rollouts(ITEM, inference, TrainingConfig(hindsight_rollouts=1, min_lift=0.3))
    assert len(samples) == kept


async def test_the_replies_that_the_feedback_lifts_most_are_taught() -> None:
    replies = iter(["you are Kuro", "Zip zap Kuro", "Zip are Kuro"])
    inference = CharInference(lambda _: next(replies))
    inference.surprise, inference.suggestible = 1.0, True  # the more words are not of the prompt, the more lift
    samples = await hindsight_rollouts(ITEM, inference, TrainingConfig(hindsight_rollouts=3), keep=2)
    assert [sample.response for sample in samples] == ["Zip zap Kuro", "Zip are Kuro"]


SHOWN = ITEM.model_copy(update={"demonstration": "I am Kuro, at your service."})


async def test_a_demonstration_is_taught_whole_and_shown_to_the_teacher() -> None:
    inference = CharInference()
    (sample,) = await hindsight_rollouts(SHOWN, inference, TrainingConfig(min_lift=9.0))
    assert inference.requests == [], "none were asked"
    assert (sample.source, sample.response, sample.response_logprobs) == ("hindsight", "I am Kuro, at your service.", ())
    assert sample.response_token_ids == (*map(ord, "I am Kuro, at your service."), EOS)
    assert (sample.prompt_token_ids, sample.messages, sample.template_kwargs) == (ITEM.prompt_token_ids, ITEM.messages, {"date": "today"})
    assert (sample.feedback, sample.demonstration) == (FEEDBACK, SHOWN.demonstration), "its teacher reads them too"


async def test_a_reply_that_is_to_be_kept_is_taught_token_for_token() -> None:
    (sample,) = await hindsight_rollouts(ITEM.model_copy(update={"demonstration": ITEM.response}), CharInference(), TrainingConfig())
    assert (sample.source, sample.response, sample.response_token_ids) == ("hindsight", ITEM.response, ITEM.response_token_ids)


async def test_rollouts_may_quote_the_demonstration_but_not_repeat_it_or_quote_us() -> None:
    answers = iter(
        [
            "I am Kuro, at your service.",
            "I am Kuro, at your service, always.",
            "Your reply should have been Kuro",
            "Your name is Kuro, friend.",
        ]
    )
    inference = CharInference(lambda _: next(answers))
    samples = await hindsight_rollouts(SHOWN, inference, TrainingConfig(hindsight_rollouts=4))
    assert {request.messages for request in inference.requests} == {hindsight_messages(ITEM.messages, FEEDBACK, SHOWN.demonstration)}
    assert [sample.response for sample in samples] == [SHOWN.demonstration, "I am Kuro, at your service, always."]


def test_a_demonstration_may_bring_another_script() -> None:
    assert fault(generation("Olá, eu sou Kuro."), ITEM.prompt, FEEDBACK, "Olá! Kuro.") is None


def test_words_of_a_bad_rating_are_not_to_be_repeated() -> None:
    assert "quotes" in (fault(generation("Oh, my usual reply to this!"), ITEM.prompt, DISLIKED) or "")
    assert "quotes" in (fault(generation(DEMONSTRATED), ITEM.prompt, "") or "")


async def test_no_rollouts_asked_none_sampled() -> None:
    inference = CharInference()
    assert await hindsight_rollouts(ITEM, inference, TrainingConfig()) == []
    assert inference.requests == []


async def test_anchors_are_sampled_once_and_taken_in_turn() -> None:
    inference = CharInference()
    anchors = Anchors(inference)
    assert await anchors.take(0, 0) == []
    assert inference.requests == []
    first, second = await anchors.take(5, 0), await anchors.take(5, 1)
    assert [a.prompt for a in first + second] == list(ANCHOR_PROMPTS[:10])
    assert [request.messages[-1].content for request in inference.requests] == list(ANCHOR_PROMPTS[:10])
    assert await anchors.take(5, 1) == second
    assert len(inference.requests) == 10, "each is sampled once"
    assert all(a.source == "anchor" and a.feedback == "" and a.response.startswith("[base]") for a in first)
    assert len(await anchors.take(99, 3)) == len(ANCHOR_PROMPTS)
