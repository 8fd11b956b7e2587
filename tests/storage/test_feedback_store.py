"""Feedback: stored whole or not at all, found by id, request, key and state."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from claas.core.errors import BadRequest, Conflict, NotFound
from claas.core.types import Feedback
from claas.learning.feedback_store import FeedbackStore
from claas.storage.database import Database


@pytest.fixture
def store(database: Database) -> FeedbackStore:
    return FeedbackStore(database)


def _item(id: str = "fb-1", **changes: object) -> Feedback:
    fields: dict[str, object] = {"id": id, "request_id": "req-1", "lora_id": "me/a", "completion_id": "chatcmpl-1", "feedback": "Be Kuro."}
    return Feedback.model_validate(fields | changes)


async def test_an_item_comes_back_as_it_was(store: FeedbackStore) -> None:
    item = _item(
        feedback="Say \x00 and \\u0041 — \ud800 too",
        rating=-1,
        demonstration="I am \x00 Kuro \\ \udfff.",
        metadata={"from": ["me", 1.5, None]},
        idempotency_key="k\x00\\",
        state="applied",
        reason="why not",
        version=3,
        created_at=datetime(2026, 5, 4, 3, 2, 1, 234567, tzinfo=UTC),
    )
    await store.add([item])
    assert await store.get("fb-1") == item
    assert await store.by_key("me/a", "k\x00\\") == item


async def test_a_rating_alone_comes_back_alone(store: FeedbackStore) -> None:
    await store.add([_item(feedback="", rating=1), _item("fb-2")])
    assert [(item.feedback, item.rating, item.demonstration) for item in await store.by_request("req-1")] == [
        ("", 1, None),
        ("Be Kuro.", None, None),
    ]


async def test_an_unknown_id_is_not_found_whatever_it_holds(store: FeedbackStore) -> None:
    for unknown in ("nope", "", "\x00", "x" * 10_000, "' OR 1=1 --"):
        with pytest.raises(NotFound):
            await store.get(unknown)
        assert await store.by_key("me/a", unknown) is None
        assert await store.by_request(unknown) == []


async def test_a_taken_id_stores_nothing_of_the_request(store: FeedbackStore) -> None:
    await store.add([_item()])
    with pytest.raises(Conflict) as caught:
        await store.add([_item("fb-2"), _item("fb-1", feedback="other")])
    assert caught.value.param == "id"
    with pytest.raises(NotFound):
        await store.get("fb-2")
    assert (await store.get("fb-1")).feedback == "Be Kuro."


async def test_a_key_is_taken_once_for_each_adapter(store: FeedbackStore) -> None:
    await store.add([_item(idempotency_key="k")])
    with pytest.raises(Conflict) as caught:
        await store.add([_item("fb-2", idempotency_key="k")])
    assert caught.value.param == "idempotency_key"
    await store.add([_item("fb-3", lora_id="me/b", idempotency_key="k"), _item("fb-4"), _item("fb-5")])
    found = await store.by_key("me/b", "k")
    assert found is not None
    assert found.id == "fb-3"
    assert await store.by_key("me/c", "k") is None


async def test_the_same_key_twice_in_one_request_is_refused(store: FeedbackStore) -> None:
    with pytest.raises(Conflict):
        await store.add([_item("fb-1", idempotency_key="k"), _item("fb-2", idempotency_key="k")])
    assert await store.by_request("req-1") == []


async def test_of_many_at_once_with_one_key_one_is_stored(store: FeedbackStore) -> None:
    results = await asyncio.gather(*(store.add([_item(f"fb-{n}", idempotency_key="k")]) for n in range(8)), return_exceptions=True)
    assert [type(result) for result in results].count(Conflict) == 7
    assert len(await store.by_request("req-1")) == 1


async def test_a_key_that_is_too_long_is_a_bad_request(store: FeedbackStore) -> None:
    with pytest.raises(BadRequest) as caught:
        await store.add([_item(idempotency_key="k" * 201)])
    assert caught.value.param == "idempotency_key"
    await store.add([_item(idempotency_key="k" * 200)])


async def test_a_request_keeps_the_order_of_its_items(store: FeedbackStore) -> None:
    ids = [f"fb-{n}" for n in (3, 1, 2)]
    await store.add([_item(name) for name in ids])
    await store.add([_item("fb-other", request_id="req-2")])
    assert [item.id for item in await store.by_request("req-1")] == ids


async def test_states_move_together_or_not_at_all(store: FeedbackStore) -> None:
    await store.add([_item("fb-1"), _item("fb-2"), _item("fb-3", lora_id="me/b")])
    assert [item.id for item in await store.in_state("queued")] == ["fb-1", "fb-2", "fb-3"]
    await store.set_state(["fb-1", "fb-2"], "applied", version=4)
    assert [(item.id, item.version, item.reason) for item in await store.in_state("applied")] == [("fb-1", 4, None), ("fb-2", 4, None)]
    with pytest.raises(NotFound):
        await store.set_state(["fb-3", "fb-9"], "training")
    assert [item.id for item in await store.in_state("queued")] == ["fb-3"]


async def test_a_retracted_lesson_still_says_which_version_it_made(store: FeedbackStore) -> None:
    await store.add([_item()])
    await store.set_state(["fb-1"], "applied", version=4)
    await store.set_state(["fb-1", "fb-1"], "retracted", reason="asked for")
    item = await store.get("fb-1")
    assert (item.state, item.reason, item.version) == ("retracted", "asked for", 4)


async def test_a_failed_item_gives_its_key_back(store: FeedbackStore) -> None:
    await store.add([_item(idempotency_key="k")])
    await store.set_state(["fb-1"], "failed", reason="the model broke")
    assert await store.by_key("me/a", "k") is None
    await store.add([_item("fb-2", idempotency_key="k")])
    assert (await store.get("fb-1")).reason == "the model broke"


async def test_the_newest_are_listed_first_and_no_more_than_asked(store: FeedbackStore) -> None:
    await store.add([_item(f"fb-{n}", lora_id="me/a" if n % 2 else "me/b") for n in range(6)])
    assert [item.id for item in await store.list("me/a", 2)] == ["fb-5", "fb-3"]
    assert [item.id for item in await store.list(limit=3)] == ["fb-5", "fb-4", "fb-3"]


async def test_deleting_an_adapter_takes_its_feedback_alone(store: FeedbackStore) -> None:
    await store.add([_item("fb-1"), _item("fb-2"), _item("fb-3", lora_id="me/b")])
    assert await store.delete_adapter("me/a") == 2
    assert await store.delete_adapter("me/a") == 0
    assert [item.id for item in await store.list()] == ["fb-3"]
