"""The catalog's tables. What changes here needs a migration beside `adapters/migrations/`."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()
adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False, index=True),
    sa.Column("weights_sha256", sa.String(64), nullable=False, index=True),
    sa.Column("manifest", sa.Text, nullable=False),  # AdapterManifest.to_json
    sa.Column("created", sa.String(32), nullable=False),
    sa.Column("deleted", sa.String(32)),
    sa.Column("tokenizer_sha256", sa.String(64)),
)
arms = sa.Table(  # an alias is its arms: one, or several that share its traffic
    "alias_arms",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("alias", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("weight", sa.Float, nullable=False),
    sa.ForeignKeyConstraint(["name", "version"], ["adapters.name", "adapters.version"]),
)
served = sa.Table(  # requests that came through an alias; bounded in time and number
    "served_requests",
    metadata,
    sa.Column("request_id", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("alias", sa.String(64), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("finished", sa.Float, nullable=False, index=True),  # seconds since the epoch
    sa.Column("score", sa.Float),
    sa.Column("comment", sa.Text),
)
totals = sa.Table(  # what all requests of one arm came to, those forgotten since among them
    "arm_totals",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("alias", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("failed", sa.BigInteger, nullable=False),
    sa.Column("cancelled", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("generated_tokens", sa.BigInteger, nullable=False),
    sa.Column("first_token_sum", sa.Float, nullable=False),  # seconds, of completed requests
    sa.Column("first_token_squares", sa.Float, nullable=False),
    sa.Column("seconds_sum", sa.Float, nullable=False),
    sa.Column("seconds_squares", sa.Float, nullable=False),
    sa.Column("scored", sa.BigInteger, nullable=False),
    sa.Column("binary", sa.BigInteger, nullable=False),  # of these, scores of exactly 0 or 1
    sa.Column("score_sum", sa.Float, nullable=False),
    sa.Column("score_squares", sa.Float, nullable=False),
)
