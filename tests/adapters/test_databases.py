"""The catalog on SQLite and on PostgreSQL: migrations up and down, and many writers at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from adapters.catalog import HEAD, MIGRATIONS, Catalog, metadata
from adapters.errors import AdapterInUse, AdapterNotFound, StoreUnavailable, Unkeepable
from adapters.sharing import Share, Shares
from adapters.store import AdapterStore
from tests.adapters.test_manifest import MANIFEST

WRITERS = 8
HISTORY = tuple(f"{number:04d}" for number in range(1, int(HEAD) + 1))


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'catalog.db'}"
    return str(request.getfixturevalue("postgresql_database"))


@pytest.fixture
def replicas(url: str) -> Iterator[list[Catalog]]:
    """As many servers over one database, each with its own connections."""
    with ExitStack() as closing:
        found = [Catalog(url) for _ in range(WRITERS)]
        for each in found:
            closing.callback(each.close)
        yield found


def move(url: str, to: str, *, up: bool) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(MIGRATIONS))
        (command.upgrade if up else command.downgrade)(config, to)
    engine.dispose()


def differences(url: str) -> list[object]:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), metadata)
    engine.dispose()
    return list(found)


def fill(url: str) -> None:
    """A row of `default` in each table that has none, whatever the revision."""
    engine, now = sa.create_engine(url), sa.MetaData()
    with engine.begin() as connection:
        now.reflect(connection)
        for table in now.sorted_tables:
            if connection.scalar(sa.select(sa.func.count()).select_from(table)) == 0:
                row: dict[str, object] = {
                    column.name: 1 if issubclass(column.type.python_type, int | float) else "a"
                    for column in table.columns
                }
                if "tenant" in row:
                    row["tenant"] = "default"
                connection.execute(table.insert().values(row))
    engine.dispose()


def rows(url: str) -> dict[str, list[dict[str, object]]]:
    """All of them, by their tables."""
    engine, now = sa.create_engine(url), sa.MetaData()
    with engine.connect() as connection:
        now.reflect(connection)
        found = {
            table.name: [dict(row._mapping) for row in connection.execute(sa.select(table))]
            for table in now.sorted_tables
            if table.name != "alembic_version"
        }
    engine.dispose()
    return found


def at_once(*work: Callable[[], object]) -> list[object]:
    """All begin together; what came of each, its exception where it raised one."""
    start = threading.Barrier(len(work))

    def one(each: Callable[[], object]) -> object:
        start.wait()
        try:
            return each()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(one, work))


def test_rows_survive_every_migration_down_and_up(url: str) -> None:
    catalog = Catalog(url)
    draft = replace(MANIFEST, name="support", version=0, tokenizer_sha256=None)
    for digest in "ab":
        catalog.add(replace(draft, digest=digest * 64))
    catalog.set_alias("support", "prod", {2: 1.0})
    catalog.close()
    assert differences(url) == []
    for revision in reversed(HISTORY[:-1]):
        move(url, revision, up=False)
    for revision in HISTORY[1:]:
        move(url, revision, up=True)
    assert differences(url) == []
    again = Catalog(url)
    assert [one.digest[0] for one in again.versions("support")] == ["a", "b"]
    assert again.aliases_of("support") == {"prod": {2: 1.0}}
    with pytest.raises(AdapterInUse):
        again.delete("support", 2, "now")
    again.close()
    move(url, "base", up=False)
    engine = sa.create_engine(url)
    assert sa.inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()


@pytest.mark.slow
def test_each_migration_keeps_the_rows_of_every_table(url: str) -> None:
    """Up and down one by one, with a row in each table that the revision before has."""

    def moved(to: str, *, up: bool) -> None:
        fill(url)
        before = rows(url)
        move(url, to, up=up)
        after = rows(url)
        for name in before.keys() & after.keys():
            (was,), (now,) = before[name], after[name]
            kept = was.keys() & now.keys()
            assert kept
            assert {each: was[each] for each in kept} == {each: now[each] for each in kept}, to

    move(url, HISTORY[0], up=True)
    for revision in HISTORY[1:]:
        moved(revision, up=True)
    fill(url)
    assert differences(url) == []
    assert set(rows(url)) == set(metadata.tables)
    for revision in reversed(HISTORY[:-1]):
        moved(revision, up=False)
    moved(HISTORY[-1], up=True)
    assert differences(url) == []


def test_servers_that_start_at_once_make_the_tables_once(url: str) -> None:
    made = at_once(*(lambda: Catalog(url) for _ in range(WRITERS)))
    assert [one for one in made if not isinstance(one, Catalog)] == []
    for each in made:
        assert isinstance(each, Catalog)
        each.close()
    assert differences(url) == []


def test_an_older_server_says_that_it_is_older(url: str) -> None:
    Catalog(url).close()
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(StoreUnavailable, match=f"revision 9999.*up to {HEAD}"):
        Catalog(url)


def test_each_writer_gets_a_number_of_its_own(replicas: list[Catalog]) -> None:
    def several(which: int) -> Callable[[], list[int]]:
        drafts = [replace(MANIFEST, version=0, digest=f"{which:032x}{n:032x}") for n in range(10)]
        return lambda: [replicas[which].add(draft).version for draft in drafts]

    found = at_once(*(several(which) for which in range(WRITERS)))
    assert [one for one in found if isinstance(one, Exception)] == []
    numbers = [number for one in found for number in one]  # type: ignore[attr-defined]
    assert sorted(numbers) == list(range(1, 10 * WRITERS + 1))


def test_an_alias_is_never_seen_half_moved(replicas: list[Catalog]) -> None:
    """Some move it, to one version or to a split of two; whoever reads sees one of these, whole."""
    first, *movers, reader = replicas
    for digest in "abc":
        first.add(replace(MANIFEST, name="support", version=0, digest=digest * 64))
    whole: list[dict[int, float]] = [{1: 1.0}, {2: 1.0}, {2: 90.0, 3: 10.0}]
    first.set_alias("support", "prod", whole[0])
    seen: list[dict[int, float]] = []
    moving = threading.Event()

    def read() -> None:
        while not moving.is_set():
            arms = reader.alias("support", "prod")
            seen.append({arm.manifest.version: arm.weight for arm in arms})

    def move_it(catalog: Catalog) -> Callable[[], None]:
        def moves() -> None:
            for number in range(12):
                catalog.set_alias("support", "prod", whole[number % 3])

        return moves

    reading = threading.Thread(target=read)
    reading.start()
    assert at_once(*(move_it(catalog) for catalog in movers)) == [None] * len(movers)
    moving.set()
    reading.join()
    assert [one for one in seen if one not in whole] == []
    assert len({str(one) for one in seen}) > 1, "nothing moved while it was read"
    assert reader.aliases_of("support")["prod"] in whole


def test_no_alias_points_to_what_another_deletes(replicas: list[Catalog]) -> None:
    one, other = replicas[:2]
    for number in range(1, 16):
        one.add(replace(MANIFEST, name="support", version=0, digest=f"{number:064x}"))
        deleted, pointed = at_once(
            lambda number=number: one.delete("support", number, "now"),  # type: ignore[misc]
            lambda number=number: other.set_alias("support", "prod", {number: 1.0}),  # type: ignore[misc]
        )
        if pointed is None:
            assert isinstance(deleted, AdapterInUse)
            assert other.alias("support", "prod")[0].manifest.version == number
            other.drop_alias("support", "prod")
        else:
            assert isinstance(pointed, AdapterNotFound)
            assert not isinstance(deleted, Exception)


def test_versions_are_counted_by_what_they_were_made_for(url: str) -> None:
    catalog = Catalog(url)
    for digest, tenant, base in (("a", "acme", "1"), ("b", "zeta", "1"), ("c", "zeta", "2")):
        told = {"base_fingerprint": "3" * 64}  # of where it came from, not of itself
        draft = replace(MANIFEST, version=0, digest=digest * 64, provenance=told)
        catalog.of(tenant).add(replace(draft, base_fingerprint=base * 64))
    assert [catalog.made_for(base * 64) for base in "123"] == [2, 1, 0]
    catalog.of("acme").delete(MANIFEST.name, None, "now")
    assert catalog.made_for("1" * 64) == 1
    catalog.close()


def test_a_share_ends_with_what_is_shared(url: str) -> None:
    catalog = Catalog(url)
    draft = replace(MANIFEST, name="support", version=0)
    catalog.add(draft)
    Shares(catalog).set(Share("adapter", "default", "support", ("*",)))
    assert catalog.of("zeta").latest("support").version == 1
    catalog.delete("support", None, "now")
    assert Shares(catalog).list() == []
    catalog.add(draft)
    with pytest.raises(AdapterNotFound):
        catalog.of("zeta").latest("support")
    catalog.close()


@pytest.mark.slow
def test_a_writer_that_hangs_is_said(
    postgresql_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.catalog.BUSY_SECONDS", 1)
    one, other = Catalog(postgresql_database), Catalog(postgresql_database)
    draft = replace(MANIFEST, name="support", version=0)
    with one.writing():
        assert other.all_latest() == [], "reading waits for nobody"
        with pytest.raises(StoreUnavailable, match="lock timeout"):
            other.add(draft)
    assert other.add(draft).version == 1
    for each in (one, other):
        each.close()


@pytest.mark.slow
def test_a_text_that_no_row_can_have_is_no_fault_of_the_store(postgresql_database: str) -> None:
    catalog = Catalog(postgresql_database)
    named = sa.select(metadata.tables["adapters"]).where(sa.column("name") == "a\0b")
    with pytest.raises(Unkeepable, match="NUL"), catalog.reading() as connection:
        connection.execute(named)
    assert catalog.all_latest() == []
    catalog.close()


@pytest.mark.slow
def test_a_database_that_was_restarted_is_found_again(postgresql_database: str) -> None:
    catalog = Catalog(postgresql_database)
    catalog.add(replace(MANIFEST, name="support", version=0))
    engine = sa.create_engine(postgresql_database, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:  # as a restart does with every connection
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    engine.dispose()
    assert catalog.latest("support").version == 1
    catalog.close()


@pytest.mark.slow
def test_replicas_change_blobs_and_rows_one_at_a_time(
    postgresql_database: str, tmp_path: Path
) -> None:
    """Each has a directory of its own for its copies, so no file's lock is between them."""
    stores = [AdapterStore(str(tmp_path / str(n)), postgresql_database) for n in range(4)]
    inside, most = 0, 0

    def change(store: AdapterStore) -> Callable[[], None]:
        def changes() -> None:
            nonlocal inside, most
            for _ in range(5):
                with store._exclusive():
                    inside += 1
                    most = max(most, inside)
                    store.catalog.blobs_in_use()
                    time.sleep(0.005)
                    inside -= 1

        return changes

    assert at_once(*(change(store) for store in stores)) == [None] * len(stores)
    assert most == 1
    for store in stores:
        store.close()
