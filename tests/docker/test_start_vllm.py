"""scripts/start-vllm: the command that it would run, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from claas.adapters.initialise import DEFAULT_TARGETS
from claas.core.settings import Settings
from tests.docker.compose import ROOT
from tests.docs.markdown import rows, sections

SCRIPT = ROOT / "scripts" / "start-vllm"
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
NEEDED = {"VLLM_SERVER_DEV_MODE=1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "--enable-lora"}


def start_vllm(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(SCRIPT), *words], capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment
    )


def command(*words: str, **environment: str) -> list[str]:
    """What a dry run prints, as words."""
    done = start_vllm("--dry-run", *words, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return shlex.split(done.stdout)


def flags(*words: str) -> dict[str, str]:
    return dict(pairwise(command(*words)))


def test_on_a_gpu() -> None:
    words = command("--cuda", "--model", "Qwen/Qwen3-8B")
    assert NEEDED | {"--enable-sleep-mode"} <= set(words)
    assert words[words.index("vllm") : words.index("vllm") + 3] == ["vllm", "serve", "Qwen/Qwen3-8B"]
    assert flags("--cuda", "--model", "Qwen/Qwen3-8B")["--served-model-name"] == "Qwen/Qwen3-8B"


def test_the_layers_that_it_adapts_are_those_that_are_trained() -> None:
    words = command("--model", "a/b")
    first = words.index("--lora-target-modules") + 1
    assert tuple(words[first : first + len(DEFAULT_TARGETS)]) == DEFAULT_TARGETS
    assert words[first + len(DEFAULT_TARGETS)].startswith("--")


@pytest.mark.parametrize(
    ("words", "known", "kept"),
    [([], "", "32"), ([], "80", "80"), (["--max-loras", "48"], "", "48"), (["--max-cpu-loras", "7"], "80", "7")],
)
def test_it_keeps_as_many_adapters_as_claas_has_it_know(words: list[str], known: str, kept: str) -> None:
    """What it would not keep is read from disk in the middle of serving; fewer than --max-loras is refused by vLLM."""
    said = command("--model", "a/b", *words, CLAAS_VLLM_MAX_ADAPTERS=known)
    assert dict(pairwise(said))["--max-cpu-loras"] == kept


def test_the_default_of_both_is_the_same() -> None:
    assert flags("--model", "a/b")["--max-cpu-loras"] == str(Settings().vllm_max_adapters)


def test_on_a_cpu() -> None:
    words = command("--cpu", "--model", "Qwen/Qwen3-8B")
    assert NEEDED | {"VLLM_TARGET_DEVICE=cpu", "--enforce-eager"} <= set(words)
    assert "--enable-sleep-mode" not in words
    assert words[words.index("-m") + 1] == "vllm.entrypoints.openai.api_server"
    assert words[words.index("-m") - 1].endswith(".venv-vllm/bin/python")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU here")
def test_a_machine_without_a_gpu_takes_its_cpu() -> None:
    assert command("--model", "a/b") == command("--cpu", "--model", "a/b")


def test_it_listens_to_this_machine_alone_unless_told_otherwise() -> None:
    assert (flags("--model", "a/b")["--host"], flags("--model", "a/b")["--port"]) == ("127.0.0.1", "8000")
    assert flags("--model", "a/b", "--host", "10.0.0.1", "--port", "9")["--host"] == "10.0.0.1"


def test_the_default_is_what_claas_is_set_to(tmp_path: Path) -> None:
    assert (ROOT / ".venv" / "bin" / "python").exists(), "`make setup` makes it, and the script asks it"
    mine = dict(pairwise(command("--cpu", CLAAS_CACHE_DIR=str(tmp_path))))
    assert mine["--model"].startswith(f"{tmp_path}/SmolLM2-135M-Instruct-")
    assert mine["--served-model-name"] == "SmolLM2-135M-Instruct"
    assert not any(tmp_path.iterdir())
    set_to = dict(pairwise(command("--cpu", CLAAS_BASE_MODEL_ID="someone/something")))
    assert (set_to["--model"], set_to["--served-model-name"]) == ("someone/something", "someone/something")


def test_a_folder_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    assert flags("--model", f"{tmp_path}/my model/")["--served-model-name"] == "my model"
    assert flags("--model", str(tmp_path), "--name", "other")["--served-model-name"] == "other"


def test_what_follows_the_dashes_goes_to_vllm_as_it_is() -> None:
    words = command("--model", "a/b", "--max-model-len", "4096", "--", "--chat-template", "it's {a} template")
    assert words[-4:] == ["--max-model-len", "4096", "--chat-template", "it's {a} template"]


@pytest.mark.parametrize("words", [["--bogus"], ["--model"], ["--model", ""], ["--enable-lora"]])
def test_a_wrong_option_starts_nothing(words: list[str]) -> None:
    done = start_vllm(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("start-vllm: ")


def test_help_tells_every_option() -> None:
    text = start_vllm("--help").stdout
    taken = set(re.findall(r"^\s+(--[a-z-]+)\) [a-z_]+=\$2", SCRIPT.read_text(), flags=re.MULTILINE)) | {"--cuda", "--cpu", "--dry-run"}
    assert len(taken) == 11
    assert all(option in text for option in taken)


def test_without_a_vllm_it_says_where_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    there = ["sh", str(tmp_path / "scripts" / "start-vllm"), "--model", "a/b"]
    tools = "/usr/bin:/bin"
    for device, told in [("--cpu", "make vllm"), ("--cuda", "pip install vllm==0.32.0")]:
        done = subprocess.run([*there, device], capture_output=True, text=True, timeout=60, check=False, env={"PATH": tools})
        assert (done.returncode, told in done.stderr) == (2, True)
    done = subprocess.run(there[:2], capture_output=True, text=True, timeout=60, check=False, env={"PATH": tools})
    assert (done.returncode, "make setup" in done.stderr) == (2, True)


def test_the_page_explains_every_flag_and_no_other() -> None:
    told = [flag for row in rows(sections(ROOT / "docs" / "hybrid.md")["The flags of vLLM"]) for flag in re.findall(r"`([^`]+)`", row[0])]
    given = ["--model", "a/b", "--max-model-len", "1", "--", "--gpu-memory-utilization", "0.9"]
    words = {word for device in ("--cuda", "--cpu") for word in command(device, *given)} - {"--", "--model"}
    assert set(told) == {word for word in words if re.match("--|VLLM_", word)}


@pytest.mark.vllm
@pytest.mark.parametrize("device", ["--cpu", "--cuda"])
def test_vllm_knows_every_flag(device: str, tmp_path: Path) -> None:
    """vLLM's own parser reads them: a flag that it does not know, or a value that it refuses, ends it."""
    assert VLLM_PYTHON.exists(), "`make test-vllm` installs it"
    words = command(
        device, "--model", "a/b", "--max-model-len", "4096", "--", "--gpu-memory-utilization", "0.88", "--tool-call-parser", "hermes"
    )
    given = words[words.index("--served-model-name") :] + (["--enable-sleep-mode"] if device == "--cuda" else ["--enforce-eager"])
    code = (
        "import json, sys; from vllm.entrypoints.launchers.cli_args import make_arg_parser;"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser;"
        "args = make_arg_parser(Parser()).parse_args(sys.argv[1:]);"
        "print(json.dumps([args.enable_lora, args.max_loras, args.max_cpu_loras, args.max_lora_rank, args.max_logprobs, args.host,"
        "args.enable_sleep_mode]))"
    )
    run = subprocess.run(
        [str(VLLM_PYTHON), "-c", code, *given],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1"},
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == [True, 4, 32, 32, 64, "127.0.0.1", device == "--cuda"]
