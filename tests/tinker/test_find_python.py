"""`scripts/find-python`, which looks for the interpreter that the Tinker server needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "find-python"
OURS = f"{sys.version_info.major}.{sys.version_info.minor}"


def find(
    home: Path, *versions: str, path: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """On a machine where `home` and `path` are all there is."""
    own = {"HOME": str(home), "PATH": os.pathsep.join([*([str(path)] if path else []), "/nonexistent"])}
    return subprocess.run(["/bin/sh", SCRIPT, *versions], env=own | (environment or {}), capture_output=True, text=True, check=False)


def put(link: Path) -> Path:
    """This interpreter, where `link` says."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(sys.executable)
    return link


def test_it_is_on_path(tmp_path: Path) -> None:
    put(tmp_path / "bin" / f"python{OURS}")
    assert find(tmp_path, "9.9", OURS, path=tmp_path / "bin").stdout == f"python{OURS}\n"


@pytest.mark.parametrize("root", [".pyenv", "elsewhere"])
def test_it_is_of_pyenv(tmp_path: Path, root: str) -> None:
    there = put(tmp_path / root / "versions" / f"{OURS}.77" / "bin" / "python")
    environment = {} if root == ".pyenv" else {"PYENV_ROOT": str(tmp_path / root)}
    assert find(tmp_path, "9.9", OURS, environment=environment).stdout == f"{there}\n"


def test_it_is_named_and_comes_first(tmp_path: Path) -> None:
    put(tmp_path / "bin" / f"python{OURS}")
    mine = put(tmp_path / "mine")
    assert find(tmp_path, "9.9", OURS, path=tmp_path / "bin", environment={"PYTHON": str(mine)}).stdout == f"{mine}\n"
    assert find(tmp_path, "9.9", path=tmp_path / "bin", environment={"PYTHON": str(mine)}).returncode == 1, (
        "but only if it is of the version"
    )


def test_it_is_nowhere(tmp_path: Path) -> None:
    put(tmp_path / "bin" / "python9.9")  # of another version than it says
    found = find(tmp_path, "9.9", "9.10", path=tmp_path / "bin")
    assert (found.returncode, found.stdout) == (1, "")
    assert "There is no Python of the version 9.9 9.10" in found.stderr and "uv python install 9.9" in found.stderr
