"""Serving and training take turns on one device: the gate that requests pass, and the states that a vLLM goes through.

::

    down ──repaired──▶ serving ──▶ draining ──▶ asleep ──▶ training ──▶ waking ──▶ serving
      ▲                                 (whatever fails) ─────────────────▶ waking ──fails──▶ down

An update shuts the gate: requests that arrive wait, those that run come to their end, none is aborted. Then vLLM frees memory, as little
as will do, and what is free is measured before anything is trained. However the update ends, vLLM is woken and the gate opened; if that
fails, or vLLM is gone, the state is `down`: requests are told so at once, and vLLM is looked for until it serves again.

Needs vLLM's control endpoints (VLLM_SERVER_DEV_MODE=1), but for the policy `none`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Literal

from claas.core.errors import BackendUnavailable, ClaasError, ConfigurationError, NotFound
from claas.core.types import RoomPlan
from claas.inference.base import Room
from claas.inference.vllm_adapters import VllmAdapters
from claas.inference.vllm_http import RETRY_AFTER_S, VllmDown, VllmHttp

ReleasePolicy = Literal["auto", "none", "kv_release", "sleep"]
Release = Literal["kv_release", "sleep"]
State = Literal["down", "serving", "draining", "asleep", "training", "waking"]
RELEASES: dict[ReleasePolicy, tuple[Release, ...]] = {
    "auto": ("kv_release", "sleep"),
    "none": (),
    "kv_release": ("kv_release",),
    "sleep": ("sleep",),
}
CONTROL_TIMEOUT_S = 180.0
"""Of one control call: the first sleep allocates the host memory that the weights go to."""
HEALTH_TIMEOUT_S = 3.0
DOWN = "vLLM does not answer or is not ready yet: try again soon"
WAKE_TRIES = 4
LOOK_AGAIN_S = 1.0
MEMORY_SETTLES_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of the trainer's device: what a step takes, and what is free now (None: the device does not tell)."""

    needed: Callable[[], int]
    free: Callable[[], int | None]

    def enough(self) -> bool | None:
        free = self.free()
        return None if free is None else free >= self.needed()


class VllmControl:
    """The one who may pause a vLLM. `look` is asked whether it is the right one."""

    def __init__(
        self,
        http: VllmHttp,
        memory: DeviceMemory,
        *,
        policy: ReleasePolicy,
        drain_timeout_s: float,
        gate_timeout_s: float,
        adapters: VllmAdapters,
        look: Callable[[], Awaitable[None]],
        on_demand: bool = False,
    ) -> None:
        self.state: State = "down"
        self.running = 0
        self.waiting = 0
        self._http = http
        self._memory = memory
        self._policy: ReleasePolicy = policy
        self._drain_timeout_s = drain_timeout_s
        self._gate_timeout_s = gate_timeout_s
        self._adapters = adapters
        self._look = look
        self._too_little = math.inf
        """The least need that freeing the KV cache alone did not meet, of the vLLM that runs now."""
        self._on_demand = on_demand
        self._starting = False
        """Whether the last look found none that answers yet, rather than one that does not serve us."""
        self._closing = False
        self._device = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._watch: asyncio.Task[None] | None = None

    # --- the gate ---

    @asynccontextmanager
    async def admitted(self, *, background: bool = False) -> AsyncIterator[None]:
        """One request, from here to its end. Waits while an update has the device; `background` as long as it takes.

        Where vLLM starts on demand, it also waits for one that starts, but for `background`, which can be done later.

        Raises BackendUnavailable if that is longer than the gate's time-out, or vLLM is down.
        """
        self.waiting += 1
        try:
            async with asyncio.timeout(None if background else self._gate_timeout_s):
                await self._until(
                    lambda: self._closing or self.state == "serving" or (self.state == "down" and not self._awaited(background))
                )
        except TimeoutError:
            if self.state == "down":
                raise VllmDown(DOWN) from None
            raise BackendUnavailable("the model is learning, and the update takes long: try again", retry_after_s=RETRY_AFTER_S) from None
        finally:
            self.waiting -= 1
        if self._closing:
            raise BackendUnavailable("the service is closing: try again later")
        if self.state == "down":
            raise VllmDown(DOWN)
        self.running += 1
        try:
            yield
        except VllmDown:
            await self.lost()
            raise
        finally:
            self.running -= 1
            await self._tell()

    def _awaited(self, background: bool) -> bool:
        return self._on_demand and self._starting and not background

    # --- up and down ---

    async def begin(self) -> None:
        """Look for vLLM once, and wake it if a service that ended left it asleep. If there is none, go on looking in the background.

        Raises ConfigurationError if it is one that cannot serve this service.
        """
        try:
            await self._repair()
        except BackendUnavailable as error:
            log.warning("%s", error.message)
            self._starting = error.retry_after_s is not None
            self._keep_looking()

    async def lost(self) -> None:
        """A request lost its connection. If vLLM is gone, so is everybody's; an update that holds the device finds out for itself."""
        if self._closing or self._device.locked() or self.state != "serving":
            return
        try:
            await self._http.ask("GET", "/health", timeout_s=HEALTH_TIMEOUT_S)
        except BackendUnavailable:
            if not self._device.locked():
                self._starting = True
                await self._become("down")
                self._keep_looking()

    async def aclose(self) -> None:
        """Let nobody in any more, and let an update that runs wake vLLM. Whoever trains must have been closed before."""
        self._closing = True
        await self._tell()
        async with self._device:
            pass
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def _repair(self) -> None:
        try:
            await self._look()
        except (LookupError, TypeError, ValueError) as error:
            raise BackendUnavailable("what answers at VLLM_BASE_URL is no vLLM") from error
        try:
            if await self._asleep():
                await self._wake_all()
        except NotFound:
            if self._policy != "none":
                raise ConfigurationError(
                    "vLLM has no control endpoints: start it with VLLM_SERVER_DEV_MODE=1, on loopback or a private network, or never let "
                    "it make room for a step (CLAAS_VLLM_RELEASE=none)"
                ) from None
        self._too_little = math.inf
        await self._become("serving")

    def _keep_looking(self) -> None:
        if not self._closing and (self._watch is None or self._watch.done()):
            self._watch = asyncio.create_task(self._look_until_it_serves())

    async def _look_until_it_serves(self) -> None:
        told = ""
        while self.state == "down":
            await asyncio.sleep(LOOK_AGAIN_S)
            try:
                async with self._device:
                    await self._repair()
                log.info("vLLM serves")
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the watch
                if str(error) != told:
                    log.warning("vLLM is down: %s", error)
                told = str(error)
                self._starting = isinstance(error, BackendUnavailable) and error.retry_after_s is not None
                await self._tell()

    # --- an update ---

    @asynccontextmanager
    async def room(self, plan: RoomPlan) -> AsyncIterator[Room]:
        """The device, for one step. Raises BackendUnavailable if no room can be made: nothing was trained, and vLLM serves."""
        async with self._device:
            room = Room()
            try:
                await self._make(room, self._releases() if plan.sleep_before else ())
                yield room
            finally:
                if self.state not in ("serving", "down"):
                    await _to_its_end(self._give_back(room))

    def _releases(self) -> tuple[Release, ...]:
        """What to try, the least first; what was too little for as much before is left out."""
        releases = RELEASES[self._policy]
        return releases[-1:] if self._memory.needed() >= self._too_little else releases

    async def _make(self, room: Room, releases: tuple[Release, ...]) -> None:
        enough = self._memory.enough()
        if self.state == "down":
            raise VllmDown(DOWN)
        if self._policy == "auto" and enough is not False:  # it fits beside the server, or the device does not tell
            return
        for release in releases:
            try:
                await self._release(room, release)
            except VllmDown:
                raise
            except BackendUnavailable as error:
                if (self.state == "draining" and not room.slept) or release == releases[-1]:
                    raise
                log.warning("vLLM could not make room by %s, so it does more: %s", release, error.message)
                continue
            if await self._settled():
                await self._become("training")
                return
            if release == "kv_release":
                self._too_little = min(self._too_little, self._memory.needed())
        if not releases and enough is not False:
            return
        raise BackendUnavailable(
            f"a step needs {_gib(self._memory.needed())} of device memory and {_gib(self._memory.free() or 0)} is free beside vLLM: lower "
            "its --gpu-memory-utilization, or let it make more room (CLAAS_VLLM_RELEASE=auto or sleep)"
        )

    async def _release(self, room: Room, release: Release) -> None:
        if self.state == "serving":
            with _timed(room, "drain"):
                await self._drain()
        with _timed(room, "sleep"):
            if room.slept:  # the KV cache is gone already, and /sleep wants to find it
                await self._call("/wake_up")
            room.slept = True  # from here on it must be woken, even if it says that it failed
            if release == "kv_release":
                await self._call("/release_kv_cache_memory")
            else:
                await self._call("/sleep", level="1", mode="wait")
        await self._become("asleep")

    async def _drain(self) -> None:
        await self._become("draining")
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                await self._until(lambda: self.running == 0)
                await self._adapters.settled()  # whoever asked may have left: nothing may be loaded into weights that are asleep
        except TimeoutError:
            raise BackendUnavailable(
                f"replies still ran after {self._drain_timeout_s:g} s, so the update did not begin: send the feedback again "
                "(FEEDBACK_DRAIN_TIMEOUT_S)"
            ) from None
        await self._call("/pause", mode="wait")

    async def _settled(self) -> bool:
        """Whether there is room. Freed memory may take a moment to show."""
        give_up = time.monotonic() + MEMORY_SETTLES_S
        while self._memory.enough() is False:
            if time.monotonic() > give_up:
                return False
            await asyncio.sleep(0.1)
        return True

    async def _give_back(self, room: Room) -> None:
        """Weights, then the new adapter, then the KV cache; the gate opens when all is back. vLLM may have died: then it is looked for."""
        with _timed(room, "wake"):
            await self._become("waking")
            for attempt in range(WAKE_TRIES):
                try:
                    if room.slept:
                        await self._call("/wake_up", tags="weights")
                        await self._load_next(room)
                    await self._wake_all()
                    room.woke = room.slept
                    await self._become("serving")
                    return
                except Exception as error:  # noqa: BLE001 - whatever it is, the gate must open
                    log.warning("waking vLLM failed: %s", error)
                    await asyncio.sleep(0.5 * 2**attempt)
            await self._become("down")
            self._keep_looking()

    async def _load_next(self, room: Room) -> None:
        if room.next is None:
            return
        try:
            await self._adapters.load(room.next)
        except ClaasError as error:  # waking goes first: whoever activates the version will be told
            log.warning("version %d of %r could not be loaded: %s", room.next.version, room.next.lora_id, error.message)

    async def _wake_all(self) -> None:
        """Awake and scheduling, whatever it was: asleep, paused, or neither."""
        await self._call("/wake_up")
        if await self._asleep():
            raise BackendUnavailable("vLLM was told to wake up and is still asleep")

    async def _asleep(self) -> bool:
        """Asleep or paused."""
        return bool(await self._http.ask("GET", "/is_sleeping", timeout_s=CONTROL_TIMEOUT_S) != {"is_sleeping": False})

    async def _call(self, path: str, **params: str) -> None:
        await self._http.ask("POST", path, params=params, timeout_s=CONTROL_TIMEOUT_S)

    # --- the state, and who waits for it ---

    async def _become(self, state: State) -> None:
        self.state = state
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, holds: Callable[[], bool]) -> None:
        if not holds():
            async with self._changed:
                await self._changed.wait_for(holds)


async def _to_its_end(work: Awaitable[None]) -> None:
    """Await `work` even if the one who waits is cancelled meanwhile: vLLM must not be left asleep."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


@contextmanager
def _timed(room: Room, phase: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        room.seconds[phase] = room.seconds.get(phase, 0.0) + time.perf_counter() - began


def _gib(n: int) -> str:
    return f"{n / 2**30:.1f} GiB"
