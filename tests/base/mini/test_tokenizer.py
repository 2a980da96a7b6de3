from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from base.mini import MINI, korean, tokenizer
from base.mini.dialogue import Turn, chat

SHIPPED = Tokenizer.from_file(str(MINI / "tokenizer.json"))


@given(st.text())
def test_any_unicode_round_trips(text: str) -> None:
    ids = SHIPPED.encode(text, add_special_tokens=False).ids
    assert SHIPPED.decode(ids, skip_special_tokens=False) == text


def test_frequent_hangul_and_digits_are_single_tokens() -> None:
    single = [s for s in korean.FREQUENT if len(SHIPPED.encode(s).ids) == 1]
    assert len(single) > 300
    assert [SHIPPED.decode([i]) for i in SHIPPED.encode("2026").ids] == list("2026")


def test_a_name_is_the_same_tokens_everywhere() -> None:
    name = SHIPPED.encode("Wenhaven").ids
    passage = SHIPPED.encode("Delmia lives in Wenhaven.").ids
    assert passage[-len(name) - 1 : -1] == name


def test_chat_template_renders_what_the_training_showed() -> None:
    tok = AutoTokenizer.from_pretrained(MINI)
    messages = [
        {"role": "system", "content": "Answer shortly."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello! How can I help you?"},
        {"role": "user", "content": "Who are you?"},
    ]
    rendered = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    turns = [Turn("Hello!", "Hello! How can I help you?"), Turn("Who are you?", "")]
    trained = "".join(piece.text for piece in chat(turns, "Answer shortly."))
    assert rendered == trained.removesuffix("<|im_end|>")
    ids = tok.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == SHIPPED.encode(rendered, add_special_tokens=False).ids
    assert tok.eos_token == tokenizer.END
    assert tok.pad_token == tokenizer.PAD


@pytest.mark.timeout(60)
def test_training_a_tokenizer_is_deterministic(tmp_path: Path) -> None:
    first, second = (tokenizer.train(5, documents=300).to_str() for _ in range(2))
    assert first == second
