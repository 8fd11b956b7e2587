"""The whole service in modal mode as it is by default: lessons from the app's worker, replies from its vLLM (a double) behind the guard."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import modal
import pytest
from pydantic import SecretStr

from claas.core.errors import ConfigurationError
from claas.core.settings import Settings
from claas.wiring import open_services
from tests.api.wire import assert_error, events
from tests.conformance.backends import asked
from tests.conformance.talk import CHAT, HELLO, body_of, finished, item, logprobs, said, taught, teach, text_of, versions
from tests.modal_server.processes import containers_possible
from tests.on_modal.deployed import KEY, Deployed, deployed

ZIP = {"content-type": "application/zip"}

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not containers_possible(), reason="this machine lets nobody make namespaces"),
]


@pytest.fixture(name="app", scope="module")
def _app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    with deployed(tmp_path_factory.mktemp("modal"), CLAAS_MODAL_MAX_CONTAINERS="1", CLAAS_DEVICE="cpu") as app:
        modal.Client._set_env_client(app.client)
        try:
            yield app
        finally:
            modal.Client._set_env_client(None)


def settings_of(app: Deployed, folder: Path, **more: object) -> Settings:
    chosen = {
        "base_model_id": app.environment["CLAAS_BASE_MODEL_ID"],
        "modal_volume_path": app.adapters,
        "vllm_api_key": SecretStr(KEY),
        "dtype": "float32",
        "device": "cpu",
    }
    return Settings.model_validate({"distill_execution_mode": "modal", "data_dir": folder} | chosen | more)


@pytest.fixture
async def client(app: Deployed, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with asked(settings_of(app, tmp_path)) as client:
        yield client


async def test_a_correction_changes_the_reply_and_can_be_gone_back_from(client: httpx.AsyncClient) -> None:
    before = text_of(await said(client))
    untaught = await logprobs(client)
    lesson = await teach(client, item(await finished(client)))
    assert (lesson["status"], lesson["version"]) == ("ok", 1)
    assert lesson["distill_result"]["metadata"]["usage"]["gpu_seconds"]["L40S"] > 0
    assert text_of(await said(client)) != before
    assert text_of(await said(client, model="assistant@0")) == before
    body_of(await client.post("/v1/lora/rollback", json={"lora_id": "assistant", "version": 0}))
    assert text_of(await said(client)) == before
    assert await logprobs(client) == pytest.approx(untaught, abs=1e-4)
    assert await versions(client) == (0, [(0, None), (1, 0)])
    async with client.stream("POST", CHAT, json=HELLO | {"stream": True}) as answer:
        assert answer.headers["x-claas-adapter"] == "assistant@0"
        told = [event async for event in events(answer)]
    assert told[-1] == "[DONE]" and len(told) > 3
    assert body_of(await client.get("/v1/health"))["status"] == "healthy"


async def test_adapters_come_and_go(client: httpx.AsyncClient) -> None:
    body_of(await client.post("/v1/lora/init", json={"lora_id": "me/second"}))
    await taught(client, "me/second")
    archive = (await client.get("/v1/lora/export", params={"lora_id": "me/second"})).content
    learnt = await logprobs(client, "me/second")
    body_of(await client.post("/v1/lora/import", params={"lora_id": "me/third"}, content=archive, headers=ZIP))
    assert await logprobs(client, "me/third") == pytest.approx(learnt, abs=1e-3)
    for lora_id in ("me/second", "me/third"):
        body_of(await client.delete("/v1/lora", params={"lora_id": lora_id}))
        assert_error(await client.post(CHAT, json=HELLO | {"model": lora_id}), 404, param="model")
    body_of(await client.post("/v1/lora/init", json={"lora_id": "me/second"}))
    assert await logprobs(client, "me/second") != pytest.approx(learnt, abs=1e-5), "made anew, it is another"


async def test_without_vllms_key_it_does_not_start(app: Deployed, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="VLLM_API_KEY"):
        async with open_services(settings_of(app, tmp_path, vllm_api_key=None)):
            pass
