"""The whole service in tinker mode over the double of its server, over HTTP: what works everywhere works, the rest is refused by name."""

from __future__ import annotations

import io
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from claas.api.app import create_app
from claas.core.errors import BackendUnavailable, ConfigurationError
from claas.core.settings import Settings
from claas.models.base_model import LoadedModel
from claas.wiring import open_services
from tests.api.conftest import LOCAL
from tests.api.wire import CHAT, assert_error, events
from tests.doubles.tinker_faults import CLOUD, SKYRL, Ways
from tests.doubles.tinker_server import KEY, TinkerDouble

HELLO: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
LESSON = {"gradient_steps": 2, "hindsight_rollouts": 0, "own_replies": True, "anchors": 2, "learning_rate": 1e-4, "min_signal": 0.0} | {
    "min_reply_logprob": -1000.0,
    "max_anchor_kl": 100.0,
}


@pytest.fixture(params=[CLOUD, SKYRL], ids=["hosted", "own"])
def server(request: pytest.FixtureRequest, tiny_model: LoadedModel) -> Any:
    with double(tiny_model, request.param) as found:
        yield found


def double(model: LoadedModel, ways: Ways = CLOUD) -> TinkerDouble:
    return TinkerDouble(model, ways, poll_s=0.2)


def settings(server: TinkerDouble, folder: Path, tokenizer: Path, **more: Any) -> Settings:
    return Settings(
        distill_execution_mode="tinker", tinker_base_url=server.url, tinker_api_key=SecretStr(KEY), base_model_id=server.model.id,
        tinker_tokenizer=str(tokenizer), tinker_lora_rank=4, tinker_max_runs=3, tinker_patience_s=1.0, data_dir=folder, **more,
    )  # fmt: skip


@asynccontextmanager
async def asked(chosen: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service, closed with all that it opened."""
    async with open_services(chosen) as services:
        app = create_app(lambda: nullcontext(services))
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url=LOCAL, timeout=120.0) as client:
            yield client


@pytest.fixture
async def client(server: TinkerDouble, tmp_path: Path, tiny_model_dir: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with asked(settings(server, tmp_path, tiny_model_dir)) as client:
        yield client
    assert server.violations == []


async def said(client: httpx.AsyncClient, **changes: Any) -> dict[str, Any]:
    answer = await client.post(CHAT, json=HELLO | changes)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def taught(client: httpx.AsyncClient) -> dict[str, Any]:
    """A lesson on a reply that ended by itself."""
    reply = await finished(client)
    body = {"requests": [{"completion_id": reply["id"], "feedback": "Be kind.", "training": LESSON}]}
    answer = await client.post("/v1/feedback", json=body)
    assert answer.status_code == 200, answer.text
    lesson: dict[str, Any] = answer.json()
    return lesson


async def finished(client: httpx.AsyncClient) -> dict[str, Any]:
    """A reply that ended by itself."""
    for seed in range(60):
        reply = await said(client, seed=seed, temperature=1.0, max_tokens=100)
        if reply["choices"][0]["finish_reason"] == "stop":
            return reply
    raise AssertionError("no reply ended by itself")


async def test_chat_streams_and_says_who_spoke(client: httpx.AsyncClient) -> None:
    whole = await said(client)
    async with client.stream("POST", CHAT, json=HELLO | {"stream": True}) as response:
        assert response.headers["x-claas-adapter"] == "assistant@0"
        chunks = [event async for event in events(response)]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if isinstance(chunk, dict))
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1] == "[DONE]"


async def test_a_lesson_makes_a_version_with_its_cost_and_the_others_stay(client: httpx.AsyncClient) -> None:
    (await client.post("/v1/lora/init", json={"lora_id": "you/other"})).raise_for_status()
    before, other = await said(client, model="assistant@0"), await said(client, model="you/other")
    lesson = await taught(client)
    assert (lesson["status"], lesson["version"]) == ("ok", 1), lesson["reason"]
    usage = lesson["distill_result"]["metadata"]["usage"]
    assert usage["trained_tokens"] > 0 and usage["scored_tokens"] > 0 and usage["sampled_tokens"] > 0 and usage["price"] is None
    counted = lesson["distill_result"]["metadata"]["adapter_usage"]
    assert counted["trained_tokens"] == usage["trained_tokens"] and counted["sampled_tokens"] > 0
    again, untouched = await said(client, model="assistant@0"), await said(client, model="you/other")
    assert again["choices"] == before["choices"] and untouched["choices"] == other["choices"]
    versions = (await client.get("/v1/lora/versions", params={"lora_id": "assistant"})).json()
    assert [(v["version"], v["parent"]) for v in versions["versions"]] == [(0, None), (1, 0)]
    assert versions["latest"] == 1
    archive = zipfile.ZipFile(io.BytesIO((await client.get("/v1/lora/export", params={"lora_id": "assistant"})).content))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(archive.namelist())


async def test_scores_rollbacks_and_deletions(client: httpx.AsyncClient) -> None:
    assert (await taught(client))["version"] == 1
    body = {"model": "assistant", "messages": HELLO["messages"], "completion": "and then"}
    new = (await client.post("/v1/score", json=body)).json()["logprobs"]
    rolled = await client.post("/v1/lora/rollback", json={"lora_id": "assistant", "version": 0})
    assert rolled.json()["version"] == 0
    assert (await client.post("/v1/score", json=body)).json()["logprobs"] != new
    assert (await client.post("/v1/score", json=body | {"model": "assistant@1"})).json()["logprobs"] == pytest.approx(new, abs=1e-4)
    assert (await client.delete("/v1/lora", params={"lora_id": "assistant"})).json() == {"deleted": True}
    assert_error(await client.post(CHAT, json=HELLO), 404, param="model")


async def test_all_is_there_after_a_restart_of_the_service_and_of_the_server(
    server: TinkerDouble, tmp_path: Path, tiny_model_dir: Path
) -> None:
    chosen = settings(server, tmp_path, tiny_model_dir)
    async with asked(chosen) as client:
        assert (await taught(client))["version"] == 1
        before = await said(client)
    server.kill()
    server.start()
    async with asked(chosen) as client:
        assert (await said(client))["choices"] == before["choices"]
        server.kill()
        server.start()
        assert (await said(client))["choices"] == before["choices"], "a version that the server forgot is brought back"
        assert (await taught(client))["version"] == 2
    assert server.violations == []


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("response_format", {"response_format": {"type": "json_object"}}),
    ],
)
async def test_what_a_tinker_server_cannot_honour_is_refused_by_name(
    client: httpx.AsyncClient, field: str, changes: dict[str, Any]
) -> None:
    assert_error(await client.post(CHAT, json=HELLO | changes), 400, param=field, says="Tinker mode")


async def test_alternatives_are_told_where_the_server_tells_them(client: httpx.AsyncClient, server: TinkerDouble) -> None:
    answer = await client.post(CHAT, json=HELLO | {"logprobs": True, "top_logprobs": 3})
    if not server.ways.topk:
        assert_error(answer, 400, param="top_logprobs")
        return
    for token in answer.json()["choices"][0]["logprobs"]["content"]:
        assert len(token["top_logprobs"]) == 3
        assert max(alternative["logprob"] for alternative in token["top_logprobs"]) == pytest.approx(token["logprob"], abs=1e-4)


async def test_an_archive_is_not_taken(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/lora/import?lora_id=new", content=b"zip", headers={"content-type": "application/zip"})
    assert_error(answer, 400, param="archive", says="takes no weights")


async def test_while_the_server_is_down_requests_are_told_so_and_feedback_is_kept(client: httpx.AsyncClient, server: TinkerDouble) -> None:
    reply = await finished(client)
    server.kill()
    assert_error(await client.post(CHAT, json=HELLO), 503, says="does not answer")
    body = {"requests": [{"completion_id": reply["id"], "feedback": "Be kind.", "training": LESSON}]}
    assert_error(await client.post("/v1/feedback", json=body), 503, says="does not answer")
    assert (await client.get("/v1/health")).status_code == 503
    server.start()
    assert (await client.post("/v1/feedback", json=body)).status_code == 200
    assert (await client.get("/v1/health")).status_code == 200


# --- at the start ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tinker_api_key": "tml-wrong"}, "CLAAS_TINKER_API_KEY"),
        ({"tinker_api_key": "wrong"}, "must begin with 'tml-'"),
        ({"base_model_id": "gpt-4"}, "'tiny'"),
        ({"tinker_tokenizer": "/nowhere"}, "CLAAS_TINKER_TOKENIZER"),
    ],
)
async def test_a_wrong_setting_is_told_at_the_start(
    tiny_model: LoadedModel, tmp_path: Path, tiny_model_dir: Path, changes: dict[str, str], says: str
) -> None:
    with double(tiny_model) as server:
        chosen = settings(server, tmp_path, tiny_model_dir)
        chosen = Settings.model_validate(chosen.model_dump() | changes)
        with pytest.raises(ConfigurationError, match=says):
            async with asked(chosen):
                pass


async def test_without_a_server_the_service_does_not_start(tiny_model: LoadedModel, tmp_path: Path, tiny_model_dir: Path) -> None:
    with double(tiny_model) as server:
        chosen = settings(server, tmp_path, tiny_model_dir)
    with pytest.raises(BackendUnavailable, match="does not answer"):
        async with asked(chosen):
            pass
