"""A whole service over the doubles, with the real learner, life cycle, feedback store and journal on a database in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claas.core.settings import Settings
from claas.core.types import LoraInitRequest
from claas.learning.feedback_store import FeedbackStore
from claas.learning.journal import Journal
from claas.learning.learner import Learner
from claas.learning.ledger import Ledger
from claas.learning.lesson_book import LessonBook
from claas.learning.lifecycle import AdapterLifecycle
from claas.learning.locks import AdapterLocks
from claas.learning.retraction import Retraction
from claas.learning.updater import Updater
from claas.services import Services
from claas.storage.database import Database
from tests.doubles.engine import MemoryEngine
from tests.doubles.inference import CharInference
from tests.doubles.rollouts import MemoryRolloutStore

BASE_MODEL = "tiny/base"
ADAPTER = "me/assistant"


@dataclass(frozen=True, slots=True)
class World:
    """The services, and the doubles inside them as what they are."""

    services: Services
    engine: MemoryEngine
    inference: CharInference
    rollouts: MemoryRolloutStore
    database: Database


@asynccontextmanager
async def open_world(folder: Path, **settings: Any) -> AsyncIterator[World]:
    """One adapter, `ADAPTER`, is there. `settings` go over the defaults; files, if any, go under `folder`."""
    database = Database("sqlite://")
    database.migrate()
    engine, inference, rollouts = MemoryEngine(BASE_MODEL), CharInference(), MemoryRolloutStore()
    feedback, journal, book = FeedbackStore(database), Journal(database, folder / "feedback"), LessonBook(database)
    chosen = Settings(data_dir=folder, distill_execution_mode="local", **settings)  # whatever the environment says: these are doubles
    locks = AdapterLocks(chosen.feedback_lock_timeout_s, engine)
    updater = Updater(engine, inference, book)
    learner = Learner(engine, inference, rollouts, updater, Ledger(feedback, journal, engine), locks, BASE_MODEL)
    retraction = Retraction(engine, updater, feedback, journal, book, locks)
    lifecycle = AdapterLifecycle(engine, inference, rollouts, feedback, journal, book, locks, BASE_MODEL)
    await lifecycle.init(LoraInitRequest(lora_id=ADAPTER))
    services = Services(chosen, BASE_MODEL, engine, inference, rollouts, feedback, journal, lifecycle, learner, retraction)
    try:
        yield World(services, engine, inference, rollouts, database)
    finally:
        await inference.aclose()
        await learner.aclose()
        await engine.aclose()
        database.close()
