import _sqlite3
import ctypes
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from adapters.catalog import CACHE_KIB, HEAD, MIGRATIONS, Catalog, check_alias, check_name, metadata
from adapters.errors import AdapterInUse, AdapterNotFound, InvalidAdapter, StoreUnavailable
from tests.adapters.test_manifest import MANIFEST


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Catalog]:
    if request.param == "sqlite":
        catalog = Catalog(str(tmp_path / "catalog.db"))
    else:
        catalog = Catalog(request.getfixturevalue("postgresql_database"))
    yield catalog
    catalog.close()


def add(catalog: Catalog, digest: str = "d", name: str = "support", **fields: str | None) -> int:
    draft = replace(MANIFEST, name=name, version=0, digest=digest * 64, **fields)  # type: ignore[arg-type]
    return catalog.add(draft).version


def test_versions_count_up(catalog: Catalog) -> None:
    assert [add(catalog, d) for d in "abc"] == [1, 2, 3]
    assert add(catalog, "a", name="other") == 1
    assert catalog.latest("support").version == 3
    assert catalog.version("support", 2).digest == "b" * 64
    assert [m.version for m in catalog.versions("support")] == [1, 2, 3]
    assert [(m.name, m.version) for m in catalog.all_latest()] == [("other", 1), ("support", 3)]


def test_pages_have_every_name_once_in_order(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", "a-b", "a.b", "a_b", "ab", "b2"]
    for number, name in enumerate(reversed(names)):
        add(catalog, "0", name)
        add(catalog, f"{number + 1}", name)
    add(catalog, "9", "gone")
    catalog.delete("gone", None, "now")
    monkeypatch.setattr("adapters.catalog.PAGE", 2)
    every = catalog.all_latest()
    assert {(one.name, one.version) for one in every} == {(name, 2) for name in names}
    assert [one.name for one in catalog.page("", 100)] == [one.name for one in every]
    for place, one in enumerate(every):
        behind = catalog.page(one.name, 3)
        assert behind == every[place + 1 : place + 4]
    assert [one.name for one in catalog.page("", 100, search="b")] == [
        one.name for one in every if "b" in one.name
    ]
    assert [one.name for one in catalog.page("", 100, search="a_b")] == ["a_b"]
    assert catalog.page("", 100, search="%") == []
    assert catalog.page("a-b0", 1) == [one for one in every if one.name > "a-b0"][:1]
    assert [one.digest for one in catalog.page("", 9, ["3" * 64, "9" * 64])] == ["3" * 64]
    old = catalog.page("", 2, ["0" * 64])  # a version of each, the newest of none
    assert old == every[:2]


def test_the_newest_again_adds_nothing(catalog: Catalog) -> None:
    assert [add(catalog, d) for d in "aab"] == [1, 1, 2]
    assert add(catalog, "a") == 3, "an older one again becomes the newest"
    assert add(catalog, "a", placement="unmerged") == 4
    assert add(catalog, "a", placement="unmerged", template="x") == 5


def test_a_number_is_never_given_again(catalog: Catalog) -> None:
    add(catalog, "a")
    add(catalog, "b")
    assert [m.version for m in catalog.delete("support", 2, "now")] == [2]
    assert catalog.latest("support").version == 1
    with pytest.raises(AdapterNotFound):
        catalog.version("support", 2)
    catalog.delete("support", None, "now")
    assert catalog.all_latest() == []
    with pytest.raises(AdapterNotFound):
        catalog.latest("support")
    with pytest.raises(AdapterNotFound):
        catalog.delete("support", None, "now")
    assert add(catalog, "a") == 3


def test_aliases_move(catalog: Catalog) -> None:
    add(catalog, "a")
    add(catalog, "b")
    catalog.set_alias("support", "prod", {1: 1.0})
    assert [arm.manifest.digest for arm in catalog.alias("support", "prod")] == ["a" * 64]
    catalog.set_alias("support", "prod", {2: 1.0})
    assert [arm.manifest.digest for arm in catalog.alias("support", "prod")] == ["b" * 64]
    assert catalog.aliases_of("support") == {"prod": {2: 1.0}}
    catalog.drop_alias("support", "prod")
    for gone in (catalog.alias, catalog.drop_alias):
        with pytest.raises(AdapterNotFound, match="support@prod"):
            gone("support", "prod")


def test_aliases_point_to_living_versions_of_their_name(catalog: Catalog) -> None:
    add(catalog, "a")
    add(catalog, "b", name="other")
    add(catalog, "c", name="other")
    for name, version in (("support", 2), ("none", 1)):
        with pytest.raises(AdapterNotFound):
            catalog.set_alias(name, "prod", {version: 1.0})
    catalog.delete("other", 2, "now")
    with pytest.raises(AdapterNotFound):
        catalog.set_alias("other", "prod", {2: 1.0})


def test_what_an_alias_points_to_stays(catalog: Catalog) -> None:
    add(catalog, "a")
    add(catalog, "b")
    catalog.set_alias("support", "prod", {1: 1.0})
    for version in (1, None):
        with pytest.raises(AdapterInUse, match="support@prod"):
            catalog.delete("support", version, "now")
    assert len(catalog.versions("support")) == 2
    catalog.delete("support", 2, "now")


def test_an_alias_shares_its_traffic(catalog: Catalog) -> None:
    for digest in "abc":
        add(catalog, digest)
    catalog.set_alias("support", "prod", {1: 10.0, 3: 90.0})
    found = [(arm.manifest.version, arm.weight) for arm in catalog.alias("support", "prod")]
    assert found == [(3, 90.0), (1, 10.0)]
    for version in (1, 3):
        with pytest.raises(AdapterInUse, match="support@prod"):
            catalog.delete("support", version, "now")
    catalog.delete("support", 2, "now")
    with pytest.raises(AdapterNotFound, match="support@2"):
        catalog.set_alias("support", "prod", {1: 1.0, 2: 1.0})
    assert catalog.aliases_of("support") == {"prod": {3: 90.0, 1: 10.0}}, "nothing of it was kept"


def test_aliases_of_the_first_catalog_are_kept(tmp_path: Path) -> None:
    """A database of the version before: its aliases become aliases of one arm."""
    path = tmp_path / "catalog.db"
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(MIGRATIONS))
        command.upgrade(config, "0001")
        manifest = replace(MANIFEST, name="support", version=4)
        row = {**asdict(manifest), "manifest": manifest.to_json()}
        connection.execute(
            sa.text(
                "INSERT INTO adapters (name, version, digest, weights_sha256, manifest, created) "
                "VALUES (:name, :version, :digest, :weights_sha256, :manifest, :created)"
            ),
            row,
        )
        connection.execute(sa.text("INSERT INTO aliases VALUES ('support', 'prod', 4)"))
    engine.dispose()
    catalog = Catalog(str(path))
    (arm,) = catalog.alias("support", "prod")
    assert (arm.manifest.version, arm.weight) == (4, 1.0)
    catalog.close()


def test_a_digest_finds_the_adapter(catalog: Catalog) -> None:
    add(catalog, "a")
    assert catalog.digest("a" * 64).name == "support"
    with pytest.raises(AdapterNotFound, match=r"sha256:e+"):
        catalog.digest("e" * 64)


def test_blobs_of_living_rows_are_in_use(catalog: Catalog) -> None:
    add(catalog, "a", weights_sha256="1" * 64, tokenizer_sha256="3" * 64)
    add(catalog, "b", weights_sha256="2" * 64, tokenizer_sha256=None)
    assert catalog.blobs_in_use() == {"1" * 64, "2" * 64, "3" * 64}
    catalog.delete("support", 1, "now")
    assert catalog.blobs_in_use() == {"2" * 64}


def test_of_what_is_deleted_the_blobs_that_others_need_are_found(catalog: Catalog) -> None:
    add(catalog, "a", weights_sha256="1" * 64, tokenizer_sha256="3" * 64)
    add(catalog, "b", weights_sha256="1" * 64, tokenizer_sha256=None)
    add(catalog, "c", weights_sha256="2" * 64, tokenizer_sha256="3" * 64)
    first, second, third = catalog.versions("support")
    assert catalog.blobs_needed([first]) == {"1" * 64, "3" * 64}
    catalog.delete("support", 1, "now")
    assert catalog.blobs_needed([first, second]) == {"1" * 64, "3" * 64}
    catalog.delete("support", 2, "now")
    assert catalog.blobs_needed([first, second]) == {"3" * 64}
    catalog.delete("support", 3, "now")
    assert catalog.blobs_needed([first, second, third]) == set()
    many = [replace(first, weights_sha256=f"{n:064x}") for n in range(1001)]
    assert catalog.blobs_needed(many) == set()


def test_a_deletion_reads_only_the_rows_of_its_blobs(tmp_path: Path) -> None:
    """A million rows may have been deleted before."""
    catalog = Catalog(str(tmp_path / "catalog.db"))
    asked: list[str] = []

    def note(*said: Any) -> None:
        asked.append(said[2])

    sa.event.listen(sa.engine.Engine, "before_cursor_execute", note)
    try:
        catalog.blobs_needed([replace(MANIFEST, tokenizer_sha256=None)])
    finally:
        sa.event.remove(sa.engine.Engine, "before_cursor_execute", note)
    (query,) = [text for text in asked if text.startswith("SELECT")]
    with catalog.reading() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", ("x",)).all()
    assert "USING INDEX ix_adapters_weights_sha256" in plan[0].detail
    catalog.close()


def test_connections_keep_few_pages(tmp_path: Path) -> None:
    """SQLite keeps 2 MB for each connection unless it is told otherwise: a server's memory would
    grow with its catalog for hours, by as much as it has connections."""
    used = ctypes.CDLL(_sqlite3.__file__).sqlite3_memory_used
    used.restype = ctypes.c_int64
    catalog = Catalog(str(tmp_path / "catalog.db"))
    row = {"tenant": "default", "version": 1, "digest": "d", "weights_sha256": "a", "created": ""}
    with catalog.writing() as connection:
        rows = [{**row, "name": f"n{n}", "manifest": "x" * 3000} for n in range(1000)]
        connection.execute(sa.insert(metadata.tables["adapters"]), rows)
    with ExitStack() as held:
        readers = [held.enter_context(catalog.reading()) for _ in range(8)]
        before = used()
        for reader in readers:
            assert len(reader.execute(sa.text("SELECT manifest FROM adapters")).all()) == 1000
        assert (used() - before) / len(readers) < 1.5 * CACHE_KIB * 1024
    catalog.close()


def test_many_threads_and_two_processes_worth_of_catalogs(tmp_path: Path) -> None:
    """Every writer gets its own number; nobody sees `database is locked`."""
    path = str(tmp_path / "catalog.db")
    catalogs = [Catalog(path), Catalog(path)]
    with ThreadPoolExecutor(8) as pool:
        digests = [f"{n:064x}" for n in range(60)]
        drafts = [replace(MANIFEST, version=0, digest=digest) for digest in digests]
        found = pool.map(lambda n: catalogs[n % 2].add(drafts[n]).version, range(60))
        assert sorted(found) == list(range(1, 61))
    for catalog in catalogs:
        catalog.close()


def test_rows_are_durable_and_keys_are_kept(tmp_path: Path) -> None:
    catalog = Catalog(str(tmp_path / "catalog.db"))
    with catalog._engine.connect() as connection:
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
            assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() == value
    add(catalog, "a")
    catalog.close()
    again = Catalog(str(tmp_path / "catalog.db"))
    assert again.latest("support").digest == "a" * 64
    again.close()


def test_migrations_make_what_the_code_reads(tmp_path: Path) -> None:
    Catalog(str(tmp_path / "catalog.db")).close()
    engine = sa.create_engine(f"sqlite:///{tmp_path}/catalog.db")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == HEAD
    engine.dispose()
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_a_broken_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "catalog.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        Catalog(str(tmp_path / "catalog.db"))


def test_a_locked_database_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.catalog.BUSY_SECONDS", 0)
    catalog = Catalog(str(tmp_path / "catalog.db"))
    holder = sqlite3.connect(tmp_path / "catalog.db")
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        add(catalog, "a")
    holder.rollback()
    holder.close()
    assert add(catalog, "a") == 1
    catalog.close()


@pytest.mark.parametrize("name", ["a", "support", "my-model_v1.2", "0", "a" * 64])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "A", ".a", "-a", "a/b", "../a", "a\\b", "a b", "a\n", "a\0", "ａ", "а", "a" * 65, "a@1",
     "sha256:x", "١"],
)  # fmt: skip
def test_no_names(name: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        check_name(name)
    assert caught.value.where == "name"
    with pytest.raises(InvalidAdapter):
        check_alias(name)


def test_an_alias_is_no_number() -> None:
    assert check_alias("v1") == "v1"
    with pytest.raises(InvalidAdapter, match="version"):
        check_alias("12")
