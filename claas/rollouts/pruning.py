"""Old replies go in time, on a service to which nobody talks too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from claas.rollouts.store import RolloutStore

EVERY_S = 3600.0

log = logging.getLogger(__name__)


@asynccontextmanager
async def pruned_regularly(store: RolloutStore, every_s: float = EVERY_S) -> AsyncIterator[None]:
    """Prune now, and every so often for as long as the block lasts. Raises what the first pruning raises; of later ones it is logged."""
    await store.prune()
    task = asyncio.create_task(_prune_for_ever(store, every_s))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _prune_for_ever(store: RolloutStore, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            await store.prune()
        except Exception:  # such as a database that is gone for a while: the next round may do
            log.exception("old replies could not be pruned")
