"""The app, deployed on the double of Modal with a tiny model, and the double of vLLM in place of vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import modal

from tests.modal_server.server import ModalDouble
from tests.models.tiny import save_tiny_model

ROOT = Path(__file__).parents[2]
KEY = "the-key-of-vllm"
VLLM = """#!{python}
import os, sys, threading, time
sys.path.insert(0, {root!r})
from transformers import AutoTokenizer
from tests.doubles.vllm_server import VllmDouble
words = sys.argv[1:]
def said(flag):
    return words[words.index(flag) + 1]
double = VllmDouble(AutoTokenizer.from_pretrained(words[1]), model=said("--served-model-name"), dev_mode=False)
double.port = int(said("--port"))
double.start()
while not os.path.exists({ends!r}):
    time.sleep(0.05)
os.remove({ends!r})
os._exit(3)
"""


@dataclass(frozen=True)
class Deployed:
    """The app in its cloud. `ends` is a file that ends vLLM when it is written."""

    cloud: ModalDouble
    client: modal.Client
    environment: dict[str, str]
    adapters: str
    ends: Path

    def vllm_url(self) -> str:
        url = modal.Cls.from_name("claas", "VllmServer", client=self.client)().web.get_web_url()
        assert isinstance(url, str)
        return url

    def none_runs(self) -> None:
        """Until no container of the app runs."""
        give_up = time.monotonic() + 60
        while self.cloud.live_containers("claas"):
            assert time.monotonic() < give_up, self.cloud.logs()[-4000:]
            time.sleep(0.05)

    def upload(self, folder: Path, path: str) -> None:
        with modal.Volume.from_name("claas-adapters", client=self.client).batch_upload() as batch:
            batch.put_directory(folder, path)


def modal_command(cloud: ModalDouble, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`modal` as an operator runs it."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("CLAAS_", "VLLM_", "MODAL_"))}
    return subprocess.run(
        [sys.executable, "-m", "modal", *words],
        env={**known, **cloud.environment(), **settings}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def deploy(cloud: ModalDouble, **settings: str) -> None:
    done = modal_command(cloud, "deploy", "-m", "claas.training.engine.modal_app", **settings)
    assert done.returncode == 0, done.stdout + done.stderr


def mounts(folder: Path) -> dict[str, str]:
    """Settings of an app whose containers see their Volumes under `folder`: those of two doubles must not mount on the same place."""
    return {f"CLAAS_MODAL_{kept.upper()}_PATH": str(folder / "mount" / kept) for kept in ("volume", "models")}


@contextmanager
def deployed(folder: Path, **settings: str) -> Iterator[Deployed]:
    """With everything that is kept anywhere under `folder`."""
    programs = folder / "bin"
    programs.mkdir()
    ends = folder / "vllm-ends"
    (programs / "vllm").write_text(VLLM.format(python=sys.executable, root=str(ROOT), ends=str(ends)))
    (programs / "vllm").chmod(0o755)
    chosen = {"CLAAS_BASE_MODEL_ID": str(save_tiny_model(folder / "tiny")), "CLAAS_DTYPE": "float32", **mounts(folder), **settings}
    with ModalDouble(folder / "cloud", env={"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}) as cloud:
        client = cloud.client()
        modal.Secret.objects.create("claas-key", {"VLLM_API_KEY": KEY}, client=client)
        deploy(cloud, **chosen)
        yield Deployed(cloud, client, chosen, chosen["CLAAS_MODAL_VOLUME_PATH"], ends)
