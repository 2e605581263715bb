"""Limits of API keys; null is unlimited."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    for name in ("requests_per_minute", "tokens_per_minute", "concurrent_streams"):
        op.add_column("api_keys", sa.Column(name, sa.BigInteger(), nullable=True))
