"""The connection to a Tinker server: the public SDK off the event loop, its errors in our words, and a watch over what is waited for.

The SDK waits minutes for a server that is gone, and for some answers for ever: so the server is asked for a sign of life meanwhile.
Knows no adapter and no lesson.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import tinker
from tinker import types
from tinker.lib.public_interfaces.rest_client import RestClient

from claas.core.errors import BackendUnavailable, ClaasError, ConfigurationError, Overloaded, UpstreamRefused
from claas.core.usage import TokenUse, Usage, count

SIGN_OF_LIFE_S = 5.0
RETRY_AFTER_S = 15
DOWN = "the Tinker server does not answer: try again later"
REFUSES_KEY = "the Tinker server refuses the key: set CLAAS_TINKER_API_KEY to one that it knows"
AT_ONCE = 32  # scorings under way

_KEY_ERRORS = (tinker.AuthenticationError, tinker.PermissionDeniedError)

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model makes of a text's last tokens: the logprob of each, and the `top` (id, logprob), best first, where the server tells."""

    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...] | None


@dataclass(frozen=True, slots=True)
class Run:
    """A training run in a session of its own, which is also how long a self-hosted server keeps it in memory."""

    service: tinker.ServiceClient
    client: tinker.TrainingClient

    @property
    def id(self) -> str:
        return str(self.client.model_id)


class TinkerServer:
    """One server. `timeout_s` bounds every single request, `patience_s` how long it may be silent."""

    def __init__(
        self, *, base_url: str, api_key: str, timeout_s: float, patience_s: float, prices: Mapping[TokenUse, float] | None = None
    ) -> None:
        self._base_url = base_url
        self._api_key = api_key
        self.timeout_s = timeout_s
        self._patience_s = patience_s
        self._prices = prices or {}
        # No connection is kept: many a server closes an idle one after those very 5 s, and a call lost to that would be taken for silence.
        self._http = httpx.AsyncClient(
            base_url=base_url, headers={"X-API-Key": api_key}, timeout=SIGN_OF_LIFE_S, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self._service: tinker.ServiceClient | None = None
        self._rest: RestClient | None = None
        self._opening, self._asking = asyncio.Lock(), asyncio.Lock()
        self._heard = -SIGN_OF_LIFE_S
        self._scoring = asyncio.Semaphore(AT_ONCE)

    def count(self, use: TokenUse, tokens: int) -> None:
        count(use, tokens, self._prices.get(use))

    def priced(self, tokens: Mapping[TokenUse, int]) -> Usage:
        """What so many tokens cost."""
        usage = Usage()
        for use, n in tokens.items():
            if n:
                usage.add(use, n, self._prices.get(use))
        return usage

    # --- what it is ---

    async def ping(self) -> None:
        """Raises BackendUnavailable."""
        try:
            (await self._http.get("/api/v1/healthz")).raise_for_status()
        except httpx.HTTPError as error:
            raise BackendUnavailable(DOWN, retry_after_s=RETRY_AFTER_S) from error

    async def models(self) -> dict[str, int | None]:
        """Base models, and how many tokens each reads, if it is told. Raises BackendUnavailable, ConfigurationError for a wrong key."""
        service = self._client()
        try:
            supported = (await self._blocking(service.get_server_capabilities)).supported_models
        except BackendUnavailable as error:
            if isinstance(error.__cause__, _KEY_ERRORS):
                raise ConfigurationError(error.message) from error
            raise
        return {model.model_name: model.max_context_length for model in supported if model.model_name is not None}

    # --- sessions ---

    async def sampler(self, *, path: str | None = None, base_model: str | None = None, run: Run | None = None) -> tinker.SamplingClient:
        """Who speaks through a sampler checkpoint, or as the base model; in the session of `run`, where the checkpoint is of it."""
        service = await self._main_session() if run is None else run.service
        return await self._blocking(lambda: service.create_sampling_client(model_path=path, base_model=base_model))

    async def new_run(self, base_model: str, *, rank: int, train_attn: bool, train_mlp: bool) -> Run:
        """A run whose adapter has no effect yet, always the same one."""
        how: dict[str, Any] = {"rank": rank, "seed": 0, "train_attn": train_attn, "train_mlp": train_mlp, "train_unembed": False}
        return await self._run(lambda service: service.create_lora_training_client(base_model=base_model, **how))

    async def run_from(self, state_path: str) -> Run:
        """A run that goes on from a checkpoint, with its optimizer's moments."""
        return await self._run(lambda service: service.create_training_client_from_state_with_optimizer(state_path))

    async def end_run(self, run: Run) -> None:
        """Let the server free what it holds for a run; its checkpoints stay. Where it does not, the session's end does."""
        try:
            await self._http.post("/api/v1/unload_model", json={"model_id": run.id, "type": "unload_model"})
        except httpx.HTTPError as error:
            log.info("run %s was not unloaded (%s)", run.id, type(error).__name__)
        finally:
            run.service.holder.close()

    # --- requests ---

    async def wait(self, future: Awaitable[T]) -> T:
        """The result of an SDK call. Raises ClaasError."""
        return await self._watched(asyncio.ensure_future(_awaited(future)))

    async def sample(
        self, sampler: tinker.SamplingClient, prompt: Sequence[int], params: types.SamplingParams
    ) -> tuple[tuple[int, ...], tuple[float, ...], str]:
        """One reply: its tokens, their logprobs, and "stop" or "length"."""
        self.count("scored", len(prompt))
        future = sampler.sample(types.ModelInput.from_ints(list(prompt)), num_samples=1, sampling_params=params)
        reply = (await self.wait(asyncio.wrap_future(future))).sequences[0]
        if reply.logprobs is None or len(reply.logprobs) != len(reply.tokens):
            raise BackendUnavailable("the Tinker server sent a reply without the logprobs of its tokens")
        self.count("sampled", len(reply.tokens))
        return tuple(reply.tokens), tuple(reply.logprobs), str(reply.stop_reason)

    async def score(self, sampler: tinker.SamplingClient, prompt: Sequence[int], targets: Sequence[int], top_k: int = 0) -> Scored:
        """How likely `targets` are after `prompt`, and the `top_k` likeliest in the place of each, if the server tells."""
        ids, n = [*prompt, *targets], len(targets)
        async with self._scoring:
            future = sampler.sample(
                types.ModelInput.from_ints(ids),
                num_samples=1,
                sampling_params=types.SamplingParams(max_tokens=1),
                include_prompt_logprobs=True,
                topk_prompt_logprobs=top_k,
            )
            answer = await self.wait(asyncio.wrap_future(future))
        self.count("scored", len(ids))
        self.count("sampled", 1)
        logprobs = (answer.prompt_logprobs or [])[-n:]  # some servers leave out the first token's, which has none
        if len(logprobs) != n or any(logprob is None for logprob in logprobs):
            raise BackendUnavailable("the Tinker server did not score the text that it was sent")
        top = answer.topk_prompt_logprobs if top_k else None
        tail = tuple(tuple(place) for place in top[-n:] if place) if top else ()
        return Scored(tuple(map(float, logprobs)), tail if len(tail) == n else None)

    async def delete_checkpoint(self, path: str) -> bool:
        """Whether the server has deleted it; False if it cannot, or did not have it. Raises BackendUnavailable."""
        rest = await self._rest_client()
        try:
            await self.wait(rest.delete_checkpoint_async(*_parsed(path)))
        except UpstreamRefused:
            return False
        return True

    async def archive(self, sampler_path: str) -> bytes:
        """The checkpoint as a tar archive. Raises ClaasError."""
        run_id, checkpoint = _parsed(sampler_path)
        rest = await self._rest_client()
        try:
            url = await self.wait(rest.get_checkpoint_archive_url_async(run_id, checkpoint))
        except UpstreamRefused:  # some servers know it by its last name only
            url = await self.wait(rest.get_checkpoint_archive_url_async(run_id, checkpoint.rpartition("/")[2]))
        try:
            async with httpx.AsyncClient(timeout=self.timeout_s) as elsewhere:  # which is shown no key: the address is signed
                return (await elsewhere.get(url.url)).raise_for_status().content
        except httpx.HTTPError as error:
            raise BackendUnavailable("the Tinker server's archive of this version cannot be fetched: try again later") from error

    async def forget_session(self) -> None:
        """Begin anew: a server that was restarted does not know the session any more."""
        service, self._service, self._rest = self._service, None, None
        if service is not None:
            service.holder.close()

    async def aclose(self) -> None:
        await self.forget_session()
        await self._http.aclose()

    async def _rest_client(self) -> RestClient:
        if self._rest is None:
            service = await self._main_session()
            self._rest = await self._blocking(service.create_rest_client)
        return self._rest

    async def _run(self, create: Callable[[tinker.ServiceClient], tinker.TrainingClient]) -> Run:
        service = await self._session()
        try:
            return Run(service, await self._blocking(lambda: create(service)))
        except BaseException:
            service.holder.close()
            raise

    async def _main_session(self) -> tinker.ServiceClient:
        async with self._opening:
            if self._service is None:
                self._service = await self._session()
        return self._service

    async def _session(self) -> tinker.ServiceClient:
        """A session that is open: what the SDK opens when it is first used, it would open on the event loop."""
        service = self._client()
        await self._blocking(lambda: service.holder, undo=lambda opened: opened.close())
        return service

    def _client(self) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self._base_url, api_key=self._api_key, user_metadata={"client": "claas"})

    async def _blocking(self, work: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """`work`, which may block for minutes, in a thread that nobody has to wait for; `undo` is given what comes when nobody does."""
        await self.ping()
        done: Future[T] = Future()

        def target() -> None:
            done.set_running_or_notify_cancel()  # from now on it cannot be cancelled, only left alone
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - handed over
                done.set_exception(error)

        threading.Thread(target=target, name="claas-tinker", daemon=True).start()
        try:
            return await self._watched(asyncio.wrap_future(done))
        except BaseException:
            if undo is not None:
                done.add_done_callback(lambda late: late.exception() or undo(late.result()))
            raise

    async def _is_alive(self) -> bool:
        """Whether the server answers; asked once for all who wait."""
        async with self._asking:
            if time.monotonic() - self._heard < SIGN_OF_LIFE_S:
                return True
            try:
                await self.ping()
            except BackendUnavailable:
                return False
            self._heard = time.monotonic()
            return True

    async def _watched(self, task: asyncio.Future[T]) -> T:
        """Wait, and make sure from time to time that there is something to wait for."""
        began = heard = time.monotonic()
        try:
            while not (await asyncio.wait({task}, timeout=SIGN_OF_LIFE_S))[0]:
                if await self._is_alive():
                    heard = time.monotonic()
                elif time.monotonic() - heard > self._patience_s:
                    raise BackendUnavailable(DOWN, retry_after_s=RETRY_AFTER_S)
                if time.monotonic() - began > self.timeout_s:
                    raise BackendUnavailable(f"the Tinker server has not answered for {self.timeout_s:g} s: try again later")
            return task.result()
        except ClaasError:
            raise
        except Exception as error:
            raise in_our_words(error) from error
        finally:
            task.cancel()


def _parsed(path: str) -> tuple[str, str]:
    """The run and the checkpoint that a `tinker://` path names."""
    run_id, _, checkpoint = path.removeprefix("tinker://").partition("/")
    return run_id, checkpoint


async def _awaited(future: Awaitable[T]) -> T:
    return await future


def in_our_words(error: Exception) -> ClaasError:
    """An error of the SDK's as ours, with what the server said."""
    match error:
        case tinker.AuthenticationError() | tinker.PermissionDeniedError():
            return BackendUnavailable(REFUSES_KEY)
        case tinker.RateLimitError():
            return Overloaded("the Tinker server has too much to do: try again later", retry_after_s=RETRY_AFTER_S)
        case tinker.InternalServerError():
            return BackendUnavailable(f"the Tinker server failed: {_said(error)}", retry_after_s=RETRY_AFTER_S)
        case tinker.APIStatusError():
            return UpstreamRefused(f"the Tinker server refused: {_said(error)}", status=error.status_code)
        case tinker.APIConnectionError() | httpx.TransportError() | TimeoutError():
            return BackendUnavailable(DOWN, retry_after_s=RETRY_AFTER_S)
        case tinker.RequestFailedError() | ValueError():  # of what was accepted, and then failed
            return UpstreamRefused(f"the Tinker server refused: {_said(error)}", status=400)
        case tinker.TinkerError():
            return ConfigurationError("CLAAS_TINKER_API_KEY: the key must begin with 'tml-'")
    log.error("the Tinker SDK broke", exc_info=error)
    return BackendUnavailable(f"the Tinker client broke ({type(error).__name__})")


def _said(error: Exception) -> str:
    """The server's own words, without what the SDK wraps them in."""
    text = str(error)
    for pattern in (r"""['"]detail['"]: (["'])(?P<said>.*?)\1\s*[,}]""", r"Request failed: (?P<said>.*?) for self\.request_id"):
        if found := re.search(pattern, text, re.DOTALL):
            text = found["said"]
            break
    return " ".join(text.split())[:300]
