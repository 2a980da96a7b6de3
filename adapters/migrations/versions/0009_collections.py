"""What collections take of their tenants' bytes; and an index for a deletion's look-up."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

INDEX = "ix_adapters_tokenizer_sha256"


def upgrade() -> None:
    op.create_index(INDEX, "adapters", ["tokenizer_sha256"])
    op.create_table(
        "collections",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("place", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("nbytes", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("collections")
    op.drop_index(INDEX, "adapters")
