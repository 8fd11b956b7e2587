"""What is written into the lesson book, and what of it is rehearsed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from claas.core.types import AdapterVersion, ChatMessage, DistillBatchItem, TrainingConfig
from claas.learning.lesson_book import LessonBook, TaughtLesson, rehearsal
from claas.storage.database import Database

LORA = "me/assistant"
TRAINING = TrainingConfig(learning_rate=0.125, replay=3)


@pytest.fixture
def database() -> Iterator[Database]:
    database = Database("sqlite://")
    database.migrate()
    yield database
    database.close()


def item(feedback: str, number: int = 0, *, taught: bool = True) -> DistillBatchItem:
    messages = (ChatMessage(role="user", content="p"),)
    return DistillBatchItem(
        prompt="p",
        response="r",
        feedback=feedback,
        response_logprobs=(-0.1, -2.5),
        prompt_token_ids=(1, 2),
        response_token_ids=(3, number),
        messages=messages,
        template_kwargs={"x": [1, None]},
        taught=taught,
        completion_id="chatcmpl-1",
    )


def taught(version: int, parent: int, n_samples: int = 1, lora_id: str = LORA) -> TaughtLesson:
    samples = tuple(item(f"lesson {version}", number) for number in range(n_samples))
    return TaughtLesson(
        lora_id=lora_id, version=version, parent=parent, feedback_ids=(f"fb-{version}",), training=TRAINING, samples=samples
    )


async def test_a_version_has_learnt_what_its_line_learnt(database: Database) -> None:
    book = LessonBook(database)
    lessons = {v: taught(v, parent) for v, parent in ((1, 0), (2, 1), (3, 1), (4, 3))}
    for entry in lessons.values():
        await book.add(entry)
    await book.add(taught(2, 1, lora_id="you/other"))
    assert await book.learnt(LORA, 4) == [lessons[1], lessons[3], lessons[4]]
    assert await book.learnt(LORA, 2) == [lessons[1], lessons[2]]
    assert await book.learnt(LORA, 0) == []
    assert await book.delete_adapter(LORA) == 4
    assert await book.learnt(LORA, 4) == []
    assert len(await book.learnt("you/other", 2)) == 1


async def test_a_lesson_that_the_book_lost_does_not_cut_the_line(database: Database) -> None:
    book = LessonBook(database)
    first, third = taught(1, 0), taught(3, 2)
    await book.add(first)
    await book.add(third)
    assert await book.learnt(LORA, 3) == [third]
    stored = [AdapterVersion(lora_id=LORA, version=v, parent=p, base_model="b") for v, p in ((0, None), (2, 1))]
    assert await book.learnt(LORA, 3, stored) == [first, third]


async def test_the_oldest_lessons_make_room(database: Database) -> None:
    book = LessonBook(database, max_lessons=2)
    for version in (1, 2, 3):
        await book.add(taught(version, version - 1))
        await book.add(taught(version, version - 1, lora_id="you/other"))
    assert [entry.version for entry in await book.learnt(LORA, 3)] == [2, 3]


def test_rehearsal_is_spread_over_the_lessons_and_takes_turns() -> None:
    lessons = [taught(1, 0, 6), taught(2, 1, 6), taught(3, 2, 1)]
    chosen = rehearsal(lessons, 7, turn=0)
    assert Counter(sample.feedback for sample in chosen) == {"lesson 1": 3, "lesson 2": 3, "lesson 3": 1}
    assert all(sample.replayed for sample in chosen)
    seen = {sample.response_token_ids for turn in range(6) for sample in rehearsal(lessons, 2, turn) if sample.feedback == "lesson 1"}
    assert len(seen) > 1, "another turn, other samples"


def test_more_lessons_than_places_take_turns() -> None:
    lessons = [taught(version, version - 1, 2) for version in range(1, 8)]
    turns = [{sample.feedback for sample in rehearsal(lessons, 3, turn)} for turn in range(7)]
    assert all(len(turn) == 3 for turn in turns)
    assert set.union(*turns) == {f"lesson {version}" for version in range(1, 8)}


def test_what_was_not_taught_is_not_rehearsed() -> None:
    lesson = TaughtLesson(
        lora_id=LORA, version=1, parent=0, feedback_ids=(), training=TRAINING, samples=(item("a", taught=False), item("b"))
    )
    assert [sample.feedback for sample in rehearsal([lesson], 4, 0)] == ["b"]
    assert rehearsal([lesson], 0, 0) == [] and rehearsal([], 4, 0) == []
