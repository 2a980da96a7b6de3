"""Aliases that share their traffic among several versions, and what came of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "alias_arms",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("alias", sa.String(64), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("weight", sa.Float, nullable=False),
        sa.ForeignKeyConstraint(["name", "version"], ["adapters.name", "adapters.version"]),
    )
    op.execute(
        "INSERT INTO alias_arms (name, alias, version, weight) "
        "SELECT name, alias, version, 1.0 FROM aliases"
    )
    op.drop_table("aliases")
    op.create_table(
        "served_requests",
        sa.Column("request_id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("finished", sa.Float, nullable=False),
        sa.Column("score", sa.Float),
        sa.Column("comment", sa.Text),
    )
    op.create_index("ix_served_requests_finished", "served_requests", ["finished"])
    counts = ("requests", "failed", "cancelled", "prompt_tokens", "generated_tokens")
    times = ("first_token_sum", "first_token_squares", "seconds_sum", "seconds_squares")
    op.create_table(
        "arm_totals",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("alias", sa.String(64), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in counts),
        *(sa.Column(name, sa.Float, nullable=False) for name in times),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in ("scored", "binary")),
        *(sa.Column(name, sa.Float, nullable=False) for name in ("score_sum", "score_squares")),
    )


def downgrade() -> None:
    op.drop_table("arm_totals")
    op.drop_table("served_requests")
    op.create_table(
        "aliases",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("alias", sa.String(64), primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["name", "version"], ["adapters.name", "adapters.version"]),
    )
    # The newest version of each split: an alias had one.
    op.execute(
        "INSERT INTO aliases (name, alias, version) "
        "SELECT name, alias, MAX(version) FROM alias_arms GROUP BY name, alias"
    )
    op.drop_table("alias_arms")
