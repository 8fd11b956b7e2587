"""`claas modal` and `claas doctor` through the true SDK, against the double of Modal's control plane, each in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import modal
import pytest
from grpclib import Status

from claas import __version__
from claas.adapters.modal_errors import EXHAUSTED, NO_TOKEN, UNREACHABLE
from tests.modal_server.processes import containers_possible
from tests.modal_server.server import ModalDouble
from tests.on_modal.deployed import KEY, deployed, mounts

pytestmark = pytest.mark.integration

needs_containers = pytest.mark.skipif(not containers_possible(), reason="this machine lets nobody make namespaces")
EMBEDDED = {"CLAAS_MODAL_SERVING": "embedded"}


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str


def claas(cloud: ModalDouble, *arguments: str, typed: str = "", **environment: str) -> Outcome:
    """Our command as an operator runs it."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("CLAAS_", "VLLM_", "MODAL_"))}
    done = subprocess.run(
        [sys.executable, "-m", "claas", *arguments],
        input=typed, env={**known, **cloud.environment(), "COLUMNS": "200", **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def deploy(cloud: ModalDouble, *options: str, **environment: str) -> str:
    """What the command says."""
    done = claas(cloud, "modal", "deploy", *options, **environment)
    assert done.code == 0, done.out + done.err
    return done.out


def shown_key(said: str) -> str | None:
    shown = re.search(r"export VLLM_API_KEY=(\S+)", said)
    return shown[1] if shown else None


def status(cloud: ModalDouble, *options: str, **environment: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(claas(cloud, "modal", "status", "--json", *options, **environment).out)
    return told


def doctor(cloud: ModalDouble, folder: Path, **environment: str) -> dict[str, tuple[str, str]]:
    """What is found on Modal."""
    done = claas(cloud, "doctor", "--mode", "modal", "--data-dir", str(folder), "--port", "0", "--json", **environment)
    return {part: (found["status"], found["detail"]) for part, found in json.loads(done.out).items() if part.startswith("modal")}


def volume(cloud: ModalDouble, name: str = "claas-adapters") -> modal.Volume:
    return modal.Volume.from_name(name, client=cloud.client())


def fill(cloud: ModalDouble, folder: Path) -> None:
    """An adapter of two versions, the second of which is not complete, and one that is being deleted: one version counts."""
    files = {"kuro/v0/manifest.json": "{}", "kuro/v0/weights": "12345", "kuro/v1/weights": "12345", "kuro/latest": "0"}
    for name, text in {**files, ".trash-1/v0/manifest.json": "{}"}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with volume(cloud).batch_upload() as batch:
        batch.put_directory(folder, "/")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[ModalDouble]:
    with ModalDouble(tmp_path / "modal") as cloud:
        yield cloud


@pytest.fixture(name="well", scope="module")
def _well(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModalDouble]:
    """With the app, deployed with VLLM_API_KEY, for tests that only look."""
    with ModalDouble(tmp_path_factory.mktemp("modal")) as cloud:
        deploy(cloud, VLLM_API_KEY="key")
        yield cloud


def test_what_is_deployed_is_what_is_declared(cloud: ModalDouble) -> None:
    said = deploy(cloud, CLAAS_MODAL_GPU="H100", CLAAS_MODAL_MAX_CONTAINERS="2", CLAAS_KEEP_VERSIONS="5")
    app = cloud.apps.deployed("claas")
    assert app is not None and f"claas is deployed: https://modal.com/id/{app.id}" in said and "claas serve --mode modal" in said
    assert set(app.functions) == {"DistillWorker.*", "VllmServer.*", "api"}
    worker = cloud.functions.get(cloud.apps.function_id("claas", "DistillWorker.*"))
    assert (worker.definition.resources.gpu_config.gpu_type, worker.max_containers, worker.concurrency) == ("H100", 2, 1)
    assert worker.definition.checkpointing_enabled
    mounts = {mount.mount_path: (mount.volume_id, mount.read_only) for mount in worker.definition.volume_mounts}
    adapters, models = (cloud.volumes.names.get("", name) for name in ("claas-adapters", "claas-models"))
    assert mounts == {"/adapters": (adapters, False), "/models": (models, False)}
    steps = cloud.images.commands(worker.definition.image_id)
    assert any("torch==" in step for step in steps) and not any("vllm==" in step for step in steps)
    baked = cloud.images.environment(worker.definition.image_id)
    assert (baked["CLAAS_MODAL_GPU"], baked["CLAAS_KEEP_VERSIONS"]) == ("H100", "5")
    assert not {"VLLM_API_KEY", "CLAAS_API_KEYS", "MODAL_TOKEN_SECRET"} & set(baked)
    assert not cloud.live_containers() and not cloud.unimplemented


def test_vllm_is_one_container_that_reads_adapters_and_has_the_key(cloud: ModalDouble) -> None:
    key = shown_key(deploy(cloud))
    server = cloud.functions.get(cloud.apps.function_id("claas", "VllmServer.*"))
    assert server.max_containers == 1 and server.concurrency > 1
    assert {mount.mount_path: mount.read_only for mount in server.definition.volume_mounts} == {"/adapters": True, "/models": False}
    (secret,) = server.definition.secret_ids
    assert cloud.secrets.environment(secret) == {"VLLM_API_KEY": key}
    assert key and len(key) > 40
    assert any("vllm==" in step for step in cloud.images.commands(server.definition.image_id))


def test_the_key_is_shown_once_and_kept(cloud: ModalDouble) -> None:
    first = shown_key(deploy(cloud))
    again = deploy(cloud)
    assert shown_key(again) is None and "is kept" in again
    assert cloud.secrets.named("claas-key") == {"VLLM_API_KEY": first}
    assert status(cloud)["deployed"]["version"] == 2


def test_another_key_is_drawn_or_named(cloud: ModalDouble) -> None:
    first = shown_key(deploy(cloud))
    second = shown_key(deploy(cloud, "--new-key"))
    assert second and second != first
    assert cloud.secrets.named("claas-key") == {"VLLM_API_KEY": second}
    said = deploy(cloud, VLLM_API_KEY="one-of-my-own")
    assert "one-of-my-own" not in said
    assert cloud.secrets.named("claas-key") == {"VLLM_API_KEY": "one-of-my-own"}
    both = claas(cloud, "modal", "deploy", "--new-key", VLLM_API_KEY="one-of-my-own")
    assert both.code == 2 and "--new-key" in both.err


def test_without_vllm_there_is_neither_server_nor_key(cloud: ModalDouble) -> None:
    assert shown_key(deploy(cloud, **EMBEDDED)) is None
    app = cloud.apps.deployed("claas")
    assert app is not None and set(app.functions) == {"DistillWorker.*", "api"}
    assert cloud.secrets.named("claas-key") is None


def test_a_dry_run_asks_modal_nothing(cloud: ModalDouble) -> None:
    deploy(cloud, "--dry-run")
    assert not cloud.calls


def test_status_tells_what_there_is(cloud: ModalDouble, tmp_path: Path) -> None:
    nothing = claas(cloud, "modal", "status")
    assert nothing.code == 1 and "claas is not deployed: 'claas modal deploy' does it" in nothing.out
    assert status(cloud) == {"app": "claas", "deployed": None, "volume": None, "worker": None}
    deploy(cloud)
    fill(cloud, tmp_path / "adapters")
    told = status(cloud)
    assert told["volume"] == {"name": "claas-adapters", "adapters": 1, "versions": 1, "size_bytes": 15}
    assert told["deployed"]["tags"]["claas"] == __version__
    assert {function["name"]: function["containers"] for function in told["deployed"]["functions"]} == {
        "DistillWorker": 0, "VllmServer": 0, "api": 0,
    }  # fmt: skip
    shown = claas(cloud, "modal", "status")
    assert shown.code == 0 and "1 with 1 versions" in shown.out and "0 containers run" in shown.out
    assert not cloud.live_containers()


@needs_containers
def test_the_worker_is_asked_only_on_demand(tmp_path: Path, tiny_model_dir: Path) -> None:
    tiny = {**EMBEDDED, "CLAAS_BASE_MODEL_ID": str(tiny_model_dir), **mounts(tmp_path)}
    with ModalDouble(tmp_path / "modal", env={"PYTHONPATH": "", "CLAAS_DEVICE": "cpu"}) as cloud:
        deploy(cloud, **tiny)
        assert status(cloud, **tiny)["worker"] is None and not cloud.live_containers()
        told = status(cloud, "--ask", **tiny)["worker"]
        assert (told["claas"], told["gpu"], told["device"], told["lessons"]) == (__version__, "L40S", "cpu", 0)
        running = {function["name"]: function["containers"] for function in status(cloud, **tiny)["deployed"]["functions"]}
        assert running == {"DistillWorker": 1, "api": 0}
        assert claas(cloud, "modal", "destroy", "--yes", **tiny).code == 0


def test_destroy_keeps_the_adapters(cloud: ModalDouble, tmp_path: Path) -> None:
    key = shown_key(deploy(cloud))
    fill(cloud, tmp_path / "adapters")
    declined = claas(cloud, "modal", "destroy", typed="n\n")
    assert declined.code == 1 and cloud.apps.deployed("claas")
    done = claas(cloud, "modal", "destroy", "--yes")
    assert done.code == 0 and "claas is stopped" in done.out and "Adapters stay" in done.out
    assert cloud.apps.deployed("claas") is None
    assert status(cloud)["volume"]["adapters"] == 1
    assert "was not deployed" in claas(cloud, "modal", "destroy", "--yes").out
    assert "is kept" in deploy(cloud) and cloud.secrets.named("claas-key") == {"VLLM_API_KEY": key}


def test_destroying_the_adapters_leaves_nothing(cloud: ModalDouble, tmp_path: Path) -> None:
    deploy(cloud)
    fill(cloud, tmp_path / "adapters")
    wrong = claas(cloud, "modal", "destroy", "--adapters", "--yes", typed="y\n")
    assert wrong.code == 2 and cloud.apps.deployed("claas") and status(cloud)["volume"]
    done = claas(cloud, "modal", "destroy", "--adapters", typed="claas\n")
    assert done.code == 0 and "are deleted" in done.out
    assert status(cloud) == {"app": "claas", "deployed": None, "volume": None, "worker": None}
    assert cloud.secrets.named("claas-key") is None and cloud.volumes.names.get("", "claas-models") is None


@pytest.mark.parametrize("command", [["deploy"], ["status"], ["destroy", "--yes"]])
def test_a_wrong_token_is_told(cloud: ModalDouble, command: list[str]) -> None:
    done = claas(cloud, "modal", *command, **cloud.environment("as-wrong"))
    assert (done.code, done.err) == (1, f"claas: {NO_TOKEN}\n")
    assert "as-wrong" not in done.out + done.err


def test_no_token_is_told(cloud: ModalDouble) -> None:
    none = {"MODAL_TOKEN_ID": "", "MODAL_TOKEN_SECRET": ""}
    assert claas(cloud, "modal", "status", **none).err == f"claas: {NO_TOKEN}\n"


def test_what_modal_refuses_is_told_in_its_words(cloud: ModalDouble) -> None:
    done = claas(cloud, "modal", "deploy", CLAAS_MODAL_SECRETS='["hub"]')
    assert done.code == 2 and "Modal refuses the app: " in done.err and "'hub'" in done.err
    cloud.faults.refuse("AppPublish", Status.RESOURCE_EXHAUSTED, "the spending limit is reached", times=9)
    assert claas(cloud, "modal", "deploy").err == f"claas: {EXHAUSTED}\n"


def test_an_app_of_another_name_and_environment(cloud: ModalDouble) -> None:
    elsewhere = {"CLAAS_MODAL_APP": "mine", "CLAAS_MODAL_ENVIRONMENT": "dev"}
    deploy(cloud, **elsewhere)
    assert cloud.apps.deployed("mine", "dev") and not cloud.apps.deployed("claas")
    assert status(cloud, **elsewhere)["deployed"]["app"] == "mine"
    assert status(cloud)["deployed"] is None


def test_doctor_finds_all_well(well: ModalDouble, tmp_path: Path) -> None:
    found = doctor(well, tmp_path, VLLM_API_KEY="key")
    assert {status for status, _ in found.values()} == {"ok"}, found
    assert list(found) == ["modal price", "modal token", "modal app", "modal worker", "modal adapters", "modal vllm"]
    assert "Qwen_Qwen3-8B" in found["modal worker"][1]
    assert not well.live_containers()


@pytest.mark.parametrize(
    ("changes", "part", "do"),
    [
        ({"CLAAS_MODAL_APP": "other"}, "modal app", "run 'claas modal deploy'"),
        (
            {"CLAAS_BASE_MODEL_ID": "Qwen/Qwen3-4B"},
            "modal worker",
            "model Qwen_Qwen3-8B instead of Qwen_Qwen3-4B: run 'claas modal deploy'",
        ),
        ({"CLAAS_MODAL_GPU": "H100"}, "modal worker", "gpu L40S instead of H100"),
        ({"VLLM_API_KEY": ""}, "modal vllm", "VLLM_API_KEY is not set"),
        ({"MODAL_TOKEN_SECRET": "as-wrong"}, "modal token", "modal setup"),
    ],
)
def test_doctor_names_what_is_wrong(well: ModalDouble, tmp_path: Path, changes: dict[str, str], part: str, do: str) -> None:
    found = doctor(well, tmp_path, **{"VLLM_API_KEY": "key", **changes})
    assert [name for name, (status, _) in found.items() if status != "ok"] == [part], found
    assert found[part][0] == "fail" and do in found[part][1]


@needs_containers
def test_doctor_asks_a_vllm_that_runs(tmp_path: Path) -> None:
    with deployed(tmp_path) as app:

        def vllm(key: str) -> tuple[str, str]:
            return doctor(app.cloud, tmp_path / "data", **app.environment, VLLM_API_KEY=key)["modal vllm"]

        assert vllm(KEY) == ("ok", "no container runs: the first reply waits for one")
        assert not app.cloud.live_containers()
        assert httpx.get(f"{app.vllm_url()}/health", headers={"authorization": f"Bearer {KEY}"}, timeout=60).status_code == 200
        assert vllm(KEY) == ("ok", "runs, and is well")
        status, told = vllm("another")
        assert status == "fail" and "VLLM_API_KEY" in told and "another" not in told


def test_doctor_tells_a_gpu_without_a_price_and_a_modal_that_is_away(well: ModalDouble, tmp_path: Path) -> None:
    found = doctor(well, tmp_path, CLAAS_MODAL_GPU="B9000", MODAL_SERVER_URL="http://127.0.0.1:9")
    assert found["modal price"] == ("warn", "no price is known of B9000: CLAAS_MODAL_PRICES sets it, dollars a second")
    assert found["modal"] == ("fail", UNREACHABLE)
