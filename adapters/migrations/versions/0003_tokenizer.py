"""Tokenizers of adapters that have their own: blobs beside the weights."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("adapters", sa.Column("tokenizer_sha256", sa.String(64)))


def downgrade() -> None:
    op.drop_column("adapters", "tokenizer_sha256")
