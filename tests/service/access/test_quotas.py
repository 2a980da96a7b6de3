"""Quotas: what is reserved, what is given back, and who is refused."""

from __future__ import annotations

import asyncio
import gc
import math
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.catalog import Catalog
from adapters.errors import QuotaReached
from adapters.prompts.shelf import TemplateShelf
from adapters.prompts.template import parse_template
from adapters.tables import training_jobs
from service.access.keys import Keys
from service.access.quotas import Meter, Quotas, Tenants
from service.errors import NotFound, QuotaExceeded
from service.jobs.files import TrainingFiles
from service.jobs.job import Fault
from service.jobs.office import Office, within
from service.jobs.process import Confinement
from service.jobs.queue import Queue
from service.jobs.runner import Workshop
from tests.adapters.test_manifest import MANIFEST
from tests.service.jobs.conftest import keep, order_of
from tests.waiting import PATIENCE, until


@pytest.fixture(autouse=True)
def minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock on the wall stands within a minute: as the next one begins, a window counts the
    last one's requests a little less, and lets one more pass."""
    now = time.time() // 60 * 60 + 20
    monkeypatch.setattr(time, "time", lambda: now)


@pytest.fixture
def catalog(tmp_path: Path, empty_catalog: Path) -> Iterator[Catalog]:
    catalog = Catalog(str(shutil.copy(empty_catalog, tmp_path)))
    for tenant in ("acme", "zeta"):
        Keys(catalog).create("a key", tenant, ["infer"])
    yield catalog
    catalog.close()


def under(catalog: Catalog, quotas: Quotas, use: Callable[[Meter], Awaitable[None]]) -> None:
    """Let `use` run while acme has these quotas."""
    tenants = Tenants(catalog)
    tenants.set_quotas("acme", quotas)

    async def run() -> None:
        await use(Meter(tenants))

    asyncio.run(run())


def test_quotas_come_back(catalog: Catalog) -> None:
    tenants = Tenants(catalog)
    wanted = Quotas(requests_per_minute=5, bytes=1 << 40)
    tenants.set_quotas("acme", wanted)
    assert tenants.quotas("acme") == wanted
    assert [one.quotas for one in tenants.list()] == [wanted, Quotas()]
    assert tenants.quotas("nobody") == Quotas()
    with pytest.raises(NotFound, match="no keys yet"):
        tenants.set_quotas("nobody", wanted)


def test_requests_of_a_minute(catalog: Catalog) -> None:
    async def use(meter: Meter) -> None:
        for _ in range(3):
            await (await meter.admit("acme")).close()
        with pytest.raises(QuotaExceeded, match="may use 3 requests a minute, 0 are left") as over:
            await meter.admit("acme")
        assert 1 <= over.value.retry_after <= 80  # a third of the next minute too
        await (await meter.admit("zeta")).close()  # another's limit is its own

    under(catalog, Quotas(requests_per_minute=3), use)


def test_requests_at_the_same_time(catalog: Catalog) -> None:
    async def use(meter: Meter) -> None:
        leases = await asyncio.gather(
            *(meter.admit("acme") for _ in range(5)), return_exceptions=True
        )
        held = [one for one in leases if not isinstance(one, BaseException)]
        assert len(held) == 2
        assert all(isinstance(one, QuotaExceeded) for one in leases if one not in held)
        await held[0].close()
        await held[0].close()  # twice is once
        await meter.admit("acme")
        with pytest.raises(QuotaExceeded, match="2 requests at the same time"):
            await meter.admit("acme")

    under(catalog, Quotas(concurrency=2), use)


def test_tokens_are_reserved_and_given_back(catalog: Catalog) -> None:
    async def use(meter: Meter) -> None:
        first, second = await meter.admit("acme"), await meter.admit("acme")
        await first.reserve(80)
        with pytest.raises(QuotaExceeded, match="may use 100 tokens a minute, 20 are left"):
            await second.reserve(40)
        first.use(30)
        await first.close()
        await second.reserve(70)  # 30 were used, 50 came back
        with pytest.raises(QuotaExceeded):
            await second.reserve(1)
        await second.close()  # nothing of it was used
        third = await meter.admit("acme")
        await third.reserve(70)

    under(catalog, Quotas(tokens_per_minute=100), use)


def test_what_was_reserved_a_minute_ago_is_not_given_back_to_this_one(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else who lets long requests run could save up minutes, and spend them at once."""
    monkeypatch.setattr("service.access.quotas.MINUTE", 0.0)

    async def use(meter: Meter) -> None:
        lease, other = await meter.admit("acme"), await meter.admit("acme")
        await lease.reserve(80)
        await lease.close()
        with pytest.raises(QuotaExceeded, match="20 are left"):
            await other.reserve(40)

    under(catalog, Quotas(tokens_per_minute=100), use)


@pytest.mark.parametrize(
    ("taken", "wanted"),
    [
        ([(0, 80)], 80),  # of this minute's: when it is over, and most of it forgotten
        ([(10, 100)], 1),
        ([(10, 90)], 20),
        ([(0, 100), (61, 1)], 60),  # of the last minute's, while that is forgotten
        ([(0, 100), (75, 20)], 40),
        ([(0, 100), (90, 45)], 90),  # of both
        ([(0, 30)], 100),
    ],
)
def test_who_waits_as_long_as_it_was_told_finds_what_it_wants(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, taken: list[tuple[int, int]], wanted: int
) -> None:
    """And a second before that it is not there yet: nobody waits longer than it has to."""
    begins = 1_800_000_000.0  # a minute
    clock = [begins]
    monkeypatch.setattr(time, "time", lambda: clock[0])

    async def use(meter: Meter) -> None:
        async def reserve(tokens: int) -> None:
            await (await meter.admit("acme", generates=False)).reserve(tokens)

        for after, tokens in taken:
            clock[0] = begins + after
            await reserve(tokens)
        clock[0] += 0.25
        with pytest.raises(QuotaExceeded) as over:
            await reserve(wanted)
        told = math.ceil(over.value.retry_after)
        clock[0] += max(0, told - 1.01)
        if told > 1:
            with pytest.raises(QuotaExceeded):
                await reserve(wanted)
        clock[0] += min(told, 1.01)
        await reserve(wanted)

    under(catalog, Quotas(tokens_per_minute=100), use)


def test_who_has_no_tokens_left_may_do_what_takes_none(catalog: Catalog) -> None:
    async def use(meter: Meter) -> None:
        await (await meter.admit("acme")).reserve(100)
        with pytest.raises(QuotaExceeded, match="0 are left"):
            await meter.admit("acme")
        await (await meter.admit("acme", generates=False)).close()

    under(catalog, Quotas(tokens_per_minute=100), use)


def test_who_has_no_tokens_left_is_refused_before_its_body(catalog: Catalog) -> None:
    async def use(meter: Meter) -> None:
        lease = await meter.admit("acme")
        await lease.reserve(5_000)  # more than a minute has: the whole minute
        lease.use(100)
        await lease.close()
        async with asyncio.timeout(30):  # without waiting for the minute's end
            with pytest.raises(QuotaExceeded, match="0 are left"):
                await meter.admit("acme")

    under(catalog, Quotas(tokens_per_minute=100), use)


def test_a_change_of_quotas_is_seen_within_a_second(catalog: Catalog) -> None:
    async def use(meter: Meter) -> None:
        await meter.admit("acme")
        Tenants(catalog).set_quotas("acme", Quotas(concurrency=1))
        await asyncio.sleep(0.6)
        with pytest.raises(QuotaExceeded):
            await meter.admit("acme")

    under(catalog, Quotas(), use)


def add(catalog: Catalog, digest: str, nbytes: int = 100) -> None:
    draft = replace(
        MANIFEST,
        version=0,
        digest=digest * 64,
        weights_sha256=digest * 64,
        weights_bytes=nbytes,
        tokenizer_sha256=None,
    )
    catalog.add(draft)


def test_adapters_that_a_tenant_keeps(catalog: Catalog) -> None:
    Tenants(catalog).set_quotas("acme", Quotas(adapters=2))
    acme = catalog.of("acme")
    add(acme, "a")
    add(acme, "b")
    add(acme, "b")  # the same again is no new version
    with pytest.raises(QuotaReached, match="may keep 2 versions of adapters and has 2"):
        add(acme, "c")
    add(catalog.of("zeta"), "c")
    acme.delete(MANIFEST.name, 1, "now")
    add(acme, "c")


def test_templates_that_a_tenant_keeps(catalog: Catalog) -> None:
    Tenants(catalog).set_quotas("acme", Quotas(templates=2))
    acme, zeta = (TemplateShelf(catalog.of(tenant)) for tenant in ("acme", "zeta"))
    made = [parse_template({"user": f"{text} {{{{ input }}}}"}) for text in "abc"]
    for name, one in (("t", made[0]), ("other", made[0]), ("other", made[0])):
        acme.add(name, one)  # the same again is no new version
    with pytest.raises(QuotaReached, match="may keep 2 versions of templates and has 2"):
        acme.add("t", made[1])
    with pytest.raises(QuotaReached):
        acme.add("new", made[1])
    for one in made:
        zeta.add("t", one)
    acme.delete("other")
    assert acme.add("t", made[1]).version == 2


def test_aliases_of_a_name(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that shares its traffic all arms are one."""
    monkeypatch.setattr("adapters.room.MAX_ALIASES", 2)
    acme, shelf = catalog.of("acme"), TemplateShelf(catalog.of("acme"))
    add(acme, "a")
    add(acme, "b")
    shelf.add("t", parse_template({"user": "{{ input }}"}))

    def point(alias: str) -> None:
        acme.set_alias(MANIFEST.name, alias, {1: 1.0, 2: 1.0})

    for set_alias, drop in (
        (point, lambda alias: acme.drop_alias(MANIFEST.name, alias)),
        (lambda alias: shelf.set_alias("t", alias, 1), lambda alias: shelf.drop_alias("t", alias)),
    ):
        for alias in ("one", "two", "one"):
            set_alias(alias)
        with pytest.raises(QuotaReached, match="has 2 aliases, and may have no more"):
            set_alias("three")
        drop("one")
        set_alias("three")


def test_bytes_that_a_tenant_keeps(catalog: Catalog, tmp_path: Path) -> None:
    Tenants(catalog).set_quotas("acme", Quotas(bytes=1000))
    acme = catalog.of("acme")
    add(acme, "a", 600)
    with pytest.raises(QuotaReached, match="has 600: 500 more are too many"):
        add(acme, "b", 500)
    files = TrainingFiles(acme, tmp_path / "files", "0" * 32).of("acme")
    kept = keep(files, tmp_path, b"x" * 300)
    with pytest.raises(QuotaReached, match="has 900"):
        keep(files, tmp_path, b"x" * 101)
    draft = replace(MANIFEST, version=0, weights_sha256="a" * 64, weights_bytes=600)
    own = {"tokenizer_sha256": "d" * 64, "tokenizer_bytes": 101}
    with pytest.raises(QuotaReached, match="has 900: 101 more"):  # of the tokenizer alone
        acme.add(replace(draft, digest="d" * 64, **own))
    assert len(list((tmp_path / "files").iterdir())) == 1
    files.delete(kept.id)
    keep(files, tmp_path, b"x" * 400)


def test_no_two_files_take_the_same_room(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another comes between the look at the quota and the row."""
    Tenants(catalog).set_quotas("acme", Quotas(bytes=100))
    files = TrainingFiles(catalog, tmp_path / "files", "0" * 32).of("acme")
    kept = []

    def meanwhile(directory: Path) -> None:
        monkeypatch.undo()
        (tmp_path / "other").mkdir()
        kept.append(keep(files, tmp_path / "other", b"x" * 60))

    monkeypatch.setattr("service.jobs.files._sync", meanwhile)
    with pytest.raises(QuotaReached, match="has 60: 60 more"):
        keep(files, tmp_path, b"x" * 60)
    assert [path.name for path in (tmp_path / "files").iterdir()] == [kept[0].id]
    assert files.list(limit=9, order="asc")[0] == kept


def test_a_file_that_a_job_holds_still_counts(catalog: Catalog, tmp_path: Path) -> None:
    """The job has a link of its own: the disk has its room back when the job is over."""
    Tenants(catalog).set_quotas("acme", Quotas(bytes=100))
    files = TrainingFiles(catalog, tmp_path / "files", "0" * 32).of("acme")
    queue = Queue(catalog, "0" * 32).of("acme")
    file = keep(files, tmp_path, b"x" * 60)
    jobs = [queue.add(order_of(file)) for _ in range(2)]
    keep(files, tmp_path, b"x" * 40)  # the same bytes are not counted twice
    files.delete(file.id)
    with pytest.raises(QuotaReached, match="has 100: 1 more"):
        keep(files, tmp_path, b"x")
    keep(files.of("zeta"), tmp_path, b"x")
    queue.cancel(jobs[0].id)
    with pytest.raises(QuotaReached):
        keep(files, tmp_path, b"x")
    queue.fail(jobs[1].id, Fault("x", "bad rows"), before=("validating_files",))
    keep(files, tmp_path, b"x" * 60)


def test_minutes_of_training(catalog: Catalog, tmp_path: Path) -> None:
    files = TrainingFiles(catalog, tmp_path / "files", "0" * 32)
    queue = Queue(catalog, "0" * 32)
    acme = queue.of("acme")
    order = order_of(keep(files, tmp_path), config={"budget": {"minutes": 4.0}})
    job = acme.add(within(order, 10.0))
    assert acme.minutes(0.0) == 4.0  # promised
    other = Queue(catalog, "1" * 32).of("acme")  # of another server
    assert other.minutes(0.0) == 4.0
    with pytest.raises(QuotaExceeded, match="promised"):  # ordered at once: both saw ten left
        other.add(within(order_of(keep(files, tmp_path)), 10.0), most_minutes=10.0)
    left = within(order_of(keep(files, tmp_path)), 10.0 - acme.minutes(0.0))
    assert left.config["budget"]["minutes"] == 6.0
    promised = other.add(left, most_minutes=10.0)
    other.move(promised.id, "cancelled", "gone", before=("validating_files",))
    queue.trained(job.id, 1.5)
    assert acme.minutes(0.0) == 4.0
    queue.move(job.id, "succeeded", "done", before=("validating_files",))
    assert acme.minutes(0.0) == 1.5  # what it did not use came back
    assert acme.minutes(time.time() + 1) == 0.0
    assert queue.of("zeta").minutes(0.0) == 0.0
    with pytest.raises(QuotaExceeded, match="thirty days"):
        within(order, 0.0)


def test_a_dry_run_takes_of_the_minutes_what_it_lasts(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it may last while it runs, so that two at once cannot have the same minutes."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    one, other = (Queue(catalog, home * 32).of("acme") for home in "01")
    with one.planning(12.0, 600.0) as seconds:
        assert seconds == 600.0
        with other.planning(12.0, 600.0) as left:
            assert left == pytest.approx(120.0)
            with pytest.raises(QuotaExceeded, match="thirty days"), one.planning(12.0, 600.0):
                pass
            clock[0] += 30
        with suppress(OSError), other.planning(12.0, 600.0):
            clock[0] += 30
            raise OSError
    assert one.minutes(0.0) == pytest.approx(2.0)  # the first for a minute, the others half of one
    assert one.of("zeta").minutes(0.0) == 0.0
    assert one.newest(None, 9) == ([], False)
    assert sum(one.counts().values()) == 0
    assert one.minutes(time.time() + 1) == 0.0
    with pytest.raises(QuotaExceeded), one.planning(2.0, 600.0):
        pass


def test_a_dry_run_ends_with_the_minutes(catalog: Catalog, tmp_path: Path) -> None:
    files = TrainingFiles(catalog, tmp_path / "files", "0" * 32)
    queue = Queue(catalog, "0" * 32)
    sleeps = Confinement(nibble=(sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"))
    workshop = Workshop(tmp_path / "jobs", "b", sleeps)
    nobody: Any = None
    office = Office(queue, files, workshop, nobody, 8).of("acme")
    order = order_of(keep(files.of("acme"), tmp_path))
    with queue.of("acme").planning(1.0, 60.0) as _:
        pass
    queue.trained(next(iter(plans(catalog))), 1.0 - 1 / 120)  # half a second is left
    begun = time.perf_counter()
    with pytest.raises(QuotaExceeded, match="thirty days"):
        office.plan(order, 1)
    assert time.perf_counter() - begun < 20.0
    assert queue.of("acme").minutes(0.0) >= 1.0
    with pytest.raises(QuotaExceeded, match="thirty days"):
        office.plan(order, 1)
    assert list((tmp_path / "jobs").glob("plan-*")) == []


def plans(catalog: Catalog) -> list[str]:
    with catalog.reading() as connection:
        return list(connection.execute(sa.select(training_jobs.c.id)).scalars())


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """The address of a Redis of this test's own."""
    program = shutil.which("redis-server")
    if program is None or find_spec("redis") is None:
        pytest.skip("needs Debian's redis-server and `pip install '.[redis]'`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir"]
    server = subprocess.Popen([*command, str(tmp_path)], stdout=subprocess.DEVNULL)

    def answers() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    until(answers)
    yield f"async+redis://127.0.0.1:{port}"
    server.terminate()
    server.wait(PATIENCE)


# The connections live as long as the process: a meter has no end of its own.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_several_servers_count_together(
    catalog: Catalog, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.access.windows.ANSWER_SECONDS", PATIENCE)
    tenants = Tenants(catalog)
    tenants.set_quotas("acme", Quotas(tokens_per_minute=100, requests_per_minute=6))

    async def run() -> None:
        one, other = Meter(tenants, redis), Meter(tenants, redis)
        lease = await one.admit("acme")
        await lease.reserve(80)
        elsewhere = await other.admit("acme")
        with pytest.raises(QuotaExceeded, match="20 are left"):
            await elsewhere.reserve(40)
        lease.use(30)
        await lease.close()
        await elsewhere.reserve(70)
        await elsewhere.close()
        for meter in (one, other, one, other):
            await (await meter.admit("acme")).close()
        with pytest.raises(QuotaExceeded, match="6 requests a minute"):
            await one.admit("acme")

    asyncio.run(run())
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("answers", ["refuses", "is silent"])
def test_without_its_redis_a_server_counts_for_itself(
    catalog: Catalog,
    answers: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One request waits for an answer, and none after it, for a while."""
    monkeypatch.setattr("service.access.windows.AWAY_SECONDS", PATIENCE)
    pytest.importorskip("redis", reason="`pip install '.[redis]'`")
    tenants = Tenants(catalog)
    tenants.set_quotas("acme", Quotas(requests_per_minute=3))
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        if answers == "is silent":
            door.listen()  # the kernel takes connections, and nobody reads them
        meter = Meter(tenants, f"async+redis://127.0.0.1:{door.getsockname()[1]}")

        async def run() -> None:
            for _ in range(3):
                await (await meter.admit("acme")).close()
            with pytest.raises(QuotaExceeded, match="3 requests a minute"):
                await meter.admit("acme")

        asyncio.run(run())
    gc.collect()
    said = [one.message for one in caplog.records if "each server for itself" in one.message]
    assert len(said) == 1
