"""`claas doctor`."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import torch
from pydantic import SecretStr

from claas.cli.checks import check_address, check_device, check_folder, check_model, check_packages
from claas.core.settings import Settings
from claas.models.default_model import MANIFEST, SMOLLM2
from tests.cli.conftest import KEY, Live, claas


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


def test_a_missing_extra_is_named() -> None:
    findings = {
        finding.part: finding for finding in check_packages(Settings(distill_execution_mode="modal", database_url="postgresql://x/y"))
    }
    assert findings["extra 'modal'"].status == "fail"
    assert "pip install 'claas[modal]'" in findings["extra 'modal'"].detail
    assert findings["extra 'postgres'"].status == "ok"


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
