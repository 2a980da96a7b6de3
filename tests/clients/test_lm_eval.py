"""lm_eval over HTTP (`local-completions`) and its own `hf` backend on the same weights: the same
likelihoods, the same greedy flags, the same texts, on a task of ten local rows."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from base.load import load_base
from base.mini import MINI
from service.conformance.oracle import PeftOracle
from tests.service.api.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lm_eval: Any = pytest.importorskip("lm_eval")

TOWNS = ["Kesh", "Tovan", "Brel"]
ROWS = [
    {
        "text": f"{who} lives in {town}. {who} lives in",
        "options": ["Kesh", "Tovan", "Brel"],
        "gold": n,
    }
    for who in ("Merla", "Dorin", "Sella", "Ivo", "Tamsin")
    for n, town in enumerate(("Kesh", "Tovan"))
]
CHOICE = """
task: towns
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""
TEXT = """
task: sentences
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{options[gold]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def evaluated(model: Any, tasks: Path) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=["towns", "sentences"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return {
        "answers": {
            name: [sample["resps"] for sample in sorted(rows, key=lambda s: s["doc_id"])]
            for name, rows in found["samples"].items()
        },
        "scores": found["results"],
    }


def test_the_same_likelihoods_and_texts_as_its_own_backend(mini: Running, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "towns.yaml").write_text(CHOICE.format(rows=rows))
    (tmp_path / "sentences.yaml").write_text(TEXT.format(rows=rows))
    base = load_base(str(MINI), device="cpu", dtype="float32", precision="exact")
    theirs = HFLM(pretrained=PeftOracle(base, None).model, tokenizer=base.tokenizer, device="cpu")
    ours = LocalCompletionsAPI(
        base_url=f"{mini.url}/v1/completions",
        model="mini",
        tokenizer=str(MINI),
        tokenizer_backend="huggingface",
        max_length=2048,
        num_concurrent=1,
    )
    want, got = evaluated(theirs, tmp_path), evaluated(ours, tmp_path)
    assert got["answers"]["sentences"] == want["answers"]["sentences"]
    for mine, other in zip(got["answers"]["towns"], want["answers"]["towns"], strict=True):
        for ((value, greedy),), ((their_value, their_greedy),) in zip(mine, other, strict=True):
            assert value == pytest.approx(their_value, abs=1e-3)
            assert greedy == their_greedy
    assert got["scores"]["towns"]["acc,none"] == want["scores"]["towns"]["acc,none"]
