"""A cross-encoder reads the question and each passage together, and scores them.

It is behind a URL, or a directory in the layout of sentence-transformers, read here without that
library: a classifier of transformers with one output. No name in it decides which Python is
imported, and none of its own code runs.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from service.retrieval.errors import RerankerFailed

SECONDS = 60.0
BATCH = 16  # pairs of one forward pass
ACTIVATIONS = {  # what sentence-transformers calls them -> whether scores lie between 0 and 1
    "torch.nn.modules.activation.Sigmoid": True,
    "torch.nn.modules.linear.Identity": False,
}


class Reranker(Protocol):
    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        """One score for each text, in their order. Raises RerankerFailed."""
        ...


class RemoteReranker:
    """A server that takes {"query", "documents"} and answers {"results": [{"index": 0,
    "relevance_score": 0.9}, …]}, as vLLM, Jina and Cohere do."""

    def __init__(
        self, url: str, model: str | None = None, key: str | None = None, transport: Any = None
    ) -> None:
        import httpx

        self._url = url
        self._model = model
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(timeout=SECONDS, headers=headers, transport=transport)

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        import httpx

        body: dict[str, Any] = {"query": question, "documents": list(texts), "top_n": len(texts)}
        if self._model:
            body["model"] = self._model
        try:
            reply = self._http.post(self._url, json=body)
        except httpx.HTTPError as error:
            raise RerankerFailed(f"the reranker does not answer: {error!r}") from error
        if reply.status_code != 200:
            raise RerankerFailed(f"the reranker answered HTTP {reply.status_code}")
        try:
            given = {int(r["index"]): float(r["relevance_score"]) for r in reply.json()["results"]}
            scores = [given[place] for place in range(len(texts))]
        except (ValueError, KeyError, TypeError) as error:
            raise RerankerFailed(f"the reranker's reply is no list of scores: {error!r}") from error
        if not all(map(math.isfinite, scores)):
            raise RerankerFailed("the reranker sent a score that is not finite")
        return scores


def open_reranker(source: str, model: str | None = None, key: str | None = None) -> Reranker:
    """A URL or a directory. Nothing is loaded yet."""
    if source.startswith(("http://", "https://")):
        return RemoteReranker(source, model, key)
    return LocalReranker(Path(source))


class LocalReranker:
    """A directory with a classifier of one output, loaded when it is first needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._loaded: _Classifier | None = None

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        with self._lock:
            if self._loaded is None:
                self._loaded = _Classifier(self._directory)
            return self._loaded.scores(question, texts)


class _Classifier:
    def __init__(self, directory: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        _check_modules(directory)
        self._sigmoid = _activation(directory)
        logging.disable_progress_bar()
        try:
            known: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            config = AutoConfig.from_pretrained(directory, **known)
            if (outputs := int(config.num_labels)) != 1:
                raise RerankerFailed(f"{directory} has {outputs} outputs; a reranker has one")
            self._tokenizer = AutoTokenizer.from_pretrained(directory, **known)
            self._model, report = AutoModelForSequenceClassification.from_pretrained(
                directory,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **known,
            )
        except (OSError, ValueError, KeyError) as error:
            raise RerankerFailed(f"{directory} cannot be loaded: {error}") from error
        if missing := sorted(report["missing_keys"]):  # transformers would draw them at random
            raise RerankerFailed(f"{directory} has no weights for {', '.join(missing[:4])}")
        self._model.eval()
        longest = getattr(config, "max_position_embeddings", self._tokenizer.model_max_length)
        self._longest = min(int(longest), int(self._tokenizer.model_max_length))
        self._torch = torch

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        """Passages of like lengths together, so that little is padded."""
        found = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            for place, score in zip(
                places, self._scored(question, [texts[place] for place in places]), strict=True
            ):
                found[place] = score
        if not all(map(math.isfinite, found)):
            raise RerankerFailed("the reranker computed a score that is not finite")
        return found

    def _scored(self, question: str, texts: list[str]) -> list[float]:
        given = self._tokenizer(
            [question] * len(texts),
            texts,
            padding=True,
            truncation=True,
            max_length=self._longest,
            return_tensors="pt",
        )
        with self._torch.inference_mode():
            logits = self._model(**given).logits[:, 0]
            scores: list[float] = (logits.sigmoid() if self._sigmoid else logits).tolist()
        return scores


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RerankerFailed(f"{path} cannot be read: {error}") from error


def _check_modules(directory: Path) -> None:
    """Newer directories list their modules: more than the transformer would be another model."""
    path = directory / "modules.json"
    if not path.is_file():
        return
    modules = _read_json(path)
    kinds = [str(one.get("type", "")).rpartition(".")[2] for one in modules]
    if kinds != ["Transformer"] or modules[0].get("path"):
        raise RerankerFailed(
            f"{directory} is built of {', '.join(kinds)}; read is a Transformer in the directory "
            "itself"
        )


def _activation(directory: Path) -> bool:
    """Whether a sigmoid comes last. Raises RerankerFailed for anything but that or nothing."""
    config = _read_json(directory / "config.json")
    path = directory / "config_sentence_transformers.json"
    newer = _read_json(path) if path.is_file() else {}
    given = (
        newer.get("activation_fn")
        or (config.get("sentence_transformers") or {}).get("activation_fn")
        or config.get("sbert_ce_default_activation_function")
        or "torch.nn.modules.activation.Sigmoid"
    )
    if given not in ACTIVATIONS:
        raise RerankerFailed(
            f"{directory} ends in {str(given)[:80]}; known are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[given]
