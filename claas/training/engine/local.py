"""The Local engine: lessons on this machine's CPU or GPU, one at a time, in a thread of their own.

Beside the embedded server the trainer's module tree shares the base weights with the server's and has an adapter of its own, so serving
goes on during a step. Beside a server in a process of its own, the base weights wait in host memory and visit the device for each step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pydantic import JsonValue

from claas.adapters.store import AdapterStore
from claas.core.errors import BackendUnavailable, ClaasError, StepFailed
from claas.core.types import AdapterVersion, ChatMessage, DistillBatchRequestPayload, DistillResponse, ServiceHealth
from claas.models.base_model import LoadedModel
from claas.models.chat_template import render
from claas.models.compute import ComputeShare, in_fresh_thread
from claas.training.engine.stored import StoredEngine, refuse_in_place
from claas.training.figures import summarise
from claas.training.memory import LONG_SAMPLE_TOKENS, Meter, free_memory, meter_of, out_of_memory, return_freed, step_bytes
from claas.training.policy import Policy
from claas.training.report import StepReport
from claas.training.residency import RESIDENT, Residency
from claas.training.samples import Sample, prepare
from claas.training.step import LessonStep
from claas.training.teachers import after_lesson, load_teachers, save_teachers, wanted_teachers

log = logging.getLogger(__name__)


class LocalEngine(StoredEngine):
    """Trains in this process on a `LoadedModel`, which `residency` brings to the device."""

    _base: LoadedModel

    def __init__(
        self,
        store: AdapterStore,
        base: LoadedModel,
        share: ComputeShare,
        allowed_base_models: tuple[str, ...] = (),
        residency: Residency = RESIDENT,
        meter: Meter | None = None,
    ) -> None:
        super().__init__(store, base, allowed_base_models)
        self._share = share
        self._residency = residency
        self._meter = meter or meter_of(base.device)
        self._trainer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="claas-trainer")
        self._closing = threading.Event()

    async def distill(self, payload: DistillBatchRequestPayload) -> DistillResponse:
        refuse_in_place(payload)
        self._stop_if_closing()
        given_up = threading.Event()
        try:
            report = await asyncio.get_running_loop().run_in_executor(self._trainer, self._in_fresh_thread, payload, given_up)
        except asyncio.CancelledError:
            given_up.set()  # its thread hears of it at the next micro-batch
            raise
        except ClaasError:
            raise
        except Exception as error:
            if out_of_memory(error):
                log.warning("a learning step on %r ran out of memory", payload.lora_id, exc_info=error)
                raise StepFailed(
                    f"the learning step ran out of the memory of {str(self._base.device)!r}: stop what else uses it, or teach shorter "
                    "conversations. The version before it still serves"
                ) from error
            log.exception("a learning step on %r broke", payload.lora_id)
            raise StepFailed(f"the learning step broke ({type(error).__name__}): the version before it still serves") from error
        return DistillResponse(lora_id=payload.lora_id, metadata=report.model_dump(mode="json"))

    def memory_needed(self, tokens: int = LONG_SAMPLE_TOKENS) -> int:
        """Estimated bytes of the device's memory that a step takes beyond what is held between steps; its longest sample has `tokens`."""
        return step_bytes(self._base, min(tokens, self._base.max_context), weights=self._residency.visiting_bytes)

    def memory_wanted(self) -> int:
        """Bytes that would do for a step such as the largest so far, those included that ran out of memory. The next may well need less."""
        return max(self.memory_needed(), self._meter.most)

    def free_memory(self) -> int | None:
        """Bytes of the device's memory that nobody uses; None where it is the machine's own (CPU, MPS)."""
        return free_memory(self._base.device)

    async def health(self) -> ServiceHealth:
        detail: dict[str, JsonValue] = {"engine": "local", "device": str(self._base.device), "dtype": str(self._base.dtype)}
        if self._closing.is_set():
            return ServiceHealth(status="unhealthy", error="the service is closing", detail=detail)
        return ServiceHealth(status="healthy", detail=detail)

    async def aclose(self) -> None:
        """A running lesson stops at its next micro-batch and publishes nothing."""
        self._closing.set()
        await asyncio.to_thread(self._trainer.shutdown)

    def _in_fresh_thread(self, payload: DistillBatchRequestPayload, given_up: threading.Event) -> StepReport:
        try:
            return in_fresh_thread("claas-lesson", partial(self._distill, payload, given_up))
        finally:
            return_freed()

    def _distill(self, payload: DistillBatchRequestPayload, given_up: threading.Event) -> StepReport:
        parent = self._store.latest(payload.lora_id) if payload.parent is None else payload.parent
        folder = self._store.path(payload.lora_id, parent)
        samples = self._samples(payload, parent)
        # Left from the right: what was staged is published when the device is free again.
        with ExitStack() as publishing, self._share.training(), self._meter.watch(), self._residency.on_device() as seconds:
            report = self._learn(payload, parent, folder, samples, publishing, given_up)
        cost = report.cost.model_copy(update={"seconds": report.cost.seconds | {phase: round(s, 4) for phase, s in seconds.items()}})
        return report.model_copy(update={"cost": cost})

    def _learn(
        self,
        payload: DistillBatchRequestPayload,
        parent: int,
        folder: Path,
        samples: Sequence[Sample],
        publishing: ExitStack,
        given_up: threading.Event,
    ) -> StepReport:
        """The step, and its version staged in `publishing`. Everything it makes on the device is local to it."""
        training = payload.training
        policy = Policy(self._base, folder, max(sample.length for sample in samples))
        policy.teachers = load_teachers(folder, wanted_teachers(training), policy.snapshot())
        optimizer = policy.optimizer(folder, training.learning_rate)
        result = LessonStep(policy, optimizer, training, samples, partial(self._breathe, given_up)).run()
        report = summarise(result, training, parent=parent, token_text=self._token_text)
        if report.outcome != "applied":
            return report
        staging = publishing.enter_context(self._store.stage(self._manifest(payload, report)))
        policy.save(staging.path, optimizer)
        after = after_lesson(policy.teachers, policy.snapshot(), training, report.update.optimizer_steps)
        save_teachers(staging.path, after)
        return report.model_copy(update={"version": staging.version})

    def _breathe(self, given_up: threading.Event) -> None:
        """Between micro-batches: stop if asked to, and take no more cores than serving leaves."""
        self._stop_if_closing()
        if given_up.is_set():
            raise BackendUnavailable("the lesson was given up")
        self._share.apply()

    def _stop_if_closing(self) -> None:
        if self._closing.is_set():
            raise BackendUnavailable("the service is closing: the lesson was not learnt, send the feedback again later")

    def _samples(self, payload: DistillBatchRequestPayload, parent: int) -> list[Sample]:
        def tokens(messages: Sequence[ChatMessage], template_kwargs: Mapping[str, JsonValue]) -> tuple[int, ...]:
            return render(self._base.tokenizer, messages, template_kwargs)

        return [
            prepare(
                item,
                tokens,
                teacher=payload.training.teacher,
                hindsight_teacher=payload.training.hindsight_teacher,
                parent=parent,
                vocab_size=int(self._base.config.vocab_size),
                max_context=self._base.max_context,
                guided=payload.training.guidance > 0,
            )
            for item in payload.samples
        ]

    def _manifest(self, payload: DistillBatchRequestPayload, report: StepReport) -> AdapterVersion:
        return AdapterVersion(
            lora_id=payload.lora_id,
            version=0,
            parent=report.parent,
            base_model=self._base.id,
            feedback_ids=payload.feedback_ids,
            metrics=report.update.model_dump(include={"loss_before", "loss_after", "realised_kl", "optimizer_steps"}),
        )

    def _token_text(self, token_id: int) -> str:
        return str(self._base.tokenizer.decode([token_id]))
