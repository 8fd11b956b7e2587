"""Rollouts, feedback, adapter versions and steps."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _number() -> sa.Column[int]:
    return sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)


def _name(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(255), nullable=nullable)


def _text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=nullable)


def _json(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.JSON, nullable=False)


def _integer(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, nullable=nullable)


def _created_at() -> sa.Column[object]:
    return sa.Column("created_at", sa.DateTime(timezone=True), nullable=False)


def upgrade() -> None:
    op.create_table(
        "rollouts",
        _number(),
        _name("id"),
        _name("lora_id", nullable=True),
        _integer("version", nullable=True),
        _text("base_model"),
        _json("messages"),
        _json("template_kwargs"),
        sa.Column("prompt_token_ids", sa.LargeBinary, nullable=False),
        sa.Column("response_token_ids", sa.LargeBinary, nullable=False),
        sa.Column("response_logprobs", sa.LargeBinary, nullable=False),
        _json("sampling"),
        _name("finish_reason"),
        _text("prompt"),
        _text("text"),
        _name("lookup"),
        _created_at(),
        sa.PrimaryKeyConstraint("number", name="pk_rollouts"),
        sa.UniqueConstraint("id", name="uq_rollouts_id"),
    )
    for column in ("lora_id", "lookup", "created_at"):
        op.create_index(f"ix_rollouts_{column}", "rollouts", [column])
    op.create_table(
        "feedback",
        _number(),
        _name("id"),
        _name("request_id"),
        _name("lora_id"),
        _name("completion_id"),
        _text("feedback"),
        _json("metadata"),
        _name("idempotency_key", nullable=True),
        _name("state"),
        _text("reason", nullable=True),
        _integer("version", nullable=True),
        _created_at(),
        sa.PrimaryKeyConstraint("number", name="pk_feedback"),
        sa.UniqueConstraint("id", name="uq_feedback_id"),
        sa.UniqueConstraint("lora_id", "idempotency_key", name="uq_feedback_lora_id_idempotency_key"),
    )
    op.create_index("ix_feedback_request_id", "feedback", ["request_id"])
    op.create_index("ix_feedback_state", "feedback", ["state"])
    op.create_index("ix_feedback_lora_id_number", "feedback", ["lora_id", "number"])
    op.create_table(
        "adapter_versions",
        _name("lora_id"),
        _integer("version"),
        _integer("parent", nullable=True),
        _text("base_model"),
        _json("feedback_ids"),
        _json("metrics"),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        _created_at(),
        sa.PrimaryKeyConstraint("lora_id", "version", name="pk_adapter_versions"),
    )
    op.create_table(
        "steps",
        _number(),
        _name("id"),
        _name("request_id"),
        _name("lora_id"),
        _integer("parent"),
        _integer("version", nullable=True),
        _name("outcome"),
        _text("reason", nullable=True),
        _json("metrics"),
        _json("timing_ms"),
        _name("log_path", nullable=True),
        _created_at(),
        sa.PrimaryKeyConstraint("number", name="pk_steps"),
        sa.UniqueConstraint("id", name="uq_steps_id"),
    )
    op.create_index("ix_steps_request_id", "steps", ["request_id"])
    op.create_index("ix_steps_lora_id_number", "steps", ["lora_id", "number"])


def downgrade() -> None:
    for table in ("steps", "adapter_versions", "feedback", "rollouts"):
        op.drop_table(table)
