"""Replicas, what one asks another to load, and the count of changes that all of them watch."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "replicas",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("base_model", sa.String(256), nullable=False),
        sa.Column("address", sa.String(512), nullable=False),
        sa.Column("beat", _number, nullable=False),
        sa.Column("state", sa.JSON(), nullable=False),
    )
    op.create_table(
        "load_requests",
        sa.Column("replica_id", sa.String(64), primary_key=True),
        sa.Column("version", sa.String(256), primary_key=True),
        sa.Column("adapter", sa.JSON(), nullable=False),
    )
    revisions = op.create_table("revisions", sa.Column("id", sa.Integer(), primary_key=True), sa.Column("number", _number, nullable=False))
    op.bulk_insert(revisions, [{"id": 1, "number": 0}])
