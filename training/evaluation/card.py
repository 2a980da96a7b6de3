"""evaluation.json beside an adapter: what was measured of it, on which data, against what.

An upload carries the file along, and the store keeps it as part of the version's provenance.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adapters.evaluation import FILE, LIST, MAX_BYTES
from base.load import Base
from training.errors import ConfigError
from training.evaluation.scorecard import Scores
from training.evaluation.significance import Paired

KEPT = 20  # evaluations in one file


def entry(
    base: Base,
    data: Path,
    questions: int,
    scores: Scores,
    against: Mapping[str, Mapping[str, Paired]],
    system: str | None,
) -> dict[str, Any]:
    """One evaluation. The data is named by its content too, for a file's name says little."""
    return {
        "data": data.name,
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest() if data.is_file() else None,
        "questions": questions,
        "system": system,
        "base": {"id": base.spec.id, "fingerprint": base.spec.fingerprint},
        "figures": {
            name: {key: round(value, 5) for key, value in asdict(figure).items()}
            for name, figure in scores.figures.items()
        },
        "against": {
            other: {
                name: {
                    "difference": round(paired.difference.value, 5),
                    "low": round(paired.difference.low, 5),
                    "high": round(paired.difference.high, 5),
                    "p": round(paired.p, 6),
                    "test": paired.test,
                }
                for name, paired in tests.items()
            }
            for other, tests in against.items()
        },
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def store(folder: Path, found: Mapping[str, Any]) -> Path:
    """Add to the file in `folder`; the same data asked in the same way replaces what was there.

    Raises ConfigError where the file is no JSON object.
    """
    path = folder / FILE
    kept = _read(path)
    ways = ("data_sha256", "data", "system")
    others = [one for one in _list(kept) if any(one.get(key) != found.get(key) for key in ways)]
    kept[LIST] = [*others, dict(found)][-KEPT:]
    text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
    while len(text.encode()) > MAX_BYTES and len(kept[LIST]) > 1:  # or no store would take it
        kept[LIST] = kept[LIST][1:]
        text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
    draft = path.with_name(f".{FILE}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
    return path


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}; an object is needed")
    return found


def _list(kept: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    found = kept.get(LIST)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
