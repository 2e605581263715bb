"""The base model of each rollout and of the version before, which need not be that of what serves."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("rollouts", sa.Column("base_model", sa.String(256), nullable=False, server_default=""))
    op.add_column("aliases", sa.Column("previous_base_model", sa.String(256), nullable=False, server_default=""))
