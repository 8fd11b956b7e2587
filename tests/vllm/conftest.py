"""A real vLLM for the whole session, and `claas serve` in front of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.doubles.vllm_server import VllmDouble
from tests.integration.process import Service, running
from tests.models.tiny import tiny_tokenizer, write_adapter
from tests.vllm.peer import NO_KEEPALIVE, Peer
from tests.vllm.process import MODEL, RealVllm

ROOT = Path(__file__).resolve().parents[2]
# Taken out of the environment: the service refuses CLAAS_ variables that are no settings of its.
PYTHON = Path(os.environ.pop("CLAAS_TEST_VLLM_PYTHON", "") or ROOT / ".venv-vllm" / "bin" / "python")


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    if not PYTHON.is_file():
        pytest.fail(f"there is no vLLM at {PYTHON.parent.parent.name!r}: `make test-vllm` installs it and runs these tests", pytrace=False)
    return PYTHON


@pytest.fixture(scope="session")
def vllm(vllm_python: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealVllm]:
    """Shared by all tests: whoever puts it to sleep wakes it, whoever kills it starts it again."""
    server = RealVllm(vllm_python, model_dir, tmp_path_factory.mktemp("vllm") / "vllm.log")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def direct(vllm: RealVllm) -> Iterator[httpx.Client]:
    """Asks vLLM itself, past the service."""
    with httpx.Client(base_url=vllm.url, timeout=300.0) as client:
        yield client


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service") / "data"


@pytest.fixture(scope="module")
def service(vllm: RealVllm, data_dir: Path) -> Iterator[Service]:
    """`claas serve` on `data_dir`, with vLLM behind it. What its adapter learns stays from test to test of a module."""
    vllm.forget_adapters()
    with running(data_dir, VLLM_BASE_URL=vllm.url) as started:
        yield started


@pytest.fixture(scope="module")
def double(tiny_model: Any) -> Iterator[Peer]:
    server = VllmDouble(tiny_tokenizer(), device="cpu", model=MODEL, max_model_len=2048, step_s=0.002)
    with server, httpx.Client(base_url=server.url, timeout=30.0, limits=NO_KEEPALIVE) as client:
        yield Peer(client, lambda folder, seed, rank: write_adapter(folder, tiny_model, seed=seed, rank=rank))


@pytest.fixture(scope="module")
def real(vllm: RealVllm, loaded_model: Any) -> Iterator[Peer]:
    vllm.forget_adapters()
    with httpx.Client(base_url=vllm.url, timeout=300.0, limits=NO_KEEPALIVE) as client:
        yield Peer(client, lambda folder, seed, rank: write_adapter(folder, loaded_model, seed=seed, rank=rank, scale=0.05))


@pytest.fixture(params=["double", pytest.param("real", marks=pytest.mark.vllm)])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    found: Peer = request.getfixturevalue(request.param)
    try:
        yield found
    finally:
        found.post("/wake_up")
        assert found.asleep() == (False, False)
