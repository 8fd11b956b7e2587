"""The app's declaration: importing it asks nobody anything, and containers are told the operator's settings, but no secret."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from claas.core.settings import Settings
from claas.training.engine import modal_image
from claas.training.engine.modal_image import BAKED, container_environment

ROOT = Path(__file__).parents[2]
OFFLINE = """
import sys
def refuse(event, arguments):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind", "urllib.Request")):
        raise SystemExit(f"asked for {event} {arguments}")
sys.addaudithook(refuse)
"""
OF_THIS_MACHINE = frozenset(
    {"host", "port", "device", "data_dir", "cache_dir", "lora_root", "feedback_log_dir", "feedback_wake_on_failure"}
)
SECRET = frozenset({"api_keys", "database_url", "vllm_api_key"})
OF_OTHER_MODES = frozenset({"distill_execution_mode", "vllm_base_url", "vllm_lora_root", "vllm_release"})
"""The mode is said by the app itself."""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("CLAAS_", "MODAL_", "VLLM_"))}
    return subprocess.run(
        [sys.executable, "-c", OFFLINE + code], capture_output=True, text=True, timeout=120, check=False, env=ours | environment
    )


def test_importing_it_asks_nobody() -> None:
    done = run(
        "import claas.training.engine.modal_app as it\n"
        "heavy = {'torch', 'transformers', 'peft', 'fastapi', 'aiohttp', 'sqlalchemy'} & set(sys.modules)\n"
        "print(it.app.name, sorted(heavy))",
        MODAL_CONFIG_PATH="/nowhere",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "claas []\n", "")


def test_the_hook_of_that_test_sees_a_request() -> None:
    assert run("import socket; socket.create_connection(('127.0.0.1', 9))").returncode == 1


@pytest.mark.parametrize(
    "code", ["import claas", "import claas.cli.main", "import claas.wiring, claas.api.app", "import claas.core.settings"]
)
def test_only_the_app_imports_modal(code: str) -> None:
    assert run(f"{code}\nprint('modal' in sys.modules)").stdout == "False\n"


@pytest.mark.parametrize(("serving", "classes"), [("vllm", "DistillWorker VllmServer"), ("embedded", "DistillWorker")])
def test_there_is_a_vllm_only_where_it_serves(serving: str, classes: str) -> None:
    code = "import claas.training.engine.modal_app as it\nprint(*(name for name in ('DistillWorker', 'VllmServer') if name in vars(it)))"
    assert run(code, CLAAS_MODAL_SERVING=serving).stdout == f"{classes}\n"


def test_wrong_settings_are_told_where_it_is_deployed() -> None:
    done = run("import claas.training.engine.modal_app", CLAAS_MODAL_GPUS="H100")
    assert done.returncode == 1 and "did you mean CLAAS_MODAL_GPU?" in done.stderr


# Settings


SET: dict[str, Any] = {
    "modal_app": "lessons",
    "modal_environment": "staging",
    "modal_gpu": "H100",
    "modal_prices": {"H100": 0.001},
    "modal_secrets": ["hub", "claas-service"],
    "modal_volume_path": "/a",
    "modal_models_path": "/m",
    "modal_timeout_s": 77,
    "base_model_id": "someone/something",
    "trust_remote_code": "someone/something",
    "allowed_init_base_models": ["someone/something"],
    "max_context": 4096,
    "feedback_lock_timeout_s": 9.5,
    "dtype": "bfloat16",
}
HERE: dict[str, Any] = {
    "api_keys": [SecretStr("top-secret")],
    "vllm_api_key": SecretStr("top-secret"),
    "database_url": "postgresql://me:top-secret@db/claas",
    "tinker_api_key": SecretStr("top-secret"),
    "data_dir": Path("/home/me/data"),
    "cache_dir": Path("/home/me/cache"),
    "lora_root": Path("/home/me/adapters"),
    "device": "mps",
    "host": "0.0.0.0",
    "port": 80,
}


def test_a_container_reads_the_settings_of_who_deployed_it() -> None:
    told = container_environment(Settings(**SET, **HERE))
    code = "from claas.core.settings import load_settings\nprint(load_settings(distill_execution_mode='modal').model_dump_json())"
    done = run(code, **told)
    there = Settings.model_validate_json(done.stdout, by_name=True) if done.returncode == 0 else done.stderr
    assert isinstance(there, Settings), there
    for name in SET:
        assert vars(there)[name] == vars(Settings(**SET))[name], name
    assert str(there.cache_dir) == "/m/claas" and told["HF_HOME"] == "/m/hub"


def test_no_secret_and_nothing_of_this_machine_goes_there() -> None:
    told = container_environment(Settings(**SET, **HERE))
    assert "top-secret" not in str(told) and "/home/me" not in str(told) and "mps" not in told.values()
    assert set(told) == {
        "CLAAS_CACHE_DIR",
        "HF_HOME",
        *(f"CLAAS_{name.upper()}" for name in SET if name != "feedback_lock_timeout_s"),
        "FEEDBACK_LOCK_TIMEOUT_S",
    }


def test_what_nobody_set_is_not_said() -> None:
    assert set(container_environment(Settings())) == {"CLAAS_CACHE_DIR", "HF_HOME"}


def test_of_each_setting_it_is_decided_whether_a_container_is_told() -> None:
    """A new one is to be put into `BAKED`, or into one of the sets above."""
    rest = {name for name in Settings.model_fields if not name.startswith(("modal_", "tinker_"))}
    assert rest == BAKED | OF_THIS_MACHINE | SECRET | OF_OTHER_MODES
    assert not BAKED & (OF_THIS_MACHINE | SECRET | OF_OTHER_MODES)


# Images


def test_the_packages_are_those_that_were_tested() -> None:
    pins = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {*modal_image.CORE, *modal_image.TRAINING, *modal_image.GUARD} <= pins
    assert modal_image.VLLM in (ROOT / "scripts" / "start-vllm").read_text()


def test_no_package_is_missing() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {_name(line) for line in (*project["dependencies"], *extras["local"], *extras["postgres"])}
    assert wanted <= {_name(line) for line in (*modal_image.CORE, *modal_image.TRAINING)}


def _name(requirement: str) -> str:
    return requirement.partition("=")[0].partition(">")[0].partition("[")[0]


def test_vllm_is_told_the_parsers_of_the_default_model_and_of_no_other() -> None:
    assert "hermes" in Settings(distill_execution_mode="modal").modal_flags
    assert Settings(distill_execution_mode="modal", base_model_id="a/b").modal_flags == ()
    assert Settings(distill_execution_mode="modal", base_model_id="a/b", modal_vllm_flags=("--x",)).modal_flags == ("--x",)
    assert Settings(distill_execution_mode="modal", modal_vllm_flags=()).modal_flags == ()
