"""Which adapter versions a vLLM knows. Each has a name and a folder of its own and is never loaded in place.

vLLM's prefix cache is salted by name and path: other weights under the same two would be answered with stale KV. So a name also says
when its folder was made: an adapter that was deleted and made anew, with the same numbers, is another name.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from claas.adapters.store import CONFIG
from claas.core.errors import BackendUnavailable, BadRequest, ClaasError, NotFound
from claas.core.types import LoraRuntimeRef
from claas.inference.vllm_http import VllmHttp

NEWEST_KEPT = 2
"""Versions of one adapter that stay loaded when idle: the one that serves, and the one before, to which a rollback returns."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Loaded:
    ref: LoraRuntimeRef
    loading: asyncio.Task[None]
    users: int = 0


class VllmAdapters:
    """Loads versions when they are asked for, and unloads those that nobody uses: superseded ones, and all over `capacity`."""

    def __init__(self, http: VllmHttp, capacity: int, here: Path, there: Path | None) -> None:
        self._http = http
        self._capacity = capacity
        self._here = here.resolve()
        self._there = there or self._here
        self._targets: frozenset[str] | None = None
        self._known: OrderedDict[str, _Loaded] = OrderedDict()
        self._unloading: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._known)

    @asynccontextmanager
    async def using(self, ref: LoraRuntimeRef) -> AsyncIterator[str]:
        """The version's name in vLLM, loaded and kept loaded. Raises NotFound, BackendUnavailable, UpstreamRefused."""
        name = _name(ref)
        entry = self._known.get(name)
        if entry is None:
            entry = self._known[name] = _Loaded(ref, asyncio.ensure_future(self._load(name, ref)))
        self._known.move_to_end(name)
        entry.users += 1
        try:
            try:
                await asyncio.shield(entry.loading)  # others may wait for the same version
            except Exception:
                if self._known.get(name) is entry:
                    del self._known[name]
                raise
            yield name
        finally:
            entry.users -= 1
            self._trim()

    async def load(self, ref: LoraRuntimeRef) -> None:
        """Have it loaded when the next request comes. Raises like `using`."""
        async with self.using(ref):
            pass

    async def forget(self, lora_id: str) -> None:
        """Unload an adapter that was deleted. Replies that run go on."""
        for name in [name for name, entry in self._known.items() if entry.ref.lora_id == lora_id]:
            self._unload(name)
        await asyncio.gather(*self._unloading)

    def drop(self, ref: LoraRuntimeRef) -> None:
        """vLLM turned out not to know this version: it was started anew since. It is loaded when it is asked for again."""
        self._known.pop(_name(ref), None)

    async def begin(self) -> None:
        """vLLM was started anew, or by a service before this one: it shall know none of our versions but those asked for from now on."""
        self._known.clear()
        try:
            lora = (await self._http.ask("GET", "/server_info", params={"config_format": "json"}))["vllm_config"]["lora_config"]
            self._targets = frozenset(lora["target_modules"]) if lora and lora["target_modules"] else None
        except NotFound:  # it has no control endpoints, and is taken at its operator's word
            self._targets = None
        for card in (await self._http.ask("GET", "/v1/models"))["data"]:
            if card["parent"] is not None and Path(card["root"]).is_relative_to(self._there):
                await self._post_unload(card["id"])

    async def aclose(self) -> None:
        await asyncio.gather(*self._unloading, *(entry.loading for entry in self._known.values()), return_exceptions=True)

    async def _load(self, name: str, ref: LoraRuntimeRef) -> None:
        if self._targets is not None and (left_out := await asyncio.to_thread(_target_modules, ref) - self._targets):
            raise BadRequest(
                f"{ref.lora_id!r} has LoRA on {sorted(left_out)}, which vLLM would leave out: start it with them in --lora-target-modules",
                param="model",
            )
        try:
            await self._http.ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": self._path_there(ref)})
        except NotFound as error:
            _name(ref)  # gone meanwhile, here too?
            raise BackendUnavailable(
                "vLLM cannot load adapters: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora, with the adapters' folder "
                "in sight (CLAAS_VLLM_LORA_ROOT says where it sees it)"
            ) from error

    def _path_there(self, ref: LoraRuntimeRef) -> str:
        return str(self._there / Path(ref.lora_path).resolve().relative_to(self._here))

    def _trim(self) -> None:
        newest: dict[str, list[int]] = {}
        for entry in self._known.values():
            newest.setdefault(entry.ref.lora_id, []).append(entry.ref.version)
        superseded = [
            name
            for name, entry in self._known.items()
            if not entry.users and entry.ref.version not in sorted(newest[entry.ref.lora_id])[-NEWEST_KEPT:]
        ]
        for name in superseded:
            self._unload(name)
        idle = [name for name, entry in self._known.items() if not entry.users]
        for name in idle[: max(0, len(self._known) - self._capacity)]:
            self._unload(name)

    def _unload(self, name: str) -> None:
        del self._known[name]
        task = asyncio.ensure_future(self._post_unload(name))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def _post_unload(self, name: str) -> None:
        try:
            await self._http.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except ClaasError as error:
            log.warning("vLLM did not unload %s: %s", name, error.message)


def _target_modules(ref: LoraRuntimeRef) -> set[str]:
    with _its_files(ref) as folder:
        config = json.loads((folder / CONFIG).read_bytes())
    return {str(name).rpartition(".")[2] for name in config["target_modules"]}


def _name(ref: LoraRuntimeRef) -> str:
    with _its_files(ref) as folder:
        return f"{ref.vllm_name}-{folder.stat().st_mtime_ns:x}"


@contextmanager
def _its_files(ref: LoraRuntimeRef) -> Iterator[Path]:
    try:
        yield Path(ref.lora_path)
    except OSError as error:
        raise NotFound(f"version {ref.version} of {ref.lora_id!r} is gone", param="model") from error
