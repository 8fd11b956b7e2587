"""Adapters that are checkpoints on a Tinker server."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "tinker_adapters",
        sa.Column("lora_id", sa.String(255), nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("train_attn", sa.Boolean, nullable=False),
        sa.Column("train_mlp", sa.Boolean, nullable=False),
        sa.Column("latest", sa.Integer, nullable=False),
        sa.Column("next_version", sa.Integer, nullable=False),
        sa.Column("sampled_tokens", sa.BigInteger, nullable=False),
        sa.Column("scored_tokens", sa.BigInteger, nullable=False),
        sa.Column("trained_tokens", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("lora_id", name="pk_tinker_adapters"),
    )
    op.create_table(
        "tinker_versions",
        sa.Column("lora_id", sa.String(255), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("parent", sa.Integer, nullable=True),
        sa.Column("feedback_ids", sa.JSON, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("run_id", sa.Text, nullable=True),
        sa.Column("published", sa.Boolean, nullable=False),
        sa.Column("state_path", sa.Text, nullable=True),
        sa.Column("sampler_path", sa.Text, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("lora_id", "version", name="pk_tinker_versions"),
    )


def downgrade() -> None:
    op.drop_table("tinker_versions")
    op.drop_table("tinker_adapters")
