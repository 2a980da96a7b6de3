"""The catalog's tables. What changes here needs a migration beside `adapters/migrations/`."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from adapters.manifest import DEFAULT_TENANT

metadata = sa.MetaData()


def _tenant(*, key: bool = True) -> sa.Column[str]:
    """Whose a row is: names are one tenant's, and another's are not there."""
    return sa.Column(
        "tenant", sa.String(64), primary_key=key, nullable=False, server_default=DEFAULT_TENANT
    )


adapters = sa.Table(
    "adapters",
    metadata,
    _tenant(),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False, index=True),
    sa.Column("weights_sha256", sa.String(64), nullable=False, index=True),
    sa.Column("manifest", sa.Text, nullable=False),  # AdapterManifest.to_json
    sa.Column("created", sa.String(32), nullable=False),
    sa.Column("deleted", sa.String(32)),
    sa.Column("tokenizer_sha256", sa.String(64), index=True),
)
arms = sa.Table(  # an alias is its arms: one, or several that share its traffic
    "alias_arms",
    metadata,
    _tenant(),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("alias", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("weight", sa.Float, nullable=False),
    sa.ForeignKeyConstraint(
        ["tenant", "name", "version"], ["adapters.tenant", "adapters.name", "adapters.version"]
    ),
)
served = sa.Table(  # requests that came through an alias; bounded in time and number
    "served_requests",
    metadata,
    sa.Column("request_id", sa.String(32), primary_key=True),
    _tenant(key=False),
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
    _tenant(),
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


def manifest_json(dialect: str) -> sa.ColumnElement[Any]:
    """A manifest as the database reads it: its fields by name."""
    text = adapters.c.manifest
    as_json = sa.cast if dialect == "postgresql" else sa.type_coerce
    return as_json(text, sa.JSON)


training_files = sa.Table(  # a row is what makes a file on the disk exist
    "training_files",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    _tenant(key=False),
    sa.Column("home", sa.String(32), nullable=False, index=True),  # the server that has it
    sa.Column("filename", sa.String(255), nullable=False),
    sa.Column("purpose", sa.String(32), nullable=False),
    sa.Column("suffix", sa.String(16), nullable=False),  # its format
    sa.Column("nbytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("created", sa.Float, nullable=False),  # seconds since the epoch, as all times here
)
training_jobs = sa.Table(
    "training_jobs",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    _tenant(key=False),
    sa.Column("home", sa.String(32), nullable=False, index=True),  # the server that runs it
    sa.Column("status", sa.String(20), nullable=False, index=True),
    sa.Column("asked", sa.String(10)),  # cancel or pause, until it has happened
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("finished", sa.Float),
    sa.Column("starts", sa.Integer, nullable=False),  # since it last got on
    sa.Column("ordered", sa.Text, nullable=False),  # service.jobs.order.Order, as JSON
    sa.Column("checked", sa.Text),  # what the check of its data found, as JSON
    sa.Column("error", sa.Text),  # as JSON
    sa.Column("adapter", sa.String(200)),  # name@version, once it is published
    sa.Column("trained_tokens", sa.BigInteger),
    sa.Column("result_file", sa.String(40)),
    sa.Column("minutes", sa.Float, nullable=False, server_default=sa.text("0")),  # of training
)
job_events = sa.Table(  # what happened to a job; its steps are in its log
    "training_job_events",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("job", sa.String(40), nullable=False, index=True),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("level", sa.String(8), nullable=False),
    sa.Column("message", sa.Text, nullable=False),
)
prompt_templates = sa.Table(
    "prompt_templates",
    metadata,
    _tenant(),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False, index=True),  # of the content
    sa.Column("definition", sa.Text, nullable=False),  # PromptTemplate.plain, as JSON
    sa.Column("created", sa.String(32), nullable=False),
    sa.Column("deleted", sa.String(32)),
)
prompt_aliases = sa.Table(
    "prompt_aliases",
    metadata,
    _tenant(),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("alias", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(
        ["tenant", "name", "version"],
        ["prompt_templates.tenant", "prompt_templates.name", "prompt_templates.version"],
    ),
)
api_keys = sa.Table(  # never removed: whether there ever was a key decides whether one is needed
    "api_keys",
    metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("tenant", sa.String(64), nullable=False, index=True),
    sa.Column("scopes", sa.String(200), nullable=False),  # parted by spaces
    sa.Column("secret_sha256", sa.String(64), nullable=False),
    sa.Column("created", sa.Float, nullable=False),  # seconds since the epoch, as all times here
    sa.Column("expires", sa.Float),
    sa.Column("revoked", sa.Float),
    sa.Column("successor", sa.String(12)),
)
tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("quotas", sa.Text),  # service.access.quotas.Quotas, as JSON
)
shares = sa.Table(  # what a tenant lets others read: all versions and aliases of a name
    "shares",
    metadata,
    sa.Column("kind", sa.String(16), primary_key=True),  # adapter or template
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("audience", sa.String(64), primary_key=True),  # a tenant, or * for all
)
collections = sa.Table(  # what each takes; its documents are elsewhere (service.retrieval)
    "collections",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("place", sa.String(64), primary_key=True),  # sha-256 of where it is kept
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("nbytes", sa.BigInteger, nullable=False),
)
