"""Which adapter versions a vLLM knows. Each has a name and a folder of its own and is never loaded in place.

vLLM's prefix cache is salted by name and path: other weights under the same two would be answered with stale KV. So a version's name also
says when it was made (`LoraRuntimeRef.vllm_name`): an adapter that was deleted and made anew, with the same numbers, is another name.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from claas.adapters.store import CONFIG
from claas.core.errors import BackendUnavailable, BadRequest, ClaasError, NotFound, UpstreamRefused
from claas.core.types import LoraRuntimeRef
from claas.inference.vllm_http import UnknownToVllm, VllmHttp

NEWEST_KEPT = 2
"""Versions of one adapter that stay loaded when idle: the last used ones, such as the one that serves and the one before."""
LOAD_TIMEOUT_S = 180.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SharedFolder:
    """The adapters' folder, as it is seen here and by vLLM."""

    here: Path
    there: Path


@dataclass(slots=True)
class _Loaded:
    ref: LoraRuntimeRef
    loading: asyncio.Task[None]
    users: int = 0


class VllmAdapters:
    """Loads versions when they are asked for, and unloads those that nobody uses: superseded ones, and all over `capacity`.

    Without a `folder` a version lies where its ref says, out of sight from here, and other services may use this vLLM too.

    vLLM reads a version's folder again whenever its own cache has let go of it, and ends if the folder is gone. So the files of a version
    that is `in_use` must stay, and those of an adapter may go only while it is `leaving`.
    """

    def __init__(self, http: VllmHttp, capacity: int, folder: SharedFolder | None) -> None:
        self._http = http
        self._capacity = capacity
        self._folder = folder
        self._targets: frozenset[str] | None = None
        self._known: OrderedDict[str, _Loaded] = OrderedDict()  # the least recently used first
        self._unloading: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[str] = set()
        self._released = asyncio.Event()

    def __len__(self) -> int:
        return len(self._known)

    def in_use(self, lora_id: str, version: int) -> bool:
        """Whether a running reply speaks through this version."""
        return any(entry.users and (entry.ref.lora_id, entry.ref.version) == (lora_id, version) for entry in self._known.values())

    @asynccontextmanager
    async def using(self, ref: LoraRuntimeRef) -> AsyncIterator[str]:
        """The version's name in vLLM, loaded and kept loaded. Raises NotFound, BadRequest, BackendUnavailable, UpstreamRefused.

        If vLLM does not know the name after all, for it was started anew, the version is loaded anew the next time.
        """
        self._check_there(ref)
        name = ref.vllm_name
        if ref.lora_id in self._leaving:
            raise NotFound(f"the adapter {ref.lora_id!r} is being deleted", param="model")
        entry = self._known.get(name) or self._begin_loading(name, ref)
        self._known.move_to_end(name)
        entry.users += 1
        try:
            await asyncio.shield(entry.loading)  # others may wait for the same version
            yield name
        except UnknownToVllm:
            self._drop(name, entry)
            raise
        finally:
            entry.users -= 1
            self._released.set()
            self._trim()

    async def load(self, ref: LoraRuntimeRef) -> None:
        """Have it loaded when the next request comes. Raises like `using`."""
        async with self.using(ref):
            pass

    @asynccontextmanager
    async def leaving(self, lora_id: str) -> AsyncIterator[None]:
        """Hold while an adapter's files are removed: its replies have ended, and none begins."""
        self._leaving.add(lora_id)
        try:
            while any(entry.users for entry in self._of(lora_id).values()):
                self._released.clear()
                await self._released.wait()
            await self.forget(lora_id)
            yield
        finally:
            self._leaving.discard(lora_id)

    async def forget(self, lora_id: str) -> None:
        """Unload an adapter's versions. Replies that run go on."""
        await self.settled()
        for name in self._of(lora_id):
            self._unload(name)
        await self.settled()

    async def settled(self) -> None:
        """Until nothing is being loaded or unloaded."""
        await asyncio.gather(*self._unloading.values(), *(entry.loading for entry in self._known.values()), return_exceptions=True)

    async def begin(self) -> None:
        """vLLM was started anew, or by a service before this one: it shall know none of our versions but those asked for from now on.

        What it knows may also be another service's, where it is not this one's alone: then it is left there.
        """
        self._known.clear()
        try:
            lora = (await self._http.ask("GET", "/server_info", params={"config_format": "json"}))["vllm_config"]["lora_config"]
            self._targets = frozenset(lora["target_modules"]) if lora and lora["target_modules"] else None
        except NotFound:  # it has no control endpoints, and is taken at its operator's word
            self._targets = None
        if self._folder is None:
            return
        for card in (await self._http.ask("GET", "/v1/models"))["data"]:
            if card["parent"] is not None and Path(card["root"]).is_relative_to(self._folder.there):
                await self._post_unload(card["id"])

    async def aclose(self) -> None:
        await self.settled()

    def _of(self, lora_id: str) -> dict[str, _Loaded]:
        return {name: entry for name, entry in self._known.items() if entry.ref.lora_id == lora_id}

    def _begin_loading(self, name: str, ref: LoraRuntimeRef) -> _Loaded:
        entry = self._known[name] = _Loaded(ref, asyncio.ensure_future(self._load(name, ref)))

        def forget_failure(loading: asyncio.Task[None]) -> None:
            if loading.cancelled() or loading.exception() is not None:
                self._drop(name, entry)

        entry.loading.add_done_callback(forget_failure)
        return entry

    def _drop(self, name: str, entry: _Loaded) -> None:
        if self._known.get(name) is entry:
            del self._known[name]

    async def _load(self, name: str, ref: LoraRuntimeRef) -> None:
        if name in self._unloading:
            await self._unloading[name]
        if self._folder and self._targets is not None and (left_out := await asyncio.to_thread(_target_modules, ref) - self._targets):
            raise BadRequest(
                f"{ref.lora_id!r} has LoRA on {sorted(left_out)}, which vLLM would leave out: start it with them in --lora-target-modules",
                param="model",
            )
        try:
            await self._http.ask(
                "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": self._path_there(ref)}, timeout_s=LOAD_TIMEOUT_S
            )
        except NotFound as error:
            self._check_there(ref)  # gone meanwhile?
            raise BackendUnavailable(
                "vLLM cannot load adapters: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora, with the adapters' folder "
                "in sight (CLAAS_VLLM_LORA_ROOT says where it sees it)"
            ) from error
        except UpstreamRefused as error:
            if "already been loaded" not in error.message:  # a name stands for one set of weights, whoever had it loaded
                raise

    def _trim(self) -> None:
        """Unload what is idle and not among the most recently used, of its adapter and of all."""
        kept: dict[str, int] = {}
        for name, entry in list(reversed(self._known.items())):
            rank = kept[entry.ref.lora_id] = kept.get(entry.ref.lora_id, 0) + 1
            if not entry.users and entry.loading.done() and rank > NEWEST_KEPT:
                self._unload(name)
        idle = [name for name, entry in self._known.items() if not entry.users and entry.loading.done()]
        for name in idle[: max(0, len(self._known) - self._capacity)]:
            self._unload(name)

    def _unload(self, name: str) -> None:
        del self._known[name]
        task = self._unloading[name] = asyncio.ensure_future(self._post_unload(name))
        task.add_done_callback(lambda _: self._unloading.pop(name))

    async def _post_unload(self, name: str) -> None:
        try:
            await self._http.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except ClaasError as error:
            log.warning("vLLM did not unload %s: %s", name, error.message)

    def _path_there(self, ref: LoraRuntimeRef) -> str:
        if self._folder is None:
            return ref.lora_path
        return str(self._folder.there / Path(ref.lora_path).resolve().relative_to(self._folder.here.resolve()))

    def _check_there(self, ref: LoraRuntimeRef) -> None:
        """Raises NotFound if its files are in sight from here and gone."""
        if self._folder is not None and not Path(ref.lora_path).is_dir():
            raise _gone(ref)


def _target_modules(ref: LoraRuntimeRef) -> set[str]:
    try:
        config = json.loads((Path(ref.lora_path) / CONFIG).read_bytes())
    except OSError as error:
        raise _gone(ref) from error
    return {str(name).rpartition(".")[2] for name in config["target_modules"]}


def _gone(ref: LoraRuntimeRef) -> NotFound:
    return NotFound(f"version {ref.version} of {ref.lora_id!r} is gone", param="model")
