"""What each step reports: numbers that say whether it learnt, how far it moved, and what it cost."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from claas.core.types import Frozen, StepOutcome

MOST_MOVED = 10


class MovedToken(Frozen):
    """A response token and how far the feedback moves it: log Q − log P in nats."""

    token_id: int
    text: str
    log_ratio: float


class Signal(Frozen):
    """How strongly teacher and student differ at the start of the lesson, nats a token."""

    loss_mean: float
    loss_p95: float
    loss_max: float
    log_ratio_mean: float
    log_ratio_p95: float
    log_ratio_max: float
    control_loss: float | None
    most_moved: tuple[MovedToken, ...]


class Support(Frozen):
    """How much of both distributions the support holds, and which it is: the `size` likeliest tokens of one of the two, or, where a server
    tells no more, the sampled token alone."""

    student_tail_mass: float
    teacher_tail_mass: float
    sampled_in_support: float
    student_entropy: float
    teacher_entropy: float
    kind: Literal["top_k", "teacher_top_k", "sampled_token"] = "top_k"
    size: int | None = None


class OffPolicy(Frozen):
    """How far the samples are from the version being trained. `train_serve_mismatch`: mean |log P − log P_old| of on-policy samples."""

    ratio_mean: float
    ratio_max: float
    clip_fraction: float
    version_age: int
    train_serve_mismatch: float | None


class Update(Frozen):
    """What the optimizer did to the lesson's own samples. `relative_change` is ‖ΔBA‖/‖BA‖ over all modules; None from a zero adapter.

    `reply_logprob_*` is the mean logprob, in nats a token, of the replies that the feedback was about.
    """

    loss_before: float
    loss_after: float | None
    reply_logprob_before: float | None
    reply_logprob_after: float | None
    grad_norm: tuple[float, ...]
    relative_change: float | None
    realised_kl: float | None
    optimizer_steps: int


class Retention(Frozen):
    """What the lesson was to leave alone: mean loss, nats a token, on earlier lessons' samples and on the anchors; None without any."""

    replayed_samples: int
    replay_loss_before: float | None
    replay_loss_after: float | None
    anchor_kl_before: float | None
    anchor_kl_after: float | None


class Cost(Frozen):
    """Tokens through the model, peak memory of the process, seconds by phase."""

    samples: int
    response_tokens: int
    forward_tokens: int
    peak_memory_bytes: int
    seconds: dict[str, float]


class StepReport(Frozen):
    """One lesson's outcome and figures. `version` is the published one, None unless applied.

    `contradicts` are the versions whose lessons this one overrules, with what they taught.
    `adapter_usage` is what the adapter's chats and lessons have used so far, where that is paid for.
    `first_try` says why the lesson was undone once already, when this is a second try with a smaller learning rate.
    """

    outcome: StepOutcome
    reason: str | None
    first_try: str | None = None
    contradicts: tuple[int, ...] = ()
    parent: int
    version: int | None
    hindsight_version: int
    signal: Signal
    support: Support
    off_policy: OffPolicy
    update: Update
    retention: Retention
    cost: Cost
    training: dict[str, JsonValue]
    adapter_usage: dict[str, JsonValue] | None = None
