"""A remote lesson's arrays → its `StepReport`. Reads only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from claas.core.types import TrainingConfig
from claas.training.engine.tinker_data import Measured, Target, part_means
from claas.training.engine.tinker_loss import Floats, buckets
from claas.training.engine.tinker_step import StepResult
from claas.training.hindsight import HINDSIGHT_VERSION
from claas.training.report import MOST_MOVED, Cost, MovedToken, OffPolicy, Retention, Signal, StepReport, Support, Update


def summarise(result: StepResult, config: TrainingConfig, *, parent: int, token_text: Callable[[int], str]) -> StepReport:
    """All figures of one lesson; its version is not known here."""
    before = part_means(result.targets, [m.divergence for m in result.before])
    after = part_means(result.targets, [m.divergence for m in result.after]) if result.after else {}
    responses = [len(target.sample.response) for target in result.targets]
    return StepReport(
        outcome=result.outcome,
        reason=result.reason,
        parent=parent,
        version=None,
        hindsight_version=HINDSIGHT_VERSION,
        signal=_signal(result, token_text),
        support=_support(result),
        off_policy=_off_policy(result, config),
        update=Update(
            loss_before=before["lesson"],
            loss_after=after.get("lesson"),
            reply_logprob_before=result.reply_logp[0],
            reply_logprob_after=result.reply_logp[1],
            grad_norm=result.grad_norms,
            relative_change=None,
            realised_kl=float(_joined(result.after, "moved").mean()) if result.after else None,
            optimizer_steps=result.steps,
        ),
        retention=Retention(
            replayed_samples=sum(target.sample.part == "replay" for target in result.targets),
            replay_loss_before=before.get("replay"),
            replay_loss_after=after.get("replay"),
            anchor_kl_before=before.get("anchor"),
            anchor_kl_after=after.get("anchor"),
        ),
        cost=Cost(
            samples=len(responses),
            response_tokens=sum(responses),
            forward_tokens=result.forward_tokens,
            peak_memory_bytes=0,
            seconds={phase: round(seconds, 4) for phase, seconds in result.seconds.items()},
        ),
        training=config.model_dump(mode="json"),
    )


def _signal(result: StepResult, token_text: Callable[[int], str]) -> Signal:
    taught = [i for i, target in enumerate(result.targets) if target.sample.part == "lesson"]
    loss_N = np.concatenate([result.before[i].divergence for i in taught])
    ratio_N = np.concatenate([result.targets[i].teacher_TK[:, 0] - result.start[i][:, 0] for i in taught])
    ids_N = np.concatenate([result.targets[i].ids_TK[:, 0] for i in taught])
    moved = np.argsort(-np.abs(ratio_N), kind="stable")[:MOST_MOVED]
    return Signal(
        loss_mean=float(loss_N.mean()),
        loss_p95=float(np.quantile(loss_N, 0.95)),
        loss_max=float(loss_N.max()),
        log_ratio_mean=float(ratio_N.mean()),
        log_ratio_p95=float(np.quantile(ratio_N, 0.95)),
        log_ratio_max=float(ratio_N.max()),
        control_loss=None,
        most_moved=tuple(MovedToken(token_id=int(ids_N[i]), text=token_text(int(ids_N[i])), log_ratio=float(ratio_N[i])) for i in moved),
    )


def _support(result: StepResult) -> Support:
    student = [buckets(start, target.real_TK) for target, start in zip(result.targets, result.start, strict=True)]
    teacher = [target.teacher for target in result.targets]
    in_top = [~target.real_TK.all(-1) for target in result.targets]  # the sampled token is among the teacher's likeliest
    return Support(
        student_tail_mass=_mean([np.exp(logp[:, -1]) for logp in student]),
        teacher_tail_mass=_mean([np.exp(logp[:, -1]) for logp in teacher]),
        sampled_in_support=_mean([hit.astype(float) for hit in in_top]),
        student_entropy=_mean([_entropy(logp) for logp in student]),
        teacher_entropy=_mean([_entropy(logp) for logp in teacher]),
        kind="teacher_top_k" if result.targets[0].support == "top_k" else "sampled_token",
        size=max(target.ids_TK.shape[1] for target in result.targets),
    )


def _off_policy(result: StepResult, config: TrainingConfig) -> OffPolicy:
    ratio_N = _joined(result.before, "ratio")
    own = [(t, start) for t, start in zip(result.targets, result.start, strict=True) if _is_own(t)]
    mismatch = _mean([np.abs(start[:, 0] - np.array(target.sample.served_logp)) for target, start in own]) if own else None
    return OffPolicy(
        ratio_mean=float(ratio_N.mean()),
        ratio_max=float(ratio_N.max()),
        clip_fraction=0.0 if config.is_clip is None else float((ratio_N >= config.is_clip).mean()),
        version_age=max(target.sample.age for target in result.targets),
        train_serve_mismatch=mismatch,
    )


def _is_own(target: Target) -> bool:
    """Whether what was served are this very version's logprobs."""
    return target.sample.source == "sampled" and target.sample.on_policy and not target.sample.masked


def _joined(measured: Sequence[Measured], column: str) -> Floats:
    joined: Floats = np.concatenate([figures.moved if column == "moved" else figures.ratio for figures in measured])
    return joined


def _entropy(logp_TS: Floats) -> Floats:
    p_TS = np.exp(logp_TS)
    summed: Floats = -np.where(p_TS > 0, p_TS * np.where(p_TS > 0, logp_TS, 0.0), 0.0).sum(-1)
    return summed


def _mean(parts: Sequence[Floats]) -> float:
    return float(np.concatenate(parts).mean())
