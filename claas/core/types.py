"""The types that rooms hand each other. Frozen, and checked when built.

Wire types live in `claas.api`; these know nothing of HTTP, of storage or of tensors.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

EngineKind = Literal["local", "modal", "tinker"]
FinishReason = Literal["stop", "length", "tool_calls", "abort"]
SampleSource = Literal["sampled", "hindsight", "anchor"]
TeacherKind = Literal["live", "base", "ema", "snapshot", "book"]
StepOutcome = Literal["applied", "skipped", "undone"]
Rating = Literal[1, -1]
FeedbackState = Literal["queued", "training", "applied", "skipped", "undone", "failed", "retracted"]


def utc_now() -> datetime:
    """Now, with its time zone."""
    return datetime.now(UTC)


class Frozen(BaseModel):
    """A value: immutable, and unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ChatMessage(Frozen):
    """One turn as the chat template sees it. `content` is plain text; `None` only beside `tool_calls`.

    `reasoning_content` is what an assistant thought before it said this; templates that keep none of it leave it out.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_calls: tuple[dict[str, JsonValue], ...] | None = None
    tool_call_id: str | None = None


# --- Serving ---


class SamplingParams(Frozen):
    """How tokens are drawn. Defaults are OpenAI's. `max_tokens` None: as many as the context still holds.

    `constrained`: a grammar forbade tokens, so that the logprobs of the reply are those of what it left over.
    """

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = Field(default=0, ge=0, le=20)
    ignore_eos: bool = False
    constrained: bool = False


class ToolCall(Frozen):
    """A function that the model wants called. `arguments` is JSON as the model wrote it: it may be no valid JSON."""

    id: str
    name: str
    arguments: str


class LoraRuntimeRef(Frozen):
    """One immutable adapter version as a serving engine needs it: a name that is never reused, and where its files are."""

    lora_id: str
    version: int
    vllm_name: str
    lora_path: str


class Rollout(Frozen):
    """One reply with all that on-policy training needs.

    `prompt_token_ids` and `response_token_ids` are the exact ids the model read and sampled; EOS is part of the response if
    and only if `finish_reason` is "stop" and the model sampled it. `response_logprobs` are nats under the unmodified model
    distribution (temperature 1, no top-p), one for each response token, unless `sampling.constrained`. `text` is the visible reply.
    """

    id: str
    lora_id: str | None
    version: int | None
    base_model: str
    messages: tuple[ChatMessage, ...]
    template_kwargs: dict[str, JsonValue] = {}
    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]
    response_logprobs: tuple[float, ...]
    sampling: SamplingParams
    finish_reason: FinishReason
    text: str
    created_at: datetime = Field(default_factory=utc_now)

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if len(self.response_token_ids) != len(self.response_logprobs):
            raise ValueError(f"{len(self.response_token_ids)} response tokens but {len(self.response_logprobs)} logprobs")
        if (self.lora_id is None) != (self.version is None):
            raise ValueError("lora_id and version come together")
        return self

    @property
    def prompt(self) -> str:
        """The last user turn: what the upstream feedback body calls `prompt`."""
        return next((m.content or "" for m in reversed(self.messages) if m.role == "user"), "")


# --- Training ---


MAX_GRADIENT_STEPS = 64


class TrainingConfig(Frozen):
    """One lesson's settings. The defaults are for an 8B model; `claas.training.defaults` has those of smaller ones.

    alpha: divergence of `sampled` rollouts. 0: KL(Q‖P), 1: KL(P‖Q), between: generalised Jensen–Shannon. Hindsight rollouts always use 0.
    is_clip: cap of the importance ratio; None switches the ratio off.
    teacher_top_k: support of the divergence, besides one tail bucket.
    teacher: which policy judges own replies. live: the adapter as it is when the lesson begins; base: the base model; ema: a moving
        average of the adapter; snapshot: the adapter as it was some lessons ago; book: the base model that has also read the feedback of
        earlier lessons.
    hindsight_teacher: which policy judges hindsight rollouts.
    teacher_ema_rate: share of the adapter that the average takes up with each gradient step.
    teacher_snapshot_every: lessons after which the snapshot is taken anew.
    gradient_steps: optimizer steps on the lesson's batch; the teacher's targets are computed once.
    minibatch: lesson samples, and anchors, that a gradient step takes after the first, which takes all; 0 means all, always. Where earlier
        lessons are rehearsed and add `replay_steps`, half of the lesson's places are theirs, besides as many as a minibatch.
    hindsight_rollouts: replies sampled with the feedback in view, for each reply the feedback is about.
    hindsight_keep: how many of them, of the whole lesson, are taught at most: those that the feedback lifts most.
    hindsight_max_tokens, hindsight_temperature: how those are sampled.
    guidance: how far beyond its teacher's own distribution a hindsight rollout's first token is taught, in the direction in which the
        feedback moved it (classifier-free guidance), those after it less and less; 0 is that distribution. Demonstrations and what is
        sampled with them in view are taught without.
    min_lift: how much likelier the feedback must make a rollout than unrelated feedback does, in nats a token, for it to be taught.
    imagined_prompts: other user messages that the feedback is about, imagined by the base model, taught beside a lesson's own: how many at
        most, of the whole lesson.
    own_replies: teach the reply itself beside its hindsight rollouts; False teaches it only where none were asked for.
    anchors: replies of the base model to unrelated prompts that the lesson must leave as they are; as many times more (at most all there
        are) as rehearsal makes it take gradient steps.
    replay: samples of the adapter's earlier lessons that are rehearsed beside the new one, each judged with its own feedback in view.
    replay_steps: gradient steps that are added for each different feedback that is rehearsed; in all, at most three times `gradient_steps`
        and `MAX_GRADIENT_STEPS`.
    min_signal: mean loss in nats a token under which the lesson counts as known and is skipped.
    max_kl: realised mean KL(new‖old) in nats a token on the lesson's own tokens above which the step is undone.
    max_anchor_kl: mean KL(base‖new) in nats a token on the anchors above which a step that made it larger is undone.
    max_forgetting: rise of the replayed samples' mean loss in nats a token above which the step is undone.
    min_reply_logprob: mean logprob, nats a token, that the base model must give a new version's replies; under it the step is undone.
    """

    learning_rate: float = Field(default=3e-5, gt=0.0, le=1.0)
    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    is_clip: Annotated[float, Field(ge=1.0, le=20.0)] | None = 5.0
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    kl_reg_weight: float = Field(default=0.0, ge=0.0, le=1.0)
    teacher_top_k: int = Field(default=100, ge=1, le=1000)
    teacher: TeacherKind = "live"
    hindsight_teacher: TeacherKind = "base"
    teacher_ema_rate: float = Field(default=0.01, gt=0.0, le=0.01)
    teacher_snapshot_every: int = Field(default=4, ge=1, le=1000)
    gradient_steps: int = Field(default=1, ge=1, le=MAX_GRADIENT_STEPS)
    minibatch: int = Field(default=0, ge=0, le=64)
    hindsight_rollouts: int = Field(default=0, ge=0, le=32)
    hindsight_keep: int = Field(default=16, ge=1, le=256)
    hindsight_max_tokens: int = Field(default=256, ge=8, le=4096)
    hindsight_temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    guidance: float = Field(default=0.0, ge=0.0, le=2.0)
    min_lift: float = 0.0
    imagined_prompts: int = Field(default=0, ge=0, le=64)
    own_replies: bool = True
    anchors: int = Field(default=0, ge=0, le=48)
    replay: int = Field(default=0, ge=0, le=64)
    replay_steps: int = Field(default=0, ge=0, le=64)
    min_signal: float = Field(default=1e-4, ge=0.0)
    max_kl: float = Field(default=10.0, gt=0.0)
    max_anchor_kl: float = Field(default=0.25, gt=0.0)
    max_forgetting: float = Field(default=0.1, gt=0.0)
    min_reply_logprob: float = Field(default=-3.5, lt=0.0)

    @property
    def needs_rollouts(self) -> bool:
        """Whether a lesson without a single good hindsight rollout or demonstration has nothing to teach."""
        return self.hindsight_rollouts > 0 and not self.own_replies


class DistillBatchItem(Frozen):
    """One sample of a lesson: x (messages, template arguments), y (ids, logprobs) and f (feedback, demonstration).

    `source` says whose sample y is: the student's own (`sampled`), the teacher's with the feedback in view (`hindsight`; its
    `response_logprobs` may be empty, since no importance ratio applies), or the base model's on an unrelated prompt (`anchor`).
    `feedback` may be empty; `demonstration` is the reply the user wanted, which the teacher is shown. `book` holds other lessons' feedback,
    oldest first, which a `book` teacher reads before this one's.
    `version` is whose distribution `response_logprobs` are of; None where that is nobody's.
    `imagined`: the last user message is the base model's, not the user's.
    A sample that is not `taught` has no loss: its logprob before and after the lesson is reported. One that is `replayed` belongs to an
    earlier lesson, whose feedback it carries.
    """

    prompt: str
    response: str
    feedback: str
    demonstration: str | None = None
    book: tuple[str, ...] = ()
    response_logprobs: tuple[float, ...]
    prompt_token_ids: tuple[int, ...] = Field(min_length=1)
    response_token_ids: tuple[int, ...] = Field(min_length=1)
    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    template_kwargs: dict[str, JsonValue] = {}
    source: SampleSource = "sampled"
    taught: bool = True
    replayed: bool = False
    imagined: bool = False
    version: int | None = None
    completion_id: str | None = None
    feedback_id: str | None = None

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if self.source == "sampled" and len(self.response_logprobs) != len(self.response_token_ids):
            raise ValueError(f"{len(self.response_token_ids)} response tokens but {len(self.response_logprobs)} logprobs")
        return self


class DistillBatchRequestPayload(Frozen):
    """A whole lesson for a training engine. `parent` is the version to train from; None the latest."""

    lora_id: str
    parent: int | None = None
    training: TrainingConfig
    samples: list[DistillBatchItem] = Field(min_length=1)
    save_in_place: bool = False
    feedback_ids: tuple[str, ...] = ()


class RoomPlan(Frozen):
    """How a serving engine on the trainer's device makes room for a step; those that need no room ignore it.

    sleep_before: False trains beside the serving engine, whatever the policy says.
    wake_after, wake_on_failure: always True: a service that was left asleep would answer nobody.
    sleep_level: 1 keeps the weights in host memory.
    """

    sleep_before: bool = True
    wake_after: Literal[True] = True
    wake_on_failure: Literal[True] = True
    sleep_level: Literal[1] = 1


class DistillResponse(Frozen):
    """What a step did. `metadata` holds a `StepReport` as JSON."""

    lora_id: str
    metadata: dict[str, Any]


# --- Adapters ---


class AdapterVersion(Frozen):
    """One immutable version. Version 0 has no effect; each lesson adds one, and `parent` is what it was trained from."""

    lora_id: str
    version: int = Field(ge=0)
    parent: int | None = None
    base_model: str
    created_at: datetime = Field(default_factory=utc_now)
    feedback_ids: tuple[str, ...] = ()
    metrics: dict[str, JsonValue] = {}
    size_bytes: int = 0


class LoraInitRequest(Frozen):
    """A new adapter. `base_model` None: the one that is served. Rank and alpha None: the defaults for the model's size."""

    lora_id: str
    base_model: str | None = None
    lora_r: Annotated[int, Field(ge=1, le=256)] | None = None
    lora_alpha: Annotated[int, Field(ge=1, le=1024)] | None = None
    target_modules: tuple[str, ...] | None = None


class LoraInitResponse(Frozen):
    lora_id: str
    version: int = 0


class LoraListResponse(Frozen):
    loras: list[str]


class LoraDeleteResponse(Frozen):
    deleted: bool


class LoraExistsPayload(Frozen):
    exists: bool


class LoraExportPayload(Frozen):
    filename: str
    content: bytes


class ServiceHealth(Frozen):
    """One part's health. `status` is "healthy" or "unhealthy"; `detail` is free-form facts."""

    status: Literal["healthy", "unhealthy"]
    error: str | None = None
    detail: dict[str, JsonValue] = {}


# --- Feedback ---


class Feedback(Frozen):
    """One stored feedback item and where it stands. `feedback` is empty where only a rating or a demonstration was given.

    `retracting`: it was asked to be taken back, and is not yet.
    """

    id: str
    request_id: str
    lora_id: str
    completion_id: str
    feedback: str
    rating: Rating | None = None
    demonstration: str | None = None
    metadata: dict[str, JsonValue] = {}
    idempotency_key: str | None = None
    state: FeedbackState = "queued"
    reason: str | None = None
    version: int | None = None
    retracting: bool = False
    created_at: datetime = Field(default_factory=utc_now)


class StepRecord(Frozen):
    """One line of the journal: what a step did to which adapter, and why."""

    id: str
    request_id: str
    lora_id: str
    parent: int
    version: int | None
    outcome: Literal["applied", "skipped", "undone", "failed"]
    reason: str | None = None
    metrics: dict[str, JsonValue] = {}
    timing_ms: dict[str, int] = {}
    created_at: datetime = Field(default_factory=utc_now)
