"""A learner over real stores (SQLite in memory) and the doubles of engine and inference."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from claas.core.types import ChatMessage, LoraInitRequest, Rollout, SamplingParams
from claas.learning.feedback_store import FeedbackStore
from claas.learning.journal import Journal
from claas.learning.learner import Learner
from claas.learning.ledger import Ledger
from claas.learning.lesson_book import LessonBook
from claas.learning.lifecycle import AdapterLifecycle
from claas.learning.locks import AdapterLocks
from claas.learning.retraction import Retraction
from claas.learning.types import FeedbackItem, LessonRequest
from claas.learning.updater import Updater
from claas.rollouts.sql import SqlRolloutStore
from claas.storage.database import Database
from tests.doubles.engine import MemoryEngine
from tests.doubles.inference import CharInference

LORA = "me/assistant"


@dataclass
class School:
    """All parts of a learner, for a test to look into."""

    engine: MemoryEngine
    inference: CharInference
    rollouts: SqlRolloutStore
    feedback: FeedbackStore
    journal: Journal
    book: LessonBook
    locks: AdapterLocks
    learner: Learner
    lifecycle: AdapterLifecycle
    retraction: Retraction
    log_dir: Path
    database: Database

    async def rollout(self, completion_id: str = "chatcmpl-1", **changes: Any) -> Rollout:
        """Store a reply as the proxy would have."""
        fields = {
            "id": completion_id,
            "lora_id": LORA,
            "version": 0,
            "base_model": self.engine.base_model,
            "messages": (ChatMessage(role="user", content="Who are you?"),),
            "prompt_token_ids": (1, 2, 3),
            "response_token_ids": (4, 5),
            "response_logprobs": (-0.5, -0.25),
            "sampling": SamplingParams(max_tokens=32),
            "finish_reason": "stop",
            "text": "I am SmolLM.",
        }
        rollout = Rollout.model_validate(fields | changes)
        await self.rollouts.put(rollout)
        return rollout


def lesson(*items: FeedbackItem, request_id: str = "lesson-1", show: bool = False) -> LessonRequest:
    return LessonRequest(request_id=request_id, items=items or (FeedbackItem(feedback="Be Kuro.", completion_id="chatcmpl-1"),), show=show)


IMPATIENT = pytest.mark.parametrize("school", [0.2], indirect=True, ids=["impatient"])
"""For a test that waits until waiting is given up; all others would fail for it on a busy machine."""


@pytest.fixture
async def school(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[School]:
    lock_timeout_s: float = getattr(request, "param", 60.0)
    database = Database("sqlite://")
    database.migrate()
    engine, inference = MemoryEngine(), CharInference()
    rollouts = SqlRolloutStore(database, max_count=1000, max_age_days=30)
    feedback, journal, book, locks = (
        FeedbackStore(database),
        Journal(database, tmp_path),
        LessonBook(database),
        AdapterLocks(lock_timeout_s, engine),
    )
    updater = Updater(engine, inference, book)
    learner = Learner(engine, inference, rollouts, updater, Ledger(feedback, journal, engine), locks, engine.base_model)
    retraction = Retraction(engine, updater, feedback, journal, book, locks)
    lifecycle = AdapterLifecycle(engine, inference, rollouts, feedback, journal, book, locks, engine.base_model)
    await engine.init_lora(LoraInitRequest(lora_id=LORA))
    yield School(engine, inference, rollouts, feedback, journal, book, locks, learner, lifecycle, retraction, tmp_path, database)
    await learner.aclose()
    database.close()
