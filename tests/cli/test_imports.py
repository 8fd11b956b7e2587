"""The command line is instant because it imports next to nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "transformers",
    "modal",
    "peft",
    "numpy",
    "sqlalchemy",
    "alembic",
    "fastapi",
    "starlette",
    "uvicorn",
    "httpx",
    "safetensors",
}


def imported_after(code: str) -> set[str]:
    script = f"import contextlib, io, sys\nwith contextlib.redirect_stdout(io.StringIO()):\n    {code}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(run.stdout.split())


RUN = "from typer.testing import CliRunner; from claas.cli.main import app; assert CliRunner().invoke(app, {}).exit_code == 0"


@pytest.mark.parametrize("code", ["import claas", "import claas.cli.main", RUN.format(["--help"]), RUN.format(["teach", "--help"])])
def test_nothing_heavy_is_imported(code: str) -> None:
    assert not imported_after(code) & HEAVY


def test_core_and_api_import_no_tensors() -> None:
    assert not imported_after("import claas.core.settings, claas.core.types, claas.api.app") & {"torch", "transformers", "peft"}


def test_runs_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-m", "claas", "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "claas 0.1.0\n"
