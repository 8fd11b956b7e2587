"""`claas adapters`."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from tests.cli.conftest import Live
from tests.doubles.services import ADAPTER


def test_lists_by_prefix(live: Live) -> None:
    live.claas("adapters", "init", "me/second")
    live.claas("adapters", "init", "you/third")
    assert live.claas("adapters", "list").out.split() == [ADAPTER, "me/second", "you/third"]
    assert live.claas("adapters", "list", "you/").out.split() == ["you/third"]
    assert json.loads(live.claas("adapters", "list", "you/", "--json").out) == {"loras": ["you/third"]}
    assert "claas adapters init" in live.claas("adapters", "list", "nobody/").out


def test_init_sends_rank_and_alpha_and_a_taken_name_is_told(live: Live) -> None:
    assert live.claas("adapters", "init", "me/new", "--rank", "8", "--alpha", "16").out == "me/new created at version 0\n"
    again = live.claas("adapters", "init", "me/new")
    assert (again.code, again.err) == (1, "claas: adapter 'me/new' exists: choose another name\n")


def test_versions_and_rollback_there_and_back(live: Live) -> None:
    reply = live.claas("chat", typed="Hello\n/feedback be brief\n")
    assert reply.code == 0, reply
    history = json.loads(live.claas("adapters", "versions", ADAPTER, "--json").out)
    assert (history["latest"], [item["parent"] for item in history["versions"]]) == (1, [None, 0])

    assert live.claas("adapters", "rollback", ADAPTER, "0").out == f"{ADAPTER} serves version 0\n"
    rows = live.claas("adapters", "versions", ADAPTER).out.splitlines()
    assert rows[0].strip() == ADAPTER
    assert rows[2].split()[:3] == ["→", "0", "–"]
    assert rows[3].split()[:2] == ["1", "0"]
    assert live.claas("adapters", "rollback", ADAPTER, "1").out == f"{ADAPTER} serves version 1\n"


def test_rollback_to_no_version(live: Live) -> None:
    result = live.claas("adapters", "rollback", ADAPTER, "9")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("claas: ")
    assert "9" in result.err


def test_export_then_import_under_another_name(live: Live, tmp_path: Path) -> None:
    file = tmp_path / "adapter.zip"
    assert live.claas("adapters", "export", ADAPTER, str(file)).code == 0
    assert "adapter_model.safetensors" in zipfile.ZipFile(file).namelist()
    assert live.claas("adapters", "import", "me/copy", str(file)).out == "me/copy created at version 0\n"
    assert "me/copy" in live.claas("adapters", "list").out.split()


def test_export_overwrites_only_when_told(live: Live, tmp_path: Path) -> None:
    file = tmp_path / "adapter.zip"
    file.write_bytes(b"mine")
    refused = live.claas("adapters", "export", ADAPTER, str(file))
    assert refused.code == 2
    assert "--force" in refused.err
    assert file.read_bytes() == b"mine"
    assert live.claas("adapters", "export", ADAPTER, str(file), "--force", "--version", "0").code == 0
    assert zipfile.is_zipfile(file)


def test_import_of_something_else(live: Live, tmp_path: Path) -> None:
    file = tmp_path / "notes.zip"
    file.write_text("not a zip")
    result = live.claas("adapters", "import", "me/copy", str(file))
    assert (result.code, result.err) == (1, "claas: the body is not a zip archive\n")


def test_delete_asks_first(live: Live) -> None:
    kept = live.claas("adapters", "delete", ADAPTER, typed="n\n")
    assert kept.code == 1
    assert live.claas("adapters", "list").out.split() == [ADAPTER]
    assert live.claas("adapters", "delete", ADAPTER, typed="y\n").code == 0
    gone = live.claas("adapters", "delete", ADAPTER, "--yes")
    assert (gone.code, gone.err) == (1, f"claas: there is no adapter {ADAPTER!r}\n")
