"""Canaries, the version before, pins, and the requests that promote or roll back."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    for kind in ("canary", "previous"):
        op.add_column("aliases", sa.Column(f"{kind}_version", sa.String(256), nullable=False, server_default=""))
        op.add_column("aliases", sa.Column(f"{kind}_job_id", sa.String(128), nullable=False, server_default=""))
        op.add_column("aliases", sa.Column(f"{kind}_adapter", sa.JSON(), nullable=True))
    op.add_column("aliases", sa.Column("canary_weight", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("aliases", sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("rollouts", sa.Column("canary_weight", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("rollouts", sa.Column("rolls_back", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("rollouts", sa.Column("replaced", sa.String(256), nullable=False, server_default=""))
    op.create_table(
        "alias_requests",
        sa.Column("project", sa.String(64), primary_key=True),
        sa.Column("request_id", sa.String(128), primary_key=True),
        sa.Column("body_sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
