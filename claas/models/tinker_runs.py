"""Who can speak on a Tinker server now: a sampler for each version that was asked for, and the training runs that some of them need.

A hosted server speaks through any sampler checkpoint. A self-hosted one may speak only through checkpoints of runs that it holds in
memory, of which there is room for a few: so a version that was just taught keeps its run, and one that cannot speak any more is brought
back from its training checkpoint. A run is never trained on once its version is published: some servers would let that version speak
with weights that are being trained.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import tinker

from claas.adapters.tinker import TinkerAdapter, TinkerAdapters, TinkerVersion
from claas.core.errors import ClaasError, NotFound, UpstreamRefused
from claas.core.types import LoraRuntimeRef
from claas.models.tinker_model import TinkerModel
from claas.models.tinker_server import Run, TinkerServer

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
    """Samplers, and at most `max_runs` runs: beyond that the longest unused goes, if it is idle."""

    def __init__(self, server: TinkerServer, adapters: TinkerAdapters, model: TinkerModel, *, max_runs: int) -> None:
        self._server = server
        self._adapters = adapters
        self._model = model
        self._max_runs = max_runs
        self._voices: dict[str, _Voice] = {}  # by the version's training checkpoint, the latest used last
        self._training: list[Run] = []
        self._opening: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def __len__(self) -> int:
        return len(self._voices)

    @property
    def held(self) -> int:
        """Runs that the server holds for us."""
        return len(self._training) + sum(voice.run is not None for voice in self._voices.values())

    # --- speaking ---

    @asynccontextmanager
    async def speaking(self, ref: LoraRuntimeRef | None) -> AsyncIterator[tinker.SamplingClient]:
        """The sampler of a version, None for the base model's; it stays as long as it is used.

        Raises:
            NotFound: the version is gone.
            UpstreamRefused, BackendUnavailable: the server does not let it speak.
        """
        key = BASE if ref is None else ref.lora_path
        async with self._opening[key]:
            voice = self._voices.pop(key, None) or await self._open(key, ref)
            self._voices[key] = voice
            voice.users += 1
        try:
            yield voice.sampler
        finally:
            voice.users -= 1
            if voice.users == 0 and self._voices.get(key) is not voice:  # dropped meanwhile
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
        """A run to be trained, from this checkpoint or else from the start."""
        await self._make_room()
        if state_path is None:
            layers = {"train_attn": adapter.train_attn, "train_mlp": adapter.train_mlp}
            run = await self._server.new_run(adapter.base_model, rank=adapter.rank, **layers)
        else:
            run = await self._server.run_from(state_path)
        self._training.append(run)
        return run

    async def give_up(self, run: Run) -> None:
        """It is not trained any more, and comes to nothing."""
        self._training.remove(run)
        await self._server.end_run(run)

    async def keep(self, run: Run, version: TinkerVersion) -> None:
        """It is trained and saved, and speaks as this version from now on."""
        assert version.state_path is not None
        self._training.remove(run)
        try:
            self._voices[version.state_path] = _Voice(await self._server.sampler(path=version.sampler_path, run=run), run)
        except ClaasError as error:  # the version is saved all the same: it is opened again when somebody asks for it
            log.warning("%s", error.message)
            await self._server.end_run(run)

    async def aclose(self) -> None:
        for run in [*self._training, *(voice.run for voice in self._voices.values() if voice.run is not None)]:
            await self._server.end_run(run)
        self._training.clear()
        self._voices.clear()

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
        run = await self.begin(await self._adapters.adapter(manifest.lora_id), state_path)
        try:
            saved = await self._server.wait(run.client.save_weights_for_sampler(f"v{manifest.version}"))
            sampler = await self._server.sampler(path=saved.path, run=run)
        except BaseException:
            await self.give_up(run)
            raise
        await self._adapters.set_sampler(manifest.lora_id, manifest.version, saved.path)
        if version.sampler_path is not None:
            await self._server.delete_checkpoint(version.sampler_path)
        self._training.remove(run)
        return _Voice(sampler, run)

    async def _make_room(self) -> None:
        idle = [path for path, voice in self._voices.items() if voice.run is not None and voice.users == 0]
        while idle and self.held >= self._max_runs:
            await self.drop(idle.pop(0))

    async def _end(self, voice: _Voice) -> None:
        if voice.run is not None:
            await self._server.end_run(voice.run)
