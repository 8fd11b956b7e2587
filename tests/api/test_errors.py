"""Every error has a status, and every answer that is not a success has OpenAI's shape."""

from __future__ import annotations

from contextlib import nullcontext

import httpx
import pytest

from claas.api.app import create_app
from claas.api.errors import TABLE, kind_of
from claas.core import errors
from claas.core.errors import BackendUnavailable, ClaasError, Overloaded, UpstreamRefused
from tests.api.conftest import LOCAL
from tests.api.wire import assert_error
from tests.doubles.services import World

STATUS = {
    "ConfigurationError": 500,
    "BadRequest": 400,
    "ContextOverflow": 400,
    "UpstreamRefused": 418,
    "AuthenticationFailed": 401,
    "NotFound": 404,
    "Conflict": 409,
    "AdapterBusy": 409,
    "TooLarge": 413,
    "Unteachable": 422,
    "Overloaded": 429,
    "BackendUnavailable": 503,
    "StorageFull": 503,
    "StepFailed": 500,
}
TREE = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ClaasError)]


def test_the_table_holds_the_whole_tree() -> None:
    assert set(TREE) <= TABLE.keys()
    assert {cls.__name__ for cls in TREE} == STATUS.keys() | {"ClaasError"}


def an_error(cls: type[ClaasError]) -> ClaasError:
    if issubclass(cls, Overloaded):
        return Overloaded("the queue is full", retry_after_s=7)
    return UpstreamRefused("no tea here", status=418) if issubclass(cls, UpstreamRefused) else cls("it went wrong")


@pytest.mark.parametrize("cls", TREE)
async def test_each_class_has_its_status_and_type(client: httpx.AsyncClient, world: World, cls: type[ClaasError]) -> None:
    world.engine.breakage = an_error(cls)
    response = await client.get("/v1/lora")
    error = assert_error(response, STATUS.get(cls.__name__, 500), param="messages" if cls.__name__ == "ContextOverflow" else None)
    assert error["message"] == str(an_error(cls))
    assert error["type"] == kind_of(an_error(cls)).type
    waits = {"Overloaded": "7", "AdapterBusy": "10", "BackendUnavailable": "5"}
    assert response.headers.get("retry-after") == waits.get(cls.__name__)


@pytest.mark.parametrize("status", [400, 404, 422, 451])
async def test_an_upstream_s_refusal_keeps_its_status_text_and_field(client: httpx.AsyncClient, world: World, status: int) -> None:
    world.engine.breakage = UpstreamRefused("'tool_choice' needs a parser", status=status, param="tool_choice")
    error = assert_error(await client.get("/v1/lora"), status, param="tool_choice", says="needs a parser")
    assert (error["type"], error["code"]) == ("invalid_request_error", "upstream_refused")


async def test_a_backend_that_knows_when_it_is_back_says_so(client: httpx.AsyncClient, world: World) -> None:
    world.engine.breakage = BackendUnavailable("an update is under way", retry_after_s=42)
    response = await client.get("/v1/lora")
    assert_error(response, 503, says="update")
    assert response.headers["retry-after"] == "42"


async def test_a_new_branch_answers_as_its_parent_does(client: httpx.AsyncClient, world: World) -> None:
    class Stricter(errors.Unteachable):
        pass

    world.engine.breakage = Stricter("no")
    assert_error(await client.get("/v1/lora"), 422)


async def test_unforeseen_errors_are_logged_and_not_told(client: httpx.AsyncClient, world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.engine.breakage = RuntimeError("/secret/path and key")
    response = await client.get("/v1/lora")
    error = assert_error(response, 500, says=response.headers["x-request-id"])
    assert error["code"] == "internal_error"
    assert "secret" not in response.text
    assert "/secret/path and key" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


async def test_unknown_urls(client: httpx.AsyncClient) -> None:
    for path in ("/", "/v1", "/v2/models", "/v1/chat/completions/", "/v1/lora/", "/redoc", "/v1/" + "x" * 5000):
        assert assert_error(await client.get(path, follow_redirects=False), 404, says="Unknown request URL")["code"] == "unknown_url"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/chat/completions"), ("PUT", "/v1/lora/init"), ("POST", "/v1/models"), ("PATCH", "/v1/lora")]
)
async def test_methods_that_a_url_does_not_take(client: httpx.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, path)
    assert assert_error(response, 405, says=method)["code"] == "method_not_allowed"
    assert response.headers["allow"]


async def test_two_apps_share_nothing(client: httpx.AsyncClient, world: World) -> None:
    other = create_app(lambda: nullcontext(world.services))
    async with other.router.lifespan_context(other), httpx.AsyncClient(transport=httpx.ASGITransport(other), base_url=LOCAL) as second:
        assert (await second.get("/health")).status_code == 200
    assert (await client.get("/health")).status_code == 200
