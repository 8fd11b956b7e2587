"""What the worker on Modal does with a lesson: the local engine's work, on the mounted Volume. It knows no SDK.

What Modal gives it, the mount and a Dict for signs of life, are protocols; without them it works on a plain folder.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import time
from pathlib import Path
from typing import Any, Protocol

import torch

from claas import __version__
from claas.adapters.modal_mounted import MountedVolumeStore, VolumeMount
from claas.core.errors import BackendUnavailable, ConfigurationError
from claas.core.settings import Settings
from claas.core.types import utc_now
from claas.models.base_model import LoadedModel
from claas.models.compute import ComputeShare, usable_cores
from claas.models.load import choose_device, load_base_model
from claas.training.engine.local import LocalEngine
from claas.training.engine.modal_wire import GIVEN_UP, SCHEMA, Answer, LessonCall, WorkerFacts, encode, read_call, sign_of, told
from claas.training.report import StepReport

WITHOUT_BFLOAT16 = ("T4",)
"""GPUs of Modal's that only emulate it."""

log = logging.getLogger(__name__)


class Signs(Protocol):
    """Where a worker says that it has begun: `modal.Dict` is one."""

    def get(self, key: str, default: Any = None) -> Any: ...

    def put(self, key: str, value: Any) -> object: ...


class Worker:
    """One for a container. Made without a GPU, in the memory that a snapshot keeps; `start` is called in each container."""

    def __init__(self, settings: Settings, mount: VolumeMount | None = None, signs: Signs | None = None) -> None:
        self._settings = settings
        self._mount = mount
        self._signs = signs
        self._base = load_base_model(settings.model_copy(update={"base_model_id": settings.modal_base_model, **_on_host(settings)}))
        self._engine: LocalEngine | None = None
        self._lessons = 0
        self._started_at = ""

    def start(self) -> None:
        """Bring the base model to the device, and see the Volume."""
        self._started_at = utc_now().isoformat()
        self._base = _on_device(self._base, choose_device(self._settings.device))
        store = MountedVolumeStore(Path(self._settings.modal_volume_path), self._mount, keep_versions=self._settings.keep_versions)
        self._engine = LocalEngine(store, self._base, ComputeShare(usable_cores()))

    def distill(self, request: str) -> str:
        """A `LessonCall` in, an `Answer` out; nothing is raised but what ends the container."""
        began, cold = time.monotonic(), self._lessons == 0
        self._lessons += 1
        report, error = None, None
        try:
            report = self._distill(read_call(request))
        except Exception as broken:
            log.warning("a lesson failed", exc_info=broken)
            error = told(broken)
        facts = WorkerFacts(
            seconds=round(time.monotonic() - began, 3),
            gpu=self._settings.modal_gpu,
            device=str(self._base.device),
            cold=cold,
            started_at=self._started_at,
        )
        return encode(Answer(report=report.model_dump(mode="json") if report else None, error=error, worker=facts))

    def health(self) -> str:
        """What it is, as JSON."""
        facts = {
            "schema": SCHEMA,
            "claas": __version__,
            "base_model": self._base.id,
            "gpu": self._settings.modal_gpu,
            "device": str(self._base.device),
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "lessons": self._lessons,
            "started_at": self._started_at,
        }
        return json.dumps(facts)

    def close(self) -> None:
        if self._engine is not None:
            asyncio.run(self._engine.aclose())

    def _distill(self, call: LessonCall) -> StepReport:
        if call.base_model != self._base.id:
            raise BackendUnavailable(
                f"the worker on Modal trains {self._base.id!r}, and this service serves {call.base_model!r}: run `claas modal deploy` with "
                "the settings of the service"
            )
        if self._engine is None:
            raise ConfigurationError("the worker was not started")
        self._begin(call)
        gc.collect()  # files that an earlier lesson has mapped would keep the Volume from being reloaded
        done = asyncio.run(self._engine.distill(call.payload))
        return StepReport.model_validate(done.metadata)

    def _begin(self, call: LessonCall) -> None:
        """Say that it has begun. Raises BackendUnavailable if nobody waits for it any more."""
        if self._signs is None:
            return
        if self._signs.get(sign_of(call.call)) == GIVEN_UP:
            raise BackendUnavailable("the lesson was given up before it began")
        self._signs.put(sign_of(call.call), utc_now().isoformat())


def _on_host(settings: Settings) -> dict[str, str]:
    """How the base model is loaded where there is no GPU yet: in the type that it will be trained in."""
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "float32" if settings.modal_gpu.upper() in WITHOUT_BFLOAT16 else "bfloat16"
    return {"device": "cpu", "dtype": dtype}


def _on_device(base: LoadedModel, device: torch.device) -> LoadedModel:
    return dataclasses.replace(base, module=base.module.to(device), device=device)
