"""How long each job has trained, for the quota of its tenant."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    column = sa.Column("minutes", sa.Float, nullable=False, server_default=sa.text("0"))
    op.add_column("training_jobs", column)


def downgrade() -> None:
    op.drop_column("training_jobs", "minutes")
