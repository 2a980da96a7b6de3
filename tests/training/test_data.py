from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from adapters.template import render_chat
from base.load import Base
from training.data import Example, encode, examples, read_rows
from training.data.batches import IGNORED, Batches, collate
from training.errors import DataError

CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def _examples(base: Base, *rows: dict[str, Any], max_length: int = 512) -> list[Example]:
    return examples([(f"r:{i}", row) for i, row in enumerate(rows)], base.tokenizer, max_length)


def test_each_answer_bears_loss_after_the_prompt_that_serving_renders(base: Base) -> None:
    first, second = _examples(base, {"messages": CHAT})
    stop = base.tokenizer.eos_token_id
    for example, prompt, answer in ((first, CHAT[:1], "two"), (second, CHAT[:3], "four")):
        assert list(example.tokens[: example.answer_start]) == render_chat(base.tokenizer, prompt)
        said = [*encode(base.tokenizer, answer), stop]
        assert list(example.tokens[example.answer_start :]) == said


def test_a_completion_bears_loss_and_its_prompt_does_not(base: Base) -> None:
    (example,) = _examples(base, {"prompt": "ab ", "completion": "cd"})
    assert base.tokenizer.decode(example.tokens[: example.answer_start]) == "ab "
    assert example.loss_tokens == len(encode(base.tokenizer, "cd")) + 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": CHAT[:1]}, "no token bears loss"),
        ({"messages": [*CHAT[:1], {"role": "assistant", "content": ""}]}, "empty answer"),
        ({"prompt": "a", "completion": ""}, "empty answer"),
        ({"prompt": "a", "completion": 3}, "must be strings"),
        ({"prompt": "a", "text": "a"}, r"fields \['prompt', 'text'\]; one of messages"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "role is 'bot'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no messages"),
        ({"prompt": "a", "completion": "b</s>c"}, "</s>"),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
            "weight 0, so no",
        ),
        ({"messages": [{"role": "user", "content": "a", "weight": 2}]}, "weight is 2; 0 or 1"),
        ({"messages": [{"role": "my secret", "content": "a"}]}, "role is a text; one of"),
        ({"messages": [{"role": "user", "content": "a", "weight": "s" * 99}]}, "weight is a text;"),
        ({"messages": [{"role": "user", "content": "a", "weight": ["s"]}]}, "weight is a list;"),
        ({"conversations": [{"from": "my secret", "value": "a"}]}, "from is a text; one of"),
        ({"text": "a", "continues": "my secret"}, "continues is a text; true"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, r"history\[0\] needs a question"),
        ({"instruction": "a", "output": "b", "history": "ab"}, r"history\[0\] needs a question"),
    ],
)
def test_a_row_without_loss_is_refused_by_its_place(
    base: Base, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=f"r:1: .*{said}"):
        _examples(base, {"messages": CHAT}, row)


def test_a_message_of_weight_0_is_read_and_bears_no_loss(base: Base) -> None:
    chat = [dict(message) for message in CHAT]
    chat[1]["weight"] = 0  # type: ignore[assignment]
    assert _examples(base, {"messages": chat}) == _examples(base, {"messages": CHAT})[1:]


def test_an_instruction_may_have_a_system_prompt_and_a_history(base: Base) -> None:
    system = {"role": "system", "content": "be brief"}
    row = {"instruction": "three", "output": "four", "history": [["one", "two"]]}
    assert _examples(base, row) == _examples(base, {"messages": CHAT})
    asked = _examples(base, {**row, "system": "be brief", "input": ""})
    assert asked == _examples(base, {"messages": [system, *CHAT]})
    said = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
    share = {"conversations": said, "system": "be brief", "tools": ""}
    assert _examples(base, share) == _examples(base, {"messages": [system, *CHAT[:2]]})


def test_no_rows_and_too_long_rows_are_refused(base: Base) -> None:
    with pytest.raises(DataError, match="no rows"):
        _examples(base)
    with pytest.raises(DataError, match="max_length is 8"):
        _examples(base, {"messages": CHAT}, max_length=8)


def test_lines_are_named_and_blank_ones_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n\n[1]\n")
    rows = read_rows(path)
    assert next(rows) == (f"{path}:1", {"prompt": "a"})
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*list"):
        next(rows)
    path.write_text("{")
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON"):
        list(read_rows(path))


def test_padding_and_prompts_have_no_label() -> None:
    batch = collate([Example((5, 6, 7), 2), Example((8, 9), 1)], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7], [IGNORED, 9, IGNORED]]
    assert batch.loss_tokens == 2


def test_every_epoch_shows_every_example_once_and_the_seed_decides_the_order() -> None:
    data = [Example((i, 1, *([2] * (i % 7))), 1) for i in range(10, 60)]

    def epochs(seed: int) -> list[list[int]]:
        stream = Batches(data, 8, 0, seed)
        return [batch.input_ids[:, 0].tolist() for batch in itertools.islice(stream, 14)]

    seen = epochs(3)
    firsts = [first for batch in seen for first in batch]
    assert sorted(firsts[:50]) == sorted(firsts[50:]) == list(range(10, 60))
    assert firsts[:50] != firsts[50:]
    assert seen == epochs(3)
    assert seen != epochs(4)


def test_batches_hold_examples_of_similar_length() -> None:
    data = [Example((1,) * (length + 2), 1) for length in range(64)]
    padding = [
        int((batch.attention_mask == 0).sum())
        for batch in itertools.islice(Batches(data, 8, 0, 0), 8)
    ]
    assert padding == [28] * 8  # eight adjacent lengths: 7 + 6 + … + 0
