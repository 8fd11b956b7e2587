"""docs/backends.md says what a backend does not support: that, and nothing else, is refused, with 400 and the name of the field."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from claas.models.base_model import LoadedModel
from tests.api.wire import assert_error
from tests.conformance.backends import Backend
from tests.conformance.talk import CHAT, HELLO, finished, item
from tests.models.tiny import write_adapter

PAGE = Path(__file__).resolve().parents[2] / "docs" / "backends.md"
Ask = Callable[[httpx.AsyncClient, bytes], Awaitable[httpx.Response]]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def chat(**fields: Any) -> Ask:
    async def ask(client: httpx.AsyncClient, _: bytes) -> httpx.Response:
        return await client.post(CHAT, json=HELLO | fields)

    return ask


def init(**fields: Any) -> Ask:
    async def ask(client: httpx.AsyncClient, _: bytes) -> httpx.Response:
        return await client.post("/v1/lora/init", json={"lora_id": "me/new"} | fields)

    return ask


def lesson(*, training: dict[str, Any] | None = None, **said: Any) -> Ask:
    async def ask(client: httpx.AsyncClient, _: bytes) -> httpx.Response:
        entry = item(await finished(client), None if said else "Be kind.", training, **said)
        return await client.post("/v1/feedback", json={"requests": [entry]})

    return ask


async def export(client: httpx.AsyncClient, _: bytes) -> httpx.Response:
    return await client.get("/v1/lora/export", params={"lora_id": "assistant"})


async def import_(client: httpx.AsyncClient, archive: bytes) -> httpx.Response:
    return await client.post("/v1/lora/import?lora_id=me/new", content=archive, headers={"content-type": "application/zip"})


# What a row of the table is about: the requests that show it, and the field that a refusal names.
ROWS: dict[str, list[tuple[Ask, str]]] = {
    "`tools`, `tool_choice`": [(chat(tools=TOOLS), "tools"), (chat(tools=TOOLS, tool_choice="required"), "tools")],
    "`response_format`": [(chat(response_format={"type": "json_object"}), "response_format")],
    "`logprobs`": [(chat(logprobs=True), "logprobs")],
    "`top_logprobs`": [(chat(logprobs=True, top_logprobs=3), "top_logprobs")],
    "`POST /v1/lora/import`": [(import_, "archive")],
    "`GET /v1/lora/export`": [(export, "lora_id")],
    "`lora_r`": [(init(lora_r=4), "lora_r")],
    "`lora_alpha`": [(init(lora_r=4, lora_alpha=16), "lora_alpha")],
    "`target_modules`: attention, or MLPs, or both": [
        (init(lora_id="me/a", target_modules=ATTENTION), "target_modules"),
        (init(lora_id="me/b", target_modules=MLP), "target_modules"),
        (init(lora_id="me/c", target_modules=[*ATTENTION, *MLP]), "target_modules"),
    ],
    "`target_modules`: others": [(init(target_modules=["q_proj", "v_proj"]), "target_modules")],
    "`teacher` `base`": [(lesson(training={"teacher": "base"}), "")],
    "`teacher` `ema` or `snapshot`": [(lesson(training={"teacher": kind}), "training.teacher") for kind in ("ema", "snapshot")],
    "`kl_reg_weight`": [(lesson(training={"kl_reg_weight": 0.1}), "training.kl_reg_weight")],
    "`rating`, `demonstration`": [(lesson(rating=-1), ""), (lesson(demonstration="and then the other one"), "")],
}


def table() -> dict[str, dict[str, str]]:
    """The page's table: what each backend, by its column's name, does with each row."""
    lines = PAGE.read_text().partition("## Not supported")[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    names, _, *found = rows
    return {row[0]: dict(zip(names[1:], row[1:], strict=True)) for row in found}


def test_every_row_is_asked_about() -> None:
    assert table().keys() == ROWS.keys()
    assert {cell for row in table().values() for cell in row.values()} == {"yes", "400"}


@pytest.fixture(scope="session")
def archive(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An adapter as PEFT would have it, zipped."""
    folder = tmp_path_factory.mktemp("archive")
    write_adapter(folder, tiny_model, seed=1)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for file in folder.iterdir():
            zipped.write(file, file.name)
    return buffer.getvalue()


@pytest.mark.parametrize("row", ROWS)
async def test_a_backend_does_what_the_page_says(client: httpx.AsyncClient, backend: Backend, archive: bytes, row: str) -> None:
    supported = table()[row][backend.column] == "yes"
    for ask, field in ROWS[row]:
        answer = await ask(client, archive)
        if supported:
            assert answer.status_code == 200, answer.text
        else:
            assert_error(answer, 400, param=field)
