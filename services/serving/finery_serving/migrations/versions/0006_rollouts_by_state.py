"""Rollouts at work are few, those that have ended many: they are found by their state."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_index("rollouts_by_state", "rollouts", ["state"])
