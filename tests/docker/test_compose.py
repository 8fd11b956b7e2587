"""docker/compose.yaml, as Compose itself reads it: nothing but the API is reached, nothing runs as root for long, all is pinned."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.docker.compose import EXAMPLE, FILE, KEYS, ROOT, Project, compose_command, config, example, parse

UNPRIVILEGED = "2000:2000"


@pytest.fixture(scope="module")
def command() -> list[str]:
    found = compose_command()
    if found is None:
        missing = "no Compose here to read docker/compose.yaml: install docker-compose (it needs no engine for that)"
        if "CI" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)
    return found


@pytest.fixture(scope="module")
def project(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The file with the example's settings and a key."""
    result = config(command, tmp_path_factory.mktemp("compose"), example() | {"CLAAS_API_KEYS": KEYS})
    assert result.returncode == 0, result.stderr
    return parse(result.stdout)


def test_without_a_key_nothing_starts(command: list[str], tmp_path: Path) -> None:
    result = config(command, tmp_path, example())
    assert result.returncode != 0
    assert "docker/.env.example" in result.stderr


def test_the_profile_holds_all_three(project: Project) -> None:
    assert set(project.services) == {"init", "vllm", "api"}
    assert all(service.raw["profiles"] == ["local"] for service in project.services.values())


def test_only_the_api_has_a_port_and_only_on_loopback(project: Project) -> None:
    assert {name: service.ports for name, service in project.services.items()} == {
        "init": [],
        "vllm": [],
        "api": ["127.0.0.1:8080:8080"],
    }


def test_the_port_can_be_opened_by_saying_so(command: list[str], tmp_path: Path) -> None:
    result = config(command, tmp_path, {"CLAAS_API_KEYS": KEYS, "API_BIND": "192.0.2.1", "API_PORT": "9000"})
    assert parse(result.stdout).services["api"].ports == ["192.0.2.1:9000:8080"]


def test_vllm_is_on_a_network_that_leads_nowhere(project: Project) -> None:
    assert {name: set(service.raw["networks"]) for name, service in project.services.items()} == {
        "init": {"public"},
        "vllm": {"private"},
        "api": {"private", "public"},
    }
    assert project.networks["private"]["internal"] is True
    assert not any("network_mode" in service.raw for service in project.services.values())


def test_nothing_that_stays_is_root_and_nothing_has_more_rights_than_it_needs(project: Project) -> None:
    users = {name: service.raw["user"] for name, service in project.services.items()}
    assert users == {"init": "0:0", "vllm": UNPRIVILEGED, "api": UNPRIVILEGED}
    for service in project.services.values():
        assert service.raw["cap_drop"] == ["ALL"]
        assert service.raw["security_opt"] == ["no-new-privileges:true"]
        assert not service.raw.get("privileged")
    rights = {name: set(service.raw.get("cap_add", [])) for name, service in project.services.items()}
    assert rights == {"init": {"CHOWN", "DAC_OVERRIDE", "SETGID", "SETUID"}, "vllm": set(), "api": set()}
    assert project.services["init"].raw["restart"] == "no"
    assert project.services["api"].raw["read_only"] is True


def test_adapters_are_written_by_the_api_and_read_by_vllm(project: Project) -> None:
    api, vllm, init = (project.services[name] for name in ("api", "vllm", "init"))
    assert api.mounts["/adapters"].source == vllm.mounts["/adapters"].source == init.mounts["/adapters"].source == "adapters"
    assert not api.mounts["/adapters"].read_only
    assert vllm.mounts["/adapters"].read_only
    assert api.environment["CLAAS_LORA_ROOT"] == "/adapters"
    assert api.environment["CLAAS_VLLM_LORA_ROOT"] == "/adapters"


def test_the_model_is_fetched_by_init_alone(project: Project) -> None:
    api, vllm, init = (project.services[name] for name in ("api", "vllm", "init"))
    assert api.mounts["/models"].read_only
    assert vllm.mounts["/models"].read_only
    assert not init.mounts["/models"].read_only
    assert api.environment["HF_HUB_OFFLINE"] == vllm.environment["HF_HUB_OFFLINE"] == "1"
    assert [name for name, service in project.services.items() if "HF_TOKEN" in service.environment] == ["init"]
    assert init.command[0] == api.environment["CLAAS_BASE_MODEL_ID"] == vllm.command[vllm.command.index("--model") + 1]


def test_init_prepares_every_folder_that_is_written_to(project: Project) -> None:
    prepared = set(project.services["init"].command[1:])
    written = {mount.source for name in ("api", "vllm") for mount in project.services[name].mounts.values() if not mount.read_only} | {
        "models"
    }
    assert {project.services["init"].mounts[folder].source for folder in prepared} == written


def test_a_model_of_this_machine_is_mounted_for_all(command: list[str], tmp_path: Path) -> None:
    result = config(command, tmp_path, {"CLAAS_API_KEYS": KEYS, "BASE_MODEL": "/model", "MODEL_DIR": str(tmp_path)})
    for service in parse(result.stdout).services.values():
        assert (service.mounts["/model"].source, service.mounts["/model"].read_only) == (str(tmp_path), True)


def test_both_have_the_same_gpu(project: Project) -> None:
    wanted = [project.services[name].raw["deploy"]["resources"]["reservations"]["devices"] for name in ("api", "vllm")]
    assert wanted[0] == wanted[1]
    assert wanted[0][0]["device_ids"] == ["0"]
    assert wanted[0][0]["capabilities"] == ["gpu"]


def test_each_waits_until_what_it_needs_is_well(project: Project) -> None:
    assert project.services["vllm"].waits_for == {"init": "service_completed_successfully"}
    assert project.services["api"].waits_for == {"init": "service_completed_successfully", "vllm": "service_healthy"}
    assert "/health" in project.services["vllm"].raw["healthcheck"]["test"][-1]


def test_every_image_is_pinned(project: Project) -> None:
    assert project.services["vllm"].raw["image"] == "vllm/vllm-openai:v0.32.0"
    for service in project.services.values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service.raw["image"])


def test_vllm_is_started_with_every_flag_that_claas_needs(project: Project) -> None:
    vllm = project.services["vllm"]
    script, *_ = [mount.source for mount in vllm.mounts.values() if mount.target == "/usr/local/bin/start-vllm"]
    assert vllm.raw["entrypoint"] == ["sh", "/usr/local/bin/start-vllm"]
    said = subprocess.run(["sh", script, "--dry-run", *vllm.command], capture_output=True, text=True, timeout=60, check=True).stdout
    words = said.split()
    assert {"VLLM_SERVER_DEV_MODE=1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "--enable-lora", "--enable-sleep-mode"} <= set(words)
    flags = dict(pairwise(words))
    assert (flags["serve"], flags["--served-model-name"], flags["--host"]) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "0.0.0.0")
    assert (flags["--max-loras"], flags["--max-lora-rank"], flags["--max-model-len"]) == ("4", "32", "16384")
    assert flags["--max-cpu-loras"] == project.services["api"].environment["CLAAS_VLLM_MAX_ADAPTERS"] == "32"
    assert (flags["--gpu-memory-utilization"], flags["--tool-call-parser"]) == ("0.88", "hermes")


def test_the_api_takes_the_settings_that_it_is_given(project: Project, tmp_path: Path) -> None:
    api = project.services["api"].environment | {"CLAAS_DATA_DIR": str(tmp_path)}
    code = (
        "from claas.core.settings import load_settings; s = load_settings(host='0.0.0.0');"
        "print(s.vllm_base_url, s.base_model_id, s.adapters_dir, s.vllm_lora_root, s.vllm_release, len(s.api_keys))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=api | {"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.split() == ["http://vllm:8000", "Qwen/Qwen3-8B", "/adapters", "/adapters", "auto", "1"]


def test_the_profile_tinker_is_one_service_with_a_key_and_no_gpu(command: list[str], tmp_path: Path) -> None:
    result = config(command, tmp_path, example() | {"CLAAS_API_KEYS": KEYS, "CLAAS_TINKER_API_KEY": "tml-mine"}, profile="tinker")
    (service,) = parse(result.stdout, "tinker").services.values()
    assert (service.raw["user"], service.raw["read_only"], service.raw["cap_drop"]) == (UNPRIVILEGED, True, ["ALL"])
    assert service.ports == ["127.0.0.1:8080:8080"]
    assert "deploy" not in service.raw and "local" not in service.raw["build"]["args"]["EXTRAS"]
    assert set(service.mounts) == {"/data", "/models"}
    code = (
        "from claas.core.settings import load_settings; s = load_settings(host='0.0.0.0');"
        "print(s.distill_execution_mode, s.tinker_key, s.tinker_base_url, s.base_model_id, s.adapters_dir)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=service.environment | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    url = "https://tinker.thinkingmachines.dev/services/tinker-prod"
    assert run.stdout.split() == ["tinker", "tml-mine", url, "Qwen/Qwen3-30B-A3B", "/data/adapters"]


def test_the_example_tells_every_variable_and_its_default(command: list[str], tmp_path: Path) -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)", FILE.read_text()))
    assert set(example()) == used | {"COMPOSE_PROJECT_NAME"}
    plain = {"CLAAS_API_KEYS": KEYS, "COMPOSE_PROJECT_NAME": "claas"}
    told = config(command, tmp_path, example() | plain | {"VLLM_EXTRA_FLAGS": ""})
    assert told.stdout == config(command, tmp_path, plain).stdout != ""
    tinker = [config(command, tmp_path, given, profile="tinker").stdout for given in (example() | plain | {"VLLM_EXTRA_FLAGS": ""}, plain)]
    assert tinker[0] == tinker[1] != ""


def test_every_variable_of_the_example_is_explained() -> None:
    lines = EXAMPLE.read_text().splitlines()
    settings = [number for number, line in enumerate(lines) if re.match(r"[A-Z_]+=", line)]
    for number in settings:
        before = next(line for line in reversed(lines[:number]) if not re.match(r"[A-Z_]+=", line))
        assert before.startswith("# "), lines[number]


def test_the_example_holds_no_secret_and_the_filled_in_one_is_never_committed() -> None:
    assert {name: value for name, value in example().items() if re.search("KEY|TOKEN|SECRET|PASSWORD", name)} == {
        "CLAAS_API_KEYS": "",
        "CLAAS_TINKER_API_KEY": "",
        "HF_TOKEN": "",
        "VLLM_API_KEY": "",
    }
    assert "docker/.env" in (ROOT / ".gitignore").read_text().splitlines()
