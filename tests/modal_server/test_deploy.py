"""Deploying, looking up, listing and stopping apps, with the SDK's own command."""

from __future__ import annotations

import modal
import pytest
from modal_proto import api_pb2 as pb

from tests.modal_server.server import ModalDouble

pytestmark = pytest.mark.integration


def test_what_an_app_declares_is_there_to_be_seen(server: ModalDouble) -> None:
    app = server.apps.deployed("sample")
    assert app is not None and app.state == pb.APP_STATE_DEPLOYED
    assert set(app.functions) == {"Worker.*", "Web.*", "Stuck.*", "late", "plain"} and set(app.classes) == {"Worker", "Web", "Stuck"}
    worker = server.functions.get(app.functions["Worker.*"])
    assert worker.definition.resources.gpu_config.gpu_type == "L40S"
    assert (worker.max_containers, worker.scaledown_s, worker.definition.timeout_secs) == (2, 2, 600)
    assert worker.definition.checkpointing_enabled
    assert [server.volumes.metadata(mount.volume_id).name for mount in worker.definition.volume_mounts] == ["sample-files"]
    commands = server.images.commands(worker.definition.image_id)
    assert any("einops==0.8.1" in command for command in commands)
    assert server.images.environment(worker.definition.image_id)["SAMPLE_GREETING"] == "good day"


def test_the_tags_of_an_app_are_read_and_changed(client: modal.Client) -> None:
    app = modal.App.lookup("sample", client=client)
    assert app.get_tags() == {"sample": "v1"}
    app.set_tags({"sample": "v2"})
    assert app.get_tags() == {"sample": "v2"}


def test_redeploying_replaces_containers_and_keeps_the_app(server: ModalDouble, worker: modal.cls.Obj) -> None:
    before = server.apps.deployed("sample")
    assert before is not None
    versions = before.versions
    first = worker.describe.remote("a")["task"]
    server.modal("deploy", "-m", "tests.modal_server.sample_app", env={"SAMPLE_MOUNT": _mount(server)})
    after = server.apps.deployed("sample")
    assert before is after and before.versions == versions + 1
    assert worker.describe.remote("b")["task"] != first


def test_an_app_is_listed_and_stopped(server: ModalDouble, client: modal.Client) -> None:
    server.modal("deploy", "-m", "tests.modal_server.sample_app", env={"SAMPLE_MOUNT": _mount(server), "SAMPLE_APP": "passing"})
    stopped = modal.Cls.from_name("passing", "Worker", client=client)()
    call = stopped.sleep.spawn(60, "passing")
    assert stopped.describe.remote("x")["name"] == "x" and server.live_containers("passing")
    assert "passing" in server.modal("app", "list")
    assert "passing" in server.modal("container", "list")
    server.modal("app", "stop", "passing", "--yes")
    with pytest.raises(modal.exception.RemoteError, match="stopped"):
        call.get(timeout=20)
    assert server.apps.deployed("passing") is None
    with pytest.raises(modal.exception.NotFoundError, match="passing"):
        modal.Cls.from_name("passing", "Worker", client=client)().describe.remote("x")


def test_what_was_never_deployed_is_not_found(client: modal.Client) -> None:
    with pytest.raises(modal.exception.NotFoundError, match="Nobody"):
        modal.Cls.from_name("sample", "Nobody", client=client)().describe.remote("x")
    with pytest.raises(modal.exception.NotFoundError, match="elsewhere"):
        modal.Cls.from_name("elsewhere", "Worker", client=client)().describe.remote("x")
    with pytest.raises(modal.exception.NotFoundError, match="other"):
        modal.Cls.from_name("sample", "Worker", environment_name="other", client=client)().describe.remote("x")


def test_a_secret_is_made_once_and_found_by_name(server: ModalDouble, client: modal.Client) -> None:
    modal.Secret.objects.create("sample-key", {"KEY": "v1"}, client=client)
    assert server.secrets.named("sample-key") == {"KEY": "v1"}
    with pytest.raises(modal.exception.AlreadyExistsError):
        modal.Secret.objects.create("sample-key", {"KEY": "v2"}, client=client)
    modal.Secret.from_name("sample-key", required_keys=["KEY"], client=client).hydrate()
    with pytest.raises(modal.exception.NotFoundError):
        modal.Secret.from_name("unknown-key", client=client).hydrate()


def _mount(server: ModalDouble) -> str:
    worker = server.functions.get(server.apps.function_id("sample", "Worker.*"))
    return str(worker.definition.volume_mounts[0].mount_path)
