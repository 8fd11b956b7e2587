"""The documentation says what the service does."""

from __future__ import annotations

import httpx

ROUTES = {
    "/v1/chat/completions": {"post"},
    "/v1/completions": {"post"},
    "/v1/models": {"get"},
    "/v1/models/{model}": {"get"},
    "/v1/score": {"post"},
    "/v1/feedback": {"post"},
    "/v1/feedback/{feedback_id}": {"get", "delete"},
    "/v1/lora": {"get", "delete"},
    "/v1/lora/init": {"post"},
    "/v1/lora/export": {"get"},
    "/v1/lora/import": {"post"},
    "/v1/lora/versions": {"get"},
    "/v1/lora/rollback": {"post"},
    "/v1/health": {"get"},
}


async def test_every_route_is_documented_with_its_errors(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    assert {path: set(methods) for path, methods in schema["paths"].items()} == ROUTES
    for methods in schema["paths"].values():
        for operation in methods.values():
            assert operation["summary"]
            assert operation["description"]
            assert len(operation["tags"]) == 1
            assert operation["responses"]["default"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}
            assert "422" not in operation["responses"]


async def test_requests_forbid_unknown_fields(client: httpx.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for name in (
        "ChatCompletionRequest",
        "CompletionRequest",
        "FeedbackRequest",
        "FeedbackEntry",
        "InitRequest",
        "RollbackRequest",
        "ScoreRequest",
    ):
        assert schemas[name]["additionalProperties"] is False
    assert {"type": "string"} in schemas["WireMessage"]["properties"]["content"]["anyOf"]


async def test_the_page_is_there(client: httpx.AsyncClient) -> None:
    response = await client.get("/docs")
    assert response.status_code == 200
    assert "CLaaS" in response.text
