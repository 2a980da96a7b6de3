"""Raw text, ShareGPT's conversations, and stop tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.template import render_chat
from base.load import Base
from training.config import DataConfig
from training.data import Prepared, encode, examples, prepare
from training.data.encoding import Encoding
from training.data.shape import question
from training.data.source import scan
from training.data.text import LONGEST, PASSAGE
from training.errors import DataError

PARAGRAPH = "one two three\nfour five six 한국어\n\n"


def _prepare(base: Base, path: Path, **fields: Any) -> Prepared:
    return prepare(DataConfig(train=path, **fields), base.tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "short",
        PARAGRAPH * 3000,
        "\ufeff# head\r\n\r\n" + "line\r\n" * 20_000,
        "x" * (3 * LONGEST + 5),
        PARAGRAPH * 300 + "\n\n\n",
    ],
)
def test_nothing_of_a_text_is_lost_and_only_its_end_stops(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    found = [row for _, row in scan(path) if not isinstance(row, DataError)]
    assert "".join(row["text"] for row in found).strip() == text.strip("\ufeff").strip()
    assert [row["continues"] for row in found] == [True] * (len(found) - 1) + [False]
    assert max(len(row["text"]) for row in found) <= LONGEST
    assert all(row["text"].strip() for row in found)


def test_a_text_is_cut_at_blank_lines_and_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text(PARAGRAPH * 2800, encoding="utf-8")
    places, rows = zip(*scan(path), strict=True)
    per = len(rows[0]["text"]) // len(PARAGRAPH)
    assert len(rows) > 2
    assert all(row["text"].endswith("\n\n") for row in rows)
    assert PASSAGE <= len(rows[0]["text"]) < PASSAGE + len(PARAGRAPH)
    assert places[:2] == (f"{path}:1", f"{path}:{3 * per + 1}")


def test_every_token_of_a_text_is_learnt_and_one_stop(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(PARAGRAPH * 1500, encoding="utf-8")
    train = _prepare(base, path, max_length=64).train
    stop = base.tokenizer.eos_token_id
    assert [i for i in range(len(train)) if stop in train[i].tokens] == [len(train) - 1]
    rows = [row["text"] for _, row in scan(path) if not isinstance(row, DataError)]
    want = sum(len(encode(base.tokenizer, row)) - 1 for row in rows) + 1  # but each row's first
    assert train.loss_tokens == want


def test_a_folder_of_raw_text_is_read_to_any_depth(base: Base, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / "deep" / "er" / "a.txt").write_text("one a")
    (tmp_path / "b.md").write_text("two b")
    (tmp_path / "c.jsonl").write_text('{"text": "three c"}\n')
    (tmp_path / ".git" / "d.txt").write_text("hidden")
    (tmp_path / "e.py").write_text("other")
    train = _prepare(base, tmp_path, raw=True).train
    said = [base.tokenizer.decode(e.tokens, skip_special_tokens=True) for e in train]
    assert said == ["two b", "three c", "one a"]
    with pytest.raises(DataError, match=r"data\.raw=true reads"):
        _prepare(base, tmp_path / "deep")
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:1: fields .*data\.raw needs text"):
        _prepare(base, tmp_path, raw=True)
    (tmp_path / "c.jsonl").unlink()
    (tmp_path / "b.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"b\.md: not a text in UTF-8"):
        _prepare(base, tmp_path, raw=True)
    assert len(_prepare(base, tmp_path, raw=True, max_bad_rows=1).train) == 1


def test_a_part_of_one_long_text_is_held_out(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"paragraph {i} of many" for i in range(600)))  # one passage
    found = _prepare(base, path, split=0.3, max_length=64)
    assert found.reports[0].held_out == len(found.held_out)
    assert 0.1 < found.held_out.tokens / (found.held_out.tokens + found.train.tokens) < 0.5


def test_sharegpt_is_the_same_chat(base: Base) -> None:
    said = [("system", "be brief"), ("human", "one"), ("gpt", "two"), ("human", "three")]
    said.append(("gpt", "four"))
    share = {"conversations": [{"from": who, "value": text} for who, text in said]}
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    chat = {"messages": [{"role": roles[who], "content": text} for who, text in said]}
    encoding = Encoding(base.tokenizer, 512)
    assert encoding.examples("r", share).examples == encoding.examples("r", chat).examples
    first = encoding.examples("r", share).examples[0]
    prompt = render_chat(base.tokenizer, chat["messages"][:2])
    assert list(first.tokens[: first.answer_start]) == prompt
    other = {"conversations": [*share["conversations"][:2], {"from": "gpt", "value": "else"}]}
    assert question(share) == question(other)  # so that a split keeps both answers on one side
    other["conversations"][1] = {"from": "human", "value": "else"}
    assert question(share) != question(other)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"conversations": [{"from": "gpt", "value": "a"}], "system": 3},
            "system must be a str",
        ),
        (
            {"conversations": [{"from": "system", "value": "a"}], "system": "b"},
            r"conversations\[0\] and system: one of them",
        ),
        (
            {"conversations": [{"from": "gpt", "value": "a"}], "tools": "[1]"},
            "tools: calls of",
        ),
        ({"conversations": "hello"}, "conversations must be a list"),
        ({"conversations": [{"from": "bing", "value": "a"}]}, r"conversations\[0\].from is 'bing'"),
        ({"conversations": [{"from": "human", "text": "a"}]}, "needs from and value"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "conversations: no assistant turn"),
        ({"text": "a", "continues": "yes"}, "continues is 'yes'; true or false"),
    ],
)
def test_a_bad_row_is_named(base: Base, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"r:0: .*{said}"):
        examples([("r:0", row)], base.tokenizer, 512)


def test_data_that_never_stops_is_refused(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a long text", "continues": true}\n' * 3)
    with pytest.raises(DataError, match="no example ends with the stop token"):
        _prepare(base, path)
    with path.open("a") as file:
        file.write('{"text": "and its end"}\n')
    assert len(_prepare(base, path).train) == 4
