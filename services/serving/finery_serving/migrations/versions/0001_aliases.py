"""Aliases and their rollouts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "rollouts",
        sa.Column("number", number, sa.Identity(), primary_key=True),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("alias", sa.String(256), nullable=False),
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("body_sha256", sa.String(64), nullable=False),
        sa.Column("version", sa.String(256), nullable=False),
        sa.Column("job_id", sa.String(128), nullable=False),
        sa.Column("adapter", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("swap_s", sa.Float(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("project", "request_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("rollouts_by_alias", "rollouts", ["project", "alias", "number"])
    op.create_table(
        "aliases",
        sa.Column("project", sa.String(64), primary_key=True),
        sa.Column("alias", sa.String(256), primary_key=True),
        sa.Column("base_model", sa.String(256), nullable=False),
        sa.Column("version", sa.String(256), nullable=False),
        sa.Column("job_id", sa.String(128), nullable=False),
        sa.Column("adapter", sa.JSON(), nullable=True),
        sa.Column("etag", sa.String(32), nullable=False),
        sa.Column("epoch", number, nullable=False),
        sa.Column("rollout_number", number, sa.ForeignKey("rollouts.number"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
    )
