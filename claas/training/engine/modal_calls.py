"""One lesson's call of the worker on Modal, through its SDK: asked for, waited for, and stopped when nobody waits any more.

A call lives on Modal, not in a connection: a network that fails for a while costs one more question. What is waited for has an end: first
a container, then the training. It knows nothing of what is said.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Literal

import aiohttp
import modal
from grpclib.exceptions import StreamTerminatedError
from modal import exception

from claas.adapters.modal_errors import EXHAUSTED, RETRY_AFTER_S, UNREACHABLE, as_ours, modal_errors
from claas.core.errors import BackendUnavailable, ClaasError, StepFailed
from claas.core.settings import Settings
from claas.training.engine.modal_wire import GIVEN_UP, sign_of

WORKER = "DistillWorker"
POLL_S = 5.0
LOOK_S = 1.0
"""How often it is asked whether the lesson has begun."""
RETRY_S = 2.0
PATIENCE_S = 300.0
"""How long Modal may be out of reach while a lesson is under way there."""
GRACE_S = 60.0
"""How long after its time a lesson is waited for: Modal itself stops it, and says so."""
STOPPING_S = 10.0
SEE_LOGS = "see the app's logs, `claas modal logs-hint` shows how"

Phase = Literal["waiting for a container", "training"]
_BLIPS = (
    *(exception.ConnectionError, exception.ServiceError, exception.InternalError, exception.ClientClosed),
    *(StreamTerminatedError, aiohttp.ClientError),
)
_MEMORY = re.compile(r"out of memory|\boom\b|oom.kill|memory (manager|thrashing)|exit code:? 137|sigkill", re.IGNORECASE)
_MONEY = re.compile(r"spend(ing)? limit|billing|credit|payment", re.IGNORECASE)

log = logging.getLogger(__name__)


class ModalCalls:
    """Calls of the worker of the app that the settings name. `client` None: the one of this process."""

    def __init__(self, settings: Settings, signs: modal.Dict, client: modal.Client | None = None) -> None:
        self._app = settings.modal_app
        self._environment = settings.modal_environment
        self._start_timeout_s = settings.modal_start_timeout_s
        self._timeout_s = settings.modal_timeout_s
        self._signs = signs
        self._client = client
        self._worker: Any = None
        self._ending: set[asyncio.Task[None]] = set()

    async def check(self) -> None:
        """Raises BackendUnavailable if the app is not there, or Modal does not answer. Starts no container."""
        with modal_errors():
            await self._looked_up().hydrate.aio()

    async def distill(self, call: str, request: str, phase: Callable[[Phase], None]) -> str:
        """The worker's answer. `call` names the lesson among the signs of life.

        Raises:
            BackendUnavailable: Modal does not answer, or gives no container.
            StepFailed: the worker ended, or had to be stopped.
        """
        phase("waiting for a container")
        spawned = None
        try:
            spawned = await self._spawn(request)
            answer = await _Wait(self, call, spawned, phase).answer()
        except BaseException:
            self._behind(self._stop(call, spawned))
            raise
        self._behind(self._tidy(call))
        return answer

    async def begun(self, call: str) -> str | None:
        """When the worker began with it, on the worker's clock; None if it has not, or Modal does not say."""
        try:
            sign: str | None = await self._signs.get.aio(sign_of(call))
        except (exception.Error, StreamTerminatedError, OSError) as error:
            log.info("whether a lesson has begun could not be asked (%s)", type(error).__name__)
            return None
        return sign

    @property
    def timeouts_s(self) -> tuple[float, float]:
        """How long a container, and then the training, is waited for."""
        return self._start_timeout_s, self._timeout_s

    async def aclose(self) -> None:
        """Let lessons that were given up be stopped, if Modal answers."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=STOPPING_S)
        for task in self._ending:
            task.cancel()

    async def _spawn(self, request: str) -> modal.FunctionCall[str]:
        """An app that was stopped and deployed again is another one under the same name: then it is looked up anew."""
        try:
            try:
                return await self._looked_up()().distill.spawn.aio(request)
            except exception.NotFoundError:
                self._worker = None
                return await self._looked_up()().distill.spawn.aio(request)
        except (exception.Error, StreamTerminatedError, OSError) as error:
            raise lesson_error(error, self._timeout_s) from error

    def _looked_up(self) -> Any:
        if self._worker is None:
            self._worker = modal.Cls.from_name(self._app, WORKER, environment_name=self._environment, client=self._client)
        return self._worker

    def _behind(self, work: Coroutine[Any, Any, None]) -> None:
        """In the background, for as long as it takes: what still runs there is paid for."""
        task = asyncio.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _tidy(self, call: str) -> None:
        with suppress(exception.Error, StreamTerminatedError, OSError):  # Modal forgets what nobody asks for
            await self._signs.pop.aio(sign_of(call), None)

    async def _stop(self, call: str, spawned: modal.FunctionCall[str] | None) -> None:
        """Without `spawned` it is not known whether it was asked for: a worker that begins with it all the same gives it up at once."""
        give_up_at = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up_at:
            try:
                await self._signs.put.aio(sign_of(call), GIVEN_UP)
                if spawned is not None:
                    await spawned.cancel.aio(terminate_containers=True)
            except (exception.Error, StreamTerminatedError, OSError) as error:
                if not isinstance(error, (*_BLIPS, OSError)):
                    log.warning("a lesson on Modal could not be stopped: %s", error)
                    return
                await asyncio.sleep(RETRY_S)
            else:
                return
        log.warning("a lesson on Modal could not be stopped: Modal does not answer")


class _Wait:
    """Waiting for one call's answer."""

    def __init__(self, calls: ModalCalls, call: str, spawned: modal.FunctionCall[str], phase: Callable[[Phase], None]) -> None:
        self._calls = calls
        self._call = call
        self._spawned = spawned
        self._phase = phase
        self._since = self._heard = time.monotonic()
        self._begun: str | None = None

    async def answer(self) -> str:
        while True:
            try:
                return str(await self._spawned.get.aio(timeout=self._poll_s()))
            except TimeoutError:  # Python's: there is no answer yet
                self._heard = time.monotonic()
            except _BLIPS as error:
                if time.monotonic() - self._heard > PATIENCE_S:
                    raise BackendUnavailable(UNREACHABLE, retry_after_s=RETRY_AFTER_S) from error
                log.info("Modal does not answer (%s): the lesson goes on there, asking again", type(error).__name__)
                await asyncio.sleep(RETRY_S)
            except Exception as error:
                raise lesson_error(error, self._calls.timeouts_s[1]) from error
            await self._look()

    def _poll_s(self) -> float:
        return max(0.1, min(LOOK_S if self._begun is None else POLL_S, self._limit_s() - (time.monotonic() - self._since)))

    def _limit_s(self) -> float:
        start, training = self._calls.timeouts_s
        return start if self._begun is None else training + GRACE_S

    async def _look(self) -> None:
        """Whether it has begun; a worker that was lost begins anew, and so does its time. Raises if that is over."""
        sign = await self._calls.begun(self._call)
        if sign is not None and sign != self._begun:
            self._begun, self._since = sign, time.monotonic()
            self._phase("training")
        if time.monotonic() - self._since < self._limit_s():
            return
        start, training = self._calls.timeouts_s
        if self._begun is None:
            raise BackendUnavailable(
                f"Modal had no container for the lesson within {start:g} s: try again later, with a larger CLAAS_MODAL_START_TIMEOUT_S, or "
                "deploy with another CLAAS_MODAL_GPU"
            )
        raise StepFailed(_too_long(training))


def lesson_error(error: Exception, timeout_s: float) -> ClaasError:
    """What asking for a lesson, or waiting for it, raised, as ours."""
    text = str(error)
    if isinstance(error, exception.Error) and _MONEY.search(text):
        return BackendUnavailable(EXHAUSTED)
    match error:
        case ClaasError():  # raised where the worker starts
            return BackendUnavailable(f"the worker on Modal cannot start: {error.message}")
        case exception.FunctionTimeoutError():
            return StepFailed(_too_long(timeout_s))
        case exception.OutputExpiredError():
            return StepFailed("Modal has no answer to the lesson any more: the version before it still serves; send the feedback again")
        case exception.InternalFailure():
            return BackendUnavailable(
                "Modal lost the container of the lesson: the version before it still serves; send the feedback again",
                retry_after_s=RETRY_AFTER_S,
            )
        case exception.RemoteError() if _MEMORY.search(text):
            return StepFailed(
                "the worker on Modal ran out of memory: teach shorter conversations, or deploy with a larger CLAAS_MODAL_GPU. The version "
                "before it still serves"
            )
        case exception.RemoteError() | exception.ExecutionError():
            return StepFailed(f"the worker on Modal ended during the lesson: the version before it still serves; {SEE_LOGS}")
    ours = as_ours(error) if isinstance(error, (exception.Error, *_BLIPS)) else None
    if ours is not None:
        return ours
    log.warning("the worker on Modal broke", exc_info=error)
    return StepFailed(f"the worker on Modal broke ({type(error).__name__}): the version before it still serves; {SEE_LOGS}")


def _too_long(timeout_s: float) -> str:
    return (
        f"the lesson was stopped on Modal after {timeout_s:g} s: teach shorter conversations, or deploy with a larger "
        "CLAAS_MODAL_TIMEOUT_S. The version before it still serves"
    )
