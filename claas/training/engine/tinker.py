"""The Tinker engine: lessons on a hosted or self-hosted training API. Nothing is computed here but weights of logprobs.

A lesson forks a run from its parent's checkpoint, optimizer and all, trains it and saves it; what fails half-way is given up with its
run, and the parent is never touched.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from pydantic import JsonValue

from claas.adapters.tinker import TinkerAdapter, TinkerAdapters, TinkerVersion
from claas.core.adapter_id import flat_name, parse_adapter_id, vllm_name
from claas.core.errors import BackendUnavailable, BadRequest, ClaasError, NotFound, StepFailed, UpstreamRefused
from claas.core.types import (
    AdapterVersion,
    ChatMessage,
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
    TrainingConfig,
)
from claas.models.chat_template import render
from claas.models.tinker_model import TinkerModel
from claas.models.tinker_runs import BASE, TinkerRuns
from claas.models.tinker_server import Run, Scored, TinkerServer
from claas.training.defaults import default_training
from claas.training.engine.base import TrainingEngine
from claas.training.engine.tinker_archive import as_peft_zip
from claas.training.engine.tinker_figures import summarise
from claas.training.engine.tinker_step import LossReduction, TinkerStep
from claas.training.report import StepReport
from claas.training.samples import Sample, prepare

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}

log = logging.getLogger(__name__)


class TinkerEngine(TrainingEngine):
    """Trains on `server`; `adapters` are its checkpoints. `top_k` bounds how many of a teacher's likeliest tokens are asked for."""

    def __init__(
        self,
        server: TinkerServer,
        runs: TinkerRuns,
        adapters: TinkerAdapters,
        model: TinkerModel,
        *,
        rank: int,
        top_k: int,
        reduction: LossReduction = "auto",
        ttl_s: int | None = None,
        allowed_base_models: tuple[str, ...] = (),
    ) -> None:
        self._server = server
        self._runs = runs
        self._adapters = adapters
        self._model = model
        self._rank = rank
        self._top_k = top_k
        self._reduction: LossReduction = reduction
        self._ttl_s = ttl_s
        self._allowed = allowed_base_models or (model.id,)
        self._lessons: set[asyncio.Task[StepReport]] = set()
        self._steps: dict[str, TinkerStep] = {}
        self._closing = False

    def default_training(self) -> TrainingConfig:
        return default_training(self._model.n_params)

    # --- a lesson ---

    async def distill(self, payload: DistillBatchRequestPayload) -> DistillResponse:
        _refuse_unsupported(payload)
        self._stop_if_closing()
        lesson = asyncio.create_task(self._distill(payload))
        self._lessons.add(lesson)
        try:
            report = await lesson
        except asyncio.CancelledError:
            lesson.cancel()
            self._stop_if_closing()
            raise
        except UpstreamRefused as error:
            raise StepFailed(f"the learning step failed: {error.message}. The version before it still serves") from error
        except ClaasError:
            raise
        except Exception as error:
            log.exception("a learning step on %r broke", payload.lora_id)
            raise StepFailed(f"the learning step broke ({type(error).__name__}): the version before it still serves") from error
        finally:
            self._lessons.discard(lesson)
        return DistillResponse(lora_id=payload.lora_id, metadata=report.model_dump(mode="json"))

    async def _distill(self, payload: DistillBatchRequestPayload) -> StepReport:
        adapter = await self._adapters.adapter(payload.lora_id)
        parent = await self._adapters.version(payload.lora_id, payload.parent)
        samples = await asyncio.to_thread(self._samples, payload, parent.manifest.version)
        async with self._adapters.charged(payload.lora_id):
            report = await self._taught(payload, adapter, parent, samples)
        used = self._server.priced(await self._adapters.used(payload.lora_id))
        return report.model_copy(update={"adapter_usage": used.told()})

    async def _taught(
        self, payload: DistillBatchRequestPayload, adapter: TinkerAdapter, parent: TinkerVersion, samples: Sequence[Sample]
    ) -> StepReport:
        """The lesson, on a run of its own, which is kept if it is applied."""
        run = await self._runs.begin(adapter, parent.state_path)
        kept = False
        try:
            step = TinkerStep(self._server, run, payload.training, samples, self._teacher(parent), self._reduction)
            self._steps[payload.lora_id] = step
            result = await step.run()
            report = summarise(result, payload.training, parent=parent.manifest.version, token_text=self._token_text)
            if report.outcome == "applied":
                version = await self._publish(run, payload, report)
                kept, report = True, report.model_copy(update={"version": version})
        finally:
            self._steps.pop(payload.lora_id, None)
            if not kept:
                await asyncio.shield(self._runs.give_up(run))
        return report

    def _teacher(self, parent: TinkerVersion) -> Callable[[Sample], Awaitable[Scored]]:
        """Asks whoever judges a sample: the version that the lesson begins from, or the base model."""
        ref = _ref(parent)

        async def score(sample: Sample) -> Scored:
            async with self._runs.speaking(ref if sample.teacher == "live" else None) as sampler:
                return await self._server.score(sampler, sample.teacher_prompt, sample.response, self._top_k)

        return score

    async def _publish(self, run: Run, payload: DistillBatchRequestPayload, report: StepReport) -> int:
        """Save the run as the next version, whole: what is on record as published is on the server."""
        number = await self._adapters.reserve(payload.lora_id, run.id)
        name = f"v{number}"
        try:
            state, sampler = await asyncio.gather(
                self._server.wait(run.client.save_state(name, ttl_seconds=self._ttl_s)),
                self._server.wait(run.client.save_weights_for_sampler(name, ttl_seconds=self._ttl_s)),
            )
            manifest = AdapterVersion(
                lora_id=payload.lora_id,
                version=number,
                parent=report.parent,
                base_model=self._model.id,
                feedback_ids=payload.feedback_ids,
                metrics=report.update.model_dump(include={"loss_before", "loss_after", "realised_kl", "optimizer_steps"}),
            )
            version = TinkerVersion(manifest=manifest, state_path=state.path, sampler_path=sampler.path)
            self._stop_if_closing()
            await self._adapters.publish(version)
        except BaseException:
            await asyncio.shield(self._take_back(run.id, payload.lora_id, number))
            raise
        await self._runs.keep(run, version)
        return number

    async def _take_back(self, run_id: str, lora_id: str, number: int) -> None:
        await self._adapters.unreserve(lora_id, number)
        await self._delete_checkpoints(*_paths(run_id, number))

    def _samples(self, payload: DistillBatchRequestPayload, parent: int) -> list[Sample]:
        def tokens(messages: Sequence[ChatMessage], template_kwargs: Mapping[str, JsonValue]) -> tuple[int, ...]:
            return render(self._model.tokenizer, messages, template_kwargs)

        training = payload.training
        return [
            prepare(
                item,
                tokens,
                teacher=training.teacher,
                hindsight_teacher=training.hindsight_teacher,
                parent=parent,
                vocab_size=self._model.vocab_size,
                max_context=self._model.max_context,
                control_feedback=None,
            )
            for item in payload.samples
        ]

    def _token_text(self, token_id: int) -> str:
        return str(self._model.tokenizer.decode([token_id]))

    # --- the adapters' life ---

    async def promote(self, lora_id: str, version: int) -> None:
        for superseded in await self._adapters.set_latest(lora_id, version):
            await self._remove(superseded)

    async def discard(self, lora_id: str, version: int) -> None:
        await self._remove(await self._adapters.discard(lora_id, version))

    async def versions(self, lora_id: str) -> list[AdapterVersion]:
        return [version.manifest for version in await self._adapters.versions(lora_id)]

    async def init_lora(self, request: LoraInitRequest) -> LoraInitResponse:
        base_model = request.base_model or self._model.id
        if base_model not in self._allowed or base_model != self._model.id:
            raise BadRequest(f"base_model {base_model!r} is not served here: this service trains {self._model.id!r}", param="base_model")
        if request.lora_alpha is not None:
            raise BadRequest("lora_alpha cannot be chosen in Tinker mode, where the server has its own: leave it out", param="lora_alpha")
        attn, mlp = _layers(request.target_modules)
        rank = request.lora_r or self._rank
        lora_id = parse_adapter_id(request.lora_id)
        await self._adapters.create(TinkerAdapter(lora_id=lora_id, base_model=base_model, rank=rank, train_attn=attn, train_mlp=mlp))
        return LoraInitResponse(lora_id=lora_id)

    async def import_lora(self, lora_id: str, archive: bytes) -> LoraInitResponse:
        raise BadRequest("a Tinker server takes no weights from outside: import this adapter into a service in local mode", param="archive")

    async def list_loras(self, prefix: str = "") -> LoraListResponse:
        return LoraListResponse(loras=await self._adapters.adapters(prefix))

    async def export_lora(self, lora_id: str, version: int | None = None) -> LoraExportPayload:
        found = await self._adapters.version(lora_id, version)
        number = found.manifest.version
        path = found.sampler_path or await self._saved_first(found)
        content = await asyncio.to_thread(as_peft_zip, await self._server.archive(path), found.manifest)
        return LoraExportPayload(filename=f"{flat_name(lora_id)}-v{number}.zip", content=content)

    async def delete_lora(self, lora_id: str) -> LoraDeleteResponse:
        versions = await self._adapters.delete(lora_id)
        for version in versions or ():
            await self._remove(version)
        return LoraDeleteResponse(deleted=versions is not None)

    async def lora_exists(self, lora_id: str) -> LoraExistsPayload:
        try:
            await self._adapters.latest(lora_id)
        except NotFound:
            return LoraExistsPayload(exists=False)
        return LoraExistsPayload(exists=True)

    async def lora_runtime_ref(self, lora_id: str, version: int | None = None) -> LoraRuntimeRef:
        return _ref(await self._adapters.version(lora_id, version))

    async def recover(self) -> list[str]:
        """Take away what an interrupted process left on the server; returns a line for each."""
        lines = []
        for run_id, lora_id, number in await self._adapters.unfinished():
            await self._delete_checkpoints(*_paths(run_id, number))
            lines.append(f"version {number} of {lora_id!r} was being saved when the service stopped: forgotten")
        return lines

    async def health(self) -> ServiceHealth:
        learning: dict[str, JsonValue] = {lora_id: step.progress for lora_id, step in self._steps.items()}
        detail: dict[str, JsonValue] = {"engine": "tinker", "runs": self._runs.held, "learning": learning}
        if self._closing:
            return ServiceHealth(status="unhealthy", error="the service is closing", detail=detail)
        try:
            await self._server.ping()
        except BackendUnavailable as error:
            return ServiceHealth(status="unhealthy", error=error.message, detail=detail)
        return ServiceHealth(status="healthy", detail=detail)

    async def aclose(self) -> None:
        """Running lessons are given up and publish nothing."""
        self._closing = True
        for lesson in list(self._lessons):
            lesson.cancel()
        await asyncio.gather(*self._lessons, return_exceptions=True)

    async def _saved_first(self, version: TinkerVersion) -> str:
        """Where the sampler's checkpoint of a version without one is, from now on."""
        lora_id, number = version.manifest.lora_id, version.manifest.version
        run = await self._runs.begin(await self._adapters.adapter(lora_id), version.state_path)
        try:
            saved = await self._server.wait(run.client.save_weights_for_sampler(f"v{number}"))
        finally:
            await asyncio.shield(self._runs.give_up(run))
        await self._adapters.set_sampler(lora_id, number, saved.path)
        return str(saved.path)

    async def _remove(self, version: TinkerVersion) -> None:
        """Take a version that is off the record away from the server, which may not be reached: then its checkpoints stay."""
        await self._runs.drop(version.state_path)
        await self._delete_checkpoints(*version.paths)

    async def _delete_checkpoints(self, *paths: str) -> None:
        for path in paths:
            try:
                deleted = await self._server.delete_checkpoint(path)
            except ClaasError:
                deleted = False
            if not deleted:
                log.info("a checkpoint could not be deleted on the Tinker server: %s", path)

    def _stop_if_closing(self) -> None:
        if self._closing:
            raise BackendUnavailable("the service is closing: the lesson was not learnt, send the feedback again later")


def _refuse_unsupported(payload: DistillBatchRequestPayload) -> None:
    """What a Tinker server has no counterpart for. Raises BadRequest, naming it."""
    if payload.save_in_place:
        raise BadRequest("save_in_place is not supported: versions are immutable, and a rollback undoes a lesson", param="save_in_place")
    training = payload.training
    for field, kind in (("teacher", training.teacher), ("hindsight_teacher", training.hindsight_teacher)):
        if kind in ("ema", "snapshot"):
            raise BadRequest(f"{field} {kind!r} is not supported in Tinker mode: use 'live', 'base' or 'book'", param=f"training.{field}")
    if training.kl_reg_weight > 0:
        raise BadRequest("kl_reg_weight is not supported in Tinker mode: use anchors", param="training.kl_reg_weight")


def _layers(target_modules: tuple[str, ...] | None) -> tuple[bool, bool]:
    """Whether attention and MLPs are adapted. Raises BadRequest for what is neither all of one, of the other, or of both."""
    wanted = ATTENTION | MLP if target_modules is None else set(target_modules)
    for attn, mlp, layers in ((True, True, ATTENTION | MLP), (True, False, ATTENTION), (False, True, MLP)):
        if wanted == layers:
            return attn, mlp
    raise BadRequest(
        f"target_modules in Tinker mode are {', '.join(sorted(ATTENTION))}, or {', '.join(sorted(MLP))}, or all of these",
        param="target_modules",
    )


def _ref(version: TinkerVersion) -> LoraRuntimeRef:
    lora_id, number = version.manifest.lora_id, version.manifest.version
    return LoraRuntimeRef(lora_id=lora_id, version=number, vllm_name=vllm_name(lora_id, number), lora_path=version.state_path or BASE)


def _paths(run_id: str, number: int) -> tuple[str, str]:
    """Where a run saves a version."""
    return f"tinker://{run_id}/weights/v{number}", f"tinker://{run_id}/sampler_weights/v{number}"
