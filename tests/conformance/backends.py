"""The whole service on each backend, as a client sees it: a tiny real model, and a double of the server where there is one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import modal
from pydantic import SecretStr

from claas.api.app import create_app
from claas.core.settings import Settings
from claas.models.base_model import LoadedModel
from claas.wiring import open_services
from tests.doubles.tinker_faults import CLOUD, SKYRL, Ways
from tests.doubles.tinker_server import KEY, TinkerDouble
from tests.inference.vllm_serving import sound_double
from tests.on_modal.stage import APP, modal_settings

URL = "http://127.0.0.1"
Opening = Callable[[LoadedModel, Path, Path], AbstractContextManager[Settings]]


@contextmanager
def _embedded(_: LoadedModel, model_dir: Path, folder: Path) -> Iterator[Settings]:
    yield Settings(distill_execution_mode="local", base_model_id=str(model_dir), data_dir=folder, dtype="float32")


@contextmanager
def _vllm(model: LoadedModel, model_dir: Path, folder: Path) -> Iterator[Settings]:
    with sound_double(model.tokenizer) as server:
        yield Settings(
            distill_execution_mode="local", base_model_id=str(model_dir), data_dir=folder, vllm_base_url=server.url, vllm_release="sleep"
        )


def _tinker(ways: Ways) -> Opening:
    @contextmanager
    def opening(model: LoadedModel, model_dir: Path, folder: Path) -> Iterator[Settings]:
        with TinkerDouble(model, ways, poll_s=0.2) as server:
            yield tinker_settings(server, folder, model_dir)
        assert server.violations == []

    return opening


@contextmanager
def _modal(_: LoadedModel, model_dir: Path, folder: Path) -> Iterator[Settings]:
    """On the double that the module's tests share: what one of them made is taken away."""
    yield modal_settings(folder, model_dir)
    volume = modal.Volume.from_name(f"{APP}-adapters")
    for entry in volume.listdir("/"):
        volume.remove_file(entry.path, recursive=True)


def tinker_settings(server: TinkerDouble, folder: Path, tokenizer: Path, **more: Any) -> Settings:
    return Settings(
        distill_execution_mode="tinker", tinker_base_url=server.url, tinker_api_key=SecretStr(KEY), base_model_id=server.model.id,
        tinker_tokenizer=str(tokenizer), tinker_lora_rank=4, tinker_max_runs=3, tinker_patience_s=1.0, data_dir=folder, **more,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Backend:
    """`mode` is the execution mode that chooses it, `column` how docs/backends.md calls it."""

    name: str
    mode: str
    column: str
    opening: Opening


BACKENDS = (
    Backend("embedded", "local", "Embedded", _embedded),
    Backend("vllm", "local", "vLLM", _vllm),
    Backend("tinker-hosted", "tinker", "Tinker, hosted", _tinker(CLOUD)),
    Backend("tinker-skyrl", "tinker", "Tinker, SkyRL", _tinker(SKYRL)),
    Backend("modal-embedded", "modal", "Modal, embedded", _modal),
)


@asynccontextmanager
async def asked(chosen: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service, closed with all that it opened."""
    async with open_services(chosen) as services:
        app = create_app(lambda: nullcontext(services))
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url=URL, timeout=120.0) as client:
            yield client
