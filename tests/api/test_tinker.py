"""What is Tinker mode's own, over HTTP and the double of its server: what it costs, servers that are restarted, gone or set up wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from claas.core.errors import BackendUnavailable, ConfigurationError
from claas.core.settings import Settings
from claas.models.base_model import LoadedModel
from tests.api.wire import CHAT, assert_error
from tests.conformance.backends import asked, tinker_settings
from tests.conformance.talk import HELLO, finished, item, said, taught
from tests.doubles.tinker_faults import CLOUD, SKYRL, Ways
from tests.doubles.tinker_server import TinkerDouble


@pytest.fixture(params=[CLOUD, SKYRL], ids=["hosted", "own"])
def server(request: pytest.FixtureRequest, tiny_model: LoadedModel) -> Any:
    with double(tiny_model, request.param) as found:
        yield found


def double(model: LoadedModel, ways: Ways = CLOUD) -> TinkerDouble:
    return TinkerDouble(model, ways, poll_s=0.2)


@pytest.fixture
async def client(server: TinkerDouble, tmp_path: Path, tiny_model_dir: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with asked(tinker_settings(server, tmp_path, tiny_model_dir)) as client:
        yield client
    assert server.violations == []


async def test_a_lesson_says_what_it_cost_and_what_the_adapter_did(client: httpx.AsyncClient) -> None:
    record = (await taught(client))["distill_result"]["metadata"]
    usage, adapter = record["usage"], record["adapter_usage"]
    assert usage["trained_tokens"] > 0 and usage["scored_tokens"] > 0 and usage["sampled_tokens"] > 0 and usage["price"] is None
    assert adapter["trained_tokens"] == usage["trained_tokens"] and adapter["sampled_tokens"] > 0 and adapter["price"] is None
    again = (await taught(client))["distill_result"]["metadata"]["adapter_usage"]
    assert again["sampled_tokens"] > adapter["sampled_tokens"] and again["trained_tokens"] > adapter["trained_tokens"]


async def test_all_is_there_after_a_restart_of_the_service_and_of_the_server(
    server: TinkerDouble, tmp_path: Path, tiny_model_dir: Path
) -> None:
    chosen = tinker_settings(server, tmp_path, tiny_model_dir)
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


async def test_alternatives_are_told_where_the_server_tells_them(client: httpx.AsyncClient, server: TinkerDouble) -> None:
    answer = await client.post(CHAT, json=HELLO | {"logprobs": True, "top_logprobs": 3})
    if not server.ways.topk:
        assert_error(answer, 400, param="top_logprobs")
        return
    for token in answer.json()["choices"][0]["logprobs"]["content"]:
        assert len(token["top_logprobs"]) == 3
        assert max(alternative["logprob"] for alternative in token["top_logprobs"]) == pytest.approx(token["logprob"], abs=1e-4)


async def test_while_the_server_is_down_requests_are_told_so_and_feedback_is_kept(client: httpx.AsyncClient, server: TinkerDouble) -> None:
    reply = await finished(client)
    server.kill()
    assert_error(await client.post(CHAT, json=HELLO), 503, says="does not answer")
    body = {"requests": [item(reply)]}
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
        chosen = tinker_settings(server, tmp_path, tiny_model_dir)
        chosen = Settings.model_validate(chosen.model_dump() | changes)
        with pytest.raises(ConfigurationError, match=says):
            async with asked(chosen):
                pass


async def test_without_a_server_the_service_does_not_start(tiny_model: LoadedModel, tmp_path: Path, tiny_model_dir: Path) -> None:
    with double(tiny_model) as server:
        chosen = tinker_settings(server, tmp_path, tiny_model_dir)
    with pytest.raises(BackendUnavailable, match="does not answer"):
        async with asked(chosen):
            pass
