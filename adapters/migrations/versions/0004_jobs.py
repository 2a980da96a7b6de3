"""Training jobs, their files, and what happened to them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "training_files",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("home", sa.String(32), nullable=False),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("suffix", sa.String(16), nullable=False),
        sa.Column("nbytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_index("ix_training_files_home", "training_files", ["home"])
    op.create_table(
        "training_jobs",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("home", sa.String(32), nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("asked", sa.String(10)),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("finished", sa.Float),
        sa.Column("starts", sa.Integer, nullable=False),
        sa.Column("ordered", sa.Text, nullable=False),
        sa.Column("checked", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("adapter", sa.String(200)),
        sa.Column("trained_tokens", sa.BigInteger),
        sa.Column("result_file", sa.String(40)),
    )
    for column in ("home", "status"):
        op.create_index(f"ix_training_jobs_{column}", "training_jobs", [column])
    op.create_table(
        "training_job_events",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("job", sa.String(40), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("level", sa.String(8), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
    )
    op.create_index("ix_training_job_events_job", "training_job_events", ["job"])


def downgrade() -> None:
    for table in ("training_job_events", "training_jobs", "training_files"):
        op.drop_table(table)
