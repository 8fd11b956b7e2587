"""What keeps a new version from serving: one test for each kind of collapse, and what must pass."""

from __future__ import annotations

import pytest

from claas.core.types import ChatMessage, DistillBatchItem, LoraRuntimeRef, TrainingConfig
from claas.inference.base import GenerationRequest
from claas.learning.checks import CHECK_PROMPTS, CHECK_TOKENS, MAX_PROMPT_TOKENS, MAX_SAID_CHARS, Question, find_collapse, questions
from claas.learning.lesson_book import TaughtLesson
from claas.learning.types import FeedbackItem
from claas.training.hindsight import hindsight_messages
from tests.doubles.inference import CharInference
from tests.learning.conftest import LORA, School, lesson

PARENT = LoraRuntimeRef(lora_id=LORA, version=1, vllm_name="v1", lora_path="memory")
CANDIDATE = PARENT.model_copy(update={"version": 2})
SOUND = "Paris is the capital."
GARBAGE = "qzx vfk"


def item(prompt: str, feedback: str = "Be Kuro.", **fields: object) -> DistillBatchItem:
    values = {
        "prompt": prompt,
        "response": "I am SmolLM.",
        "feedback": feedback,
        "response_logprobs": (-1.0,),
        "prompt_token_ids": tuple(map(ord, prompt)),
        "response_token_ids": (3,),
        "messages": (ChatMessage(role="user", content=prompt),),
    }
    return DistillBatchItem.model_validate(values | fields)


def taught(version: int, *samples: DistillBatchItem) -> TaughtLesson:
    return TaughtLesson(lora_id=LORA, version=version, parent=version - 1, feedback_ids=(), training=TrainingConfig(), samples=samples)


def serving(said: dict[str, str], *, parent: dict[str, str] | None = None, base: dict[str, str] | None = None) -> CharInference:
    """The candidate answers these prompts with these texts; all else, parent and base model too, is sound."""

    def reply(request: GenerationRequest) -> str:
        scripts = {CANDIDATE: said, PARENT: parent or {}, None: base or {}}
        return scripts[request.adapter].get(request.messages[-1].content or "", SOUND)

    inference = CharInference(reply)
    inference.garbage = (GARBAGE,)
    return inference


FRANCE, BICYCLE = CHECK_PROMPTS
OWN = (item("Who are you?"), item("Your name?"))
ASKED = questions(OWN, [taught(1, item("Bye!", "Say see you."))])


async def found(inference: CharInference, asked: list[Question] = ASKED, min_logprob: float = -3.5) -> str | None:
    return await find_collapse(inference, CANDIDATE, PARENT, asked, min_logprob)


async def test_a_sound_candidate_passes_and_the_parent_is_not_asked() -> None:
    inference = serving({"Who are you?": "Kuro.", FRANCE: "Paris"})
    assert await found(inference) is None
    assert {request.adapter for request in inference.requests} == {CANDIDATE}
    assert {request.messages[-1].content for request in inference.requests} == {FRANCE, BICYCLE, "Who are you?", "Your name?", "Bye!"}
    assert all(r.background and (r.sampling.temperature, r.sampling.max_tokens) == (0.0, CHECK_TOKENS) for r in inference.requests)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("... ! ...", "is without a word"),
        ("a b c d " * 8, "is a loop"),
        ("Kuro, Kuro, Kuro, Kuro, Kuro, Kuro", "is a loop"),
        (GARBAGE, "is garbage to the base model"),
    ],
)
@pytest.mark.parametrize(
    ("prompt", "whose"), [(BICYCLE, "the unrelated"), ("Who are you?", "the lesson's own"), ("Bye!", "an earlier lesson's")]
)
async def test_a_collapse_is_found_named_and_not_blamed_on_a_version_whose_parent_had_it(
    text: str, says: str, prompt: str, whose: str
) -> None:
    reason = await found(serving({prompt: text}))
    assert reason is not None
    assert f"reply to {whose} prompt {prompt!r} {says}" in reason
    assert await found(serving({prompt: text}, parent={prompt: "again and again " * 4})) is None


@pytest.mark.parametrize(("prompt", "sampled_loops", "undone"), [("Who are you?", 1, False), ("Who are you?", 2, True), (BICYCLE, 0, True)])
async def test_a_greedy_loop_on_what_was_taught_counts_where_sampled_replies_loop_too(
    prompt: str, sampled_loops: int, undone: bool
) -> None:
    loop = "again and again " * 4
    inference = serving({})

    def reply(request: GenerationRequest) -> str:
        greedy = request.sampling.temperature == 0.0
        mine = request.adapter == CANDIDATE and request.messages[-1].content == prompt
        return loop if mine and (greedy or (request.sampling.seed or 0) < sampled_loops) else SOUND

    inference.reply = reply
    assert ((await found(inference)) is not None) == undone


@pytest.mark.parametrize("told", [False, True])
async def test_what_the_base_model_cannot_answer_itself_is_not_held_against_a_version(told: bool) -> None:
    loop = "again and again " * 4
    (question,) = (q for q in ASKED if q.prompt == "Bye!")
    asked = (question.told if told else question.messages)[-1].content
    assert asked is not None
    assert await found(serving({"Bye!": loop}, base={asked: loop})) is None
    assert await found(serving({"Bye!": loop}, base={BICYCLE: loop})) is not None


@pytest.mark.parametrize(
    "text", ["Yes.", "OK", "\N{THUMBS UP SIGN}", "你好。", "1, 2, 3, 4, 5, 6, 7, 8, 9", "I am Kuro, at your service, always."]
)
async def test_brief_and_unusual_replies_are_no_collapse(text: str) -> None:
    assert await found(serving({"Who are you?": text})) is None


async def test_what_the_lesson_asks_for_is_no_garbage() -> None:
    """The base model judges the reply with the lesson in view: here, a demonstration that it would never have said."""
    shown = item("Who are you?", "", demonstration=GARBAGE)
    assert await found(serving({"Who are you?": GARBAGE}), questions((shown,), ())) is None
    assert questions((shown,), ())[-1].told == hindsight_messages(shown.messages, "", GARBAGE)


def test_few_and_short_questions_are_asked() -> None:
    own = [item("a"), item("a", source="hindsight"), item("b"), item("c")]
    learnt = [taught(n, item(f"earlier {n}"), item("other")) for n in (1, 2, 3)]
    assert [q.prompt for q in questions(own, learnt)] == [*CHECK_PROMPTS, "a", "b", "earlier 2", "earlier 3"]
    huge = [item("x" * (MAX_PROMPT_TOKENS + 1)), item("b", "x" * (MAX_SAID_CHARS + 1)), item("c", demonstration="x" * MAX_SAID_CHARS)]
    assert [q.prompt for q in questions(huge, [])] == list(CHECK_PROMPTS)


async def test_a_collapse_on_the_lessons_own_prompt_or_an_earlier_ones_is_undone(school: School) -> None:
    await school.rollout()
    assert (await school.learner.learn(lesson())).outcome == "applied"
    await school.rollout("chatcmpl-2", messages=(ChatMessage(role="user", content="And now?"),), prompt_token_ids=(7,))

    for n, prompt in enumerate(("And now?", "Who are you?"), 2):

        def reply(request: GenerationRequest, prompt: str = prompt) -> str:
            new = request.adapter is not None and request.adapter.version > 1
            return "" if new and request.messages[-1].content == prompt else "fine"

        school.inference.reply = reply
        about = FeedbackItem(feedback="Be Kuro.", completion_id="chatcmpl-2")
        result = await school.learner.learn(lesson(about, request_id=f"lesson-{n}"))
        assert (result.outcome, result.version) == ("undone", 1)
        assert f"prompt {prompt!r} is empty" in str(result.reason)
        assert "is empty" in result.distill_result.metadata["first_try"]
