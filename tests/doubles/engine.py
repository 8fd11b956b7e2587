"""A training engine that keeps adapters in memory and learns nothing, but says that it did, with a whole report."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import Callable
from typing import Literal

from claas.core.adapter_id import flat_name, parse_adapter_id, vllm_name
from claas.core.errors import BackendUnavailable, BadRequest, Conflict, NotFound
from claas.core.types import (
    AdapterVersion,
    DistillBatchRequestPayload,
    DistillResponse,
    LoraDeleteResponse,
    LoraExistsPayload,
    LoraExportPayload,
    LoraInitRequest,
    LoraInitResponse,
    LoraListResponse,
    LoraRuntimeRef,
    ServiceHealth,
    StepOutcome,
    TrainingConfig,
)
from claas.training.engine.base import TrainingEngine
from claas.training.report import Cost, OffPolicy, Retention, Signal, StepReport, Support, Update

WEIGHTS = "adapter_model.safetensors"
NO_EFFECT = b"nothing learnt"


class MemoryEngine(TrainingEngine):
    """`outcome` decides what the next lessons come to, and a learning rate over `undo_above` is undone.

    With `failure`, `distill` raises it; with `breakage`, listing and health do.
    """

    def __init__(self, base_model: str = "tiny/base") -> None:
        self.base_model = base_model
        self.outcome: StepOutcome = "applied"
        self.undo_above: float | None = None
        self.failure: Exception | None = None
        self.before_distill: Callable[[], None] = lambda: None
        self.breakage: Exception | None = None
        self.unhealthy: str | None = None
        self.lessons: list[DistillBatchRequestPayload] = []
        self.closed = False
        self._latest: dict[str, int] = {}
        self._versions: dict[str, dict[int, AdapterVersion]] = {}
        self._weights: dict[str, dict[int, bytes]] = {}
        self._next: dict[str, int] = {}

    def default_training(self) -> TrainingConfig:
        return TrainingConfig()

    async def distill(self, payload: DistillBatchRequestPayload) -> DistillResponse:
        if payload.save_in_place:
            raise BadRequest("save_in_place is not supported: versions are immutable", param="save_in_place")
        parent = self._known(payload.lora_id) if payload.parent is None else self._version(payload.lora_id, payload.parent).version
        self.before_distill()
        await asyncio.sleep(0)  # a step takes time: others may act meanwhile
        if self.closed:
            raise BackendUnavailable("the service is closing: send the feedback again later")
        if self.failure is not None:
            raise self.failure
        self.lessons.append(payload)
        too_large = self.undo_above is not None and payload.training.learning_rate > self.undo_above
        outcome: StepOutcome = "undone" if too_large else self.outcome
        taught = self._weights[payload.lora_id][parent] + b"\n" + payload.model_dump_json().encode()
        version = self._publish(payload.lora_id, parent, payload.feedback_ids, taught) if outcome == "applied" else None
        reason = None if outcome == "applied" else f"the double was told to answer {outcome!r}"
        report = report_of(payload, outcome, reason, parent, version)
        return DistillResponse(lora_id=payload.lora_id, metadata=report.model_dump(mode="json"))

    async def promote(self, lora_id: str, version: int) -> None:
        self._version(lora_id, version)
        self._latest[lora_id] = version

    async def discard(self, lora_id: str, version: int) -> None:
        self._version(lora_id, version)
        if self._latest[lora_id] == version:
            raise Conflict(f"version {version} of {lora_id!r} is the latest", param="version")
        del self._versions[lora_id][version], self._weights[lora_id][version]

    async def versions(self, lora_id: str) -> list[AdapterVersion]:
        self._known(lora_id)
        return list(self._versions[lora_id].values())

    async def init_lora(self, request: LoraInitRequest) -> LoraInitResponse:
        if request.base_model not in (None, self.base_model):
            raise BadRequest(f"base model {request.base_model!r} is not served here: use {self.base_model!r}", param="base_model")
        return self._create(request.lora_id, NO_EFFECT)

    async def import_lora(self, lora_id: str, archive: bytes) -> LoraInitResponse:
        try:
            file = zipfile.ZipFile(io.BytesIO(archive))
        except zipfile.BadZipFile:
            raise BadRequest("the body is not a zip archive") from None
        if WEIGHTS not in file.namelist():
            raise BadRequest(f"the zip holds no {WEIGHTS!r}")
        return self._create(lora_id, file.read(WEIGHTS))

    async def list_loras(self, prefix: str = "") -> LoraListResponse:
        if self.breakage is not None:
            raise self.breakage
        return LoraListResponse(loras=sorted(lora_id for lora_id in self._latest if lora_id.startswith(prefix)))

    async def export_lora(self, lora_id: str, version: int | None = None) -> LoraExportPayload:
        ref = await self.lora_runtime_ref(lora_id, version)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("adapter_config.json", json.dumps({"base_model_name_or_path": self.base_model}))
            archive.writestr(WEIGHTS, self._weights[lora_id][ref.version])
        return LoraExportPayload(filename=f"{flat_name(lora_id)}-v{ref.version}.zip", content=buffer.getvalue())

    async def delete_lora(self, lora_id: str) -> LoraDeleteResponse:
        self._versions.pop(lora_id, None)
        self._weights.pop(lora_id, None)
        self._next.pop(lora_id, None)
        return LoraDeleteResponse(deleted=self._latest.pop(lora_id, None) is not None)

    async def lora_exists(self, lora_id: str) -> LoraExistsPayload:
        return LoraExistsPayload(exists=lora_id in self._latest)

    async def lora_runtime_ref(self, lora_id: str, version: int | None = None) -> LoraRuntimeRef:
        number = self._known(lora_id) if version is None else self._version(lora_id, version).version
        return LoraRuntimeRef(lora_id=lora_id, version=number, vllm_name=vllm_name(lora_id, number), lora_path="memory")

    async def health(self) -> ServiceHealth:
        if self.breakage is not None:
            raise self.breakage
        error = self.unhealthy or ("the service is closing" if self.closed else None)
        status: Literal["healthy", "unhealthy"] = "unhealthy" if error else "healthy"
        return ServiceHealth(status=status, error=error)

    async def aclose(self) -> None:
        self.closed = True

    def _known(self, lora_id: str) -> int:
        if lora_id not in self._latest:
            raise NotFound(f"there is no adapter {lora_id!r}", param="lora_id")
        return self._latest[lora_id]

    def _version(self, lora_id: str, version: int) -> AdapterVersion:
        self._known(lora_id)
        if version not in self._versions[lora_id]:
            raise NotFound(f"adapter {lora_id!r} has no version {version}", param="version")
        return self._versions[lora_id][version]

    def _create(self, lora_id: str, weights: bytes) -> LoraInitResponse:
        if parse_adapter_id(lora_id) in self._latest:
            raise Conflict(f"adapter {lora_id!r} exists: choose another name", param="lora_id")
        self._versions[lora_id], self._weights[lora_id] = {}, {}
        self._latest[lora_id] = self._publish(lora_id, None, (), weights)
        return LoraInitResponse(lora_id=lora_id, version=0)

    def _publish(self, lora_id: str, parent: int | None, feedback_ids: tuple[str, ...], weights: bytes) -> int:
        number = self._next.get(lora_id, 0)  # also after a version was discarded: no number is used twice
        self._next[lora_id] = number + 1
        self._weights[lora_id][number] = weights
        self._versions[lora_id][number] = AdapterVersion(
            lora_id=lora_id, version=number, parent=parent, base_model=self.base_model, feedback_ids=feedback_ids, size_bytes=1
        )
        return number


def report_of(
    payload: DistillBatchRequestPayload, outcome: StepOutcome, reason: str | None, parent: int, version: int | None
) -> StepReport:
    """A report in which the loss halved."""
    return StepReport(
        outcome=outcome,
        reason=reason,
        parent=parent,
        version=version,
        hindsight_version=1,
        signal=Signal(
            loss_mean=0.5,
            loss_p95=1.0,
            loss_max=1.0,
            log_ratio_mean=0.25,
            log_ratio_p95=1.0,
            log_ratio_max=1.0,
            control_loss=None,
            most_moved=(),
        ),
        support=Support(student_tail_mass=0.0, teacher_tail_mass=0.0, sampled_in_support=1.0, student_entropy=1.0, teacher_entropy=1.0),
        off_policy=OffPolicy(ratio_mean=1.0, ratio_max=1.0, clip_fraction=0.0, version_age=0, train_serve_mismatch=0.0),
        update=Update(
            loss_before=0.5,
            loss_after=0.25 if outcome == "applied" else None,
            reply_logprob_before=-10.0,
            reply_logprob_after=-12.0 if outcome == "applied" else None,
            grad_norm=(1.0,),
            relative_change=None,
            realised_kl=0.125,
            optimizer_steps=1,
        ),
        retention=Retention(
            replayed_samples=sum(sample.replayed for sample in payload.samples),
            replay_loss_before=None,
            replay_loss_after=None,
            anchor_kl_before=None,
            anchor_kl_after=None,
        ),
        cost=Cost(samples=len(payload.samples), response_tokens=1, forward_tokens=1, peak_memory_bytes=0, seconds={"total": 0.0}),
        training=payload.training.model_dump(mode="json"),
    )
