"""The store: adapters that were acknowledged, complete and checked, or not there at all.

An upload goes temp file -> checks in a child -> fsync -> rename -> fsync of the directory ->
catalog row. The row alone makes it visible; whatever a crash leaves before that, `sweep` removes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from time import time
from typing import Any

from adapters import evaluation, origin
from adapters.blobs import BlobStore, StagedBlob, Step, disk_errors
from adapters.catalog import DIGEST, Catalog, check_alias, check_name
from adapters.errors import (
    AdapterError,
    AdapterNotFound,
    InvalidAdapter,
    QuotaReached,
    StoreUnavailable,
    TooLarge,
)
from adapters.limits import MIB, Limits
from adapters.manifest import AdapterManifest, MergedDtype, Placement, adapter_digest
from adapters.outcomes import Outcomes
from adapters.remote_blobs import CACHE_BYTES, open_blobs
from adapters.safetensors_header import open_regular
from adapters.traffic import Arm
from adapters.validate import Validated
from adapters.validation_child import validate_in_child
from adapters.vocabulary import Tokens
from base.spec import BaseSpec

log = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_SHA256 = "config_sha256"  # of the config as it was uploaded, before it became canonical
TOKENIZER_SHA256 = "tokenizer_sha256"  # of the tokenizer as it was uploaded, kept or not
VERSION = re.compile(r"[1-9][0-9]{0,8}")


Probe = Callable[[AdapterManifest, Path], None]
Check = Callable[[bytes, Path, BaseSpec, Limits, str | None, Tokens | None], Validated]


@dataclass(frozen=True, slots=True)
class AdapterDescription:
    """All that is known under one name."""

    name: str
    versions: tuple[AdapterManifest, ...]  # oldest first; the last is what the bare name means
    aliases: Mapping[str, Mapping[int, float]]  # alias -> version -> weight, the largest first


@dataclass(frozen=True, slots=True)
class SweepReport:
    temporary_files: tuple[str, ...] = ()  # removed
    blobs: tuple[str, ...] = ()  # removed: no row needed them
    missing: tuple[str, ...] = ()  # name@version whose blob is not there; the row was kept


@dataclass(frozen=True, slots=True)
class DirectoryReport:
    added: tuple[AdapterManifest, ...] = ()
    refused: Mapping[str, AdapterError] = field(default_factory=dict)  # directory name -> why


class AdapterStore:
    """Blobs and catalog together. Every method may be called from any thread."""

    def __init__(
        self,
        blobs: str,
        catalog: str,
        *,
        cache: Path | None = None,
        max_cache_bytes: int = CACHE_BYTES,
        step: Step | None = None,
    ) -> None:
        """Open (or create) a store.

        blobs    a directory, or a URL that obstore knows; then `cache` is a local directory for
                 copies, of `max_cache_bytes` in all
        catalog  a file for SQLite, or an SQLAlchemy URL
        step     called after each step of an upload: a place for tests to put faults
        """
        self._step: Step = step or (lambda name: None)
        self._blobs: BlobStore = open_blobs(blobs, cache, self._step, max_cache_bytes)
        self._catalog = Catalog(catalog)
        self.outcomes = Outcomes(self._catalog)
        self._verified: set[str] = set()
        self._doubtful: list[AdapterManifest] = []  # whether their rows are there

    def of(self, tenant: str) -> AdapterStore:
        """The same store as this tenant sees it: its own names, and those shared with it."""
        found = copy(self)
        found._catalog = self._catalog.of(tenant)
        found.outcomes = Outcomes(found._catalog)
        return found

    @property
    def catalog(self) -> Catalog:
        """The rows, for what is kept beside the adapters."""
        return self._catalog

    def close(self) -> None:
        self._catalog.close()

    def add(
        self,
        name: str,
        config: bytes,
        weights: Path,
        template: str | None,
        spec: BaseSpec,
        limits: Limits,
        *,
        placement: Placement = "unmerged",
        merged_dtype: MergedDtype = "bfloat16",
        provenance: Mapping[str, Any] | None = None,
        probe: Probe | None = None,
        check: Check = validate_in_child,
        tokens: Tokens | None = None,
    ) -> AdapterManifest:
        """Check an upload and keep it as the next version of `name`; durable when this returns.

        `weights` is read once and stays where it is. The same content again, as the newest
        version's, returns that version. `probe` is the last check, on the staged file of an upload
        that passed all others; what it raises refuses the upload. `check` makes the others:
        `validate_here` where the files are the operator's own work, so that no child is needed.
        `tokens` are the base's, and the upload's own tokenizer: kept where it says more.

        Raises InvalidAdapter, UnsupportedMedia, TooLarge, StoreUnavailable, StoreFull.
        """
        check_name(name)
        with open_regular(weights) as source:
            staged = self._blobs.stage(source, limits.max_weights_bytes)
        own = tokens.own if tokens else None
        tokenizer: StagedBlob | None = None
        try:
            found = check(config, staged.path, spec, limits, template, tokens)
            if found.own_tokenizer and own is not None:
                tokenizer = self._staged(own, limits.max_tokenizer_bytes)
            address = tokenizer.sha256 if tokenizer else None
            draft = AdapterManifest(
                digest=adapter_digest(staged.sha256, found.config, spec.fingerprint, address),
                name=name,
                version=0,  # the catalog gives it
                kind=found.kind,
                rank=found.rank,
                targets=found.targets,
                base_fingerprint=spec.fingerprint,
                config=found.config,
                weights_sha256=staged.sha256,
                weights_bytes=staged.nbytes,
                memory_bytes=found.memory_bytes,
                created=_now(),
                placement=placement,
                merged_dtype=merged_dtype,
                template=template,
                vocabulary=found.vocabulary,
                tokenizer_sha256=address,
                tokenizer_bytes=tokenizer.nbytes if tokenizer else 0,
                provenance={
                    **(provenance or {}),
                    CONFIG_SHA256: hashlib.sha256(config).hexdigest(),
                    **_told(own),
                },
            )
            if probe is not None:
                probe(draft, staged.path)
            self._send(staged, tokenizer)
            with self._exclusive():
                manifest = self._commit(draft, staged, tokenizer)
            self._step("committed")
            return manifest
        finally:
            self._blobs.discard(staged)
            if tokenizer is not None:
                self._blobs.discard(tokenizer)

    def _send(self, *staged: StagedBlob | None) -> None:
        for blob in staged:
            if blob is not None:
                self._blobs.send(blob)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Threads and processes of this machine wait for the blobs, other replicas for the
        catalog: a blob is kept or discarded by what the rows say, so both hold still."""
        with self._blobs.exclusive(), self._catalog.exclusive():
            yield

    def _commit(
        self, draft: AdapterManifest, staged: StagedBlob, tokenizer: StagedBlob | None
    ) -> AdapterManifest:
        """Blobs, then the row. Blobs whose row failed are removed when the next one succeeds: until
        then a start may still find that row in the database's log."""
        doubtful = {address for one in self._doubtful for address in _addresses(one)}
        try:
            self._blobs.publish(staged)
            if tokenizer is not None:
                self._blobs.publish(tokenizer)
            manifest = self._catalog.add(draft)
        except QuotaReached:
            if doubtful.isdisjoint(_addresses(draft)):
                self._drop([draft])
            raise
        except StoreUnavailable:
            self._doubtful.append(draft)
            raise
        if self._doubtful:
            with suppress(StoreUnavailable):  # the upload itself is kept
                self._drop(self._doubtful)
                self._doubtful.clear()
        return manifest

    def _staged(self, content: bytes, limit: int) -> StagedBlob:
        with disk_errors("cannot write a temporary file"), TemporaryFile() as file:
            file.write(content)
            file.flush()
            return self._blobs.stage(file.fileno(), limit)

    def resolve(self, reference: str) -> AdapterManifest:
        """The adapter behind `name`, `name@3`, `name@alias` or `sha256:<hex>`.

        Where an alias shares its traffic it is the version with the largest share: see `arms`.
        Raises AdapterNotFound.
        """
        return self.arms(reference)[0].manifest

    def arms(self, reference: str) -> tuple[Arm, ...]:
        """All versions that answer for a reference, the largest share first. One, but for an alias
        that shares its traffic. Raises AdapterNotFound."""
        named = alias_of(reference)
        if named is None:
            return (Arm(self._version(reference)),)
        with _as_not_found(reference):
            return self._catalog.alias(check_name(named[0]), check_alias(named[1]))

    def _version(self, reference: str) -> AdapterManifest:
        scheme, colon, digest = reference.partition(":")
        if colon:
            if scheme == "sha256" and DIGEST.fullmatch(digest):
                return self._catalog.digest(digest)
            raise AdapterNotFound(reference)
        name, at, tag = reference.partition("@")
        with _as_not_found(reference):
            check_name(name)
            if not at:
                return self._catalog.latest(name)
            return self._catalog.version(name, int(tag))

    def list(self) -> list[AdapterManifest]:
        """The newest version of every name, by name."""
        return self._catalog.all_latest()

    def page(
        self,
        after: str,
        limit: int,
        digests: Collection[str] | None = None,
        search: str = "",
    ) -> Sequence[AdapterManifest]:
        """As the catalog's."""
        return self._catalog.page(after, limit, digests, search)

    def describe(self, name: str) -> AdapterDescription:
        """Versions and aliases of one name. Raises AdapterNotFound."""
        versions = self._catalog.versions(name)
        if not versions:
            raise AdapterNotFound(name)
        return AdapterDescription(name, tuple(versions), self._catalog.aliases_of(name))

    def pinned(self, digest: str) -> AdapterManifest:
        """The adapter of a digest, even if it was retired: for requests that came before.

        Of any tenant: never for a digest that a client names. Raises AdapterNotFound.
        """
        return self._catalog.digest_anywhere(digest, living=False)

    def living(self, digest: str) -> AdapterManifest:
        """The adapter of a digest, whosever, if it was not deleted. Raises AdapterNotFound."""
        return self._catalog.digest_anywhere(digest, living=True)

    def delete(self, reference: str) -> tuple[AdapterManifest, ...]:
        """Retire and discard in one: for when nothing is being served. Raises as `retire`."""
        gone = self.retire(reference)
        self.discard(gone)
        return gone

    def retire(self, reference: str) -> tuple[AdapterManifest, ...]:
        """Delete `name` with all its versions, or `name@version`; what was deleted. From now on
        nobody finds it, but its weights stay for those who did, until `discard` or a sweep.

        Raises AdapterNotFound; AdapterInUse where an alias still points there.
        """
        name, at, tag = reference.partition("@")
        if at and not VERSION.fullmatch(tag):
            raise AdapterNotFound(reference)
        with self._exclusive():
            return tuple(self._catalog.delete(name, int(tag) if at else None, _now()))

    def discard(self, retired: Iterable[AdapterManifest]) -> None:
        """Remove the weights of these, but for those that a living row needs."""
        with self._exclusive():
            self._drop(retired)

    def _drop(self, unneeded: Iterable[AdapterManifest]) -> None:
        """`discard`, while the store is held."""
        manifests = list(unneeded)
        needed = self._catalog.blobs_needed(manifests)
        for sha256 in {address for one in manifests for address in _addresses(one)} - needed:
            self._blobs.delete(sha256)
            self._verified.discard(sha256)

    def set_alias(self, name: str, alias: str, shares: Mapping[int, float]) -> None:
        """Point `name@alias` to versions: version -> weight. Raises InvalidAdapter (the alias),
        AdapterNotFound."""
        self._catalog.set_alias(name, check_alias(alias), shares)

    def drop_alias(self, name: str, alias: str) -> None:
        """Take an alias away, with what was counted under it. Raises AdapterNotFound."""
        self._catalog.drop_alias(name, alias)

    def weights_path(self, manifest: AdapterManifest) -> Path:
        """A local file with the weights, its sha-256 checked once in this process.

        Raises StoreUnavailable where the blob is missing or is not what it was.
        """
        return self._checked(manifest.weights_sha256, "weights", manifest)

    def tokenizer_path(self, manifest: AdapterManifest) -> Path | None:
        """`weights_path` for its own tokenizer.json; None where it reads with the base's."""
        address = manifest.tokenizer_sha256
        return None if address is None else self._checked(address, "tokenizer", manifest)

    def _checked(self, sha256: str, what: str, manifest: AdapterManifest) -> Path:
        try:
            path = self._blobs.local_path(sha256)
        except FileNotFoundError as error:
            whose = f"{manifest.name}@{manifest.version}"
            raise StoreUnavailable(f"the {what} of {whose} ({sha256}) are missing") from error
        if sha256 not in self._verified:  # two at once both look: nobody waits for another's file
            found = _sha256(path)
            if found != sha256:
                raise StoreUnavailable(f"blob {sha256} is damaged: its sha-256 is now {found}")
            self._verified.add(sha256)
        return path

    def sweep(self, older_than: float | None = None) -> SweepReport:
        """Remove what crashed uploads left before `older_than` (default: now), at start.

        Rows whose blob is missing are reported, never removed.
        """
        before = time() if older_than is None else older_than
        rows = self._catalog.everything()
        listed = self._blobs.addresses(before)  # of a bucket: seconds, in which others may write
        with self._exclusive():
            needed = self._catalog.blobs_in_use()
            temporary = self._blobs.sweep(before, needed)
            orphans = [address for address in listed if address not in needed]
            for sha256 in orphans:
                self._blobs.delete(sha256)
        present = set(self._blobs.addresses(float("inf")))
        missing = [f"{m.name}@{m.version}" for m in rows if not present.issuperset(_addresses(m))]
        return SweepReport(tuple(temporary), tuple(orphans), tuple(missing))

    def load_directory(
        self,
        path: Path,
        spec: BaseSpec,
        limits: Limits,
        probe: Probe | None = None,
        tokens: Tokens | None = None,
    ) -> DirectoryReport:
        """Add every subdirectory that PEFT's `save_pretrained` wrote, under its own name.

        Doing it again adds nothing new. A bad one is reported and does not stop the others.
        """
        added: list[AdapterManifest] = []
        refused: dict[str, AdapterError] = {}
        for directory in sorted(p for p in path.iterdir() if (p / CONFIG_FILE).exists()):
            try:
                name = directory.name
                added.append(self.add_directory(name, directory, spec, limits, probe, tokens))
            except AdapterError as error:
                log.warning("adapter %s was refused: %s", directory.name, error)
                refused[directory.name] = error
        return DirectoryReport(tuple(added), refused)

    def add_directory(
        self,
        name: str,
        directory: Path,
        spec: BaseSpec,
        limits: Limits,
        probe: Probe | None = None,
        tokens: Tokens | None = None,
    ) -> AdapterManifest:
        """`add` for a directory as PEFT's `save_pretrained` writes it, with the tokenizer's beside
        it if there is one. `tokens` are the base's. Raises as `add` does."""
        config = read_small(directory / CONFIG_FILE, limits.max_config_bytes, "config")
        template = None
        if (directory / TEMPLATE_FILE).exists():
            raw = read_small(directory / TEMPLATE_FILE, limits.max_template_bytes, "template")
            try:
                template = raw.decode()
            except UnicodeDecodeError as error:
                raise InvalidAdapter("is not UTF-8", "template") from error
        weights = directory / WEIGHTS_FILE
        if tokens is not None and (directory / TOKENIZER_FILE).exists():
            most = limits.max_tokenizer_bytes
            tokens = replace(tokens, own=read_small(directory / TOKENIZER_FILE, most, "tokenizer"))
        own = tokens.own if tokens else None
        told = read_provenance(directory)
        known = self._unchanged(name, config, weights, template, spec, own, told)
        return known or self.add(
            name,
            config,
            weights,
            template,
            spec,
            limits,
            provenance=told,
            probe=probe,
            tokens=tokens,
        )

    def _unchanged(
        self,
        name: str,
        config: bytes,
        weights: Path,
        template: str | None,
        spec: BaseSpec,
        tokenizer: bytes | None,
        told: Mapping[str, Any],
    ) -> AdapterManifest | None:
        """The newest version, where these very files made it: no need to check again."""
        try:
            newest = self._catalog.latest(name)
            self._blobs.local_path(newest.weights_sha256)
        except (AdapterNotFound, FileNotFoundError):
            return None
        made_of = (newest.base_fingerprint, newest.template, newest.placement)
        if made_of != (spec.fingerprint, template, "unmerged"):
            return None
        if newest.provenance.get(CONFIG_SHA256) != hashlib.sha256(config).hexdigest():
            return None
        if newest.provenance.get(TOKENIZER_SHA256) != _told(tokenizer).get(TOKENIZER_SHA256):
            return None
        if newest.provenance.get(evaluation.KEY) != told.get(evaluation.KEY):
            return None
        with open_regular(weights) as fd:
            same = os.fstat(fd).st_size == newest.weights_bytes
        return newest if same and _sha256(weights) == newest.weights_sha256 else None


def alias_of(reference: str) -> tuple[str, str] | None:
    """(name, alias), where the reference is one; None for a name, a version or a digest."""
    name, at, tag = reference.partition("@")
    return (name, tag) if at and ":" not in reference and not VERSION.fullmatch(tag) else None


def read_small(path: Path, limit: int, where: str) -> bytes:
    """The bytes of a small regular file. Raises InvalidAdapter, TooLarge."""
    with open_regular(path, where) as fd, disk_errors(f"cannot read the {where}"):
        raw = os.pread(fd, limit + 1, 0)
    if len(raw) > limit:
        raise TooLarge(f"more than {limit} bytes", where)
    return raw


def read_provenance(directory: Path) -> dict[str, Any]:
    """The part of a provenance that training.json and evaluation.json give, where they are.

    Raises InvalidAdapter, TooLarge.
    """
    found = {}
    if (directory / origin.FILE).exists():
        raw = read_small(directory / origin.FILE, evaluation.MAX_BYTES, origin.KEY)
        found = origin.checked(raw)
    if (directory / evaluation.FILE).exists():
        raw = read_small(directory / evaluation.FILE, evaluation.MAX_BYTES, evaluation.KEY)
        found[evaluation.KEY] = evaluation.checked(raw)
    return found


@contextmanager
def _as_not_found(reference: str) -> Iterator[None]:
    """What could never be a name is not there either."""
    try:
        yield
    except (InvalidAdapter, AdapterNotFound) as error:
        raise AdapterNotFound(reference) from error


def _told(tokenizer: bytes | None) -> dict[str, str]:
    """What the provenance says of an upload's tokenizer."""
    if tokenizer is None:
        return {}
    return {TOKENIZER_SHA256: hashlib.sha256(tokenizer).hexdigest()}


def _addresses(manifest: AdapterManifest) -> list[str]:
    """Of every blob that this version needs."""
    own = manifest.tokenizer_sha256
    return [manifest.weights_sha256] if own is None else [manifest.weights_sha256, own]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    with disk_errors("cannot read a blob"), path.open("rb") as file:
        while piece := file.read(MIB):
            hashed.update(piece)
    return hashed.hexdigest()
