"""Tenants in the catalog: another's names are not there, but for what is shared, to read."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from adapters.catalog import MIGRATIONS, Catalog
from adapters.errors import AdapterNotFound, InvalidAdapter, TemplateNotFound
from adapters.outcomes import Outcome, Outcomes
from adapters.prompts.shelf import TemplateShelf
from adapters.prompts.template import parse_template
from adapters.sharing import Share, Shares
from adapters.tables import shares
from tests.adapters.test_manifest import MANIFEST


@pytest.fixture
def catalog(tmp_path: Path, empty_catalog: Path) -> Iterator[Catalog]:
    catalog = Catalog(str(shutil.copy(empty_catalog, tmp_path)))
    yield catalog
    catalog.close()


@pytest.fixture
def acme(catalog: Catalog) -> Catalog:
    """A tenant with `support@1`, `support@2` and `support@prod`."""
    acme = catalog.of("acme")
    for digest in "ab":
        add(acme, digest)
    acme.set_alias("support", "prod", {1: 1.0})
    return acme


@pytest.fixture
def zeta(catalog: Catalog) -> Catalog:
    return catalog.of("zeta")


def add(catalog: Catalog, digest: str, name: str = "support") -> int:
    return catalog.add(replace(MANIFEST, name=name, version=0, digest=digest * 64)).version


READS: list[Callable[[Catalog], Any]] = [
    lambda one: one.latest("support"),
    lambda one: one.version("support", 1),
    lambda one: one.alias("support", "prod"),
    lambda one: one.digest("a" * 64),
]
WRITES: list[Callable[[Catalog], Any]] = [
    lambda one: one.delete("support", None, "now"),
    lambda one: one.delete("support", 1, "now"),
    lambda one: one.set_alias("support", "mine", {1: 1.0}),
    lambda one: one.drop_alias("support", "prod"),
]


@pytest.mark.parametrize("do", READS + WRITES)
def test_what_is_anothers_is_not_there(
    catalog: Catalog, zeta: Catalog, do: Callable[[Catalog], Any]
) -> None:
    with pytest.raises(AdapterNotFound) as before:
        do(zeta)
    acme = catalog.of("acme")
    add(acme, "a")
    acme.set_alias("support", "prod", {1: 1.0})
    for other in (zeta, catalog):
        with pytest.raises(AdapterNotFound) as refused:
            do(other)
        assert str(refused.value) == str(before.value)
    assert zeta.all_latest() == zeta.versions("support") == []
    assert zeta.aliases_of("support") == {}
    assert [arm.manifest.version for arm in acme.alias("support", "prod")] == [1]


def test_names_are_unique_within_a_tenant(acme: Catalog, zeta: Catalog) -> None:
    assert add(zeta, "c") == 1
    zeta.set_alias("support", "prod", {1: 1.0})
    assert zeta.latest("support").digest == "c" * 64
    assert acme.latest("support").digest == "b" * 64
    zeta.drop_alias("support", "prod")
    zeta.delete("support", None, "now")
    assert acme.alias("support", "prod")[0].manifest.digest == "a" * 64
    assert add(zeta, "d") == 2
    assert len(acme.versions("support")) == 2


def test_weights_stay_while_anybody_needs_them(acme: Catalog, zeta: Catalog) -> None:
    add(zeta, "a")
    acme.drop_alias("support", "prod")
    acme.delete("support", None, "now")
    assert MANIFEST.weights_sha256 in acme.blobs_in_use()
    assert zeta.digest_anywhere("a" * 64, living=True).version == 1
    assert acme.digest_anywhere("b" * 64, living=False).version == 2
    with pytest.raises(AdapterNotFound):
        acme.digest_anywhere("b" * 64, living=True)


@pytest.mark.parametrize("audience", [("zeta",), ("*",)])
def test_what_is_shared_is_read_and_never_written(
    acme: Catalog, zeta: Catalog, audience: tuple[str, ...]
) -> None:
    Shares(zeta).set(Share("adapter", "acme", "support", audience))
    for read in READS:
        assert read(zeta) == read(acme)
    assert zeta.all_latest() == acme.all_latest()
    assert len(zeta.versions("support")) == 2
    assert zeta.aliases_of("support") == {"prod": {1: 1.0}}
    for write in WRITES:
        with pytest.raises(AdapterNotFound):
            write(zeta)
    assert (READS[0](zeta.of("beta")) if audience == ("*",) else None) in (
        None,
        acme.latest("support"),
    )
    Shares(zeta).set(Share("adapter", "acme", "support", ()))
    assert Shares(zeta).list() == []
    for read in READS:
        with pytest.raises(AdapterNotFound):
            read(zeta)


def test_only_who_is_named_reads(acme: Catalog, zeta: Catalog) -> None:
    Shares(zeta).set(Share("adapter", "acme", "support", ("zeta",)))
    with pytest.raises(AdapterNotFound):
        zeta.of("beta").latest("support")
    with pytest.raises(TemplateNotFound):
        TemplateShelf(zeta).get("support")


def test_an_own_name_hides_a_shared_one_whole(acme: Catalog, zeta: Catalog) -> None:
    Shares(zeta).set(Share("adapter", "acme", "support", ("*",)))
    assert add(zeta, "c") == 1
    assert zeta.latest("support").digest == "c" * 64
    assert [one.digest for one in zeta.all_latest()] == ["c" * 64]
    assert add(acme, "d", "another") == 1
    assert add(zeta, "e", "zebra") == 1
    Shares(zeta).set(Share("adapter", "acme", "another", ("zeta",)))
    assert [one.digest[0] for one in zeta.all_latest()] == ["d", "c", "e"]
    assert [one.digest[0] for one in zeta.page("another", 1)] == ["c"]
    assert [one.digest[0] for one in zeta.page("", 9, ["d" * 64, "e" * 64])] == ["d", "e"]
    assert len(zeta.versions("support")) == 1
    assert zeta.aliases_of("support") == {}
    with pytest.raises(AdapterNotFound):  # acme's version 2 is not a version of zeta's adapter
        zeta.version("support", 2)
    with pytest.raises(AdapterNotFound):
        zeta.alias("support", "prod")
    zeta.delete("support", None, "now")
    assert zeta.latest("support").digest == "b" * 64


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        (("zeta",), ("zeta", "beta"), True),
        (("*",), ("zeta",), True),
        (("zeta",), ("*",), True),
        (("zeta",), ("beta",), False),
    ],
)
def test_two_tenants_share_no_name_with_one(
    acme: Catalog, first: tuple[str, ...], second: tuple[str, ...], meet: bool
) -> None:
    add(acme.of("other"), "c")
    Shares(acme).set(Share("adapter", "acme", "support", first))
    if meet:
        with pytest.raises(InvalidAdapter, match="'acme' shares adapter 'support'"):
            Shares(acme).set(Share("adapter", "other", "support", second))
    else:
        Shares(acme).set(Share("adapter", "other", "support", second))
    assert len(Shares(acme).list()) == 2 - meet


def test_what_is_not_there_is_not_shared(acme: Catalog) -> None:
    for audience in (("*",), ()):
        with pytest.raises(AdapterNotFound):
            Shares(acme).set(Share("adapter", "acme", "nothing", audience))
    with pytest.raises(TemplateNotFound):
        Shares(acme).set(Share("template", "acme", "support", ("*",)))


@pytest.mark.parametrize("versions", [[None], [2, 1]])
def test_a_share_ends_with_the_last_version(
    acme: Catalog, zeta: Catalog, versions: list[int | None]
) -> None:
    """What comes under that name later was never shared."""
    add(acme, "c", name="other")
    kept = Share("adapter", "acme", "other", ("zeta",))
    for share in (Share("adapter", "acme", "support", ("*",)), kept):
        Shares(acme).set(share)
    acme.drop_alias("support", "prod")
    for version in versions:
        assert zeta.versions("support")
        acme.delete("support", version, "now")
    assert Shares(acme).list() == [kept]
    add(acme, "d")
    with pytest.raises(AdapterNotFound):
        zeta.latest("support")


def left_behind(catalog: Catalog, kind: str, name: str) -> None:
    """A share of what is no longer there, as servers left it once."""
    with catalog.writing() as connection:
        row = {"kind": kind, "tenant": "acme", "name": name, "audience": "zeta"}
        connection.execute(sa.insert(shares).values(**row))


def test_a_share_that_was_left_behind_is_not_one_of_what_comes_later(
    acme: Catalog, zeta: Catalog
) -> None:
    for kind in ("adapter", "template"):
        left_behind(acme, kind, "later")
    add(acme, "d", name="later")
    TemplateShelf(acme).add("later", parse_template({"user": "{{ input }}"}))
    assert Shares(acme).list() == []
    with pytest.raises(AdapterNotFound):
        zeta.latest("later")
    with pytest.raises(TemplateNotFound):
        TemplateShelf(zeta).get("later")


def test_a_share_that_was_left_behind_can_be_taken_back(acme: Catalog) -> None:
    left_behind(acme, "adapter", "gone")
    Shares(acme).set(Share("adapter", "acme", "gone", ()))
    assert Shares(acme).list() == []


def test_a_template_s_share_ends_with_its_last_version(catalog: Catalog) -> None:
    acme, zeta = TemplateShelf(catalog.of("acme")), TemplateShelf(catalog.of("zeta"))
    for text in "ab":
        acme.add("t", parse_template({"user": f"{text} {{{{ input }}}}"}))
    Shares(catalog).set(Share("template", "acme", "t", ("zeta",)))
    acme.delete("t@1")
    assert zeta.get("t").version == 2
    acme.delete("t")
    assert Shares(catalog).list() == []
    acme.add("t", parse_template({"user": "c {{ input }}"}))
    with pytest.raises(TemplateNotFound):
        zeta.get("t")


def test_templates(catalog: Catalog) -> None:
    acme, zeta = TemplateShelf(catalog.of("acme")), TemplateShelf(catalog.of("zeta"))
    made = [acme.add("t", parse_template({"user": f"{n} {{{{ input }}}}"})) for n in "ab"]
    acme.set_alias("t", "prod", 1)

    def nothing() -> None:
        for reference in ("t", "t@1", "t@prod"):
            with pytest.raises(TemplateNotFound):
                zeta.get(reference)
        assert zeta.page("", 10) == []

    nothing()
    Shares(catalog).set(Share("template", "acme", "t", ("zeta",)))
    assert [zeta.get(reference).version for reference in ("t", "t@1", "t@prod")] == [2, 1, 1]
    assert zeta.page("", 10) == [made[1]]
    assert zeta.versions("t") == made
    assert zeta.aliases_of("t") == {"prod": 1}
    for write in (
        lambda: zeta.delete("t"),
        lambda: zeta.set_alias("t", "x", 1),
        lambda: zeta.drop_alias("t", "prod"),
    ):
        with pytest.raises(TemplateNotFound):
            write()
    Shares(catalog).set(Share("template", "acme", "t", ()))
    nothing()
    assert zeta.add("t", made[0].template).version == 1


def test_outcomes_are_the_tenants_own(acme: Catalog, zeta: Catalog) -> None:
    Shares(acme).set(Share("adapter", "acme", "support", ("zeta",)))
    mine = Outcome("r1", "support", "prod", 1, 1.0, "completed", tenant="acme")
    theirs = Outcome("r2", "support", "prod", 1, 1.0, "completed", tenant="zeta")
    Outcomes(acme).record([mine, theirs])
    assert Outcomes(acme).totals("support", "prod")[1].requests == 1
    assert Outcomes(zeta).totals("support", "prod") == {}
    assert Outcomes(zeta).score("r1", 1.0, "spied") is None
    assert Outcomes(acme).score("r1", 1.0, "mine") is not None
    assert Outcomes(zeta).comments("support", "prod", 9) == []
    assert len(Outcomes(acme).comments("support", "prod", 9)) == 1


def migrate(catalog: Catalog, to: str) -> None:
    """Bring a catalog to a revision, up or down."""
    with catalog.writing() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(MIGRATIONS))
        command.downgrade(config, to)


def test_a_catalog_of_before_belongs_to_the_default_tenant(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    catalog = Catalog(str(path))
    for digest in "ab":
        add(catalog, digest)
    catalog.set_alias("support", "prod", {1: 9.0, 2: 1.0})
    Outcomes(catalog).record([Outcome("r1", "support", "prod", 2, 1.0, "completed")])
    migrate(catalog, "0006")
    catalog.close()
    with sqlite3.connect(path) as before:
        columns = {row[1] for row in before.execute("PRAGMA table_info(adapters)")}
        assert "tenant" not in columns
        assert before.execute("SELECT count(*) FROM adapters").fetchone() == (2,)
    catalog = Catalog(str(path))
    assert [one.version for one in catalog.versions("support")] == [1, 2]
    assert catalog.aliases_of("support") == {"prod": {1: 9.0, 2: 1.0}}
    assert Outcomes(catalog).totals("support", "prod")[2].requests == 1
    with pytest.raises(AdapterNotFound):
        catalog.of("acme").latest("support")
    with catalog.reading() as connection:  # the alias still cannot point to nothing
        assert connection.execute(sa.select(shares)).all() == []
        keys = sa.inspect(connection).get_foreign_keys("alias_arms")
        assert keys[0]["referred_table"] == "adapters"
        assert keys[0]["referred_columns"] == ["tenant", "name", "version"]
        indexes = {one["name"] for one in sa.inspect(connection).get_indexes("adapters")}
        assert {"ix_adapters_digest", "ix_adapters_weights_sha256"} <= indexes
    add(catalog.of("acme"), "c")
    with pytest.raises(RuntimeError, match="rows of tenant 'acme'"):
        migrate(catalog, "0006")
    assert catalog.of("acme").latest("support").digest == "c" * 64
    catalog.close()
