"""`claas doctor`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import SecretStr

from claas.cli.checks import check_address, check_device, check_folder, check_model, check_packages
from claas.cli.vllm_checks import check_adapters_folder, check_vllm
from claas.core.settings import Settings
from claas.models.default_model import MANIFEST, SMOLLM2
from tests.cli.conftest import KEY, WITHOUT_MODAL, Live, claas
from tests.cli.vllm_says import CONTROL, LORA, PATHS, answers, saying


def examined(*options: str, **environment: str) -> dict[str, dict[str, str]]:
    result = claas("doctor", *options, "--json", **environment)
    report: dict[str, dict[str, str]] = json.loads(result.out)
    assert result.code == int(any(part["status"] == "fail" for part in report.values()))
    return report


def test_all_is_well_here(tmp_path: Path) -> None:
    report = examined("--data-dir", str(tmp_path / "new" / "folder"), "--port", "0")
    assert {part["status"] for part in report.values()} <= {"ok", "warn"}
    assert {"python", "settings", "extra 'local'", "data folder", "address"} <= set(report)
    assert not (tmp_path / "new").exists()


def test_the_table_says_the_same(tmp_path: Path) -> None:
    out = claas("doctor", "--data-dir", str(tmp_path), "--port", "0").out
    assert "python" in out
    assert "GiB free" in out


def test_a_wrong_setting_ends_the_examination(tmp_path: Path) -> None:
    report = examined("--data-dir", str(tmp_path), CLAAS_MAX_BATCH="0")
    assert report["settings"]["status"] == "fail"
    assert "max_batch" in report["settings"]["detail"]
    assert set(report) == {"python", "settings"}


def test_the_model_is_looked_for(tmp_path: Path) -> None:
    def model(**settings: Any) -> tuple[str, str]:
        finding = check_model(Settings(cache_dir=tmp_path, **settings))
        return finding.status, finding.detail

    assert model() == ("warn", "the first start fetches SmolLM2-135M-Instruct (89 MiB)")
    (tmp_path / SMOLLM2.folder).mkdir()
    (tmp_path / SMOLLM2.folder / MANIFEST).write_text('{"files": {}}')
    assert model()[0] == "ok"
    assert model(base_model_id="nobody/nothing")[0] == "warn"
    assert model(base_model_id=str(tmp_path))[0] == "fail"
    (tmp_path / "config.json").write_text("{}")
    assert model(base_model_id=str(tmp_path))[0] == "ok"


def test_the_device_is_told() -> None:
    finding = check_device(Settings(device="cpu", dtype="float32"))
    assert (finding.status, finding.detail) == ("ok", "cpu, float32")
    if not torch.cuda.is_available():
        finding = check_device(Settings(device="cuda"))
        assert finding.status == "fail"
        assert "CLAAS_DEVICE" in finding.detail


def test_the_extras_that_are_needed_are_looked_for() -> None:
    findings = {finding.part for finding in check_packages(Settings(distill_execution_mode="modal", database_url="postgresql://x/y"))}
    assert findings == {"extra 'local'", "extra 'modal'", "extra 'postgres'"}


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    run = [sys.executable, "-c", WITHOUT_MODAL, "doctor", "--mode", "modal", "--data-dir", str(tmp_path), "--port", "0", "--json"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    found = json.loads(done.stdout)["extra 'modal'"]
    assert done.returncode == 1
    assert found == {"status": "fail", "detail": "modal missing: pip install 'claas[modal]'"}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = check_folder("data folder", tmp_path / "file" / "data")
    assert finding.status == "fail"
    assert "cannot be written" in finding.detail


def _hang_up(other: socket.socket) -> None:
    connection, _ = other.accept()
    connection.close()


def test_the_port_of_another_program_fails(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(30)
        port = other.getsockname()[1]
        closing = threading.Thread(target=_hang_up, args=[other])
        closing.start()
        finding = check_address(Settings(data_dir=tmp_path, port=port))
        closing.join()
    assert finding.status == "fail"
    assert "--port" in finding.detail


def test_a_running_service_is_recognised(live: Live) -> None:
    port = int(live.url.rsplit(":", 1)[1])
    settings = Settings(data_dir=live.world.services.settings.data_dir, port=port, api_keys=(SecretStr(KEY),))
    assert check_address(settings).status == "ok"
    live.world.inference.unhealthy = "out of memory"
    finding = check_address(settings)
    assert (finding.status, "unhealthy" in finding.detail) == ("warn", True)


def vllm(said: dict[str, Any], *, key: str = "", **settings: Any) -> dict[str, tuple[str, str]]:
    """What is found in a vLLM that answers so."""
    with saying(said, key) as url:
        found = list(check_vllm(Settings(**{"base_model_id": "tiny", **settings}), url))
    return {finding.part: (finding.status, finding.detail) for finding in found}


def test_a_vllm_in_which_all_is_well() -> None:
    found = vllm(answers())
    assert {status for status, _ in found.values()} == {"ok"}
    assert list(found) == [f"vllm{part}" for part in ("", " model", " adapters", " control", " lora", " sleep", " state", " folder")]
    assert found["vllm"][1].startswith("0.32.0 at http://127.0.0.1:")


@pytest.mark.parametrize(
    ("changes", "part", "status", "do"),
    [
        ({"version": "0.30.2"}, "vllm", "fail", "pip install vllm==0.32.0"),
        ({"version": "dev"}, "vllm", "warn", "0.32.0"),
        ({"model": "other"}, "vllm model", "warn", "CLAAS_BASE_MODEL_ID"),
        ({"paths": CONTROL}, "vllm adapters", "fail", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"paths": PATHS}, "vllm control", "fail", "VLLM_SERVER_DEV_MODE=1"),
        ({"lora": None}, "vllm lora", "fail", "--enable-lora"),
        ({"lora": LORA | {"max_loras": 1}}, "vllm lora", "warn", "--max-loras 2"),
        ({"lora": LORA | {"target_modules": None}}, "vllm lora", "warn", "--lora-target-modules"),
        ({"lora": LORA | {"target_modules": ["q_proj", "lm_head"]}}, "vllm lora", "warn", "--lora-target-modules"),
        ({"lora": {}}, "vllm flags", "warn", "scripts/start-vllm"),
        ({"sleep_mode": False}, "vllm sleep", "fail", "--enable-sleep-mode"),
        ({"sleep_mode": False, "device": "cpu"}, "vllm sleep", "ok", "CPU"),
        ({"sleeping": True}, "vllm state", "warn", "wakes it"),
    ],
)
def test_what_is_wrong_with_a_vllm_is_told_with_what_to_do(changes: dict[str, Any], part: str, status: str, do: str) -> None:
    found = vllm(answers(**changes))
    assert found[part][0] == status
    assert do in found[part][1]
    assert all(other == "ok" for name, (other, _) in found.items() if name != part)


def test_what_a_policy_does_without_is_no_fault() -> None:
    assert vllm(answers(paths=PATHS), vllm_release="none")["vllm control"][0] == "ok"
    assert vllm(answers(sleep_mode=False), vllm_release="kv_release")["vllm sleep"][0] == "ok"


def test_the_limits_of_adapters_are_told() -> None:
    assert vllm(answers())["vllm lora"][1] == "4 adapters in a batch, rank 32 at most, on q_proj, v_proj and no other layers"


def test_a_model_may_have_another_name_there(tmp_path: Path) -> None:
    said = answers()
    said["/v1/models"]["data"][0] |= {"id": "served-name", "root": f"{tmp_path}/"}
    assert vllm(said, base_model_id=str(tmp_path))["vllm model"] == ("ok", f"serves {tmp_path} as 'served-name'")


def test_the_key_of_a_vllm() -> None:
    assert vllm(answers(), key="k", vllm_api_key=SecretStr("k"))["vllm model"][0] == "ok"
    refused = vllm(answers(), key="k")
    assert list(refused) == ["vllm", "vllm key"]
    assert "VLLM_API_KEY" in refused["vllm key"][1]


def test_something_else_than_a_vllm(tmp_path: Path) -> None:
    assert vllm({"/version": ["?"]})["vllm"][0] == "fail"
    assert "no vLLM" in vllm({})["vllm"][1]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    report = examined("--data-dir", str(tmp_path), "--port", "0", "--vllm-url", f"{url}/v1")
    assert report["vllm"]["status"] == "fail"
    assert f"none answers at {url}: scripts/start-vllm" in report["vllm"]["detail"]


def test_the_adapters_folder_cannot_be_seen_from_outside(tmp_path: Path) -> None:
    here = check_adapters_folder(Settings(lora_root=tmp_path), "http://127.0.0.1:8000")
    assert (here.status, "says so if it cannot" in here.detail) == ("ok", True)
    elsewhere = check_adapters_folder(Settings(lora_root=tmp_path), "http://vllm:8000")
    assert (elsewhere.status, "CLAAS_VLLM_LORA_ROOT" in elsewhere.detail) == ("warn", True)
    mounted = check_adapters_folder(Settings(lora_root=tmp_path, vllm_lora_root=Path("/adapters")), "http://vllm:8000")
    assert (mounted.status, "as /adapters" in mounted.detail) == ("ok", True)
