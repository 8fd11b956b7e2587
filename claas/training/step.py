"""One lesson's optimizer steps on one policy: measure, learn, rescore, and undo what did harm. Device-agnostic.

Shape legend
    N  response tokens of a micro-batch   D  hidden size   V  vocabulary   K  support   S  buckets (K and a tail)

The backbone runs once a pass; the LM head and the loss run on `CHUNK` positions at a time, and each chunk's gradient with respect to its
hidden states is taken at once, so that no (N, V) tensor exists and the head runs once, not twice as under checkpointing.
Teacher targets are taken on the first pass and kept as (N, S). There student and teacher see the same rows together, so that equal policies
differ by nothing; gradient steps after it take as many micro-batches at a time as fit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from claas.core.types import StepOutcome, TrainingConfig
from claas.training.batch import Sequences, collate
from claas.training.memory import synchronize
from claas.training.micro_batch import (
    Measure,
    MicroBatch,
    Targets,
    chunks,
    fitting_together,
    join_measures,
    join_targets,
    lesson_batches,
    old_logp,
    part_means,
    rows_of,
    students,
)
from claas.training.policy import Policy
from claas.training.samples import PARTS, Sample, Speaker
from claas.training.sdpo import bucket_and_token_logp, bucket_logp, divergence, guided, importance_ratio, token_logp, top_k_support
from claas.training.verdicts import why_not_step, why_undo


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the lesson did. Figures are of all taught response tokens, in micro-batch order.

    `reply_logp` is the mean logprob of the user's own replies' tokens, taught or not, before and after; None without any or unscored.
    """

    outcome: StepOutcome
    reason: str | None
    batches: list[MicroBatch]
    before: Measure
    after: Measure | None
    reply_logp: tuple[float | None, float | None]
    grad_norms: tuple[float, ...]
    relative_change: float | None
    forward_tokens: int
    seconds: dict[str, float]


class LessonStep:
    """One lesson, once: make it, `run` it, read the result. `breathe` is called between micro-batches, where cores are shared out anew."""

    def __init__(
        self, policy: Policy, optimizer: torch.optim.AdamW, config: TrainingConfig, samples: Sequence[Sample], breathe: Callable[[], None]
    ) -> None:
        self._policy = policy
        self._optimizer = optimizer
        self._config = config
        self._breathe = breathe
        self._batches = lesson_batches([s for s in samples if s.taught], config, policy.device, sharing=policy.shares_prompts)
        self._witnesses = lesson_batches([s for s in samples if not s.taught], config, policy.device, sharing=policy.shares_prompts)
        self._start = policy.snapshot()
        self._before: Measure | None = None
        self._after: Measure | None = None
        self._witnessed: list[Tensor] = []
        self._witnessed_after: list[Tensor] = []
        self._grad_norms: list[float] = []
        self._forward_tokens = 0
        self._seconds: dict[str, float] = {}

    def run(self) -> StepResult:
        """Learn. Unless the outcome is "applied", the policy's weights are what they were, bit for bit."""
        with self._timed("rescore"):
            self._witnessed = self._witness()
        for turn in range(self._config.gradient_steps):
            with self._timed("learn"):
                measured = self._accumulate(self._batches_of(turn))
                norm = self._clip()
            self._before = self._before or measured
            if reason := self._gate(measured, norm):
                return self._finish("undone" if self._grad_norms else "skipped", reason)
            self._grad_norms.append(norm)
            with self._timed("optimizer"):
                self._optimizer.step()
        with self._timed("rescore"):
            self._after = self._rescore()
            self._witnessed_after = self._witness()
        if reason := self._harm():
            return self._finish("undone", reason)
        return self._finish("applied", None)

    # --- the recipe's steps ---

    def _batches_of(self, turn: int) -> list[MicroBatch]:
        """The first gradient step takes the whole lesson, and measures it; with `minibatch`, later ones take a part of it in turn."""
        if turn == 0 or not self._config.minibatch:
            return self._batches
        parts = [[batch for batch in self._batches if batch.part == part] for part in PARTS]
        return [batches[turn % len(batches)] for batches in parts if batches]

    def _accumulate(self, batches: Sequence[MicroBatch]) -> Measure:
        """Student forward and backward over the micro-batches, each token weighing the same. Measures targets that are not known yet."""
        self._optimizer.zero_grad(set_to_none=True)
        weight = 1.0 / sum(batch.tokens for batch in batches)
        measures: list[Measure] = []
        for fitting in fitting_together(batches, self._policy.shares_prompts):
            contexts = [{} if batch.targets else self._contexts(batch) for batch in fitting]
            hidden_ND = self._students(fitting)
            gradients: list[Tensor] = []
            for batch, compared, own_ND in zip(fitting, contexts, hidden_ND.split([batch.tokens for batch in fitting]), strict=True):
                measures.append(self._backward(batch, compared, own_ND.detach(), weight, gradients))
            hidden_ND.backward(torch.cat(gradients))
        return join_measures(measures)

    def _students(self, fitting: Sequence[MicroBatch]) -> Tensor:
        """Hidden states (N, D) of the student on these micro-batches, in one forward."""
        self._breathe()
        sequences = students(fitting)
        self._forward_tokens += self._policy.positions(sequences)
        return self._policy.hidden(sequences)

    def _backward(
        self, batch: MicroBatch, contexts: dict[str, Tensor], hidden_ND: Tensor, weight: float, gradients: list[Tensor]
    ) -> Measure:
        """The loss of a micro-batch; its gradients with respect to the hidden states are appended, chunk by chunk."""
        known = batch.targets
        targets: list[Targets] = []
        figures: list[Measure] = []
        for rows in chunks(batch.tokens):
            leaf_ND = hidden_ND[rows].requires_grad_()
            logits_NV = self._policy.logits(leaf_ND)
            if known:
                chunk = rows_of(known, rows)
                student = self._student(batch, rows, logits_NV, chunk.index_NK)
            else:
                student, chunk = self._measure_targets(batch, rows, logits_NV, contexts)
            loss_N, figure = self._loss(batch, rows, student, chunk)
            (loss_N.sum() * weight).backward()
            assert leaf_ND.grad is not None
            gradients.append(leaf_ND.grad)
            targets.append(chunk)
            figures.append(figure)
        batch.targets = known or join_targets(targets)
        return join_measures(figures)

    @torch.no_grad()
    def _contexts(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Hidden states (N, D) of everything the student is compared with: the teacher and, where asked, the base and the control."""
        responses = [s.response for s in batch.samples]
        teacher = batch.samples[0].teacher
        passes: dict[str, tuple[Sequences, Speaker]] = {"teacher": (collate([s.teacher_prompt for s in batch.samples], responses), teacher)}
        if self._config.kl_reg_weight > 0:
            passes["base"] = (batch.student, "base")
        controls = [s.control_prompt for s in batch.samples if s.control_prompt is not None]
        if controls:
            passes["control"] = (collate(controls, responses), teacher)
        hidden = {}
        for name, (sequences, speaker) in passes.items():
            with self._timed(name):
                hidden[name] = self._policy.hidden(sequences, speaker=speaker)
            self._forward_tokens += self._policy.positions(sequences)
        return hidden

    def _measure_targets(
        self, batch: MicroBatch, rows: slice, logits_NV: Tensor, contexts: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], Targets]:
        """The student, and the teacher and it at the start of the lesson on one support: the student's top-K for its own replies, the
        teacher's for the teacher's, since there the token to be learnt may be nowhere near the student's top."""
        with torch.no_grad():
            teacher_NV = self._policy.logits(contexts["teacher"][rows])
            index_NK = top_k_support(logits_NV if batch.source == "sampled" else teacher_NV, self._config.teacher_top_k)
            teacher_NS, teacher_N = bucket_and_token_logp(teacher_NV, index_NK, batch.student.targets_N[rows])
            del teacher_NV
            others = {
                name: bucket_logp(self._policy.logits(contexts[name][rows]), index_NK) for name in ("base", "control") if name in contexts
            }
            if batch.source == "hindsight" and "control" in others:
                teacher_NS = guided(teacher_NS, others.pop("control"), self._config.guidance, batch.places[rows], index_NK.shape[-1])
        student_NS, student_N = self._student(batch, rows, logits_NV, index_NK)
        return (student_NS, student_N), Targets(
            index_NK=index_NK,
            teacher_logp_NS=teacher_NS,
            teacher_logp_N=teacher_N,
            start_logp_NS=student_NS.detach(),
            start_logp_N=student_N,
            base_logp_NS=others.get("base"),
            control_logp_NS=others.get("control"),
        )

    def _student(self, batch: MicroBatch, rows: slice, logits_NV: Tensor, index_NK: Tensor) -> tuple[Tensor, Tensor]:
        return bucket_and_token_logp(logits_NV, index_NK, batch.student.targets_N[rows])

    def _loss(self, batch: MicroBatch, rows: slice, student: tuple[Tensor, Tensor], targets: Targets) -> tuple[Tensor, Measure]:
        student_NS, logp_N = student
        divergence_N = divergence(student_NS, targets.teacher_logp_NS, batch.alpha)
        ratio_N = importance_ratio(logp_N, old_logp(batch, targets, rows), self._config.is_clip)
        loss_N = divergence_N * ratio_N
        if targets.base_logp_NS is not None:
            loss_N = loss_N + self._config.kl_reg_weight * divergence(student_NS, targets.base_logp_NS, 1.0)
        moved_N = divergence(student_NS.detach(), targets.start_logp_NS, 1.0)
        return loss_N, Measure(divergence_N.detach(), ratio_N, logp_N, moved_N)

    @torch.no_grad()
    def _rescore(self) -> Measure:
        """The same tokens under the new weights."""
        measures: list[Measure] = []
        for batch in self._batches:
            assert batch.targets is not None
            hidden_ND = self._students([batch])
            for rows in chunks(batch.tokens):
                targets = rows_of(batch.targets, rows)
                student = self._student(batch, rows, self._policy.logits(hidden_ND[rows]), targets.index_NK)
                measures.append(self._loss(batch, rows, student, targets)[1])
        return join_measures(measures)

    @torch.no_grad()
    def _witness(self) -> list[Tensor]:
        """Logprobs of the tokens of replies that are not taught, as the policy is now."""
        logps = []
        for batch in self._witnesses:
            hidden_ND = self._students([batch])
            logps += [token_logp(self._policy.logits(hidden_ND[rows]), batch.student.targets_N[rows]) for rows in chunks(batch.tokens)]
        return logps

    def _reply_logp(self, measure: Measure | None, witnessed: list[Tensor]) -> float | None:
        """Mean logprob of the user's own replies' tokens in this pass."""
        if measure is None:
            return None
        columns = measure.logp.split([batch.tokens for batch in self._batches])
        own = [b.part == "lesson" and b.source == "sampled" for b in self._batches]
        logps = [*witnessed, *(column for column, is_own in zip(columns, own, strict=True) if is_own)]
        return float(torch.cat(logps).mean()) if logps else None

    def _clip(self) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self._policy.parameters.values(), self._config.max_grad_norm))

    # --- verdicts ---

    def _gate(self, measured: Measure, grad_norm: float) -> str | None:
        means = part_means(self._batches, measured.divergence) if not self._grad_norms else {}
        taught = {batch.source for batch in self._batches if batch.part == "lesson"}
        return why_not_step(self._config, float(measured.divergence.mean()), grad_norm, taught, means.get("lesson"))

    def _harm(self) -> str | None:
        assert self._before is not None and self._after is not None
        before, after = (part_means(self._batches, measure.divergence) for measure in (self._before, self._after))
        return why_undo(self._config, before, after, float(self._after.kl_to_start.mean()))

    def _finish(self, outcome: StepOutcome, reason: str | None) -> StepResult:
        """The result; unless the lesson was applied, the weights are taken back first."""
        assert self._before is not None
        change = self._policy.relative_change(self._start)
        if outcome != "applied":
            self._policy.restore(self._start)
        return StepResult(
            outcome=outcome,
            reason=reason,
            batches=self._batches,
            before=self._before,
            after=self._after,
            reply_logp=(self._reply_logp(self._before, self._witnessed), self._reply_logp(self._after, self._witnessed_after)),
            grad_norms=tuple(self._grad_norms),
            relative_change=change,
            forward_tokens=self._forward_tokens,
            seconds=self._seconds,
        )

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
            synchronize(self._policy.device)
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - began
