"""One writer at a time for each adapter, across services: leases in a Modal Dict.

::

    <id>#head   the newest epoch, so that nobody need list the Dict
    <id>#7      epoch 7: who holds it, and until when; "" where it was given back

An epoch is taken by putting it if it is absent: Modal lets exactly one of many do so. A holder renews its own epoch and frees it at the
end; one that was freed, or has expired by more than the clocks may differ, is followed by the next. The two newest epochs stay on record,
so that a head that is one behind still leads to the newest.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from claas.adapters.modal_errors import modal_errors
from claas.core.errors import AdapterBusy, BackendUnavailable, ClaasError

if TYPE_CHECKING:
    import modal

LEASE_S = 90.0
RENEW_S = 20.0
POLL_S = 1.0
CLOCK_MARGIN_S = 30.0
"""How far the clocks of two services may be apart."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Held:
    """A lease of this service: good until `good_until` on its own clock, unless it was lost before."""

    epoch: int
    good_until: float
    lost: bool = False


class ModalLease:
    """Leases by adapter id, on behalf of one service. `now` is the wall clock, in seconds."""

    def __init__(self, leases: modal.Dict, *, timeout_s: float, now: Callable[[], float] = time.time, renew_s: float = RENEW_S) -> None:
        self._leases = leases
        self._timeout_s = timeout_s
        self._now = now
        self._renew_s = renew_s
        self._holder = uuid.uuid4().hex
        self._held: dict[str, _Held] = {}

    @asynccontextmanager
    async def hold(self, lora_id: str) -> AsyncIterator[None]:
        """Hold the adapter. One block at a time of this service may hold an adapter: see `AdapterLocks`.

        Raises AdapterBusy when another service holds it past the timeout, BackendUnavailable where Modal does not answer.
        """
        raise NotImplementedError
        yield

    def check(self, lora_id: str) -> None:
        """Raises BackendUnavailable if the adapter is held here, but the lease could not be renewed in time: another may write now."""
        raise NotImplementedError
