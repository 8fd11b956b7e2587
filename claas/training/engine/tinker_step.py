"""One lesson's optimizer steps on a run of a Tinker server: measure, learn, rescore. The same recipe as `claas.training.step`.

Nothing is undone here: who judges that a lesson did harm gives its run up. Every answer is awaited: a server saves a run whose last
step failed as readily as any other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import tinker
from tinker import types

from claas.core.types import StepOutcome, TrainingConfig
from claas.models.tinker_server import Run, Scored, TinkerServer
from claas.training.engine.tinker_data import (
    Measured,
    Target,
    answers,
    carried,
    lesson,
    loss_name,
    measure,
    of_response,
    part_means,
    question,
    target_of,
)
from claas.training.engine.tinker_loss import Floats
from claas.training.samples import PARTS, Sample, lesson_groups
from claas.training.verdicts import why_not_step, why_undo

ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.0}

LossReduction = Literal["auto", "sum", "sequence_mean"]
Score = Callable[[Sample], Awaitable[Scored]]
"""Asks a sample's teacher about it."""


@dataclass(slots=True)
class StepResult:
    """What the lesson did. `targets` and the measures' lists go together; reply logprobs as in `claas.training.step`."""

    outcome: StepOutcome
    reason: str | None
    targets: list[Target]
    start: list[Floats]
    before: list[Measured]
    after: list[Measured] | None
    reply_logp: tuple[float | None, float | None]
    steps: int
    grad_norms: tuple[float, ...]
    forward_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)


class TinkerStep:
    """One lesson, once: make it, `run` it, read the result."""

    def __init__(
        self,
        server: TinkerServer,
        run: Run,
        config: TrainingConfig,
        samples: Sequence[Sample],
        score: Score,
        reduction: LossReduction,
    ) -> None:
        self._server = server
        self._client = run.client
        self._config = config
        self._score = score
        self._sums = None if reduction == "auto" else reduction == "sum"
        self._groups = lesson_groups([s for s in samples if s.taught], config)
        self._witnesses = [s for s in samples if not s.taught]
        self._targets: list[Target] = []
        self._start: list[Floats] = []
        self._grad_norms: list[float] = []
        self._steps = self._forward_tokens = 0
        self._seconds: dict[str, float] = {}

    @property
    def progress(self) -> str:
        """How far it is, for who waits."""
        return f"{self._steps} of {self._config.gradient_steps} optimizer steps done"

    async def run(self) -> StepResult:
        """Learn. Unless the outcome is "applied", the run is to be given up."""
        with self._timed("teacher"):
            self._targets = await self._ask_teachers()
        with self._timed("rescore"):
            (whole, first), witnessed = await asyncio.gather(self._forward(self._targets), self._witness())
        self._start = first
        before = self._measure(self._targets, first)
        logp: tuple[list[Floats], list[Floats]] | None = (whole, first)
        for turn in range(self._config.gradient_steps):
            batch = self._batch_of(turn)
            with self._timed("learn"):
                whole, found = logp or await self._forward(batch)
                measured = self._measure(batch, found)
                if reason := self._gate(measured):
                    return self._finish("undone" if self._steps else "skipped", reason, before, None, (witnessed, []))
                await self._learn(batch, whole, found, measured)
            logp = None
        with self._timed("rescore"):
            (_, found), witnessed_after = await asyncio.gather(self._forward(self._targets), self._witness())
        after = self._measure(self._targets, found)
        reason = self._harm(before, after)
        return self._finish("undone" if reason else "applied", reason, before, after, (witnessed, witnessed_after))

    # --- the recipe's steps ---

    async def _ask_teachers(self) -> list[Target]:
        samples = [sample for group in self._groups for sample in group]
        scored = await asyncio.gather(*map(self._score, samples))
        if any(found.top is None for found in scored):
            scored = [Scored(found.logprobs, None) for found in scored]
        alphas = [self._config.alpha if sample.source == "sampled" else 0.0 for sample in samples]
        return [target_of(*given) for given in zip(samples, scored, alphas, strict=True)]

    def _batch_of(self, turn: int) -> list[Target]:
        """The first gradient step takes the whole lesson; with `minibatch`, later ones take a part of it in turn."""
        if turn == 0 or not self._config.minibatch:
            return self._targets
        by_part = [[group for group in self._groups if group[0].part == part] for part in PARTS]
        taken = {id(sample) for groups in by_part if groups for sample in groups[turn % len(groups)]}
        return [target for target in self._targets if id(target.sample) in taken]

    async def _forward(self, batch: Sequence[Target]) -> tuple[list[Floats], list[Floats]]:
        """The student's logprobs of each target's support: of whole sequences, and of the responses alone."""
        found = await self._pass([(target.sample, target.ids_TK) for target in batch])
        return found, [of_response(target.sample, logp) for target, logp in zip(batch, found, strict=True)]

    async def _witness(self) -> list[Floats]:
        """Logprobs of the tokens of replies that are not taught."""
        found = await self._pass([(sample, np.array(sample.response)[:, None]) for sample in self._witnesses])
        return [of_response(sample, logp)[:, 0] for sample, logp in zip(self._witnesses, found, strict=True)]

    async def _pass(self, asked: Sequence[tuple[Sample, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]]) -> list[Floats]:
        if not asked:
            return []
        data = [question(*each) for each in asked]
        self._forward_tokens += self._count("scored", data)
        output = await self._server.wait(self._client.forward(data, "cross_entropy"))
        if self._sums is None:
            self._sums = "loss:sum" in output.metrics
        return answers(output, [(sample, ids.shape[1]) for sample, ids in asked])

    def _measure(self, batch: Sequence[Target], logp: Sequence[Floats]) -> list[Measured]:
        start = {id(target): found for target, found in zip(self._targets, self._start, strict=True)}
        clip = self._config.is_clip
        return [measure(target, found, start[id(target)], clip) for target, found in zip(batch, logp, strict=True)]

    async def _learn(self, batch: Sequence[Target], whole: Sequence[Floats], logp: Sequence[Floats], measured: Sequence[Measured]) -> None:
        """One backward pass over the batch, each token weighing the same, and one step of the optimizer."""
        tokens = sum(len(target.sample.response) for target in batch)
        data = []
        for target, sequence, found, figures in zip(batch, whole, logp, measured, strict=True):
            # A server that takes means, of each sequence's positions and of all sequences, gets so much more.
            scale = (1.0 if self._sums else len(sequence) * len(batch)) / tokens
            data.append(lesson(target.sample, target.ids_TK, sequence, carried(target, found, figures.ratio) * scale))
        self._forward_tokens += self._count("trained", data)
        adam = types.AdamParams(learning_rate=self._config.learning_rate, grad_clip_norm=self._config.max_grad_norm, **ADAM)
        # Sent together, so that a server that works in rounds needs one; a failure of either gives the run up.
        backward = self._client.forward_backward(data, loss_name(batch[0].support))
        step = self._client.optim_step(adam)
        _, stepped = await asyncio.gather(self._server.wait(backward), self._server.wait(step))
        norms = [value for name, value in (stepped.metrics or {}).items() if "grad_norm" in name]
        self._grad_norms += norms[:1]
        self._steps += 1

    def _count(self, use: Literal["scored", "trained"], data: Sequence[tinker.Datum]) -> int:
        tokens = sum(int(datum.model_input.length) for datum in data)
        self._server.count(use, tokens)
        return tokens

    # --- verdicts ---

    def _gate(self, measured: Sequence[Measured]) -> str | None:
        loss = float(np.concatenate([figures.divergence for figures in measured]).mean())
        taught = {target.sample.source for target in self._targets if target.sample.part == "lesson"}
        means = part_means(self._targets, [figures.divergence for figures in measured]) if not self._steps else {}
        return why_not_step(self._config, loss, self._grad_norms[-1] if self._grad_norms else None, taught, means.get("lesson"))

    def _harm(self, before: Sequence[Measured], after: Sequence[Measured]) -> str | None:
        means = [part_means(self._targets, [figures.divergence for figures in measured]) for measured in (before, after)]
        moved = float(np.concatenate([figures.moved for figures in after]).mean())
        return why_undo(self._config, means[0], means[1], moved)

    def _finish(
        self,
        outcome: StepOutcome,
        reason: str | None,
        before: list[Measured],
        after: list[Measured] | None,
        witnessed: tuple[list[Floats], list[Floats]],
    ) -> StepResult:
        return StepResult(
            outcome=outcome,
            reason=reason,
            targets=self._targets,
            start=self._start,
            before=before,
            after=after,
            reply_logp=(self._reply_logp(before, witnessed[0]), self._reply_logp(after, witnessed[1]) if after else None),
            steps=self._steps,
            grad_norms=tuple(self._grad_norms),
            forward_tokens=self._forward_tokens,
            seconds=self._seconds,
        )

    def _reply_logp(self, measured: Sequence[Measured], witnessed: Sequence[Floats]) -> float | None:
        """Mean logprob of the user's own replies' tokens in this pass."""
        own = [t.sample.part == "lesson" and t.sample.source == "sampled" for t in self._targets]
        logps = [*witnessed, *(figures.logp for figures, is_own in zip(measured, own, strict=True) if is_own)]
        return float(np.concatenate(logps).mean()) if logps else None

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - began
