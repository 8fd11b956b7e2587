"""`/v1/models` and `/v1/score`."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.wire import assert_error
from tests.doubles.inference import logprob_of
from tests.doubles.services import ADAPTER, BASE_MODEL

SCORE: dict[str, Any] = {"model": ADAPTER, "messages": [{"role": "user", "content": "Hi"}], "completion": "Yo"}


async def test_the_base_model_and_every_adapter_are_listed(client: httpx.AsyncClient) -> None:
    await client.post("/v1/lora/init", json={"lora_id": "me/other"})
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == [BASE_MODEL, ADAPTER, "me/other"]
    assert all(card["object"] == "model" and card["created"] > 0 and card["owned_by"] == "claas" for card in listed["data"])


@pytest.mark.parametrize("name", [BASE_MODEL, ADAPTER, f"{ADAPTER}@0"])
async def test_one_model(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.get(f"/v1/models/{name}")).json()["id"] == name


@pytest.mark.parametrize("name", ["nobody", f"{ADAPTER}@9", "%00", "..%2f..%2fetc", "x" * 5000])
async def test_unknown_models(client: httpx.AsyncClient, name: str) -> None:
    assert_error(await client.get(f"/v1/models/{name}"), 404, param="model", says="does not exist")


async def test_a_score_has_one_logprob_for_each_token(client: httpx.AsyncClient) -> None:
    score = (await client.post("/v1/score", json=SCORE)).json()
    expected = [logprob_of(ord("Y")), logprob_of(ord("o"))]
    assert score == {
        "model": ADAPTER,
        "prompt_tokens": len("user:Hi\n"),
        "completion_tokens": 2,
        "tokens": ["Y", "o"],
        "token_ids": [ord("Y"), ord("o")],
        "logprobs": expected,
        "logprob_sum": sum(expected),
    }


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"completion": ""}, "completion"),
        ({"completion": 7}, "completion"),
        ({"messages": []}, "messages"),
        ({"prompt": "x"}, "prompt"),
    ],
)
async def test_wrong_scores_are_named(client: httpx.AsyncClient, changes: dict[str, Any], param: str) -> None:
    assert_error(await client.post("/v1/score", json=SCORE | changes), 400, param=param)


async def test_the_score_of_an_unknown_model(client: httpx.AsyncClient) -> None:
    assert_error(await client.post("/v1/score", json=SCORE | {"model": "nobody"}), 404, param="model")
