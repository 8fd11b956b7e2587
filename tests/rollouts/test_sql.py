"""The bounds of the SqlRolloutStore, by count and by age, and that it stays fast and durable."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import event, func, select, update

from claas.core.errors import NotFound
from claas.core.types import ChatMessage, Rollout, SamplingParams, utc_now
from claas.rollouts.pruning import pruned_regularly
from claas.rollouts.sql import SqlRolloutStore
from claas.storage.database import Database
from claas.storage.models import RolloutRow
from tests.storage.databases import KINDS, migrated


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Database]:
    with migrated(request.param, tmp_path, pytestconfig) as database:
        yield database


def _rollout(id: str, created_at: datetime | None = None, text: str = "Hello.") -> Rollout:
    return Rollout(
        id=id,
        lora_id="me/a",
        version=0,
        base_model="base",
        messages=(ChatMessage(role="user", content="Hi"),),
        prompt_token_ids=(1,),
        response_token_ids=(2,),
        response_logprobs=(-1.0,),
        sampling=SamplingParams(),
        finish_reason="stop",
        text=text,
        created_at=created_at or utc_now(),
    )


async def _kept(database: Database) -> list[str]:
    return list(await database.run(lambda session: session.scalars(select(RolloutRow.id).order_by(RolloutRow.created_at)).all()))


async def test_the_oldest_go_first_by_their_time_not_by_arrival(database: Database) -> None:
    store = SqlRolloutStore(database, max_count=3, max_age_days=30)
    now = utc_now()
    for seconds in (50, 10, 40, 20, 30):
        await store.put(_rollout(f"r{seconds}", now - timedelta(seconds=seconds)))
    assert await _kept(database) == ["r30", "r20", "r10"]
    with pytest.raises(NotFound, match="pruned"):
        await store.get("r50")


async def test_of_the_same_moment_the_last_to_arrive_stay(database: Database) -> None:
    store = SqlRolloutStore(database, max_count=2, max_age_days=30)
    now = utc_now()
    for number in range(5):
        await store.put(_rollout(f"r{number}", now))
    assert sorted(await _kept(database)) == ["r3", "r4"]


async def test_what_is_too_old_is_pruned_however_few_there_are(database: Database) -> None:
    store = SqlRolloutStore(database, max_count=1000, max_age_days=0.5)
    await store.put(_rollout("old", utc_now() - timedelta(hours=13)))
    await store.put(_rollout("young", utc_now() - timedelta(hours=11)))
    assert await store.prune() == 1
    assert await _kept(database) == ["young"]
    assert await store.prune() == 0


async def test_what_grows_too_old_goes_though_nobody_talks(database: Database) -> None:
    store = SqlRolloutStore(database, max_count=1000, max_age_days=0.5)
    await store.put(_rollout("old", utc_now() - timedelta(hours=13)))
    async with pruned_regularly(store, every_s=0.01):
        assert await _kept(database) == []
        await store.put(_rollout("young", utc_now() - timedelta(hours=11, minutes=59, seconds=59)))
        while await _kept(database):  # noqa: ASYNC110 - until it has grown too old
            await asyncio.sleep(0.01)


async def test_pruning_is_rare_and_the_surplus_small(database: Database) -> None:
    """Of 100 allowed, five more may gather; deletes run for every fifth put only."""
    deletes: list[str] = []

    def listen(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.startswith("DELETE"):
            deletes.append(statement)

    event.listen(database.engine, "before_cursor_execute", listen)
    store = SqlRolloutStore(database, max_count=100, max_age_days=30)
    most = 0
    for number in range(130):
        await store.put(_rollout(f"r{number}"))
        most = max(most, await database.run(lambda session: session.scalar(select(func.count(RolloutRow.number))) or 0))
    assert most <= 105
    assert len(deletes) == 2 * 130 // 5
    assert len(await _kept(database)) == 100


async def test_a_digest_that_collides_finds_nobody_elses_reply(database: Database) -> None:
    store = SqlRolloutStore(database, max_count=10, max_age_days=30)
    await store.put(_rollout("mine", text="Mine."))
    await store.put(_rollout("other", text="Other."))
    mine = select(RolloutRow.lookup).where(RolloutRow.id == "mine").scalar_subquery()
    await database.run(lambda session: session.execute(update(RolloutRow).values(lookup=mine)))
    assert (await store.find("me/a", "Hi", "Mine.")).id == "mine"
    with pytest.raises(NotFound):
        await store.find("me/a", "Hi", "Other.")


async def test_concurrent_puts_are_all_kept(database: Database) -> None:
    store = SqlRolloutStore(database, max_count=100, max_age_days=30)
    await asyncio.gather(*(store.put(_rollout(f"r{number}")) for number in range(60)))
    assert len(await _kept(database)) == 60


async def test_a_new_store_over_the_same_database_has_them_all(database: Database) -> None:
    rollout = _rollout("kept")
    await SqlRolloutStore(database, max_count=10, max_age_days=30).put(rollout)
    assert await SqlRolloutStore(database, max_count=10, max_age_days=30).get("kept") == rollout
