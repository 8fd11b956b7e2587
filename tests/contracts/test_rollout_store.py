"""What every RolloutStore promises, asked of each: over SQLite, over PostgreSQL, and the double in memory."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from claas.core.errors import Conflict, NotFound
from claas.core.types import ChatMessage, Rollout, SamplingParams
from claas.rollouts.sql import SqlRolloutStore
from claas.rollouts.store import RolloutStore
from tests.doubles.rollouts import MemoryRolloutStore
from tests.storage.databases import KINDS, migrated


@pytest.fixture(params=["memory", *KINDS])
def store(request: pytest.FixtureRequest, tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[RolloutStore]:
    if request.param == "memory":
        yield MemoryRolloutStore()
        return
    with migrated(request.param, tmp_path, pytestconfig) as database:
        yield SqlRolloutStore(database, max_count=1000, max_age_days=36500)


def _rollout(id: str = "chatcmpl-1", **changes: object) -> Rollout:
    fields: dict[str, object] = {
        "id": id,
        "lora_id": "me/a",
        "version": 2,
        "base_model": "base",
        "messages": (ChatMessage(role="user", content="Who are you?"),),
        "prompt_token_ids": (1, 2, 3),
        "response_token_ids": (4, 5),
        "response_logprobs": (-0.5, -0.25),
        "sampling": SamplingParams(max_tokens=32),
        "finish_reason": "stop",
        "text": "I am SmolLM.",
    }
    return Rollout.model_validate(fields | changes)


async def test_a_rollout_comes_back_exactly_as_it_was_served(store: RolloutStore) -> None:
    call: dict[str, object] = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "\\u0000"}'}}
    rollout = _rollout(
        messages=(
            ChatMessage(role="system", content="Be kind.\x00 \\u0041"),
            ChatMessage(role="user", content="Wie spät? 🕰", name="me"),
            ChatMessage.model_validate({"role": "assistant", "tool_calls": (call,)}),
            ChatMessage(role="tool", content="noon", tool_call_id="call_1"),
            ChatMessage(role="user", content="And in Tōkyō?"),
        ),
        template_kwargs={"enable_thinking": False, "tools": [{"name": "now", "depth": 1.5, "none": None}]},
        prompt_token_ids=(0, 1, 151_935, 2**31),
        response_token_ids=tuple(range(300)),
        response_logprobs=tuple(-n / 7 for n in range(300)),
        sampling=SamplingParams(temperature=0.7, top_p=0.9, seed=2**40, stop=("\n", "END"), max_tokens=5),
        finish_reason="length",
        text="Evening — \ud800 \\ too.",
        created_at=datetime(2026, 5, 4, 3, 2, 1, 234567, tzinfo=UTC),
    )
    await store.put(rollout)
    assert await store.get("chatcmpl-1") == rollout
    assert await store.find("me/a", "And in Tōkyō?", "Evening — \ud800 \\ too.") == rollout


async def test_a_reply_of_the_base_model_has_no_adapter(store: RolloutStore) -> None:
    rollout = _rollout(lora_id=None, version=None, messages=(), response_token_ids=(), response_logprobs=(), text="")
    await store.put(rollout)
    assert await store.get("chatcmpl-1") == rollout


async def test_a_taken_id_is_a_conflict_and_keeps_the_first(store: RolloutStore) -> None:
    await store.put(_rollout())
    with pytest.raises(Conflict):
        await store.put(_rollout(text="Another."))
    assert (await store.get("chatcmpl-1")).text == "I am SmolLM."


@pytest.mark.parametrize("unknown", ["chatcmpl-2", "", "\x00", "CHATCMPL-1", "chatcmpl-1 ", "%", "x" * 5000])
async def test_an_unknown_id_is_not_found(store: RolloutStore, unknown: str) -> None:
    await store.put(_rollout())
    with pytest.raises(NotFound):
        await store.get(unknown)


@pytest.mark.parametrize(
    ("lora_id", "prompt", "response"),
    [
        ("me/b", "Who are you?", "I am SmolLM."),
        ("me/a", "Who are you? ", "I am SmolLM."),
        ("me/a", "who are you?", "I am SmolLM."),
        ("me/a", "Who are you?", "I am SmolLM"),
        ("me/a", "I am SmolLM.", "Who are you?"),
        ("me/aWho are you?", "", "I am SmolLM."),
    ],
)
async def test_find_takes_nothing_but_the_very_words(store: RolloutStore, lora_id: str, prompt: str, response: str) -> None:
    await store.put(_rollout())
    await store.put(_rollout("of the base model", lora_id=None, version=None))
    with pytest.raises(NotFound):
        await store.find(lora_id, prompt, response)


async def test_find_goes_by_the_last_user_turn(store: RolloutStore) -> None:
    turns = [("user", "First."), ("assistant", "Yes?"), ("user", "Second."), ("assistant", "Hm.")]
    await store.put(_rollout(messages=tuple(ChatMessage(role=role, content=text) for role, text in turns)))  # type: ignore[arg-type]
    assert (await store.find("me/a", "Second.", "I am SmolLM.")).id == "chatcmpl-1"
    with pytest.raises(NotFound):
        await store.find("me/a", "First.", "I am SmolLM.")


async def test_two_users_with_the_same_words_share_nothing(store: RolloutStore) -> None:
    await store.put(_rollout("chatcmpl-a", lora_id="user/a"))
    await store.put(_rollout("chatcmpl-b", lora_id="user/b"))
    assert (await store.find("user/a", "Who are you?", "I am SmolLM.")).id == "chatcmpl-a"
    assert (await store.find("user/b", "Who are you?", "I am SmolLM.")).id == "chatcmpl-b"


async def test_of_equal_replies_the_newest_is_found(store: RolloutStore) -> None:
    noon = datetime(2026, 5, 4, 12, tzinfo=UTC)
    for number in range(3):
        await store.put(_rollout(f"chatcmpl-{number}", version=number, created_at=noon + timedelta(seconds=number)))
    assert (await store.find("me/a", "Who are you?", "I am SmolLM.")).id == "chatcmpl-2"


@pytest.mark.parametrize("other", [{"prompt_token_ids": (1, 2)}, {"response_token_ids": (4, 6)}])
async def test_replies_that_only_look_equal_must_be_named(store: RolloutStore, other: dict[str, object]) -> None:
    await store.put(_rollout("chatcmpl-1"))
    await store.put(_rollout("chatcmpl-2", **other))
    with pytest.raises(Conflict, match="completion_id"):
        await store.find("me/a", "Who are you?", "I am SmolLM.")


async def test_nothing_is_pruned_within_the_bounds(store: RolloutStore) -> None:
    await store.put(_rollout())
    assert await store.prune() == 0
    assert (await store.get("chatcmpl-1")).id == "chatcmpl-1"


async def test_deleting_an_adapter_takes_its_rollouts_alone(store: RolloutStore) -> None:
    await store.put(_rollout("chatcmpl-1"))
    await store.put(_rollout("chatcmpl-2", version=3))
    await store.put(_rollout("chatcmpl-3", lora_id="me/ab"))
    await store.put(_rollout("chatcmpl-4", lora_id=None, version=None))
    assert await store.delete_adapter("me/a") == 2
    assert await store.delete_adapter("me/a") == 0
    for gone in ("chatcmpl-1", "chatcmpl-2"):
        with pytest.raises(NotFound):
            await store.get(gone)
    assert [(await store.get(kept)).id for kept in ("chatcmpl-3", "chatcmpl-4")] == ["chatcmpl-3", "chatcmpl-4"]
