"""Which earlier lessons a new one takes back, what follows from it, and what brings them back."""

from __future__ import annotations

import re

import pytest
import torch

from claas.core.errors import ContextOverflow
from claas.core.types import ChatMessage, DistillBatchItem, DistillBatchRequestPayload
from claas.inference.base import GenerationRequest, Score
from claas.inference.embedded import EmbeddedInference
from claas.learning.contradictions import MAX_CLAIMS, MAX_DOUBTS, Claim, claims, contradicted, denied, replaced
from claas.learning.hindsight_rollouts import hindsight_rollouts
from claas.learning.types import FeedbackItem, LessonResult
from claas.models.base_model import LoadedModel
from claas.models.compute import ComputeShare
from claas.training.defaults import default_training
from claas.training.hindsight import DISLIKED
from tests.doubles.inference import CharInference
from tests.learning.conftest import LORA, School, lesson

KURO, MAX = "Your name is Kuro.", "Your name is Max."


def said(feedback: str, response: str, prompt: str = "Who are you?", feedback_id: str = "fb-1", **fields: object) -> DistillBatchItem:
    """A taught reply."""
    known = {
        "prompt": prompt,
        "response": response,
        "feedback": feedback,
        "response_logprobs": (),
        "prompt_token_ids": tuple(map(ord, prompt)),
        "response_token_ids": tuple(map(ord, response or "?")),
        "messages": (ChatMessage(role="user", content=prompt),),
        "source": "hindsight",
        "feedback_id": feedback_id,
    }
    return DistillBatchItem.model_validate(known | fields)


@pytest.mark.parametrize(
    ("feedback", "reply", "prompt", "new", "thing"),
    [
        (KURO, "I am Kuro.", "Who are you?", MAX, "kuro"),
        ("Your name is Kuro, always say Kuro.", "I am Kuro.", "Who are you?", "Your name is Max, always say Max.", "kuro"),
        ("Always start with 'Good day, Sir!'", "Good day, sir! Yes.", "Is it?", "Always start with “Hello!”", "good day sir"),
        ("Say 'It's me' at the end.", "Yes. It's me", "Is it?", "Say 'Bye' at the end.", "it's me"),
        (KURO, "I am a chatbot.", "Who are you?", MAX, None),  # not learnt
        (KURO, "I am Kuro.", "Are you Kuro?", MAX, None),  # asked for, not learnt
        (KURO, "I am Kuro.", "Who are you?", "your name is KURO!", None),  # the same again
        (KURO, "I am Kuro.", "Who are you?", "My name is Anna.", None),  # two things differ
        (KURO, "I am Kuro.", "Who are you?", "Your name is Kuro Max.", None),  # only more
        ("Your name is Kuro, so say Kuro.", "I am Kuro.", "Who are you?", "Your name is Kuro, so say hello.", None),  # still Kuro
        ("My dog is called Bruno.", "It is Bruno.", "Who is my dog?", "My cat is called Rex.", None),
        ("My brother lives in Rome.", "Your brother lives in Rome.", "And my brother?", "My sister lives in Rome.", None),
        ("You are polite.", "I am polite.", "Who are you?", "You are brief.", None),  # too little in common
        ("I live in Lisbon.", "In Lisbon.", "Where?", "i live in oslo", "lisbon"),
        ("I live in Lisbon.", "In Lisbon.", "Where?", "I live in a flat.", None),  # not another name
        ("I live in Lisbon.", "In Lisbon.", "Where?", "I live in no city.", None),
        (KURO, "I am Kuro.", "Who are you?", "", None),
    ],
)
def test_one_thing_replaced(feedback: str, reply: str, prompt: str, new: str, thing: str | None) -> None:
    assert replaced(Claim(feedback, (said(feedback, reply, prompt),)), new) == thing


@pytest.mark.parametrize(
    ("feedback", "reply", "new", "is_denied"),
    [
        (KURO, "I am Kuro.", "Your name is not Kuro any more: you are Max.", True),
        (KURO, "I am Kuro.", "Your name isn’t Kuro.", True),
        ("Talk like a pirate, matey.", "Ask the pirate, matey.", "Stop talking like a pirate.", True),
        ("I live in Lisbon.", "In Lisbon.", "I moved to Rome, I don't live in Lisbon.", True),
        ("I live in Lisbon.", "In Rome.", "I don't live in Lisbon.", False),  # not learnt
        ("I live in Lisbon.", "In Lisbon.", "I do not like to live in Lisbon.", False),  # something else
        ("My dog lives in Rome.", "In Rome.", "My dog does not live in Rome any more.", True),
        ("I live in Lisbon.", "In Lisbon.", "I do not live alone in Lisbon.", False),
        (KURO, "I am Kuro.", "You are not a robot, your name is Kuro.", False),  # denied in another clause
        (KURO, "I am Kuro.", "Never forget that your name is Kuro.", False),
        ("Never say Kuro again.", "Kuro, no.", "Never say Kuro again!", False),  # the same again
    ],
)
def test_the_same_denied(feedback: str, reply: str, new: str, is_denied: bool) -> None:
    assert denied(Claim(feedback, (said(feedback, reply, "Well?"),)), new) is is_denied


async def test_what_has_no_words_is_not_compared() -> None:
    inference = CharInference()
    for text in ("", DISLIKED):
        assert await contradicted([Claim(text, (said(text, "I am Kuro."),))], [said(KURO, "Kuro.")], inference) == set()
        assert await contradicted([Claim(KURO, (said(KURO, "I am Kuro."),))], [said(text, "Hm.")], inference) == set()


async def test_the_model_confirms_what_the_words_propose() -> None:
    inference = CharInference()
    inference.surprise, inference.suggestible = 4.0, True
    old = claims([said(KURO, "Kuro.", feedback_id="fb-1"), said(KURO, "Kuro.", "Name?", feedback_id="fb-2")])
    assert await contradicted(old, [said(MAX, "Max.")], inference) == {"fb-1", "fb-2"}
    assert await contradicted(old, [said("Your name is Kuro..", "Kuro.")], inference) == set()
    inference.surprise = 0.0
    assert await contradicted(old, [said(MAX, "Max.")], inference) == set(), "feedback that did nothing has nothing to lose"


async def test_a_conversation_that_is_too_long_to_ask_about_confirms_nothing() -> None:
    class Narrow(CharInference):
        async def score(self, request: GenerationRequest, completion: str | tuple[int, ...]) -> Score:
            raise ContextOverflow("too long")

    assert await contradicted(claims([said(KURO, "Kuro.")]), [said(MAX, "Max.")], Narrow()) == set()


async def test_another_demonstration_for_the_same_conversation() -> None:
    def shown(reply: str, prompt: str = "Hi", feedback_id: str = "fb-1") -> DistillBatchItem:
        return said("", reply, prompt, feedback_id, demonstration=reply)

    inference, old = CharInference(), claims([shown("Hello."), shown("Hello.", "Hey", "fb-2")])
    assert await contradicted(old, [shown("Good day.")], inference) == {"fb-1"}
    assert await contradicted(old, [shown("Hello.")], inference) == set()
    assert await contradicted(old, [said("Be kind.", "Good day.", "Hi")], inference) == set()


async def test_the_work_is_bounded() -> None:
    class Counting(CharInference):
        scored = 0

        async def score(self, request: GenerationRequest, completion: str | tuple[int, ...]) -> Score:
            self.scored += 1
            assert request.background
            return await super().score(request, completion)

    names = [f"Kuro{n}" for n in range(2 * MAX_CLAIMS)]
    old = [Claim(f"Your name is {name}.", tuple(said("", f"{name}.", f"Q{n}?") for n in range(5))) for name in names]
    inference = Counting()
    await contradicted(old, [said(MAX, "Max.")], inference)
    assert inference.scored == MAX_DOUBTS * 2 * 3


@pytest.mark.model
async def test_the_default_model_confirms_another_name_and_lets_a_home_town_stand(loaded_model: LoadedModel) -> None:
    inference = EmbeddedInference(loaded_model, ComputeShare(torch.get_num_threads()), max_batch=8)
    kuro, training = "Your name is Kuro, always introduce yourself as Kuro.", default_training(loaded_model.n_params)
    asked = [said(kuro, "", prompt, f"fb-{n}") for n, prompt in enumerate(("Who are you?", "What is your name?"))]
    taught = [sample for item in asked for sample in await hindsight_rollouts(item, inference, training)]

    async def overruled_by(feedback: str) -> set[str]:
        return await contradicted(claims(taught), [said(feedback, "")], inference)

    assert await overruled_by("Your name is Max, always introduce yourself as Max.") == {s.feedback_id for s in taught}
    assert await overruled_by("I live in Lisbon.") == set()
    assert await overruled_by(kuro) == set()
    await inference.aclose()


# --- what follows from it ---


def named(request: GenerationRequest) -> str:
    """Answers with the last name it was told."""
    return "Hm." if not (names := re.findall(r"name is (\w+\.)", request.messages[-1].content or "")) else names[-1]


@pytest.fixture
def told(school: School) -> School:
    """A school whose base model takes feedback up."""
    school.inference.reply = named
    school.inference.surprise, school.inference.suggestible = 4.0, True
    return school


async def teach(school: School, number: int, feedback: str, **training: object) -> LessonResult:
    await school.rollout(f"chatcmpl-{number}")
    settings = {"hindsight_rollouts": 1, "own_replies": False, "replay": 8} | training
    item = FeedbackItem(feedback=feedback, completion_id=f"chatcmpl-{number}", training=settings)
    return await school.learner.learn(lesson(item, request_id=f"lesson-{number}"))


def rehearsed(payload: DistillBatchRequestPayload) -> set[str]:
    return {sample.feedback for sample in payload.samples if sample.replayed}


def reported(result: LessonResult) -> list[int]:
    found: list[int] = result.distill_result.metadata["contradicts"]
    return found


async def test_the_newer_wins_and_says_so(told: School) -> None:
    first = await teach(told, 1, KURO)
    assert reported(first) == []
    assert reported(await teach(told, 2, "I live in Lisbon.")) == []
    third = await teach(told, 3, MAX)
    assert (third.outcome, reported(third)) == ("applied", [1])
    assert rehearsed(told.engine.lessons[-1]) == {"I live in Lisbon."}
    assert (await told.journal.steps())[0].metrics["contradicts"] == [1]
    assert (await told.book.learnt(LORA, 3))[-1].contradicts == first.feedback_ids
    assert reported(await teach(told, 4, MAX)) == [], "what is overruled is not noticed twice"
    assert rehearsed(told.engine.lessons[-1]) == {"I live in Lisbon.", MAX}


async def test_both_rounds_of_a_lesson_are_overruled(told: School) -> None:
    for number in (1, 2):
        await teach(told, number, KURO)
    assert reported(await teach(told, 3, MAX)) == [1, 2]


async def test_a_lesson_that_came_to_nothing_overrules_nothing(told: School) -> None:
    await teach(told, 1, KURO)
    told.engine.outcome = "undone"
    assert reported(await teach(told, 2, MAX)) == []
    told.engine.outcome = "applied"
    await teach(told, 3, "Be kind.")
    assert rehearsed(told.engine.lessons[-1]) == {KURO}


async def test_a_rollback_behind_the_newer_lesson_brings_the_older_back(told: School) -> None:
    await teach(told, 1, KURO)
    await teach(told, 2, MAX)
    await told.lifecycle.rollback(LORA, 1)
    await teach(told, 3, "Be kind.")
    assert rehearsed(told.engine.lessons[-1]) == {KURO}


async def test_retracting_the_newer_lesson_brings_the_older_back(told: School) -> None:
    await teach(told, 1, KURO)
    newer = await teach(told, 2, MAX)
    await teach(told, 3, "Be kind.")
    assert rehearsed(told.engine.lessons[-1]) == {MAX}
    await told.retraction.begin(newer.feedback_ids[0])
    await told.retraction.aclose()
    again = told.engine.lessons[-1]
    assert (again.parent, rehearsed(again)) == (1, {KURO})
    await teach(told, 4, "Be brief.")
    assert rehearsed(told.engine.lessons[-1]) == {KURO, "Be kind."}


async def test_a_rebuilding_notices_the_contradiction_again(told: School) -> None:
    """The versions are new ones, so what the book says of the old ones must not decide."""
    other = await teach(told, 1, "Be kind.")
    await teach(told, 2, KURO)
    await teach(told, 3, MAX)
    await told.retraction.begin(other.feedback_ids[0])
    await told.retraction.aclose()
    serving = (await told.engine.lora_runtime_ref(LORA)).version
    await teach(told, 4, "Be brief.")
    assert serving == 5 and rehearsed(told.engine.lessons[-1]) == {MAX}


# --- the book ---


async def test_a_book_teacher_reads_the_lessons_that_stand_before_its_own(told: School) -> None:
    for number, feedback in enumerate((KURO, "I live in Lisbon.", MAX), start=1):
        await teach(told, number, feedback)
    assert not any(sample.book for payload in told.engine.lessons for sample in payload.samples), "nobody asked for it"
    await teach(told, 4, "Be kind.", hindsight_teacher="book", anchors=1)
    books = {(s.feedback, s.source): s.book for s in told.engine.lessons[-1].samples}
    assert books["Be kind.", "hindsight"] == ("I live in Lisbon.", MAX)
    assert books[MAX, "hindsight"] == ("I live in Lisbon.",)
    assert books["", "anchor"] == ()
    assert all(not sample.book for learnt in await told.book.learnt(LORA, 4) for sample in learnt.samples)


async def test_of_a_long_book_the_newest_lessons_are_read(told: School) -> None:
    texts = [f"Lesson {number}: {'x' * 90}" for number in range(1, 5)]
    for number, text in enumerate(texts, start=1):
        await teach(told, number, text)
    await teach(told, 5, "Be kind.", teacher="book")
    assert told.engine.lessons[-1].samples[0].book == tuple(texts[-2:])
