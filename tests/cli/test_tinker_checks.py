"""`claas doctor` and a Tinker server: the first thing that is wrong is named, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from claas.cli.findings import Status
from claas.cli.tinker_checks import check_tinker
from claas.core.settings import Settings
from claas.models.base_model import LoadedModel
from tests.doubles.tinker_faults import CLOUD, SKYRL, Ways
from tests.doubles.tinker_server import KEY, TinkerDouble


def settings(server: TinkerDouble, folder: Path, *, key: str = KEY, model: str = "tiny", tokenizer: str | None = None) -> Settings:
    return Settings(
        distill_execution_mode="tinker", tinker_base_url=server.url, tinker_api_key=SecretStr(key), base_model_id=model,
        tinker_tokenizer=tokenizer or str(folder),
    )  # fmt: skip


def found(chosen: Settings) -> dict[str, tuple[Status, str]]:
    return {finding.part: (finding.status, finding.detail) for finding in check_tinker(chosen)}


@pytest.mark.parametrize(
    ("ways", "status", "told"), [(CLOUD, "ok", "20 likeliest"), (SKYRL, "warn", "own tokens only")], ids=["hosted", "own"]
)
def test_a_server_that_is_well_is_told_with_what_it_can(
    tiny_model: LoadedModel, tiny_model_dir: Path, ways: Ways, status: Status, told: str
) -> None:
    with TinkerDouble(tiny_model, ways) as server:
        parts = found(settings(server, tiny_model_dir))
    assert list(parts) == ["tinker", "tinker key", "tinker model", "tinker tokenizer", "tinker teacher"]
    assert [parts[part][0] for part in list(parts)[:4]] == ["ok"] * 4
    assert parts["tinker teacher"][0] == status and told in parts["tinker teacher"][1]
    assert not {"create_model", "save_weights"} & set(server.called())


@pytest.mark.parametrize(
    ("changes", "part", "told"),
    [
        ({"key": "tml-wrong"}, "tinker key", "CLAAS_TINKER_API_KEY"),
        ({"key": "wrong"}, "tinker key", "tml-"),
        ({"model": "gpt-4"}, "tinker model", "tiny"),
        ({"tokenizer": "/nowhere"}, "tinker tokenizer", "CLAAS_TINKER_TOKENIZER"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(
    tiny_model: LoadedModel, tiny_model_dir: Path, changes: dict[str, str], part: str, told: str
) -> None:
    with TinkerDouble(tiny_model) as server:
        parts = found(settings(server, tiny_model_dir, **changes))
    assert [name for name, (status, _) in parts.items() if status != "ok"] == [part], (
        "the one thing that is wrong, and nothing that follows"
    )
    detail = parts[part][1]
    assert list(parts)[-1] == part and told in detail
    assert changes.get("key", "none") not in detail


def test_no_server_is_told_with_where_it_was_looked_for(tiny_model: LoadedModel, tiny_model_dir: Path) -> None:
    with TinkerDouble(tiny_model) as server:
        chosen = settings(server, tiny_model_dir)
    parts = found(chosen)
    assert list(parts) == ["tinker"]
    assert parts["tinker"][0] == "fail" and server.url in parts["tinker"][1]
