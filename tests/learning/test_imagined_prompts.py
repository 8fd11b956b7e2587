"""Which messages a feedback is about, as the base model imagines them, and what of that is taught."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from claas.core.types import ChatMessage, DistillBatchItem, LoraRuntimeRef, SamplingParams, TrainingConfig
from claas.inference.base import GenerationRequest
from claas.learning.checks import questions
from claas.learning.contradictions import claims, denied
from claas.learning.imagined_prompts import MAX_CHARS, imagine, imagined_rollouts, read_list
from claas.learning.types import FeedbackItem
from claas.training.hindsight import DISLIKED, hindsight_messages
from tests.doubles.inference import CharInference, prompt_ids
from tests.learning.conftest import School, lesson
from tests.learning.test_hindsight_rollouts import FEEDBACK, ITEM, SHOWN

TRAINING = TrainingConfig(hindsight_rollouts=2, hindsight_max_tokens=99, min_lift=0.0)
LONG = "Who has made you?"
LEARNT = LoraRuntimeRef(lora_id="me/assistant", version=1, vllm_name="me-assistant-1", lora_path="")


def imagining(*lists: str, reply: str = "I am Kuro.") -> Callable[[GenerationRequest], str]:
    """Goes on with lists as given, again and again, and replies to everything else."""
    said = [*lists]

    def answer(request: GenerationRequest) -> str:
        if request.prompt is None:
            return reply
        said.append(said.pop(0))
        return said[-1]

    return answer


@pytest.mark.parametrize(
    ("text", "whole", "lines"),
    [
        (" What is your name?\n3. Who made you?\n4. Introd", False, ["What is your name?", "Who made you?"]),
        (" What is your name?\n3. Who made you?", True, ["What is your name?", "Who made you?"]),
        (' "Say hello."\n\n3. …\n4. ' + "x" * (MAX_CHARS + 1), True, ["Say hello."]),
        (" What is", False, []),
        ("", True, []),
    ],
)
def test_reading_a_list(text: str, whole: bool, lines: list[str]) -> None:
    assert read_list(text, whole=whole) == lines


async def test_a_list_that_the_prompt_began_is_gone_on_with() -> None:
    inference = CharInference(imagining(" Tell me your name.\n3. who are you?\n4. Hi!", " Hi!\n3. Who made you?\n4. Tell me your name."))
    assert await imagine(ITEM.model_copy(update={"feedback": 'Your name\nis "Kuro".'}), inference, 2) == [
        "Tell me your name.",
        "Hi!",
        "Who made you?",
    ], "what each thought of first in front, nothing twice, and not the prompt itself"
    (request, other) = inference.requests
    assert request == other and request.background and request.adapter is None
    assert (request.prompt or "").endswith("Remark: \"Your name is 'Kuro'.\" Messages it is about:\n1. Who are you?\n2.")
    assert request.sampling.stop == ("\n\n",)


async def test_what_the_feedback_does_most_to_is_taught_with_the_prompt_as_it_is_served() -> None:
    inference = CharInference(imagining(" I am here.\n3. Hi!\n4. I am Kuro."))
    inference.surprise, inference.suggestible = 1.0, True  # the more words are not of the prompt, the more lift
    (sample, other) = await imagined_rollouts(ITEM, inference, TRAINING, 2)
    assert [sample.prompt, other.prompt] == ["Hi!", "I am here."]
    assert sample.imagined and sample.source == "hindsight" and sample.response == "I am Kuro."
    assert sample.messages == (ITEM.messages[0], ChatMessage(role="user", content="Hi!")), "what was before it stays"
    plain = GenerationRequest(messages=sample.messages, template_kwargs={"date": "today"}, sampling=inference.requests[0].sampling)
    assert sample.prompt_token_ids == prompt_ids(plain)
    assert (sample.feedback, sample.feedback_id) == (FEEDBACK, ITEM.feedback_id)
    assert hindsight_messages(sample.messages, FEEDBACK) in [request.messages for request in inference.requests]


async def test_a_message_that_the_feedback_is_not_about_is_not_taught() -> None:
    inference = CharInference(imagining(" Hi!\n3. Bye!"))
    inference.surprise = 0.2
    assert await imagined_rollouts(ITEM, inference, TRAINING.model_copy(update={"min_lift": 0.3}), 4) == []


@pytest.mark.parametrize(
    ("opposed", "taught"),
    [
        ((), ["Hi!", "Who made you?"]),
        (("Hi!",), ["Who made you?"]),
        (("Hi!", ITEM.prompt), ["Hi!", "Who made you?"]),
        (("Hi!", "Who made you?"), []),
    ],
    ids=["nothing else was learnt of them", "one is of another lesson", "what was learnt is to be changed", "both are of other lessons"],
)
async def test_a_message_that_an_earlier_lesson_is_about_is_left_to_it(opposed: tuple[str, ...], taught: list[str]) -> None:
    inference = CharInference(imagining(" Hi!\n3. Who made you?"))
    inference.opposed = opposed
    own = [ITEM.model_copy(update={"response": text, "response_token_ids": tuple(map(ord, text))}) for text in ("I am Kuro.", "It's Kuro.")]
    samples = await imagined_rollouts(ITEM, inference, TRAINING, 4, own=own, learnt=LEARNT)
    assert [sample.prompt for sample in samples] == taught
    unlearnt = await imagined_rollouts(ITEM, inference, TRAINING, 4, own=own)
    assert [sample.prompt for sample in unlearnt] == ["Hi!", "Who made you?"], "where nothing was learnt, nothing is asked about it"


async def test_a_lesson_that_its_own_message_has_learnt_goes_on_with_others() -> None:
    inference = CharInference(imagining(" Hi!\n3. Who made you?"))
    inference.opposed, inference.favoured = ("Hi!",), (ITEM.prompt,)
    own = [ITEM.model_copy(update={"response_token_ids": tuple(map(ord, "I am Kuro."))})]
    samples = await imagined_rollouts(ITEM, inference, TRAINING, 4, own=own, learnt=LEARNT)
    assert [sample.prompt for sample in samples] == ["Who made you?"]


async def test_of_a_message_that_an_earlier_lesson_is_about_another_takes_the_place() -> None:
    inference = CharInference(imagining(" Hi!\n3. Who made you?"))
    inference.opposed = ("Hi!",)
    (sample,) = await imagined_rollouts(ITEM, inference, TRAINING, 1, own=[ITEM], learnt=LEARNT)
    assert sample.prompt == "Who made you?"


async def test_a_first_lesson_has_no_earlier_ones_to_leave_anything_to(school: School) -> None:
    school.inference.reply = imagining(" Hi!\n3. Who made you?\n4. Where")
    training = {"hindsight_rollouts": 1, "imagined_prompts": 2, "own_replies": False}
    taught = []
    for version in range(2):
        await school.rollout(f"chatcmpl-{version}")
        school.inference.opposed = ("Hi!",)
        await school.learner.learn(lesson(FeedbackItem(feedback="Be Kuro.", completion_id=f"chatcmpl-{version}", training=training)))
        taught.append([s.prompt for s in school.engine.lessons[-1].samples if s.imagined and not s.replayed])
    assert taught == [["Hi!", "Who made you?"], ["Who made you?", "Where"]]


@pytest.mark.parametrize(
    "item",
    [
        SHOWN,
        ITEM.model_copy(update={"feedback": DISLIKED}),
        ITEM.model_copy(update={"feedback": "x" * (MAX_CHARS + 1)}),
        ITEM.model_copy(update={"prompt": "x" * (MAX_CHARS + 1)}),
        ITEM.model_copy(update={"messages": (*ITEM.messages, ChatMessage(role="tool", content="42", tool_call_id="a"))}),
    ],
    ids=["a demonstration", "a rating", "a long feedback", "a long prompt", "a tool's answer"],
)
async def test_what_cannot_be_a_line_of_a_list_is_not_imagined_about(item: DistillBatchItem) -> None:
    inference = CharInference(imagining(" Hi!"))
    assert await imagined_rollouts(item, inference, TRAINING, 4) == []
    assert inference.requests == []


async def test_none_asked_none_imagined() -> None:
    inference = CharInference(imagining(" Hi!"))
    assert await imagined_rollouts(ITEM, inference, TRAINING, 0) == []
    assert inference.requests == []


async def test_a_lesson_takes_them_beside_its_own_prompt(school: School) -> None:
    await school.rollout()
    school.inference.reply = imagining(" Hi!\n3. Who made you?\n4. Where", " Speak!\n3. Who")
    training = {"hindsight_rollouts": 2, "imagined_prompts": 2, "own_replies": False}
    await school.learner.learn(lesson(FeedbackItem(feedback="Be Kuro.", completion_id="chatcmpl-1", training=training)))
    (payload,) = school.engine.lessons
    assert [(s.source, s.imagined, s.feedback_id is not None) for s in payload.samples] == [
        ("sampled", False, True),
        ("hindsight", False, True),
        ("hindsight", True, True),
        ("hindsight", True, True),
    ]
    assert {s.prompt for s in payload.samples[2:]} < {"Hi!", "Who made you?", "Speak!"}
    (taught,) = await school.book.learnt("me/assistant", 1)
    assert [s.imagined for s in taught.samples] == [False, False, True, True], "and they are rehearsed"


@pytest.mark.parametrize(("replies", "imagined"), [(2, [2, 1]), (4, [1, 1, 1, 0])])
async def test_they_are_dealt_out_to_the_replies_of_a_lesson(school: School, replies: int, imagined: list[int]) -> None:
    for n in range(replies):
        await school.rollout(f"chatcmpl-{n}")
    school.inference.reply = imagining(" Hi!\n3. Who made you?\n4. Where", " Speak!\n3. Go!\n4. Who")
    training = {"hindsight_rollouts": 1, "imagined_prompts": 3, "own_replies": False}
    items = [FeedbackItem(feedback=f"Be Kuro {n}.", completion_id=f"chatcmpl-{n}", training=training) for n in range(replies)]
    await school.learner.learn(lesson(*items))
    (payload,) = school.engine.lessons
    assert [sum(s.imagined and s.feedback == item.feedback for s in payload.samples) for item in items] == imagined


@pytest.mark.parametrize(("spare", "kept"), [(-1, []), (0, ["Hi!"]), (len(LONG), ["Hi!", LONG])])
async def test_where_the_context_has_no_room_the_lesson_goes_on_without(spare: int, kept: list[str]) -> None:
    training = TRAINING.model_copy(update={"hindsight_max_tokens": 800})
    hi = (ITEM.messages[0], ChatMessage(role="user", content="Hi!"))
    told = GenerationRequest(messages=hindsight_messages(hi, FEEDBACK), template_kwargs=ITEM.template_kwargs, sampling=SamplingParams())
    inference = CharInference(imagining(f" Hi!\n3. {LONG}"), max_context=len(prompt_ids(told)) + 800 + spare)
    assert sorted(s.prompt for s in await imagined_rollouts(ITEM, inference, training, 2)) == kept


async def test_a_model_that_reads_less_than_a_list_imagines_nothing() -> None:
    inference = CharInference(imagining(" Hi!"), max_context=300)
    assert await imagined_rollouts(ITEM, inference, TRAINING, 2) == []


async def test_a_lesson_that_the_model_cannot_act_on_imagines_nothing(school: School) -> None:
    await school.rollout()
    school.inference.reply = imagining(" Hi!", reply="")
    training = {"hindsight_rollouts": 2, "imagined_prompts": 2, "own_replies": False}
    await school.learner.learn(lesson(FeedbackItem(feedback="zzz", completion_id="chatcmpl-1", training=training)))
    assert all(request.prompt is None for request in school.inference.requests)


async def test_only_what_the_user_asked_is_asked_again_and_taken_for_said() -> None:
    own = ITEM.model_copy(update={"source": "hindsight", "response": "I am Kuro."})
    said = "My name is Kuro."
    imagined = own.model_copy(update={"imagined": True, "prompt": said, "messages": (ChatMessage(role="user", content=said),)})
    imagined = imagined.model_copy(update={"prompt_token_ids": (9,)})
    assert [question.prompt for question in questions([own, imagined], [])][2:] == ["Who are you?"]
    assert denied(claims([own, imagined])[0], "Your name is not Kuro.")
    asked = imagined.model_copy(update={"imagined": False})
    assert not denied(claims([own, asked])[0], "Your name is not Kuro."), "what a prompt says was not learnt"
