"""What mini reaches on held-out data, in fp32 and over NF4 weights side by side."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from base.mini import held_out
from base.mini.dialogue import Document
from base.mini.environment import environment
from base.mini.scoring import Score, score

SEED = 2
Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Size:
    """How many items to score: per number of facts, per task, texts per source."""

    context: int = 100
    tasks: int = 200
    texts: int = 100


def load(directory: Path) -> tuple[Qwen3ForCausalLM, Tokenizer]:
    """The model in fp32 with its tokenizer."""
    net = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return net.eval(), Tokenizer.from_file(str(directory / "tokenizer.json"))


def over_nf4(net: Qwen3ForCausalLM, block: int = 64) -> Qwen3ForCausalLM:
    """A copy whose decoder linears went through NF4 and back, all else in fp32.

    This is, number for number, what serving over NF4 weights computes in fp32. Embedding and
    output head stay as they are, as bitsandbytes leaves them too.
    """
    rounded = copy.deepcopy(net)
    for module in rounded.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            packed, state = quantize_4bit(
                module.weight.data.contiguous(), blocksize=block, quant_type="nf4"
            )
            module.weight.data = dequantize_4bit(packed, state).to(torch.float32)
    return rounded


def _exact(scores: Sequence[Score]) -> float:
    return sum(s.exact for s in scores) / len(scores)


def _loss(scores: Sequence[Score]) -> float:
    return sum(s.loss for s in scores) / sum(s.tokens for s in scores)


def _context(net: Qwen3ForCausalLM, tok: Tokenizer, count: int) -> dict[str, float]:
    items = held_out.context_items(SEED, count)
    scores = score(net, tok, [item.document for item in items])
    found: dict[str, float] = {"all": _exact(scores)}
    both = list(zip(items, scores, strict=True))
    for size in held_out.SIZES:
        name = f"{size} fact{'s' if size > 1 else ''}"
        found[name] = _exact([s for item, s in both if item.facts == size])
    found["one passage"] = _exact([s for item, s in both if item.passages == 1])
    found["several passages"] = _exact([s for item, s in both if item.passages > 1])
    lacking = score(net, tok, held_out.unknown_items(SEED, count))
    found["not in the passages"] = _exact(lacking)
    return found


def _groups(
    net: Qwen3ForCausalLM, tok: Tokenizer, groups: dict[str, list[Document]]
) -> dict[str, list[Score]]:
    return {name: score(net, tok, documents) for name, documents in groups.items()}


def measure(net: Qwen3ForCausalLM, tok: Tokenizer, size: Size) -> Table:
    """Exact match on context answers and tasks, loss in nats per token on texts and answers."""
    tasks = _groups(net, tok, held_out.task_items(SEED, size.tasks))
    texts = _groups(net, tok, held_out.texts(SEED, size.texts))
    exact = {name: _exact(scores) for name, scores in tasks.items()}
    loss = {name: _loss(scores) for name, scores in texts.items()}
    loss["task answers"] = _loss([s for scores in tasks.values() for s in scores])
    return {
        "context": _context(net, tok, size.context),
        "tasks": {"all": sum(exact.values()) / len(exact), **exact},
        "loss": loss,
    }


def evaluate(directory: Path, size: Size | None = None) -> dict[str, Any]:
    """Measure the model in `directory` and write its `evaluation.json`."""
    size = size or Size()
    net, tok = load(directory)
    result = {
        "environment": environment(),
        "parameters": sum(p.numel() for p in net.parameters()),
        "items": {
            "context": size.context * len(held_out.SIZES),
            "not in the passages": size.context,
            "each task": size.tasks,
            "texts of each source": size.texts,
        },
        "fp32": measure(net, tok, size),
        "nf4": measure(over_nf4(net), tok, size),
    }
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    (directory / "evaluation.json").write_text(text, encoding="utf-8")
    return result
