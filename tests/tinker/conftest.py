"""A real server of the Tinker API for the whole session, and the double that is to answer as it does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.tinker_faults import CLOUD, SKYRL
from tests.doubles.tinker_server import KEY, TinkerDouble
from tests.tinker.peer import Peer
from tests.tinker.process import KEY as ANY_KEY
from tests.tinker.process import MODEL, RealTinker

ROOT = Path(__file__).resolve().parents[2]
# Taken out of the environment: the service refuses CLAAS_ variables that are no settings of its.
PYTHON = Path(os.environ.pop("CLAAS_TEST_TINKER_PYTHON", "") or ROOT / ".venv-tinker" / "bin" / "python")


@pytest.fixture(scope="session")
def tinker_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealTinker]:
    """Shared by all tests: whoever kills it starts it again."""
    if not PYTHON.is_file():
        where = PYTHON.parent.parent.name
        pytest.fail(f"there is no Tinker server at {where!r}: `make test-tinker` installs it and runs these tests", pytrace=False)
    server = RealTinker(PYTHON, model_dir, tmp_path_factory.mktemp("tinker"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def double_like_it(tiny_model: Any) -> Iterator[TinkerDouble]:
    with TinkerDouble(tiny_model, SKYRL) as server:
        yield server


@pytest.fixture(scope="module")
def double(double_like_it: TinkerDouble) -> Iterator[Peer]:
    peer = Peer(double_like_it.url, double_like_it.model.id, KEY, double_like_it.restart)
    yield peer
    peer.close()


@pytest.fixture(scope="module")
def real(tinker_server: RealTinker) -> Iterator[Peer]:
    peer = Peer(tinker_server.url, MODEL, ANY_KEY, tinker_server.restart)
    yield peer
    peer.close()


@pytest.fixture(params=["double", pytest.param("real", marks=pytest.mark.tinker)])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    found: Peer = request.getfixturevalue(request.param)
    yield found
    found.forget()


@pytest.fixture
def cloud(tiny_model: Any) -> Iterator[TinkerDouble]:
    """The double as the hosted service is."""
    with TinkerDouble(tiny_model, CLOUD) as server:
        yield server


@pytest.fixture
def hosted(cloud: TinkerDouble) -> Iterator[Peer]:
    peer = Peer(cloud.url, cloud.model.id, KEY, cloud.restart)
    yield peer
    peer.close()
