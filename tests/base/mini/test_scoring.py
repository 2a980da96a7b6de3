from random import Random

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from base.mini import MINI, held_out, tasks
from base.mini.dialogue import chat
from base.mini.evaluate import load, over_nf4
from base.mini.scoring import score


def test_exact_match_is_what_greedy_generation_gives() -> None:
    net, tok = load(MINI)
    names = ("copy", "arithmetic", "sentiment", "talk")
    documents = [
        chat([tasks.TASKS[name][0](Random(str(i)), "held_out", 0.3)])
        for name in names
        for i in range(4)
    ]
    told = [s.exact for s in score(net, tok, documents, rows=5)]
    generated = []
    for question, answer in documents:
        ids = tok.encode(question.text, add_special_tokens=False).ids
        wanted = tok.encode(answer.text, add_special_tokens=False).ids
        out = net.generate(torch.tensor([ids]), max_new_tokens=len(wanted), do_sample=False)
        generated.append(out[0, len(ids) :].tolist() == wanted)
    assert told == generated
    assert any(told)


def test_scores_keep_the_order_of_the_documents() -> None:
    net, tok = load(MINI)
    documents = [item.document for item in held_out.context_items(5, 2)]
    alone = [score(net, tok, [document])[0] for document in documents]
    together = score(net, tok, documents, rows=4)
    assert [s.tokens for s in together] == [s.tokens for s in alone]
    for one, other in zip(together, alone, strict=True):
        assert abs(one.loss - other.loss) < 1e-3 * max(1.0, other.loss)


def test_nf4_rounds_the_decoder_linears_only() -> None:
    net, _ = load(MINI)
    rounded = over_nf4(net)
    for (name, before), after in zip(net.named_parameters(), rounded.parameters(), strict=True):
        linear = name.endswith("_proj.weight")
        assert torch.equal(before, after) != linear
        if linear:
            assert after.unique().numel() <= 16 * before.numel() // 64
            assert (before - after).norm() < 0.2 * before.norm()


def test_the_shipped_model_loads_as_any_base_does() -> None:
    net = Qwen3ForCausalLM.from_pretrained(MINI, dtype=torch.float32)
    tok = AutoTokenizer.from_pretrained(MINI)
    assert 4_000_000 <= sum(p.numel() for p in net.parameters()) <= 10_000_000
    assert net.config.attention_bias
    assert net.config.max_position_embeddings >= 1024
    assert net.generation_config.eos_token_id[0] == tok.eos_token_id
    assert sum(path.stat().st_size for path in MINI.rglob("*")) <= 25 * 2**20
