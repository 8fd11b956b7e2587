"""docker/Dockerfile and what it puts into the image: pinned, without secrets, not root; its scripts run here as they are."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.docker.compose import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
INIT = ROOT / "docker" / "init.sh"
USER = 2000
IS_ROOT = os.getuid() == 0


def instructions() -> list[tuple[str, str]]:
    """Every instruction and its arguments, comments left out and continued lines put together."""
    lines = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [(words[0], words[1]) for line in lines.splitlines() if (words := line.strip().split(maxsplit=1))]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def test_the_base_is_pinned_to_a_release() -> None:
    assert all(re.match(r"python:3\.1[1-3]\.\d+-slim-\w+( AS \w+)?$", base) for base in arguments("FROM"))
    assert len(arguments("FROM")) == 2


def test_it_ends_as_an_unprivileged_user_with_the_service_as_its_command() -> None:
    assert arguments("USER") == [f"{USER}:{USER}"]
    assert [name for name, _ in instructions()].index("USER") > max(i for i, (name, _) in enumerate(instructions()) if name == "RUN")
    assert [json.loads(arguments(name)[0]) for name in ("ENTRYPOINT", "CMD")] == [["claas"], ["serve", "--host", "0.0.0.0"]]


def test_no_secret_is_baked_in() -> None:
    given = " ".join(arguments("ENV") + arguments("ARG"))
    assert not re.search("KEY|TOKEN|SECRET|PASSWORD", given, flags=re.IGNORECASE)


def test_only_what_is_copied_reaches_the_build() -> None:
    rules = [line for line in (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = {
        word.removeprefix("./") for line in arguments("COPY") if "--from" not in line for word in line.split()[:-1] if word[:2] != "--"
    }
    assert copied == let_in
    assert all((ROOT / name).exists() for name in let_in)
    assert not any(fnmatch("docker/.env", pattern) for pattern in let_in)


def health_check(port: int) -> int:
    check = next(rest for rest in arguments("HEALTHCHECK"))
    python, *rest = json.loads(check[check.index("CMD") + 3 :])
    assert python == "python"
    command = [sys.executable, *(word.replace("8080", str(port)) for word in rest)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode


@contextmanager
def answering(status: int) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/v1/health" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_the_health_check_asks_whether_it_lives() -> None:
    for status in (200, 503):
        with answering(status) as port:
            assert health_check(port) == 0
    assert health_check(port) != 0


# --- init.sh ---


def init(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HF_HUB_OFFLINE": "1", "CLAAS_UID": str(USER if IS_ROOT else os.getuid()), **environment}
    return subprocess.run(["sh", str(INIT), *map(str, words)], env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """A folder that another user may enter, which pytest's own may not."""
    for folder in (tmp_path, *tmp_path.parents[:3]):  # a worker of pytest-xdist has one more of its own
        if folder.owner() == Path.home().owner():
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    return tmp_path


@pytest.fixture
def model(volumes: Path) -> Path:
    folder = volumes / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    folder.chmod(0o755)
    return folder


@pytest.mark.parametrize("script", [INIT, ROOT / "scripts" / "start-vllm"], ids=lambda script: script.name)
def test_the_scripts_are_sound_and_can_be_run(script: Path) -> None:
    subprocess.run(["sh", "-n", str(script)], check=True, timeout=60)
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/bin/sh\n")


def test_init_gives_every_folder_to_the_user(volumes: Path, model: Path) -> None:
    (volumes / "adapters" / "assistant").mkdir(parents=True)
    (volumes / "adapters" / "assistant" / "latest").write_text("0")
    done = init(model, volumes / "data", volumes / "adapters")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"init: {model} is ready\n")
    places = [volumes / "data", volumes / "adapters", *(volumes / "adapters").rglob("*")]
    assert {place.stat().st_uid for place in places} == {USER if IS_ROOT else os.getuid()}
    again = init(model, volumes / "data", volumes / "adapters")
    assert (again.returncode, again.stdout) == (0, f"init: {model} is ready\n")


def test_init_refuses_a_folder_without_a_model(volumes: Path) -> None:
    done = init(volumes, volumes / "data")
    assert done.returncode == 1
    assert "no config.json" in done.stderr


@pytest.mark.skipif(not IS_ROOT, reason="only root reads what its user may not")
def test_init_sees_with_the_eyes_of_the_user(volumes: Path, model: Path) -> None:
    (model / "config.json").chmod(0o600)
    done = init(model, volumes / "data")
    assert done.returncode == 1
    assert "let everyone read it" in done.stderr


def test_init_looks_for_a_model_of_the_hub(volumes: Path) -> None:
    home = volumes / "models"
    here = {"HF_HOME": str(home), "CLAAS_UID": str(os.getuid())}  # another user may not run this environment's tools
    missing = init("someone/something", home, **here)
    assert missing.returncode == 1
    assert "someone/something could not be fetched" in missing.stderr
    snapshot = home / "hub" / "models--someone--something" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (home / "hub" / "models--someone--something" / "refs").mkdir()
    (home / "hub" / "models--someone--something" / "refs" / "main").write_text("0" * 40)
    found = init("someone/something", home, **here)
    assert (found.returncode, found.stdout.splitlines()[-1]) == (0, "init: someone/something is ready"), found.stderr


@pytest.mark.parametrize("words", [[], ["someone/something"]])
def test_init_says_what_it_wants(words: list[str]) -> None:
    assert (init(*words).returncode, "usage:" in init(*words).stderr) == (2, True)


def test_init_refuses_a_name_that_is_none(volumes: Path) -> None:
    done = init("smollm", volumes / "data")
    assert (done.returncode, "neither a hub id" in done.stderr) == (1, True)


def test_what_the_image_says_of_folders_is_what_compose_mounts() -> None:
    environment = dict(word.split("=", 1) for word in shlex.split(arguments("ENV")[0]))
    assert {environment[name] for name in ("HF_HOME", "CLAAS_DATA_DIR", "CLAAS_CACHE_DIR", "CLAAS_LORA_ROOT")} == {
        "/models",
        "/data",
        "/cache",
        "/adapters",
    }
