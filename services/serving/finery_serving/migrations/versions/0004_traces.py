"""The trace that a rollout belongs to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("rollouts", sa.Column("traceparent", sa.String(64), nullable=False, server_default=""))
