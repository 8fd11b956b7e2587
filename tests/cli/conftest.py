"""The command line against a real server: the app over the doubles, on a free port of 127.0.0.1."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from claas.cli.main import app
from claas.cli.server import in_background
from claas.core.settings import Settings
from claas.services import Services
from tests.doubles.services import World, open_world

KEY = "a-key-for-tests"
WITHOUT_MODAL = "import sys; sys.modules['modal'] = None; from claas.__main__ import main; main()"
"""Code of a `claas` that finds no SDK of Modal's; its arguments follow."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Live:
    """A running service and the doubles inside it."""

    url: str
    world: World

    def claas(self, *arguments: str, typed: str | None = None) -> Outcome:
        """Run a client command against this service."""
        return claas(*arguments, "--url", self.url, "--api-key", KEY, typed=typed)


def claas(*arguments: str, typed: str | None = None, **environment: str) -> Outcome:
    """Run a command in this process, with `typed` on standard input."""
    result = CliRunner().invoke(app, arguments, input=typed, env=environment, catch_exceptions=False)
    return Outcome(result.exit_code, result.stdout, result.stderr)


@contextmanager
def running(folder: Path) -> Iterator[Live]:
    worlds: list[World] = []

    @asynccontextmanager
    async def open_services(settings: Settings) -> AsyncIterator[Services]:
        async with open_world(settings.data_dir, api_keys=settings.api_keys) as world:
            worlds.append(world)
            yield world.services

    with in_background(Settings(data_dir=folder, port=0, api_keys=(SecretStr(KEY),)), open_services) as url:
        yield Live(url, worlds[0])


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with running(tmp_path) as live:
        yield live
