"""The app's vLLM through the true SDK's container, with the double of vLLM behind the guard: keys, adapters on the Volume, its death."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from claas.core.settings import Settings
from claas.core.types import LoraRuntimeRef
from claas.inference.vllm import VllmInference, vllm_on_modal
from claas.inference.vllm_control import DeviceMemory
from claas.models.base_model import LoadedModel
from tests.doubles.vllm_script import voices
from tests.inference.asking import ask
from tests.modal_server.processes import containers_possible
from tests.models.tiny import write_adapter
from tests.on_modal.deployed import KEY, Deployed, deployed

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not containers_possible(), reason="this machine lets nobody make namespaces"),
]


@pytest.fixture(name="app", scope="module")
def _app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    with deployed(tmp_path_factory.mktemp("modal")) as app:
        yield app


def adapter(app: Deployed, folder: Path, model: LoadedModel, version: int) -> LoraRuntimeRef:
    """On the Volume, as another service puts it there."""
    app.upload(write_adapter(folder / f"v{version}", model, seed=version), f"/me~a/v{version}")
    path = f"{app.adapters}/me~a/v{version}"
    return LoraRuntimeRef(lora_id="me/a", version=version, vllm_name=f"claas-me~a-v{version}-{version}", lora_path=path)


async def test_it_serves_what_is_on_the_volume_and_comes_back_when_it_dies(app: Deployed, tiny_model: LoadedModel, tmp_path: Path) -> None:
    url = await asyncio.to_thread(app.vllm_url)
    settings = Settings(vllm_api_key=SecretStr(KEY))
    backend = VllmInference(vllm_on_modal(settings, url), tiny_model.tokenizer, DeviceMemory(lambda: 0, lambda: None))
    try:
        await backend.begin()
        async with httpx.AsyncClient(base_url=url) as stranger:
            for path in ("/version", "/v1/models", "/metrics"):
                assert (await stranger.get(path)).status_code == 401
        first = await asyncio.to_thread(adapter, app, tmp_path, tiny_model, 1)
        before = await backend.complete(ask(adapter=first))
        second = await asyncio.to_thread(adapter, app, tmp_path, tiny_model, 2)
        assert voices((await backend.complete(ask(adapter=second))).text) != voices(before.text), "written after it was started"
        (container,) = app.cloud.live_containers("claas")

        app.ends.touch()
        await asyncio.to_thread(app.none_runs)
        assert await backend.complete(ask(adapter=first)) == before, "in another container, which was told the adapter again"
        (other,) = app.cloud.live_containers("claas")
        assert other is not container
    finally:
        await backend.aclose()
