"""The RolloutStore seam: rollouts under the completion id they were answered with.

Every store passes `tests/contracts/test_rollout_store.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from claas.core.types import Rollout


class RolloutStore(ABC):
    """Keeps rollouts, bounded by age and count; the oldest go first."""

    @abstractmethod
    async def put(self, rollout: Rollout) -> None:
        """Store durably. Raises Conflict if the id exists, StorageFull."""

    @abstractmethod
    async def get(self, completion_id: str) -> Rollout:
        """Raises NotFound, saying that it may have been pruned."""

    @abstractmethod
    async def find(self, lora_id: str, prompt: str, response: str) -> Rollout:
        """The newest rollout of this adapter whose last user turn and visible reply are exactly these.

        Raises:
            NotFound: none.
            Conflict: several that differ in their prompt or response tokens; the caller must name a completion id.
        """

    @abstractmethod
    async def prune(self) -> int:
        """Remove what is over the bounds; returns how many."""

    @abstractmethod
    async def delete_adapter(self, lora_id: str) -> int:
        """Remove every rollout of an adapter; returns how many."""
