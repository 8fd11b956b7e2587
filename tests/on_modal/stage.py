"""The app on the double of Modal: deployed, with a tiny base model, its containers processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import modal

from claas.core.settings import Settings
from tests.modal_server.server import ModalDouble
from tests.on_modal.deployed import deploy, mounts

APP = "claas-test"


@contextmanager
def on_stage(folder: Path, model: Path, *, deployed: bool = True, **environment: str) -> Iterator[ModalDouble]:
    """A double, which is where the SDK of this process calls meanwhile. `environment` is the operator's, besides the model."""
    with ModalDouble(folder, env={"CLAAS_DEVICE": "cpu"}) as server:
        if deployed:
            deploy(server, **operators(model), **mounts(folder), **environment)
        modal.Client._set_env_client(server.client())
        try:
            yield server
        finally:
            modal.Client._set_env_client(None)


def operators(model: Path) -> dict[str, str]:
    """What the operator has set where the app is deployed."""
    return {"CLAAS_MODAL_APP": APP, "CLAAS_BASE_MODEL_ID": str(model), "CLAAS_DTYPE": "float32", "CLAAS_MODAL_SERVING": "embedded"}


def modal_settings(folder: Path, model: Path, **more: Any) -> Settings:
    """Of a service whose lessons are trained on the double, and whose replies come from the model in its process."""
    return Settings(
        distill_execution_mode="modal", modal_app=APP, modal_serving="embedded", base_model_id=str(model), data_dir=folder, dtype="float32",
        device="cpu", **more,
    )  # fmt: skip
