"""What the pages tell people to type works: commands exist, requests are answered, the Python snippet runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from claas.cli.client import Client
from claas.cli.main import app
from tests.cli.conftest import KEY, Live, running
from tests.cli.curl import curl
from tests.docs.markdown import PAGES, ROOT, commands, fenced
from tests.docs.test_cli_md import COMMANDS

DOCUMENTED_URL = "http://127.0.0.1:8080"
WRITTEN = [pytest.param(command, id=f"{page.name}: {command[:40]}") for page in PAGES for command in commands(page)]
TOOLS = {"make", "claas", "curl", "pytest", "pre-commit", "printf", "cp", "docker", "scripts/start-vllm"}


def words(command: str) -> list[str]:
    return [Path(word).name if word.startswith(".venv/bin/") else word for word in shlex.split(command, comments=True)]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("command", WRITTEN)
def test_a_documented_command_exists(command: str) -> None:
    typed = words(command)
    assert typed[0] in TOOLS, "a tool that no test knows: add it here with a check"
    if typed[0] == "make":
        assert {word for word in typed[1:] if "=" not in word} <= make_targets()
    if typed[0] == "cp":
        assert (ROOT / typed[1]).is_file()
    if typed[0] == "docker":
        assert typed[1:3] == ["compose", "-f"]
        assert (ROOT / typed[3]).is_file()
    if typed[0] == "scripts/start-vllm":
        subprocess.run(["sh", ROOT / typed[0], "--dry-run", *typed[1:]], capture_output=True, timeout=60, check=True)
    if "claas" in typed:
        arguments = typed[typed.index("claas") + 1 :]
        name = next(known for known in COMMANDS if " ".join(["claas", *arguments]).startswith(known))
        options = {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in arguments if word.startswith("--")} <= options


def test_every_make_target_is_listed_by_make_help() -> None:
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    ).stdout
    assert {line.split()[1] for line in listed.splitlines()} == make_targets()


@pytest.fixture
def documented(tmp_path: Path) -> Iterator[Live]:
    """A service with the adapter that the pages speak of."""
    with running(tmp_path) as live, Client(live.url, KEY) as client:
        client.init("assistant")
        yield live


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(command.startswith("curl") for command in commands(page))], ids=lambda page: page.name
)
def test_documented_requests_are_answered(page: Path, documented: Live, tmp_path: Path) -> None:
    with Client(documented.url, KEY) as client:
        for command in commands(page):
            if command.startswith("curl"):
                reply = client.chat("assistant", [{"role": "user", "content": "Who are you?"}])
                (taught,) = client.feedback([reply.id], "Your name is Kuro.")["feedback_ids"] if "fb-..." in command else ("",)
                typed = command.replace(DOCUMENTED_URL, documented.url).replace("chatcmpl-...", reply.id).replace("fb-...", taught)
                answer = curl(typed, tmp_path, authorization=f"Bearer {KEY}")
                assert answer.is_success, (command, answer.text)


def test_the_documented_answer_to_feedback_has_the_fields_of_a_real_one(documented: Live) -> None:
    (example,) = fenced(ROOT / "docs" / "api.md", "json")
    with Client(documented.url, KEY) as client:
        reply = client.chat("assistant", [{"role": "user", "content": "Who are you?"}])
        answer = client.feedback([reply.id], "Your name is Kuro.", show=True)
    assert set(json.loads(example)) == set(answer)
    assert_within(json.loads(example), answer)


def assert_within(example: Any, actual: Any) -> None:
    """Every field of the example is there, with a value of its type."""
    assert type(example) is type(actual) or {type(example), type(actual)} <= {int, float}
    if isinstance(example, dict):
        assert set(example) <= set(actual)
        for name, value in example.items():
            assert_within(value, actual[name])
    if isinstance(example, list):
        assert bool(example) is bool(actual)
        for one in example[:1]:
            assert_within(one, actual[0])


def test_the_python_snippet_of_the_readme_runs(documented: Live) -> None:
    (snippet,) = fenced(ROOT / "README.md", "python")
    code = snippet.replace(DOCUMENTED_URL, documented.url).replace('"none"', f'"{KEY}"')
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ, check=True).stdout
    reply_id, text = said.split(maxsplit=1)
    assert reply_id in documented.world.rollouts.kept
    assert text.strip() == "[assistant@0] Who are you?"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_every_command_has_help() -> None:
    for name in COMMANDS:
        result = CliRunner().invoke(app, [*name.split()[1:], "--help"])
        assert result.exit_code == 0
