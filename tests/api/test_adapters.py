"""`/v1/lora`."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import httpx
import pytest

from tests.api.wire import CHAT, HELLO, assert_error, chat
from tests.doubles.services import ADAPTER, World

ZIP = {"content-type": "application/zip"}
BAD_IDS = ["", "../up", "a//b", "a b", "a\tb", ".hidden", "a@1", "a/b/c/d/e", "x" * 200, "é"]


async def taught(client: httpx.AsyncClient) -> None:
    completion_id = (await chat(client))["id"]
    response = await client.post("/v1/feedback", json={"requests": [{"completion_id": completion_id, "feedback": "Shorter."}]})
    assert response.json()["status"] == "ok"


async def test_an_adapter_s_life(client: httpx.AsyncClient) -> None:
    created = await client.post("/v1/lora/init", json={"lora_id": "me/new", "lora_r": 8, "target_modules": ["q_proj"]})
    assert created.json() == {"lora_id": "me/new", "version": 0}
    assert (await client.get("/v1/lora")).json() == {"loras": [ADAPTER, "me/new"]}
    assert (await client.get("/v1/lora", params={"prefix": "me/n"})).json() == {"loras": ["me/new"]}
    assert (await client.delete("/v1/lora", params={"lora_id": "me/new"})).json() == {"deleted": True}
    assert_error(await client.delete("/v1/lora", params={"lora_id": "me/new"}), 404, param="lora_id")
    assert (await client.get("/v1/lora")).json() == {"loras": [ADAPTER]}


async def test_an_adapter_is_deleted_with_all_that_was_kept_of_it(client: httpx.AsyncClient, world: World) -> None:
    await taught(client)
    await client.delete("/v1/lora", params={"lora_id": ADAPTER})
    assert not world.rollouts.kept
    assert not await world.services.feedback.list(ADAPTER)
    assert_error(await client.post(CHAT, json=HELLO), 404, param="model")


async def test_versions_and_rollback(client: httpx.AsyncClient) -> None:
    await taught(client)
    listed = (await client.get("/v1/lora/versions", params={"lora_id": ADAPTER})).json()
    assert (listed["lora_id"], listed["latest"]) == (ADAPTER, 1)
    assert [(version["version"], version["parent"]) for version in listed["versions"]] == [(0, None), (1, 0)]
    assert len(listed["versions"][1]["feedback_ids"]) == 1

    for target in (0, 1):  # a rollback is itself undone by a rollback
        response = await client.post("/v1/lora/rollback", json={"lora_id": ADAPTER, "version": target})
        assert response.json() == {"lora_id": ADAPTER, "version": target}
        assert (await client.post(CHAT, json=HELLO)).headers["x-claas-adapter"] == f"{ADAPTER}@{target}"


async def test_export_and_import(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/lora/export", params={"lora_id": ADAPTER, "version": 0})
    assert response.headers["content-type"] == "application/zip"
    assert response.headers["content-disposition"] == 'attachment; filename="me~assistant-v0.zip"'
    assert "adapter_model.safetensors" in zipfile.ZipFile(io.BytesIO(response.content)).namelist()
    imported = await client.post("/v1/lora/import", params={"lora_id": "me/copy"}, content=response.content, headers=ZIP)
    assert imported.json() == {"lora_id": "me/copy", "version": 0}
    assert (await client.post(CHAT, json=HELLO | {"model": "me/copy"})).headers["x-claas-adapter"] == "me/copy@0"


async def test_an_archive_over_the_json_limit_may_be_imported(client: httpx.AsyncClient, world: World) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("adapter_model.safetensors", bytes(world.services.settings.max_body_bytes))
    response = await client.post("/v1/lora/import", params={"lora_id": "me/big"}, content=buffer.getvalue(), headers=ZIP)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("content", "headers", "says"),
    [
        (b"", ZIP, "empty"),
        (b"PK no", ZIP, "not a zip"),
        (b"{}", {"content-type": "application/json"}, "application/zip"),
        (b"x", {}, "application/zip"),
    ],
)
async def test_wrong_archives(client: httpx.AsyncClient, content: bytes, headers: dict[str, str], says: str) -> None:
    response = await client.post("/v1/lora/import", params={"lora_id": "me/copy"}, content=content, headers=headers)
    assert_error(response, 400, says=says)


@pytest.mark.parametrize("lora_id", BAD_IDS)
async def test_bad_ids_are_refused_everywhere(client: httpx.AsyncClient, lora_id: str) -> None:
    query = {"lora_id": lora_id}
    for response in (
        await client.post("/v1/lora/init", json=query),
        await client.post("/v1/lora/rollback", json=query | {"version": 0}),
        await client.delete("/v1/lora", params=query),
        await client.get("/v1/lora/export", params=query),
        await client.get("/v1/lora/versions", params=query),
        await client.post("/v1/lora/import", params=query, content=b"x", headers=ZIP),
    ):
        assert_error(response, 400, param="lora_id", says="is not an adapter id")


async def test_unknown_adapters_and_versions(client: httpx.AsyncClient) -> None:
    query = {"lora_id": "me/none"}
    assert_error(await client.get("/v1/lora/export", params=query), 404, param="lora_id")
    assert_error(await client.get("/v1/lora/versions", params=query), 404, param="lora_id")
    assert_error(await client.post("/v1/lora/rollback", json=query | {"version": 0}), 404, param="lora_id")
    assert_error(await client.get("/v1/lora/export", params={"lora_id": ADAPTER, "version": 9}), 404, param="version")
    assert_error(await client.post("/v1/lora/rollback", json={"lora_id": ADAPTER, "version": 9}), 404, param="version")


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "lora_id", "missing"),
        ({"lora_id": "a", "lora_r": 0}, "lora_r", "greater"),
        ({"lora_id": "a", "lora_alpha": "x"}, "lora_alpha", "integer"),
        ({"lora_id": "a", "target_modules": []}, "target_modules", "at least 1"),
        ({"lora_id": "a", "target_modules": ["../x"]}, "target_modules.0", "match"),
        ({"lora_id": "a", "base_model": "other/model"}, "base_model", "not served here"),
        ({"lora_id": "a", "rank": 8}, "rank", "unknown"),
    ],
)
async def test_wrong_adapters_are_named(client: httpx.AsyncClient, body: dict[str, Any], param: str, says: str) -> None:
    assert_error(await client.post("/v1/lora/init", json=body), 400, param=param, says=says)


async def test_a_taken_name(client: httpx.AsyncClient) -> None:
    assert_error(await client.post("/v1/lora/init", json={"lora_id": ADAPTER}), 409, param="lora_id", says="exists")


@pytest.mark.parametrize(
    ("url", "param"),
    [
        ("/v1/lora?what=1", "what"),
        ("/v1/lora/export", "lora_id"),
        ("/v1/lora/export?lora_id=a&version=x", "version"),
        ("/v1/lora/export?lora_id=a&version=-1", "version"),
        ("/v1/lora/versions?lora_id=a&v=1", "v"),
    ],
)
async def test_wrong_queries_are_named(client: httpx.AsyncClient, url: str, param: str) -> None:
    assert_error(await client.get(url), 400, param=param)
