"""`claas modal` where nothing is asked of Modal; what is asked is in tests/on_modal."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import SecretStr

from claas.cli.modal_deploy import Key, make_key, plan
from claas.cli.modal_view import key_lines
from claas.core.errors import ConfigurationError
from claas.core.settings import Settings
from tests.cli.conftest import WITHOUT_MODAL, claas


def settings(**chosen: object) -> Settings:
    return Settings(distill_execution_mode="modal", **chosen)  # type: ignore[arg-type]


def test_a_dry_run_shows_what_would_be_made_and_makes_nothing() -> None:
    chosen = {"CLAAS_MODAL_APP": "mine", "CLAAS_MODAL_GPU": "H100", "CLAAS_MODAL_MAX_CONTAINERS": "2", "COLUMNS": "200"}
    done = claas("modal", "deploy", "--dry-run", **chosen)
    assert done.code == 0
    rows = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "class DistillWorker H100 at most 2 3.95 trains lessons, one at a time" in rows
    assert "class VllmServer L40S at most 1 1.95 answers, behind its key" in rows
    assert [name for name in ("mine-adapters", "mine-models", "mine-leases", "mine-key") if name not in done.out] == []
    assert "is deployed" not in done.out


def test_an_embedded_model_needs_no_vllm_and_no_key() -> None:
    made = {planned.name for planned in plan(settings(modal_serving="embedded"))}
    assert "DistillWorker" in made
    assert not {"VllmServer", "claas-key"} & made


def test_a_gpu_without_a_price_is_told() -> None:
    done = claas("modal", "deploy", "--dry-run", CLAAS_MODAL_GPU="B9000", COLUMNS="200")
    assert "unknown: see CLAAS_MODAL_PRICES" in done.out
    priced = claas("modal", "deploy", "--dry-run", CLAAS_MODAL_GPU="B9000", CLAAS_MODAL_PRICES='{"B9000": 0.01}', COLUMNS="200")
    assert "36.00" in priced.out and "unknown" not in priced.out


def test_the_logs_are_shown_by_modals_own_command() -> None:
    assert claas("modal", "logs-hint").out == "modal app logs claas --follow --timestamps\n"
    elsewhere = claas("modal", "logs-hint", CLAAS_MODAL_APP="mine", CLAAS_MODAL_ENVIRONMENT="dev")
    assert elsewhere.out == "modal app logs mine --follow --timestamps --env dev\n"


def test_a_new_key_and_one_of_ones_own_contradict_each_other() -> None:
    with pytest.raises(ConfigurationError, match="--new-key"):
        make_key(settings(vllm_api_key=SecretStr("mine")), new=True)


def test_a_drawn_key_is_shown_and_one_that_was_given_is_not() -> None:
    assert "export VLLM_API_KEY=drawn" in key_lines(Key("drawn", "drawn"))
    assert "export" not in key_lines(Key("set")) + key_lines(Key("kept"))


def test_the_wrong_name_destroys_nothing() -> None:
    done = claas("modal", "destroy", "--adapters", typed="clas\n")
    assert done.code == 2
    assert "nothing was stopped, nothing deleted" in done.err
    declined = claas("modal", "destroy", typed="n\n")
    assert declined.code == 1


@pytest.mark.parametrize("command", [["deploy"], ["deploy", "--dry-run"], ["status"], ["destroy", "--yes"]])
def test_without_the_sdk_the_extra_is_named(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_MODAL, "modal", *command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "claas: Modal's SDK is missing: pip install 'claas[local,modal]'\n"


def test_the_logs_hint_needs_no_sdk() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MODAL, "modal", "logs-hint"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("modal app logs claas")
