import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.blobs import StagedBlob
from adapters.errors import (
    AdapterInUse,
    AdapterNotFound,
    InvalidAdapter,
    QuotaReached,
    StoreUnavailable,
    TooLarge,
    UnsupportedMedia,
)
from adapters.limits import Limits
from adapters.manifest import AdapterManifest
from adapters.remote_blobs import RemoteBlobs
from adapters.store import AdapterStore
from adapters.validation_child import validate_here
from base.spec import BaseSpec
from tests.adapters.conftest import Saved, Saver
from tests.adapters.hostile import write

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[AdapterStore]:
    store = open_store(root)
    yield store
    store.close()


def open_store(root: Path, step: Callable[[str], None] | None = None) -> AdapterStore:
    return AdapterStore(str(root), str(root / "catalog.db"), step=step)


@pytest.fixture
def add(store: AdapterStore, spec: BaseSpec, save: Saver) -> Callable[..., AdapterManifest]:
    """add("name", seed=1): upload a small adapter; another seed is other content."""

    def upload(
        name: str = "support", template: str | None = None, **fields: object
    ) -> AdapterManifest:
        saved = save(**{"targets": ["q_proj"], **fields})
        return store.add(name, saved.config, saved.weights, template, spec, Limits())

    return upload


Adder = Callable[..., AdapterManifest]


def files(root: Path) -> list[str]:
    """Blobs and temporary files."""
    found = [*(root / "blobs").glob("*/*"), *(root / "tmp").iterdir()]
    return sorted(path.name for path in found)


def test_what_is_added_is_there(
    store: AdapterStore, spec: BaseSpec, save: Saver, root: Path
) -> None:
    saved = save("dora", targets=["q_proj"], rank=3)
    manifest = store.add(
        "support",
        saved.config,
        saved.weights,
        TEMPLATE,
        spec,
        Limits(),
        placement="merged",
        merged_dtype="nf4",
        provenance={"run": 7},
    )
    sha256 = hashlib.sha256(saved.weights.read_bytes()).hexdigest()
    assert (manifest.name, manifest.version, manifest.kind, manifest.rank) == (
        "support",
        1,
        "dora",
        3,
    )
    assert (manifest.placement, manifest.merged_dtype) == ("merged", "nf4")
    uploaded = hashlib.sha256(saved.config).hexdigest()
    assert manifest.provenance == {"run": 7, "config_sha256": uploaded}
    assert manifest.template == TEMPLATE
    assert manifest.base_fingerprint == spec.fingerprint
    assert (manifest.weights_sha256, manifest.weights_bytes) == (
        sha256,
        saved.weights.stat().st_size,
    )
    assert manifest.created.endswith("+00:00")
    assert store.weights_path(manifest).read_bytes() == saved.weights.read_bytes()
    assert files(root) == [sha256]
    again = open_store(root)
    assert again.resolve("support") == manifest
    again.close()


def test_references(store: AdapterStore, add: Adder) -> None:
    first, second = add(seed=1), add(seed=2)
    store.set_alias("support", "prod", {1: 1.0})
    for reference, found in {
        "support": second,
        "support@1": first,
        "support@2": second,
        "support@prod": first,
        f"sha256:{first.digest}": first,
    }.items():
        assert store.resolve(reference) == found


@pytest.mark.parametrize(
    "reference",
    ["", "none", "support@2", "support@none", "support@", "support@0", "support@01", "@1", "@",
     "support@1@1", "support@../1", "sha256:", "sha256:../../x", "md5:1", "Support", "a\0b",
     "support@" + "9" * 30, "sha256:" + "0" * 64],
)  # fmt: skip
def test_no_references(store: AdapterStore, add: Adder, reference: str) -> None:
    add()
    with pytest.raises(AdapterNotFound) as caught:
        store.resolve(reference)
    assert caught.value.reference == reference


def test_the_same_again_is_the_same_version(store: AdapterStore, add: Adder, root: Path) -> None:
    first = add(seed=1)
    assert add(seed=1) == first
    assert len(files(root)) == 1
    second = add(seed=2)
    assert (second.version, second.digest != first.digest) == (2, True)
    back = add(seed=1)
    assert (back.version, back.digest) == (3, first.digest)
    assert len(files(root)) == 2
    assert add(seed=1, template=TEMPLATE).version == 4


def test_other_config_same_weights_is_another_digest(
    store: AdapterStore, spec: BaseSpec, save: Saver
) -> None:
    saved = save(targets=["q_proj"])
    one = store.add("a", saved.config, saved.weights, None, spec, Limits())
    louder = saved.with_fields(lora_alpha=99)
    two = store.add("a", louder, saved.weights, None, spec, Limits())
    assert one.weights_sha256 == two.weights_sha256
    assert one.digest != two.digest
    renamed = saved.with_fields(base_model_name_or_path="elsewhere", lora_dropout=0.5)
    assert store.add("b", renamed, saved.weights, None, spec, Limits()).digest == one.digest


def test_names_are_described(store: AdapterStore, add: Adder) -> None:
    add("b")
    first, second = add("a", seed=1), add("a", seed=2)
    store.set_alias("a", "prod", {1: 1.0})
    assert [(m.name, m.version) for m in store.list()] == [("a", 2), ("b", 1)]
    found = store.describe("a")
    assert (found.versions, found.aliases) == ((first, second), {"prod": {1: 1.0}})
    with pytest.raises(AdapterNotFound):
        store.describe("c")


def test_deletion(store: AdapterStore, add: Adder, root: Path) -> None:
    first, second = add(seed=1), add(seed=2)
    assert store.delete("support@1") == (first,)
    assert files(root) == [second.weights_sha256]
    store.set_alias("support", "prod", {2: 1.0})
    with pytest.raises(AdapterInUse, match="support@prod"):
        store.delete("support")
    store.drop_alias("support", "prod")
    assert store.delete("support") == (second,)
    assert files(root) == []
    for reference in ("support", "support@1", "support@prod", "none@1", "../x"):
        with pytest.raises(AdapterNotFound):
            store.delete(reference)


def test_shared_weights_outlive_one_name(store: AdapterStore, add: Adder) -> None:
    one = add("one")
    add("two")
    store.delete("one")
    assert store.weights_path(store.resolve("two")).is_file()
    store.delete("two")
    with pytest.raises(StoreUnavailable, match="missing"):
        store.weights_path(one)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A", "a\0", "a@b", "sha256:x"])
def test_bad_names_are_refused(store: AdapterStore, add: Adder, root: Path, name: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        add(name)
    assert caught.value.where == "name"
    assert files(root) == []


def test_refused_uploads_leave_nothing(
    store: AdapterStore, spec: BaseSpec, save: Saver, root: Path, tmp_path: Path
) -> None:
    saved = save(targets=["q_proj"])
    pickle = write(tmp_path / "pickle", b"\x80\x04 pickle")
    link = tmp_path / "link"
    link.symlink_to(saved.weights)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    small = Limits(max_weights_bytes=100)
    for config, weights, template, limits, kind in (
        (saved.config, pickle, None, Limits(), UnsupportedMedia),
        (saved.config, saved.weights, None, small, TooLarge),
        (saved.with_fields(r=5), saved.weights, None, Limits(), InvalidAdapter),
        (saved.config, saved.weights, "{% endfor %}", Limits(), InvalidAdapter),
        (saved.config, link, None, Limits(), InvalidAdapter),
        (saved.config, pipe, None, Limits(), InvalidAdapter),
        (saved.config, tmp_path / "none", None, Limits(), InvalidAdapter),
    ):
        with pytest.raises(kind):
            store.add("bad", config, weights, template, spec, limits)
    assert files(root) == []
    assert store.list() == []


def test_beyond_the_quota_leaves_nothing(
    store: AdapterStore, add: Adder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a tenant could fill the disk with uploads that are refused."""
    kept = add("kept", seed=1)

    def refuse(draft: AdapterManifest) -> AdapterManifest:
        raise QuotaReached("no room")

    monkeypatch.setattr(store.catalog, "add", refuse)
    for seed in (1, 2):
        with pytest.raises(QuotaReached):
            add(seed=seed)
    assert files(root) == [kept.weights_sha256]


def test_weights_are_checked_once_in_a_process(store: AdapterStore, add: Adder, root: Path) -> None:
    manifest = add()
    path = store.weights_path(manifest)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert store.weights_path(manifest) == path, "checked when it was first asked for"
    restarted = open_store(root)
    with pytest.raises(StoreUnavailable, match="damaged"):
        restarted.weights_path(manifest)
    restarted.close()


def test_sweep(store: AdapterStore, add: Adder, root: Path) -> None:
    kept, lost = add("kept", seed=1), add("lost", seed=2)
    orphan = root / "blobs" / "ab" / ("ab" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"no row")
    (root / "tmp" / "half").write_bytes(b"half")
    store.weights_path(lost).unlink()
    assert store.sweep(older_than=0.0).blobs == (), "nothing is that old"
    report = store.sweep(older_than=float("inf"))
    assert report.temporary_files == ("half",)
    assert report.blobs == ("ab" * 32,)
    assert report.missing == ("lost@1",)
    assert files(root) == [kept.weights_sha256]
    assert {m.name for m in store.list()} == {"kept", "lost"}


def test_a_directory_of_adapters(
    store: AdapterStore, spec: BaseSpec, save: Saver, tmp_path: Path
) -> None:
    good, named, broken = (tmp_path / "all" / n for n in ("good", "Bad Name", "broken"))
    for directory in (good, named, broken, tmp_path / "all" / "empty"):
        directory.mkdir(parents=True)
    copy(save(targets=["q_proj"]), good)
    (good / "chat_template.jinja").write_text(TEMPLATE)
    copy(save(targets=["q_proj"]), named)
    copy(save(targets=["q_proj"]), broken)
    write(broken / "adapter_model.safetensors", b"nothing of the kind")
    (tmp_path / "all" / "file").write_text("x")
    report = store.load_directory(tmp_path / "all", spec, Limits())
    assert [(m.name, m.template) for m in report.added] == [("good", TEMPLATE)]
    assert set(report.refused) == {"Bad Name", "broken"}
    assert isinstance(report.refused["broken"], UnsupportedMedia)
    again = store.load_directory(tmp_path / "all", spec, Limits())
    assert again.added == report.added


def test_a_directory_that_did_not_change_is_not_checked_again(
    store: AdapterStore, spec: BaseSpec, save: Saver, tmp_path: Path
) -> None:
    """A restart with many adapters starts no process for each; any change is seen."""
    one, other = save(targets=["q_proj"], seed=1), save(targets=["q_proj"], seed=2)
    copy(one, tmp_path)

    def version(limits: Limits, base: BaseSpec = spec) -> int:
        return store.add_directory("a", tmp_path, base, limits).version

    blind = Limits(child_seconds=0.0)  # nothing gets through the checks
    assert version(Limits()) == 1
    assert version(blind) == 1
    changes: list[Callable[[], object]] = [
        lambda: write(tmp_path / "adapter_model.safetensors", other.weights.read_bytes()),
        lambda: write(tmp_path / "adapter_config.json", other.with_fields(lora_alpha=3)),
        lambda: write(tmp_path / "chat_template.jinja", TEMPLATE.encode()),
        lambda: store.weights_path(store.resolve("a")).unlink(),
    ]
    for change in changes:
        change()
        with pytest.raises(StoreUnavailable, match="did not end"):
            version(blind)
        version(Limits())
    assert version(blind) == 4
    with pytest.raises(StoreUnavailable, match="did not end"):
        version(blind, replace(spec, fingerprint="0" * 64))


def copy(saved: Saved, directory: Path) -> None:
    write(directory / "adapter_config.json", saved.config)
    write(directory / "adapter_model.safetensors", saved.weights.read_bytes())


def test_a_directory_without_weights_or_with_a_link(
    store: AdapterStore, spec: BaseSpec, save: Saver, tmp_path: Path
) -> None:
    saved = save(targets=["q_proj"])
    write(tmp_path / "adapter_config.json", saved.config)
    with pytest.raises(InvalidAdapter, match="weights"):
        store.add_directory("a", tmp_path, spec, Limits())
    copy(saved, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").symlink_to(saved.directory / "adapter_config.json")
    with pytest.raises(InvalidAdapter, match="config"):
        store.add_directory("a", tmp_path, spec, Limits())


def test_many_threads(store: AdapterStore, spec: BaseSpec, save: Saver, root: Path) -> None:
    """Uploads, deletions, sweeps and reads at once: every acknowledged adapter can be read."""
    pool_of_content = [save(targets=["q_proj"], seed=seed) for seed in range(3)]

    def work(number: int) -> None:
        saved = pool_of_content[number % 3]
        name = f"n{number % 4}"
        manifest = store.add(name, saved.config, saved.weights, None, spec, Limits())
        assert store.weights_path(manifest).read_bytes() == saved.weights.read_bytes()
        store.list()
        store.sweep()
        assert store.describe(name).versions

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(16)))
    assert store.sweep().missing == ()
    assert len(files(root)) == 3


def test_deleting_while_uploading_the_same_content(
    store: AdapterStore, spec: BaseSpec, save: Saver
) -> None:
    """A blob that a new row needs is never taken away by the deletion of an old one."""
    saved = save(targets=["q_proj"])

    def upload(number: int) -> AdapterManifest:
        return store.add(f"n{number}", saved.config, saved.weights, None, spec, Limits())

    upload(99)
    with ThreadPoolExecutor(3) as pool:
        added = [pool.submit(upload, number) for number in range(6)]
        pool.submit(store.delete, "n99").result()
        for future in added:
            assert store.weights_path(future.result()).is_file()
    assert store.sweep().missing == ()


def test_nobody_waits_for_an_upload_on_its_way_to_a_bucket(
    tmp_path: Path, spec: BaseSpec, save: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = str(tmp_path / "catalog.db")
    store = AdapterStore("memory:///", catalog, cache=tmp_path / "cache")
    sent, arrived = threading.Event(), threading.Event()
    send = RemoteBlobs.send

    def slowly(blobs: RemoteBlobs, staged: StagedBlob) -> None:
        if not sent.is_set():
            sent.set()
            assert arrived.wait(60)
        send(blobs, staged)

    monkeypatch.setattr(RemoteBlobs, "send", slowly)
    first, second = (save(targets=["q_proj"], seed=seed) for seed in (1, 2))

    def upload(name: str, saved: Saved) -> AdapterManifest:
        return store.add(
            name, saved.config, saved.weights, None, spec, Limits(), check=validate_here
        )

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(upload, "slow", first)
        try:
            assert sent.wait(60)
            assert upload("quick", second).version == 1
            store.sweep()
            assert not slow.done()
        finally:
            arrived.set()
        kept = slow.result()
    assert store.weights_path(kept).read_bytes() == first.weights.read_bytes()
    store.close()


def test_a_probe_has_the_last_word(
    store: AdapterStore, spec: BaseSpec, save: Saver, root: Path
) -> None:
    saved = save(targets=["q_proj"])
    seen: list[tuple[AdapterManifest, bytes]] = []

    def probe(draft: AdapterManifest, weights: Path) -> None:
        seen.append((draft, weights.read_bytes()))
        if len(seen) == 1:
            raise InvalidAdapter("its logits are not finite")

    with pytest.raises(InvalidAdapter, match="not finite"):
        store.add("a", saved.config, saved.weights, None, spec, Limits(), probe=probe)
    assert store.list() == []
    assert files(root) == []
    kept = store.add("a", saved.config, saved.weights, None, spec, Limits(), probe=probe)
    assert store.resolve("a") == kept
    assert seen[1][0].digest == kept.digest
    assert seen[1][1] == saved.weights.read_bytes()
