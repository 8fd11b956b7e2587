"""Rollouts in a dict."""

from __future__ import annotations

import asyncio

from claas.core.errors import Conflict, NotFound
from claas.core.types import Rollout
from claas.rollouts.store import RolloutStore


class MemoryRolloutStore(RolloutStore):
    """Never prunes. `arrivals` tells, in order, what was put. With `failure`, every `put` raises it."""

    def __init__(self) -> None:
        self.kept: dict[str, Rollout] = {}
        self.arrivals: asyncio.Queue[Rollout] = asyncio.Queue()
        self.failure: Exception | None = None

    async def put(self, rollout: Rollout) -> None:
        if self.failure is not None:
            raise self.failure
        if rollout.id in self.kept:
            raise Conflict(f"a reply with the id {rollout.id!r} is already stored", param="completion_id")
        self.kept[rollout.id] = rollout
        self.arrivals.put_nowait(rollout)

    async def get(self, completion_id: str) -> Rollout:
        if completion_id not in self.kept:
            raise NotFound(f"no reply {completion_id!r} is stored", param="completion_id")
        return self.kept[completion_id]

    async def find(self, lora_id: str, prompt: str, response: str) -> Rollout:
        found = [r for r in self.kept.values() if (r.lora_id, r.prompt, r.text) == (lora_id, prompt, response)]
        if not found:
            raise NotFound(f"adapter {lora_id!r} gave no such reply", param="response")
        if len({(r.prompt_token_ids, r.response_token_ids) for r in found}) > 1:
            raise Conflict("several replies match: name one by 'completion_id'", param="response")
        return found[-1]

    async def prune(self) -> int:
        return 0

    async def delete_adapter(self, lora_id: str) -> int:
        before = len(self.kept)
        self.kept = {key: rollout for key, rollout in self.kept.items() if rollout.lora_id != lora_id}
        return before - len(self.kept)
