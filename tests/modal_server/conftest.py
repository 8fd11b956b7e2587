"""One double with the sample app deployed, for all the tests of this folder: faults are over after each test."""

from __future__ import annotations

from collections.abc import Iterator

import modal
import pytest

from tests.modal_server.processes import containers_possible
from tests.modal_server.server import ModalDouble

APP = "tests.modal_server.sample_app"


@pytest.fixture(scope="package")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModalDouble]:
    """The double, with the sample app deployed by the `modal` command."""
    if not containers_possible():
        pytest.skip("namespaces cannot be made here")
    folder = tmp_path_factory.mktemp("modal")
    with ModalDouble(folder, env={"DOUBLE_ENV": "from the machine"}, web_wait_s=20) as server:
        server.modal("deploy", "-m", APP, env={"SAMPLE_MOUNT": str(folder / "mount")})
        yield server
    assert server.unimplemented == []


@pytest.fixture
def server(deployed: ModalDouble) -> Iterator[ModalDouble]:
    yield deployed
    deployed.faults.clear()


@pytest.fixture
def client(server: ModalDouble) -> modal.Client:
    return server.client()


@pytest.fixture
def worker(client: modal.Client) -> modal.cls.Obj:
    """An instance of the sample's class, looked up as an outsider does."""
    return modal.Cls.from_name("sample", "Worker", client=client)()
