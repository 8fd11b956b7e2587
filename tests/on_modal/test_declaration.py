"""What `modal deploy` puts on Modal, read from what the control plane was told: functions, GPUs, Volumes, limits, secrets, image steps."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import modal
import pytest
from modal_proto import api_pb2 as pb

from claas import __version__
from tests.modal_server.processes import containers_possible
from tests.modal_server.server import ModalDouble
from tests.on_modal.deployed import deploy, modal_command

pytestmark = pytest.mark.integration

CHOSEN = {
    "CLAAS_MODAL_APP": "lessons",
    "CLAAS_MODAL_GPU": "H100",
    "CLAAS_MODAL_VLLM_GPU": "A100-80GB",
    "CLAAS_MODAL_MAX_CONTAINERS": "3",
    "CLAAS_MODAL_SCALEDOWN_S": "60",
    "CLAAS_MODAL_TIMEOUT_S": "900",
    "CLAAS_MODAL_START_TIMEOUT_S": "500",
    "CLAAS_MODAL_VOLUME_PATH": "/a",
    "CLAAS_MODAL_MODELS_PATH": "/m",
    "CLAAS_MODAL_SECRETS": '["hub"]',
    "CLAAS_API_KEYS": '["top-secret"]',
    "VLLM_API_KEY": "top-secret",
}


@pytest.fixture(name="cloud", scope="module")
def _cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModalDouble]:
    with ModalDouble(tmp_path_factory.mktemp("modal")) as cloud:
        client = cloud.client()
        modal.Secret.objects.create("lessons-key", {"VLLM_API_KEY": "k"}, client=client)
        modal.Secret.objects.create("hub", {"HF_TOKEN": "t"}, client=client)
        deploy(cloud, **CHOSEN)
        yield cloud


def functions(cloud: ModalDouble, app: str = "lessons") -> dict[str, pb.Function]:
    """By their tags."""
    found = cloud.apps.deployed(app)
    assert found is not None
    return {tag: cloud.functions.get(function_id).definition for tag, function_id in found.functions.items()}


def mounts(cloud: ModalDouble, function: pb.Function) -> dict[str, tuple[str, bool]]:
    """Volume and whether it may only be read, by where it is."""
    client = cloud.client()
    names = {modal.Volume.from_name(name, client=client).hydrate().object_id: name for name in ("lessons-adapters", "lessons-models")}
    return {mount.mount_path: (names[mount.volume_id], mount.read_only) for mount in function.volume_mounts}


def secrets(cloud: ModalDouble, function: pb.Function) -> dict[str, str]:
    return {name: value for secret_id in function.secret_ids for name, value in cloud.secrets.environment(secret_id).items()}


def test_the_worker(cloud: ModalDouble) -> None:
    worker = functions(cloud)["DistillWorker.*"]
    assert (worker.resources.gpu_config.gpu_type, worker.resources.gpu_config.count) == ("H100", 1)
    assert worker.checkpointing_enabled and not worker.max_concurrent_inputs, "a snapshot, and one lesson at a time"
    assert (worker.autoscaler_settings.max_containers, worker.autoscaler_settings.scaledown_window) == (3, 60)
    assert (worker.timeout_secs, worker.startup_timeout_secs) == (900, 500)
    assert mounts(cloud, worker) == {"/a": ("lessons-adapters", False), "/m": ("lessons-models", False)}
    assert set(worker.method_definitions) == {"distill", "health"} and secrets(cloud, worker) == {"HF_TOKEN": "t"}


def test_vllm(cloud: ModalDouble) -> None:
    vllm = functions(cloud)["VllmServer.*"]
    assert vllm.resources.gpu_config.gpu_type == "A100-80GB"
    assert vllm.autoscaler_settings.max_containers == 1 and vllm.max_concurrent_inputs > 100
    assert mounts(cloud, vllm) == {"/a": ("lessons-adapters", True), "/m": ("lessons-models", False)}
    assert secrets(cloud, vllm) == {"HF_TOKEN": "t", "VLLM_API_KEY": "k"}
    assert set(vllm.method_definitions) == {"web"} and vllm.startup_timeout_secs == 500


def test_the_service(cloud: ModalDouble) -> None:
    api = functions(cloud)["api"]
    assert not api.resources.gpu_config.gpu_type and secrets(cloud, api) == {"HF_TOKEN": "t", "VLLM_API_KEY": "k"}
    assert api.web_url and set(functions(cloud)) == {"DistillWorker.*", "VllmServer.*", "api"}


def test_the_images(cloud: ModalDouble) -> None:
    """Packages first, settings above them: other settings install nothing anew. No secret is in any step."""
    for tag, packages in {"DistillWorker.*": ("torch==", "peft=="), "VllmServer.*": ("vllm==0.32.0",), "api": ("fastapi==",)}.items():
        image = functions(cloud)[tag].image_id
        steps = cloud.images.commands(image)
        (install,) = [number for number, step in enumerate(steps) if "pip install " in step and "==" in step]
        assert all(package in steps[install] for package in packages) and steps[0].startswith("FROM python:3.12")
        assert all(word.count("==") == 1 for word in steps[install].partition("install ")[2].split()), "each pinned"
        assert min(number for number, step in enumerate(steps) if step.startswith("ENV CLAAS")) > install
        told = cloud.images.environment(image)
        assert (told["CLAAS_MODAL_APP"], told["CLAAS_MODAL_SECRETS"], told["HF_HOME"]) == ("lessons", '["hub"]', "/m/hub")
        assert "top-secret" not in str(steps)


def test_claas_goes_along_once_and_the_double_knew_every_question(cloud: ModalDouble) -> None:
    for function in functions(cloud).values():
        assert len(function.mount_ids) == 2, "the SDK's own and ours"
    assert cloud.unimplemented == []


def test_tags_tell_what_was_deployed(cloud: ModalDouble) -> None:
    tags = modal.App.lookup("lessons", client=cloud.client()).get_tags()
    assert (tags["claas"], tags["gpu"], tags["serving"]) == (__version__, "H100", "vllm")


def test_embedded_there_is_no_vllm_and_no_key_is_needed(cloud: ModalDouble) -> None:
    deploy(cloud, CLAAS_MODAL_APP="quiet", CLAAS_MODAL_SERVING="embedded")
    assert set(functions(cloud, "quiet")) == {"DistillWorker.*", "api"}


def test_without_the_key_of_vllm_nothing_is_deployed(cloud: ModalDouble) -> None:
    done = modal_command(cloud, "deploy", "-m", "claas.training.engine.modal_app", CLAAS_MODAL_APP="keyless")
    assert done.returncode == 1 and "keyless-key" in done.stdout + done.stderr
    assert cloud.apps.deployed("keyless") is None


@pytest.mark.skipif(not containers_possible(), reason="this machine lets nobody make namespaces")
@pytest.mark.parametrize(
    ("secret", "missing"),
    [
        ({"CLAAS_DATABASE_URL": "postgresql://db/claas"}, "CLAAS_API_KEYS"),
        ({"CLAAS_API_KEYS": '["k"]'}, "CLAAS_DATABASE_URL"),
        ({"CLAAS_API_KEYS": '["k"]', "CLAAS_DATABASE_URL": "sqlite:////m/claas.db"}, "CLAAS_DATABASE_URL"),
    ],
)
def test_the_service_refuses_to_be_open_or_forgetful(cloud: ModalDouble, secret: dict[str, str], missing: str) -> None:
    modal.Secret.objects.delete("service", client=cloud.client(), allow_missing=True)
    modal.Secret.objects.create("service", secret, client=cloud.client())
    deploy(cloud, CLAAS_MODAL_APP="open", CLAAS_MODAL_SERVING="embedded", CLAAS_MODAL_SECRETS='["service"]')
    answer = httpx.get(f"{functions(cloud, 'open')['api'].web_url}/v1/health", timeout=60)
    assert answer.status_code >= 500 and f"put {missing}" in cloud.logs()
