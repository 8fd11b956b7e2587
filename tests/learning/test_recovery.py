"""What a service finds of its own after a crash, where another one has gone on meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from claas.core.types import ChatMessage, DistillBatchItem, DistillBatchRequestPayload, Feedback, LoraInitRequest, TrainingConfig
from claas.learning.feedback_store import FeedbackStore
from claas.learning.journal import Journal
from claas.learning.recovery import recover
from claas.storage.database import Database
from tests.doubles.engine import MemoryEngine

A = "me/a"


async def version_taught(engine: MemoryEngine, feedback_id: str) -> int:
    item = DistillBatchItem(
        prompt="Hello", response="x", feedback="Be kind.", response_logprobs=(-1.0,), prompt_token_ids=(1,), response_token_ids=(2,),
        messages=(ChatMessage(role="user", content="Hello"),),
    )  # fmt: skip
    payload = DistillBatchRequestPayload(lora_id=A, training=TrainingConfig(), samples=[item], feedback_ids=(feedback_id,))
    version: int = (await engine.distill(payload)).metadata["version"]
    return version


@pytest.mark.parametrize("promoted", [True, False], ids=["served", "never-served"])
async def test_a_version_that_another_service_went_on_from_is_kept(tmp_path: Path, promoted: bool) -> None:
    database = Database(f"sqlite:///{tmp_path / 'claas.db'}")
    database.migrate()
    engine, feedback, journal = MemoryEngine(), FeedbackStore(database), Journal(database, tmp_path / "log")
    try:
        await engine.init_lora(LoraInitRequest(lora_id=A))
        row = Feedback(id="fb-1", request_id="r", lora_id=A, completion_id="c", feedback="Be kind.", state="training")
        await feedback.add([row])
        mine = await version_taught(engine, "fb-1")
        if promoted:
            await engine.promote(A, mine)
        others = await version_taught(engine, "fb-of-another-database")
        await engine.promote(A, others)

        assert len(await recover(engine, feedback, journal)) == 1
        (settled,) = await feedback.by_request("r")
        assert settled.state == ("applied" if promoted else "failed")
        assert [version.version for version in await engine.versions(A)] == ([0, mine, others] if promoted else [0, others])
    finally:
        database.close()
