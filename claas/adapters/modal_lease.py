"""One writer at a time for each adapter, across services: leases in a Modal Dict.

::

    lease:<id>#head   the newest epoch, so that nobody need list the Dict
    lease:<id>#7      epoch 7: who holds it, and until when; nobody where it was given back

An epoch is taken by putting it if it is absent: Modal lets exactly one of many do so. A holder renews its own epoch and frees it at the
end; one that was freed, or has expired by more than clocks may differ, is followed by the next. The two newest epochs stay on record, so
that a head that is one behind still leads to the newest.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

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


class _Epoch(TypedDict):
    """What an epoch's key holds; `until` on the holder's wall clock."""

    holder: str | None
    until: float


@dataclass(slots=True)
class _Held:
    """A lease of this service, good until a time of its own clock unless it was lost before."""

    epoch: int
    good_until: float
    lost: bool = False


class ModalLease:
    """Leases by adapter id, on behalf of one service. `now` is the wall clock, in seconds."""

    def __init__(
        self,
        leases: modal.Dict,
        *,
        timeout_s: float,
        now: Callable[[], float] = time.time,
        renew_s: float = RENEW_S,
        poll_s: float = POLL_S,
    ) -> None:
        self._leases = leases
        self._timeout_s = timeout_s
        self._now = now
        self._renew_s = renew_s
        self._poll_s = poll_s
        self._holder = uuid.uuid4().hex
        self._held: dict[str, _Held] = {}

    @asynccontextmanager
    async def hold(self, lora_id: str) -> AsyncIterator[None]:
        """Hold the adapter. One block at a time of this service may hold an adapter: see `AdapterLocks`.

        Raises AdapterBusy when another service holds it past the timeout, BackendUnavailable where Modal does not answer.
        """
        with modal_errors():
            held = self._held[lora_id] = await self._acquire(lora_id)
        renewing = asyncio.create_task(self._renew(lora_id, held))
        try:
            yield
        finally:
            renewing.cancel()
            try:
                await asyncio.shield(self._release(lora_id, held, renewing))
            finally:
                del self._held[lora_id]

    def check(self, lora_id: str) -> None:
        """Raises BackendUnavailable if the adapter is held here, but the lease could not be renewed in time: another may write now."""
        held = self._held.get(lora_id)
        if held is not None and (held.lost or self._now() > held.good_until):
            raise BackendUnavailable(
                f"adapter {lora_id!r} could not be kept for this service alone, since Modal did not answer for {LEASE_S:g} s: "
                "nothing was changed; try again",
                retry_after_s=int(CLOCK_MARGIN_S),
            )

    async def _acquire(self, lora_id: str) -> _Held:
        give_up_at = time.monotonic() + self._timeout_s
        while (held := await self._try(lora_id)) is None:
            if time.monotonic() > give_up_at:
                raise AdapterBusy(f"adapter {lora_id!r} is being changed by another service: try again later", param="lora_id")
            await asyncio.sleep(self._poll_s)
        return held

    async def _try(self, lora_id: str) -> _Held | None:
        """Take the epoch after the newest, if that is over."""
        newest, record = await self._newest(lora_id)
        if self._is_live(record):
            return None
        epoch, mine = newest + 1, _Epoch(holder=self._holder, until=self._now() + LEASE_S)
        try:
            added = await self._leases.put.aio(_key(lora_id, epoch), mine, skip_if_exists=True)
            # It was there already: another's, or one's own whose answer was lost and that was put again.
            if not added and await self._record(lora_id, epoch) != mine:
                return None
            if await self._head(lora_id) > epoch:  # the others went on meanwhile, and have cleared away what stood here
                await self._leases.pop.aio(_key(lora_id, epoch), None)
                return None
            await self._leases.put.aio(_key(lora_id, "head"), epoch)
            await self._leases.pop.aio(_key(lora_id, epoch - 2), None)
        except BaseException:
            with suppress(Exception):
                await asyncio.shield(self._take_back(lora_id, epoch, mine))
            raise
        return _Held(epoch, mine["until"])

    async def _newest(self, lora_id: str) -> tuple[int, _Epoch | None]:
        epoch = await self._head(lora_id)
        record = await self._record(lora_id, epoch)
        while (later := await self._record(lora_id, epoch + 1)) is not None:
            epoch, record = epoch + 1, later
        return epoch, record

    async def _head(self, lora_id: str) -> int:
        head: int = await self._leases.get.aio(_key(lora_id, "head"), 0)
        return head

    async def _record(self, lora_id: str, epoch: int) -> _Epoch | None:
        record: _Epoch | None = await self._leases.get.aio(_key(lora_id, epoch))
        return record

    def _is_live(self, record: _Epoch | None) -> bool:
        """One's own is not: it stayed behind where neither taking nor freeing it was answered."""
        return record is not None and record["holder"] not in (None, self._holder) and self._now() <= record["until"] + CLOCK_MARGIN_S

    async def _renew(self, lora_id: str, held: _Held) -> None:
        """Until cancelled, or lost."""
        while True:
            await asyncio.sleep(self._renew_s)
            if self._now() > held.good_until:
                held.lost = True  # another may have taken it: what it wrote is not written over
                log.warning("the lease of adapter %r ran out before Modal could be reached", lora_id)
                return
            mine = _Epoch(holder=self._holder, until=self._now() + LEASE_S)
            try:
                with modal_errors():
                    await self._leases.put.aio(_key(lora_id, held.epoch), mine)
                    held.lost = await self._record(lora_id, held.epoch + 1) is not None
            except ClaasError as error:
                log.warning("the lease of adapter %r was not renewed: %s", lora_id, error.message)
                continue
            if held.lost:
                log.warning("another service took the lease of adapter %r", lora_id)
                return
            held.good_until = mine["until"]

    async def _release(self, lora_id: str, held: _Held, renewing: asyncio.Task[None]) -> None:
        """Where Modal cannot be reached it expires by itself."""
        await asyncio.wait([renewing])
        if held.lost or self._now() > held.good_until:
            return
        try:
            with modal_errors():
                await self._leases.put.aio(_key(lora_id, held.epoch), _Epoch(holder=None, until=0.0))
        except ClaasError as error:
            log.warning("the lease of adapter %r was not given back: %s", lora_id, error.message)

    async def _take_back(self, lora_id: str, epoch: int, mine: _Epoch) -> None:
        if await self._record(lora_id, epoch) == mine:
            await self._leases.put.aio(_key(lora_id, epoch), _Epoch(holder=None, until=0.0))


def _key(lora_id: str, part: int | str) -> str:
    return f"lease:{lora_id}#{part}"
