"""The lesson book: every lesson an adapter has learnt and the samples that taught it, so that it can be rehearsed.

What an adapter knows is what its line of versions learnt: after a rollback, lessons of the versions left behind are not rehearsed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

from sqlalchemy import CursorResult, delete, select
from sqlalchemy.orm import Session

from claas.core.types import AdapterVersion, DistillBatchItem, Frozen, TrainingConfig
from claas.storage.database import Database
from claas.storage.models import LessonRow

MAX_LESSONS = 1000


class TaughtLesson(Frozen):
    """A lesson as it was taught: from which version to which, how, and its own samples (no anchors, no earlier lessons').

    `contradicts` are the ids of earlier feedback that it overrules, for as long as it is in the line.
    """

    lora_id: str
    version: int
    parent: int
    feedback_ids: tuple[str, ...]
    training: TrainingConfig
    samples: tuple[DistillBatchItem, ...]
    contradicts: tuple[str, ...] = ()


class LessonBook:
    """Lessons of all adapters, the newest `max_lessons` of each."""

    def __init__(self, database: Database, *, max_lessons: int = MAX_LESSONS) -> None:
        self._database = database
        self._max_lessons = max_lessons

    async def add(self, lesson: TaughtLesson) -> None:
        """Write a lesson down, before its version serves. Raises StorageFull."""
        row = LessonRow(**lesson.model_dump(mode="json"))
        own = (LessonRow.lora_id == lesson.lora_id,)
        newest_first = select(LessonRow.version).where(*own).order_by(LessonRow.version.desc())

        def write(session: Session) -> None:
            session.merge(row)
            session.flush()
            session.execute(delete(LessonRow).where(*own, LessonRow.version.in_(newest_first.offset(self._max_lessons))))

        await self._database.run(write)

    async def learnt(self, lora_id: str, version: int, versions: Sequence[AdapterVersion] = ()) -> list[TaughtLesson]:
        """What `version` has learnt, oldest first. `versions` are those still stored: they bridge lessons that the book has lost."""
        query = select(LessonRow).where(LessonRow.lora_id == lora_id)
        lessons = await self._database.run(lambda session: {row.version: _lesson(row) for row in session.scalars(query)})
        parents = {v.version: v.parent for v in versions} | {number: lesson.parent for number, lesson in lessons.items()}
        line: list[TaughtLesson] = []
        at: int | None = version
        while at is not None:
            line += [lessons[at]] if at in lessons else []
            at = parents.get(at)
        return line[::-1]

    async def delete_adapter(self, lora_id: str) -> int:
        """Remove an adapter's lessons; returns how many."""
        query = delete(LessonRow).where(LessonRow.lora_id == lora_id)
        return await self._database.run(lambda session: cast(CursorResult[Any], session.execute(query)).rowcount)


def standing(lessons: Sequence[TaughtLesson], overruled: Collection[str] = ()) -> list[TaughtLesson]:
    """A line of lessons without the samples of `overruled` feedback, and of that which a later lesson of the line contradicts."""
    gone = {feedback_id for lesson in lessons for feedback_id in lesson.contradicts} | set(overruled)
    kept = [lesson.model_copy(update={"samples": tuple(s for s in lesson.samples if s.feedback_id not in gone)}) for lesson in lessons]
    return [lesson for lesson in kept if lesson.samples]


def taught_samples(lessons: Sequence[TaughtLesson]) -> list[DistillBatchItem]:
    """Everything that these lessons taught, oldest first."""
    return [sample for lesson in lessons for sample in lesson.samples if sample.taught]


def rehearsal(lessons: Sequence[TaughtLesson], n: int, turn: int) -> list[DistillBatchItem]:
    """`n` samples (at most all) for replay, spread evenly over the lessons; other ones for each `turn`."""
    pools = [pool for lesson in lessons if (pool := [s for s in lesson.samples if s.taught])]
    if len(pools) > n > 0:
        pools = [pools[(turn * n + i) % len(pools)] for i in range(n)]
    longest = max(map(len, pools), default=0)
    order = [pool[(turn + i) % len(pool)] for i in range(longest) for pool in pools if i < len(pool)]
    return [sample.model_copy(update={"replayed": True}) for sample in order[:n]]


def _lesson(row: LessonRow) -> TaughtLesson:
    return TaughtLesson.model_validate({name: row.__dict__[name] for name in TaughtLesson.model_fields})
