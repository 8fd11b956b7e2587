"""Who can speak on a Tinker server now: a sampler for each version that was asked for, and the training runs that some of them need.

A hosted server speaks through any sampler checkpoint. A self-hosted one may speak only through checkpoints of runs that it holds in
memory, of which there is room for a few: so a version that was just taught keeps its run, and one that cannot speak any more is brought
back from its training checkpoint. A run is never trained on once its version is published: some servers would let that version speak
with weights that are being trained.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

import tinker

from claas.adapters.tinker import TinkerAdapter, TinkerAdapters, TinkerVersion
from claas.core.errors import ClaasError, NotFound, Overloaded, UpstreamRefused
from claas.core.types import LoraRuntimeRef
from claas.models.tinker_model import TinkerModel
from claas.models.tinker_server import RETRY_AFTER_S, Run, TinkerServer

MAX_SAMPLERS = 512
BASE = ""
"""In place of a checkpoint's path: the base model, which is also what an adapter speaks as before its first lesson."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Voice:
    sampler: tinker.SamplingClient
    run: Run | None = None
    users: int = 0


class TinkerRuns:
    """Samplers, and at most `max_runs` runs, two or more: for another one the longest unused goes, or one in use is waited for."""

    def __init__(self, server: TinkerServer, adapters: TinkerAdapters, model: TinkerModel, *, max_runs: int) -> None:
        self._server = server
        self._adapters = adapters
        self._model = model
        self._max_runs = max_runs
        self._voices: dict[str, _Voice] = {}  # by the version's training checkpoint, the latest used last
        self._runs: set[Run] = set()
        self._coming = 0
        self._freed = asyncio.Event()
        # One run is always left to those who speak: a lesson needs its teacher, whatever else is being taught.
        self._trainers = asyncio.Semaphore(max_runs - 1)
        self._opening: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._voices)

    @property
    def held(self) -> int:
        """Runs that the server holds for us, or is about to."""
        return len(self._runs) + self._coming

    # --- speaking ---

    @asynccontextmanager
    async def speaking(self, ref: LoraRuntimeRef | None) -> AsyncIterator[tinker.SamplingClient]:
        """The sampler of a version, None for the base model's; it stays as long as it is used.

        Raises:
            NotFound: the version is gone.
            UpstreamRefused, BackendUnavailable: the server does not let it speak.
            Overloaded: it needs a run, and all are in use.
        """
        key = BASE if ref is None else ref.lora_path
        async with self._opening.setdefault(key, asyncio.Lock()):
            voice = self._voices.pop(key, None) or await self._open(key, ref)
            self._voices[key] = voice
            voice.users += 1
        try:
            yield voice.sampler
        finally:
            voice.users -= 1
            if voice.users == 0:
                self._freed.set()
                if self._voices.get(key) is not voice:  # dropped meanwhile
                    await self._end(voice)

    async def drop(self, *paths: str | None) -> None:
        """Nobody speaks through these checkpoints any more; who does is heard out."""
        for path in paths:
            voice = self._voices.pop(path, None) if path is not None else None
            if voice is not None and voice.users == 0:
                await self._end(voice)

    async def renew(self, ref: LoraRuntimeRef | None) -> None:
        """The server has forgotten this version, or the session: the next one who asks opens it anew."""
        if ref is None or ref.lora_path == BASE:
            await self._server.forget_session()
        await self.drop(BASE if ref is None else ref.lora_path)

    def in_use(self, path: str | None) -> bool:
        voice = self._voices.get(path) if path is not None else None
        return voice is not None and voice.users > 0

    # --- training ---

    async def begin(self, adapter: TinkerAdapter, state_path: str | None) -> Run:
        """A run to be trained, from this checkpoint or else from the start, until `give_up` or `keep`. Raises ClaasError."""
        await self._trainers.acquire()
        try:
            return await self._fork(adapter, state_path)
        except BaseException:
            self._trainers.release()
            raise

    async def give_up(self, run: Run) -> None:
        """It is not trained any more, and comes to nothing."""
        self._trainers.release()
        await self._finish(run)

    async def keep(self, run: Run, version: TinkerVersion) -> None:
        """It is trained and saved, and speaks as this version from now on."""
        assert version.state_path is not None
        self._trainers.release()
        try:
            self._voices[version.state_path] = _Voice(await self._server.sampler(path=version.sampler_path, run=run), run)
            self._freed.set()
        except ClaasError as error:  # the version is saved all the same: it is opened again when somebody asks for it
            log.warning("%s", error.message)
            await self._finish(run)

    async def aclose(self) -> None:
        self._voices.clear()
        for run in list(self._runs):
            await self._finish(run)

    async def _open(self, key: str, ref: LoraRuntimeRef | None) -> _Voice:
        for old, voice in list(self._voices.items())[: max(0, len(self) + 1 - MAX_SAMPLERS)]:
            if voice.users == 0:
                await self.drop(old)
        if ref is None or key == BASE:
            return _Voice(await self._server.sampler(base_model=self._model.id))
        version = await self._adapters.version(ref.lora_id, ref.version)
        if version.state_path != key:
            raise NotFound(f"version {ref.version} of {ref.lora_id!r} is gone", param="model")
        if version.sampler_path is not None:
            try:
                sampler = await self._server.sampler(path=version.sampler_path)
                any_token = [min(self._model.stop_ids)]
                await self._server.score(sampler, any_token, any_token)
                return _Voice(sampler)
            except UpstreamRefused as error:
                log.info("version %d of %r is brought back: %s", ref.version, ref.lora_id, error.message)
        return await self._bring_back(version)

    async def _bring_back(self, version: TinkerVersion) -> _Voice:
        manifest, state_path = version.manifest, version.state_path
        assert state_path is not None
        run = await self._fork(await self._adapters.adapter(manifest.lora_id), state_path)
        try:
            saved = await self._server.wait(run.client.save_weights_for_sampler(f"v{manifest.version}"))
            sampler = await self._server.sampler(path=saved.path, run=run)
            await self._adapters.set_sampler(manifest.lora_id, manifest.version, saved.path)
        except BaseException:
            await asyncio.shield(self._finish(run))
            raise
        if version.sampler_path is not None:
            await self._server.delete_checkpoint(version.sampler_path)
        return _Voice(sampler, run)

    async def _fork(self, adapter: TinkerAdapter, state_path: str | None) -> Run:
        await self._make_room()
        try:
            if state_path is None:
                layers = {"train_attn": adapter.train_attn, "train_mlp": adapter.train_mlp}
                run = await self._server.new_run(adapter.base_model, rank=adapter.rank, **layers)
            else:
                run = await self._server.run_from(state_path)
            self._runs.add(run)
        finally:
            self._coming -= 1
            self._freed.set()
        return run

    async def _make_room(self) -> None:
        """One more is coming, and there is room for it. Raises Overloaded if all runs stay in use."""
        try:
            async with asyncio.timeout(self._server.timeout_s):
                while self.held >= self._max_runs:
                    idle = next((path for path, voice in self._voices.items() if voice.run is not None and voice.users == 0), None)
                    if idle is None:
                        self._freed.clear()
                        await self._freed.wait()
                    else:
                        await self.drop(idle)
        except TimeoutError:
            message = f"all {self._max_runs} runs on the Tinker server are in use: try again later, or raise CLAAS_TINKER_MAX_RUNS"
            raise Overloaded(message, retry_after_s=RETRY_AFTER_S) from None
        self._coming += 1

    async def _end(self, voice: _Voice) -> None:
        if voice.run is not None:
            await self._finish(voice.run)

    async def _finish(self, run: Run) -> None:
        try:
            await self._server.end_run(run)
        finally:
            self._runs.discard(run)
            self._freed.set()
