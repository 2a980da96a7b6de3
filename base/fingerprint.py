"""The fingerprint of a base: what its tensors are, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# Notes of the program that wrote config.json: none of them changes a logit.
_NOT_ARCHITECTURE = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map"}
)


def default_cache_dir() -> Path:
    """$NIBBLE_HOME, else nibble in $XDG_CACHE_HOME, else ~/.cache/nibble."""
    if home := os.environ.get("NIBBLE_HOME"):
        return Path(home)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "nibble"


def fingerprint(
    config: Mapping[str, Any], files: Iterable[Path], *, double_quant: bool, cache_dir: Path
) -> str:
    """sha-256, hex, over the architecture, the weight files' contents and the quantisation.

    `config` is config.json as it stands on disk, so that a newer transformers with other
    defaults gives the same fingerprint. File names and order do not matter.
    """
    return fingerprints(config, files, cache_dir)[double_quant]


def fingerprints(
    config: Mapping[str, Any], files: Iterable[Path], cache_dir: Path
) -> Mapping[bool, str]:
    """The fingerprints with double quantisation and without; the files are hashed once."""
    content = {
        "architecture": _architecture(config),
        "weights": sorted(hashes_of(files, cache_dir)),
    }

    def of(double: bool) -> str:
        whole = {**content, "quantisation": {"type": "nf4", "block": 64, "double": double}}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    return {double: of(double) for double in (False, True)}


def hashes_of(files: Iterable[Path], cache_dir: Path) -> list[str]:
    """sha-256, hex, of each file; one that was read before and has not changed is not read."""
    known = _KnownHashes(cache_dir / "weights.json")
    hashes = [known.sha256(file) for file in files]
    known.save()
    return hashes


def _architecture(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _architecture(v) for k, v in value.items() if k not in _NOT_ARCHITECTURE}
    return value


class _KnownHashes:
    """sha-256 of files by path, size and time of change: a big base is read for it only once."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._rows = self._load()
        self._changed = False

    def sha256(self, file: Path) -> str:
        path, stat = file.resolve(), file.stat()
        seen = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        row = self._rows.get(str(path))
        if isinstance(row, dict) and seen.items() <= row.items() and "sha256" in row:
            return str(row["sha256"])
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        self._rows[str(path)] = {**seen, "sha256": digest}
        self._changed = True
        return digest

    def save(self) -> None:
        """Write what is new. A cache that cannot be written costs time at the next start only."""
        if not self._changed:
            return
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._rows, indent=1))
            temporary.replace(self._file)
        except OSError:
            with suppress(OSError):
                temporary.unlink()

    def _load(self) -> dict[str, Any]:
        try:
            rows = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        return rows if isinstance(rows, dict) else {}
