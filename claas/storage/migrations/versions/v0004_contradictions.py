"""A lesson names the earlier feedback that it contradicts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("lessons", sa.Column("contradicts", sa.JSON, nullable=False, server_default="[]"))


def downgrade() -> None:
    op.drop_column("lessons", "contradicts")
