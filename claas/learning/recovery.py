"""After a crash: every lesson that was under way is either finished or forgotten, and its feedback says which."""

from __future__ import annotations

import uuid

from claas.core.types import AdapterVersion, Feedback, StepRecord
from claas.learning.feedback_store import FeedbackStore
from claas.learning.journal import Journal
from claas.training.engine.base import TrainingEngine

INTERRUPTED = "the service stopped during the lesson, and nothing of it was kept: send the feedback again"


async def recover(engine: TrainingEngine, feedback: FeedbackStore, journal: Journal) -> list[str]:
    """Settle interrupted lessons; returns a line for each. Called once, before anything is served.

    A lesson whose version already serves, or was gone on from, is finished: only its journal line was missing. One whose version was
    written but never served is forgotten, and the version with it.
    """
    lines = []
    for row in [*await feedback.in_state("queued"), *await feedback.in_state("training")]:
        version = await _version_of(engine, row)
        if version is not None and await _has_served(engine, version):
            if await journal.by_request(row.request_id) is None:
                await journal.record(_step(row, version), version_record=version)
            await feedback.set_state((row.id,), "applied", version=version.version)
            lines.append(f"lesson {row.request_id!r} had been published as version {version.version} of {row.lora_id!r}: recorded")
            continue
        if version is not None:
            await engine.discard(row.lora_id, version.version)
        await feedback.set_state((row.id,), "failed", reason=INTERRUPTED)
        lines.append(f"lesson {row.request_id!r} of {row.lora_id!r} was interrupted: its feedback is kept, as failed")
    return lines


async def _version_of(engine: TrainingEngine, row: Feedback) -> AdapterVersion | None:
    """The published version that this feedback made, if there is one."""
    if not (await engine.lora_exists(row.lora_id)).exists:
        return None
    return next((v for v in await engine.versions(row.lora_id) if row.id in v.feedback_ids), None)


async def _has_served(engine: TrainingEngine, version: AdapterVersion) -> bool:
    """Whether it is the latest version, or one that the latest goes on from: another service may have taught since."""
    parents = {v.version: v.parent for v in await engine.versions(version.lora_id)}
    number: int | None = (await engine.lora_runtime_ref(version.lora_id)).version
    while number is not None and number != version.version:
        number = parents.get(number)
    return number is not None


def _step(row: Feedback, version: AdapterVersion) -> StepRecord:
    assert version.parent is not None
    return StepRecord(
        id=f"step-{uuid.uuid4().hex}",
        request_id=row.request_id,
        lora_id=row.lora_id,
        parent=version.parent,
        version=version.version,
        outcome="applied",
        reason="recorded after a restart",
        metrics=version.metrics,
    )
