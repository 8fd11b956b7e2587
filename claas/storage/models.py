"""The tables, typed. Every change here needs a migration in `migrations/versions`: a test compares the two.

`number` counts rows in the order they came, since two may bear the same time.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import JsonValue
from sqlalchemy import JSON, BigInteger, Index, Integer, MetaData, UniqueConstraint, false
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from claas.storage.columns import AnyText, Logprobs, Name, TokenIds, UtcDateTime

_Count = BigInteger().with_variant(Integer, "sqlite")  # only INTEGER counts up by itself on SQLite


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class RolloutRow(Base):
    """One reply. `lookup` is a digest of adapter, `prompt` and `text`: it finds candidates, whose real columns are then compared."""

    __tablename__ = "rollouts"

    number: Mapped[int] = mapped_column(_Count, primary_key=True)
    id: Mapped[str] = mapped_column(Name, unique=True)
    lora_id: Mapped[str | None] = mapped_column(Name, index=True)
    version: Mapped[int | None]
    base_model: Mapped[str] = mapped_column(AnyText)
    messages: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    template_kwargs: Mapped[dict[str, JsonValue]] = mapped_column(JSON)
    prompt_token_ids: Mapped[tuple[int, ...]] = mapped_column(TokenIds)
    response_token_ids: Mapped[tuple[int, ...]] = mapped_column(TokenIds)
    response_logprobs: Mapped[tuple[float, ...]] = mapped_column(Logprobs)
    sampling: Mapped[dict[str, Any]] = mapped_column(JSON)
    finish_reason: Mapped[str] = mapped_column(Name)
    prompt: Mapped[str] = mapped_column(AnyText)
    text: Mapped[str] = mapped_column(AnyText)
    lookup: Mapped[str] = mapped_column(Name, index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class FeedbackRow(Base):
    """One feedback item. An idempotency key is unique within its adapter."""

    __tablename__ = "feedback"
    __table_args__ = (UniqueConstraint("lora_id", "idempotency_key"), Index(None, "lora_id", "number"))

    number: Mapped[int] = mapped_column(_Count, primary_key=True)
    id: Mapped[str] = mapped_column(Name, unique=True)
    request_id: Mapped[str] = mapped_column(Name, index=True)
    lora_id: Mapped[str] = mapped_column(Name)
    completion_id: Mapped[str] = mapped_column(Name)
    feedback: Mapped[str] = mapped_column(AnyText)
    rating: Mapped[int | None]
    demonstration: Mapped[str | None] = mapped_column(AnyText)
    details: Mapped[dict[str, JsonValue]] = mapped_column("metadata", JSON)
    idempotency_key: Mapped[str | None] = mapped_column(Name)
    state: Mapped[str] = mapped_column(Name, index=True)
    reason: Mapped[str | None] = mapped_column(AnyText)
    version: Mapped[int | None]
    retracting: Mapped[bool] = mapped_column(server_default=false())
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class AdapterVersionRow(Base):
    """One published adapter version and what it was trained from."""

    __tablename__ = "adapter_versions"

    lora_id: Mapped[str] = mapped_column(Name, primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    parent: Mapped[int | None]
    base_model: Mapped[str] = mapped_column(AnyText)
    feedback_ids: Mapped[list[str]] = mapped_column(JSON)
    metrics: Mapped[dict[str, JsonValue]] = mapped_column(JSON)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class StepRow(Base):
    """One line of the journal. `log_path` is relative to the log folder."""

    __tablename__ = "steps"
    __table_args__ = (Index(None, "lora_id", "number"),)

    number: Mapped[int] = mapped_column(_Count, primary_key=True)
    id: Mapped[str] = mapped_column(Name, unique=True)
    request_id: Mapped[str] = mapped_column(Name, index=True)
    lora_id: Mapped[str] = mapped_column(Name)
    parent: Mapped[int]
    version: Mapped[int | None]
    outcome: Mapped[str] = mapped_column(Name)
    reason: Mapped[str | None] = mapped_column(AnyText)
    metrics: Mapped[dict[str, JsonValue]] = mapped_column(JSON)
    timing_ms: Mapped[dict[str, int]] = mapped_column(JSON)
    log_path: Mapped[str | None] = mapped_column(Name)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class LessonRow(Base):
    """What a version was taught beyond its parent: how, the samples that taught it, and the ids of earlier feedback that it overrules."""

    __tablename__ = "lessons"

    lora_id: Mapped[str] = mapped_column(Name, primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    parent: Mapped[int]
    feedback_ids: Mapped[list[str]] = mapped_column(JSON)
    training: Mapped[dict[str, JsonValue]] = mapped_column(JSON)
    samples: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    contradicts: Mapped[list[str]] = mapped_column(JSON, default=list)


class TinkerAdapterRow(Base):
    """One adapter on a Tinker server: which layers of which model it adapts, and the version that serves."""

    __tablename__ = "tinker_adapters"

    lora_id: Mapped[str] = mapped_column(Name, primary_key=True)
    base_model: Mapped[str] = mapped_column(AnyText)
    rank: Mapped[int]
    train_attn: Mapped[bool]
    train_mlp: Mapped[bool]
    latest: Mapped[int]
    next_version: Mapped[int]
    sampled_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    scored_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    trained_tokens: Mapped[int] = mapped_column(BigInteger, default=0)


class TinkerVersionRow(Base):
    """One version and its checkpoints: `state_path` to train on from, `sampler_path` to speak through. Version 0 may have neither: it is
    the base model. A row that is not published is of a version being saved by `run_id`."""

    __tablename__ = "tinker_versions"

    lora_id: Mapped[str] = mapped_column(Name, primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    parent: Mapped[int | None]
    feedback_ids: Mapped[list[str]] = mapped_column(JSON)
    metrics: Mapped[dict[str, JsonValue]] = mapped_column(JSON)
    run_id: Mapped[str | None] = mapped_column(AnyText)
    published: Mapped[bool]
    state_path: Mapped[str | None] = mapped_column(AnyText)
    sampler_path: Mapped[str | None] = mapped_column(AnyText)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
