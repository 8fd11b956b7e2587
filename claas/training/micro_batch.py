"""Samples that go through the model together, what they are held to, and what a pass over them measured.

Shape legend
    N  response tokens of a micro-batch   K  support   S  buckets (K and a tail)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from claas.core.types import SampleSource, TrainingConfig
from claas.training.batch import Sequences, collate
from claas.training.samples import MICRO_BATCH_TOKENS, PARTS, Part, Sample, lesson_groups, positions

CHUNK = 128


@dataclass(frozen=True, slots=True)
class Targets:
    """What a micro-batch is held to, fixed at the start of the lesson. Rows are its N response tokens."""

    index_NK: Tensor
    teacher_logp_NS: Tensor
    teacher_logp_N: Tensor
    start_logp_NS: Tensor
    start_logp_N: Tensor
    base_logp_NS: Tensor | None
    control_logp_NS: Tensor | None


@dataclass(slots=True)
class MicroBatch:
    """Samples of one source and one part that go through the model together, and their targets once measured."""

    samples: list[Sample]
    student: Sequences
    alpha: float
    targets: Targets | None = None

    @property
    def source(self) -> SampleSource:
        return self.samples[0].source

    @property
    def part(self) -> Part:
        return self.samples[0].part

    @property
    def tokens(self) -> int:
        return int(self.student.targets_N.numel())

    @property
    def places(self) -> Tensor:
        """Where in its response each token stands, from 0 on, (N,)."""
        return torch.cat([torch.arange(len(s.response)) for s in self.samples]).to(self.student.targets_N.device)


@dataclass(frozen=True, slots=True)
class Measure:
    """Per-token figures of one pass over all micro-batches, joined: (N_total,)."""

    divergence: Tensor
    ratio: Tensor
    logp: Tensor
    kl_to_start: Tensor


def lesson_batches(samples: Sequence[Sample], config: TrainingConfig, device: torch.device, *, sharing: bool) -> list[MicroBatch]:
    """The lesson's micro-batches on this device; with `sharing`, what the prompts of one begin with takes no room of its own."""
    return [
        MicroBatch(
            group,
            collate([s.student_prompt for s in group], [s.response for s in group]).to(device),
            config.alpha if group[0].source == "sampled" else 0.0,
        )
        for group in lesson_groups(samples, config, sharing=sharing)
    ]


def fitting_together(batches: Sequence[MicroBatch], sharing: bool) -> list[list[MicroBatch]]:
    """Micro-batches in their order, in runs that have no more positions than one may have: small ones waste the machine's time.

    One whose targets are yet to be measured stays alone.
    """
    runs: list[list[MicroBatch]] = []
    for batch in batches:
        joined = [*runs[-1], batch] if runs else []
        samples = [sample for other in joined for sample in other.samples]
        if joined and all(other.targets for other in joined) and positions(samples, sharing) <= MICRO_BATCH_TOKENS:
            runs[-1].append(batch)
        else:
            runs.append([batch])
    return runs


def students(batches: Sequence[MicroBatch]) -> Sequences:
    """The student's sequences of all of these."""
    samples = [sample for batch in batches for sample in batch.samples]
    return collate([s.student_prompt for s in samples], [s.response for s in samples])


def of_part(batches: Sequence[MicroBatch], values_N: Tensor, part: Part) -> Tensor:
    """The rows of a measure's column that are tokens of one part, (N_part,); empty if the lesson has none of it."""
    columns = values_N.split([batch.tokens for batch in batches])
    chosen = [column for column, batch in zip(columns, batches, strict=True) if batch.part == part]
    return torch.cat(chosen) if chosen else values_N[:0]


def part_means(batches: Sequence[MicroBatch], values_N: Tensor) -> dict[Part, float]:
    """Mean of a measure's column over the tokens of each part that the lesson has."""
    present = {batch.part for batch in batches}
    return {part: float(of_part(batches, values_N, part).mean()) for part in PARTS if part in present}


def old_logp(batch: MicroBatch, targets: Targets, rows: slice) -> Tensor | None:
    """What the importance ratio is taken against: the serving engine's logprobs for a reply of an earlier version, the start of the lesson
    for an on-policy one (so exactly 1 on the first step), nothing for replies that are not the student's."""
    if batch.source != "sampled":
        return None
    served_N = torch.tensor([logp for s in batch.samples for logp in s.served_logp])[rows]
    on_policy_N = torch.tensor([s.on_policy for s in batch.samples for _ in s.response])[rows]
    return torch.where(on_policy_N.to(targets.start_logp_N.device), targets.start_logp_N, served_N.to(targets.start_logp_N.device))


def chunks(n: int) -> list[slice]:
    return [slice(at, min(at + CHUNK, n)) for at in range(0, n, CHUNK)]


def rows_of(targets: Targets, rows: slice) -> Targets:
    columns: list[Any] = [getattr(targets, field.name) for field in fields(Targets)]
    taken: list[Any] = [None if column is None else column[rows] for column in columns]
    return Targets(*taken)


def join_targets(parts: Sequence[Targets]) -> Targets:
    columns: list[Any] = [[getattr(part, field.name) for part in parts] for field in fields(Targets)]
    joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
    return Targets(*joined)


def join_measures(parts: Sequence[Measure]) -> Measure:
    return Measure(*[torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Measure)])
