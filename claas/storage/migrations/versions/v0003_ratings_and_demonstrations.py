"""Feedback may be a rating or a demonstration."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("feedback", sa.Column("rating", sa.Integer, nullable=True))
    op.add_column("feedback", sa.Column("demonstration", sa.Text, nullable=True))


def downgrade() -> None:
    op.drop_column("feedback", "demonstration")
    op.drop_column("feedback", "rating")
