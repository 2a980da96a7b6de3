"""Alembic's entry: `Catalog` hands its own connection over, inside its own transaction."""

from __future__ import annotations

from alembic import context

from adapters.catalog import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
