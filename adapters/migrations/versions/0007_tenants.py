"""Whose each row is: names are unique within a tenant. And what tenants let others read."""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

KEYED = (("adapters", "alias_arms"), ("prompt_templates", "prompt_aliases"))  # and who refers
TOTALS = "arm_totals"
OTHERS = ("served_requests", "training_files", "training_jobs")


def upgrade() -> None:
    for named, pointing in KEYED:
        _rebuild((named, pointing), keyed=True)
    _rebuild((TOTALS,), keyed=True)
    for name in OTHERS:
        op.add_column(name, _tenant())
    op.create_table(
        "shares",
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("audience", sa.String(64), primary_key=True),
    )


def downgrade() -> None:
    """Refused where a tenant other than `default` has something: names would meet."""
    for name in (*(one for pair in KEYED for one in pair), TOTALS, *OTHERS):
        found = sa.text(f"SELECT tenant FROM {name} WHERE tenant <> 'default' LIMIT 1")
        if (tenant := op.get_bind().execute(found).scalar()) is not None:
            raise RuntimeError(f"{name} has rows of tenant {tenant!r}: remove them first")
    op.drop_table("shares")
    for name in OTHERS:
        op.drop_column(name, "tenant")
    _rebuild((TOTALS,), keyed=False)
    for named, pointing in KEYED:
        _rebuild((named, pointing), keyed=False)


def _tenant(*, primary_key: bool = False) -> sa.Column[str]:
    return sa.Column(
        "tenant",
        sa.String(64),
        primary_key=primary_key,
        nullable=False,
        server_default="default",
    )


def _rebuild(names: Iterable[str], *, keyed: bool) -> None:
    """Tables anew, with or without `tenant` in their keys: no ALTER changes a key in SQLite.

    The first of `names` is referred to by the second.
    """
    bind = op.get_bind()
    old = {name: sa.Table(name, sa.MetaData(), autoload_with=bind) for name in names}
    key = ("tenant", "name", "version") if keyed else ("name", "version")
    referred = f"{next(iter(old))}_new"
    for name, table in old.items():
        columns = [
            sa.Column(c.name, c.type, primary_key=c.primary_key, nullable=c.nullable)
            for c in table.columns
            if c.name != "tenant"
        ]
        points = bool(table.foreign_keys)
        op.create_table(
            f"{name}_new",
            *([_tenant(primary_key=True)] if keyed else []),
            *columns,
            *(
                [sa.ForeignKeyConstraint(key, [f"{referred}.{column}" for column in key])]
                if points
                else []
            ),
        )
        quote = bind.dialect.identifier_preparer.quote  # `binary` is a word of PostgreSQL's
        listed = ", ".join(quote(column.name) for column in columns)
        op.execute(f"INSERT INTO {name}_new ({listed}) SELECT {listed} FROM {name}")
    for name in reversed(old):
        op.drop_table(name)
    for name, table in old.items():
        op.rename_table(f"{name}_new", name)
        for index in table.indexes:
            op.create_index(str(index.name), name, [column.name for column in index.columns])
