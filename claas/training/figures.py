"""A lesson's tensors → its `StepReport`. Reads only."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from claas.core.types import TrainingConfig
from claas.training.hindsight import HINDSIGHT_VERSION
from claas.training.micro_batch import MicroBatch, of_part, part_means
from claas.training.report import MOST_MOVED, Cost, MovedToken, OffPolicy, Retention, Signal, StepReport, Support, Update
from claas.training.sdpo import divergence, entropy
from claas.training.step import StepResult


def summarise(result: StepResult, config: TrainingConfig, *, parent: int, token_text: Callable[[int], str]) -> StepReport:
    """All figures of one lesson; its version is not known here."""
    return StepReport(
        outcome=result.outcome,
        reason=result.reason,
        parent=parent,
        version=None,
        hindsight_version=HINDSIGHT_VERSION,
        signal=_signal(result, token_text),
        support=_support(result.batches),
        off_policy=_off_policy(result, config),
        update=_update(result),
        retention=_retention(result),
        cost=_cost(result),
        training=config.model_dump(mode="json"),
    )


def _signal(result: StepResult, token_text: Callable[[int], str]) -> Signal:
    loss_N = of_part(result.batches, result.before.divergence, "lesson")
    lesson = [(batch, batch.targets) for batch in result.batches if batch.part == "lesson" and batch.targets is not None]
    ratio_N = torch.cat([targets.teacher_logp_N - targets.start_logp_N for _, targets in lesson])
    ids_N = torch.cat([batch.student.targets_N for batch, _ in lesson])
    moved = ratio_N.abs().topk(min(MOST_MOVED, ratio_N.numel())).indices.tolist()
    controls = [
        divergence(targets.start_logp_NS, targets.control_logp_NS, batch.alpha)
        for batch, targets in lesson
        if targets.control_logp_NS is not None
    ]
    return Signal(
        loss_mean=float(loss_N.mean()),
        loss_p95=_p95(loss_N),
        loss_max=float(loss_N.max()),
        log_ratio_mean=float(ratio_N.mean()),
        log_ratio_p95=_p95(ratio_N),
        log_ratio_max=float(ratio_N.max()),
        control_loss=float(torch.cat(controls).mean()) if controls else None,
        most_moved=tuple(MovedToken(token_id=int(ids_N[i]), text=token_text(int(ids_N[i])), log_ratio=float(ratio_N[i])) for i in moved),
    )


def _support(batches: list[MicroBatch]) -> Support:
    targets = [b.targets for b in batches if b.targets is not None]
    full = all(t.index_NK.shape[-1] == t.teacher_logp_NS.shape[-1] for t in targets)
    in_support = [(t.index_NK == b.student.targets_N[:, None]).any(-1) for b, t in zip(batches, targets, strict=True)]
    return Support(
        student_tail_mass=0.0 if full else _mean([t.start_logp_NS[:, -1].exp() for t in targets]),
        teacher_tail_mass=0.0 if full else _mean([t.teacher_logp_NS[:, -1].exp() for t in targets]),
        sampled_in_support=_mean([hit.float() for hit in in_support]),
        student_entropy=_mean([entropy(t.start_logp_NS) for t in targets]),
        teacher_entropy=_mean([entropy(t.teacher_logp_NS) for t in targets]),
        size=max(t.index_NK.shape[-1] for t in targets),
    )


def _off_policy(result: StepResult, config: TrainingConfig) -> OffPolicy:
    ratio_N = result.before.ratio
    own = [(s, b) for b in result.batches for s in b.samples if s.source == "sampled" and s.on_policy and not s.masked]
    mismatch = None
    if own:
        served = torch.tensor([logp for s, _ in own for logp in s.served_logp])
        trained = torch.cat([_rows_of(b, s) for s, b in own]).cpu()
        mismatch = float((trained - served).abs().mean())
    clipped = (ratio_N >= config.is_clip).float().mean() if config.is_clip is not None else torch.zeros(())
    return OffPolicy(
        ratio_mean=float(ratio_N.mean()),
        ratio_max=float(ratio_N.max()),
        clip_fraction=float(clipped),
        version_age=max(s.age for b in result.batches for s in b.samples),
        train_serve_mismatch=mismatch,
    )


def _rows_of(batch: MicroBatch, sample: object) -> Tensor:
    """The start-of-lesson logprobs of one sample's tokens, (T,)."""
    assert batch.targets is not None
    at = 0
    for other in batch.samples:
        if other is sample:
            return batch.targets.start_logp_N[at : at + len(other.response)]
        at += len(other.response)
    raise AssertionError("the sample is not in its batch")


def _update(result: StepResult) -> Update:
    after = result.after
    return Update(
        loss_before=part_means(result.batches, result.before.divergence)["lesson"],
        loss_after=part_means(result.batches, after.divergence)["lesson"] if after else None,
        reply_logprob_before=result.reply_logp[0],
        reply_logprob_after=result.reply_logp[1],
        grad_norm=result.grad_norms,
        relative_change=result.relative_change,
        realised_kl=float(after.kl_to_start.mean()) if after else None,
        optimizer_steps=len(result.grad_norms),
    )


def _retention(result: StepResult) -> Retention:
    before = part_means(result.batches, result.before.divergence)
    after = part_means(result.batches, result.after.divergence) if result.after else {}
    return Retention(
        replayed_samples=sum(len(batch.samples) for batch in result.batches if batch.part == "replay"),
        replay_loss_before=before.get("replay"),
        replay_loss_after=after.get("replay"),
        anchor_kl_before=before.get("anchor"),
        anchor_kl_after=after.get("anchor"),
    )


def _cost(result: StepResult) -> Cost:
    return Cost(
        samples=sum(len(b.samples) for b in result.batches),
        response_tokens=sum(b.tokens for b in result.batches),
        forward_tokens=result.forward_tokens,
        peak_memory_bytes=_peak_memory(result.before.logp.device),
        seconds={phase: round(seconds, 4) for phase, seconds in result.seconds.items()},
    )


def _peak_memory(device: torch.device) -> int:
    """Bytes: of a CUDA device this step's, else the process's largest resident size so far (kibibytes on Linux, bytes on macOS)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).mean())


def _p95(values_N: Tensor) -> float:
    return float(values_N.float().quantile(0.95))
