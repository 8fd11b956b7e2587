"""One lesson from outside, over HTTP: replies, feedback, and the same probes before and after.

Knows neither the terminal nor where the service runs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from claas.cli.client import Client, Reply
from claas.cli.report import Step
from claas.core.errors import ClaasError

PROMPTS = ("Who are you?", "What can you do for me?", "Hi! Please introduce yourself.", "Tell me something interesting.")
PROBES = (
    "What should I call you?",
    "Hello there!",
    "How can you help me today?",
    "Say something about yourself.",
    "Do you like tea?",
)
T = TypeVar("T")
TRIES = 3  # for a reply that ends by itself: one that was cut off cannot be taught

Observe = Callable[
    [str, int], AbstractContextManager[Callable[[], None]]
]  # (what happens, how many) → entered, then called for each one done


@dataclass(frozen=True, slots=True)
class Lesson:
    """What to teach and how to look at it. `expect` is searched for in the replies to the probes; `seed` None draws anew each time."""

    feedback: str
    model: str
    prompts: tuple[str, ...] = PROMPTS
    probes: tuple[str, ...] = PROBES
    unrelated: tuple[str, ...] = ()
    expect: re.Pattern[str] | None = None
    rounds: int = 1
    max_tokens: int = 160
    temperature: float = 0.7
    seed: int | None = None

    def matches(self, text: str) -> bool:
        """Whether a reply shows what is expected; nothing does where nothing is."""
        return self.expect is not None and self.expect.search(text) is not None


@dataclass(frozen=True, slots=True)
class Answer:
    """A question that was never trained on, and the greedy replies to it."""

    question: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Round:
    """One feedback request: the replies it was about, those that could not be used, what came of it, and how many probes match since."""

    replies: tuple[tuple[str, Reply], ...]
    cut_off: tuple[str, ...]
    step: Step
    answer: dict[str, Any]
    matched: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What the lesson did."""

    lesson: Lesson
    probes: tuple[Answer, ...]
    unrelated: tuple[Answer, ...]
    rounds: tuple[Round, ...]
    seconds: float

    @property
    def matched_before(self) -> int:
        return sum(self.lesson.matches(probe.before) for probe in self.probes)

    @property
    def matched_after(self) -> int:
        return sum(self.lesson.matches(probe.after) for probe in self.probes)

    @property
    def learnt(self) -> bool:
        """A step was applied, and, where something is expected, more probes show it than before."""
        applied = any(one.step.applied for one in self.rounds)
        return applied and (self.lesson.expect is None or self.matched_after > self.matched_before)

    def as_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            "model": self.lesson.model,
            "feedback": self.lesson.feedback,
            "learnt": self.learnt,
            "expect": self.lesson.expect.pattern if self.lesson.expect else None,
            "matched_before": self.matched_before,
            "matched_after": self.matched_after,
            "probes": [_answer_json(probe) | {"matches": self.lesson.matches(probe.after)} for probe in self.probes],
            "unrelated": [_answer_json(answer) for answer in self.unrelated],
            "rounds": [_round_json(one) for one in self.rounds],
            "seconds": round(self.seconds, 3),
        }


def teach(client: Client, lesson: Lesson, observe: Observe) -> Result:
    """Teach it, round by round, until every probe shows what is expected or the rounds are over.

    Raises:
        ClaasError: the service refused, or not one reply could be used.
    """
    start = time.monotonic()
    questions = (*lesson.probes, *lesson.unrelated)
    before = _greedy(client, lesson, questions, observe, "Asking the probes")
    after, rounds = before, list[Round]()
    for number in range(lesson.rounds):
        one = _round(client, lesson, number, observe)
        if one.step.applied:
            after = _greedy(client, lesson, questions, observe, "Asking the probes again")
        matched = sum(map(lesson.matches, after[: len(lesson.probes)]))
        rounds.append(replace(one, matched=matched))
        if matched == len(lesson.probes) or not one.step.applied:
            break
    answers = tuple(Answer(*columns) for columns in zip(questions, before, after, strict=True))
    n_probes = len(lesson.probes)
    return Result(lesson, answers[:n_probes], answers[n_probes:], tuple(rounds), time.monotonic() - start)


def _round(client: Client, lesson: Lesson, number: int, observe: Observe) -> Round:
    replies = _in_parallel(
        lambda index, prompt: _whole_reply(client, lesson, prompt, TRIES * (len(lesson.prompts) * number + index)),
        lesson.prompts,
        observe,
        "Taking replies",
    )
    usable = tuple((prompt, reply) for prompt, reply in zip(lesson.prompts, replies, strict=True) if reply.finish_reason == "stop")
    cut_off = tuple(prompt for prompt, reply in zip(lesson.prompts, replies, strict=True) if reply.finish_reason != "stop")
    if not usable:
        raise ClaasError(f"every reply was cut off at {lesson.max_tokens} tokens, so there is nothing to learn from: raise --max-tokens")
    with observe("Learning", 0):
        answer = client.feedback([reply.id for _, reply in usable], lesson.feedback)
    return Round(usable, cut_off, Step.of(answer), answer)


def _whole_reply(client: Client, lesson: Lesson, prompt: str, draw: int) -> Reply:
    """A sampled reply that ended by itself, if one comes in a few tries; `draw` keeps the seeds apart."""
    for attempt in range(TRIES):
        seed = None if lesson.seed is None else 10_000 * lesson.seed + draw + attempt
        reply = _ask(client, lesson, prompt, temperature=lesson.temperature, seed=seed)
        if reply.finish_reason == "stop":
            break
    return reply


def _greedy(client: Client, lesson: Lesson, questions: Sequence[str], observe: Observe, what: str) -> list[str]:
    return _in_parallel(lambda _, question: _ask(client, lesson, question, temperature=0.0).text, questions, observe, what)


def _ask(client: Client, lesson: Lesson, question: str, **sampling: Any) -> Reply:
    return client.chat(lesson.model, [{"role": "user", "content": question}], max_tokens=lesson.max_tokens, **sampling)


def _in_parallel(ask: Callable[[int, str], T], questions: Sequence[str], observe: Observe, what: str) -> list[T]:
    """All at once, so that the service can batch them; results in order."""
    with observe(what, len(questions)) as done, ThreadPoolExecutor(max_workers=8) as pool:

        def one(index: int, question: str) -> T:
            result = ask(index, question)
            done()
            return result

        return list(pool.map(one, range(len(questions)), questions))


def _answer_json(answer: Answer) -> dict[str, Any]:
    return {"question": answer.question, "before": answer.before, "after": answer.after}


def _round_json(one: Round) -> dict[str, Any]:
    replies = [{"prompt": prompt, "completion_id": reply.id, "text": reply.text} for prompt, reply in one.replies]
    return {"replies": replies, "cut_off": list(one.cut_off), "matched": one.matched, "result": one.answer}
