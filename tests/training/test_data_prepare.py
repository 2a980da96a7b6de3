"""What a run's files become: shapes, loss, lengths, bad rows, duplicates, the held-out part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from adapters.template import render_chat
from base.load import Base
from training.cli import app
from training.config import DataConfig
from training.data import Corpus, Encoding, Example, Prepared, encode, prepare, survey
from training.errors import ConfigError, DataError

CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def _file(tmp_path: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"say {i}", "completion": f"w {i}"} for i in range(count)]


def _prepare(base: Base, path: Path, **fields: Any) -> Prepared:
    return prepare(DataConfig(train=path, **fields), base.tokenizer)


def _one(base: Base, row: dict[str, Any], **fields: Any) -> Example:
    (example,) = Encoding(base.tokenizer, 512, **fields).examples("r", row).examples
    return example


@pytest.mark.parametrize("given", ["", "the input", None])
def test_an_instruction_is_a_chat_of_one_turn(base: Base, given: str | None) -> None:
    row = {"instruction": "do", "output": "done"} | ({} if given is None else {"input": given})
    asked = "do\n\nthe input" if given else "do"
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": "done"}]
    assert _one(base, row) == _one(base, {"messages": chat})


def test_loss_falls_where_it_is_asked_for(base: Base) -> None:
    every = Encoding(base.tokenizer, 512).examples("r", {"messages": CHAT}).examples
    last = _one(base, {"messages": CHAT}, loss="completion")
    whole = _one(base, {"messages": CHAT}, loss="all")
    assert [example.answer_start for example in every] == [
        len(render_chat(base.tokenizer, CHAT[:n])) for n in (1, 3)
    ]
    assert last == every[1]
    assert (whole.tokens, whole.answer_start) == (last.tokens, 1)


def test_a_table_of_texts_holds_messages_as_json(base: Base) -> None:
    assert _one(base, {"messages": json.dumps(CHAT[:2])}) == _one(base, {"messages": CHAT[:2]})


@pytest.mark.parametrize("length", [2, 5, 7])
def test_every_token_of_a_document_is_learnt_once(base: Base, length: int) -> None:
    text = "abcde fghij klmno"
    encoded = Encoding(base.tokenizer, length).examples("r", {"text": text})
    learnt = [t for e in encoded.examples for t in e.tokens[e.answer_start :]]
    begin = encoded.examples[0].tokens[:1]
    assert [*begin, *learnt][-len(encode(base.tokenizer, text)) - 1 :] == [
        *encode(base.tokenizer, text),
        base.tokenizer.eos_token_id,
    ]
    assert all(len(e.tokens) <= length for e in encoded.examples)
    pairs = zip(encoded.examples, encoded.examples[1:], strict=False)
    assert all(a.tokens[-1] == b.tokens[0] for a, b in pairs)
    assert encoded.pieces == len(encoded.examples) > 1


def test_a_prompt_is_cut_at_its_beginning_and_an_answer_never(base: Base, tmp_path: Path) -> None:
    row = {"prompt": "abcdefghijklmnop", "completion": "qr"}
    whole = _one(base, row)
    short = Encoding(base.tokenizer, 8, too_long="cut").examples("r", row)
    assert short.examples[0].tokens == whole.tokens[-8:]
    assert short.examples[0].loss_tokens == whole.loss_tokens
    assert short.cut == len(whole.tokens) - 8
    found = _prepare(base, _file(tmp_path, row), max_length=8, too_long="cut")
    (report,) = found.reports
    assert (report.cut, report.cut_tokens) == (1, short.cut)
    assert report.cuts == [f"{tmp_path}/rows.jsonl:1: {short.cut} tokens of the prompt cut off"]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: completion: an answer of \d+ tokens"):
        _prepare(base, tmp_path / "rows.jsonl", max_length=2, too_long="cut")
    with pytest.raises(DataError, match=r"completion: \d+ tokens with its prompt.*too_long=cut"):
        _prepare(base, tmp_path / "rows.jsonl", max_length=8)


def test_bad_rows_are_named_counted_and_refused_beyond_the_threshold(
    base: Base, tmp_path: Path
) -> None:
    bad = {"prompt": "a", "completion": 3}
    path = _file(tmp_path, *_pairs(2), bad, {"messages": CHAT[:1]}, *_pairs(1))
    with pytest.raises(DataError) as refused:
        _prepare(base, path, max_bad_rows=1)
    said = str(refused.value).splitlines()
    assert said[0] == "2 bad rows, data.max_bad_rows is 1:"
    assert said[1].startswith(f"{path}:3: prompt and completion must be strings, completion is")
    assert said[2].startswith(f"{path}:4: messages: no assistant turn")
    found = _prepare(base, path, max_bad_rows=2)
    assert (found.reports[0].rows, found.reports[0].bad, len(found.train)) == (5, 2, 3)
    with pytest.raises(DataError, match="no rows"):
        _prepare(base, _file(tmp_path, bad), max_bad_rows=9)


def test_columns_are_taken_by_name_and_the_others_left(base: Base, tmp_path: Path) -> None:
    path = _file(tmp_path, {"q": "say", "a": "word", "id": 7})
    with pytest.raises(DataError, match=r"fields \['a', 'id', 'q'\].*data\.columns"):
        _prepare(base, path)
    found = _prepare(base, path, columns={"prompt": "q", "completion": "a"})
    assert found.train[0] == _one(base, {"prompt": "say", "completion": "word"})
    with pytest.raises(DataError, match=r"fields \['prompt'\]"):
        _prepare(base, path, columns={"prompt": "q", "completion": "answer"})


def test_duplicates_are_counted_and_left_out_on_demand(base: Base, tmp_path: Path) -> None:
    rows = [*_pairs(3), _pairs(3)[1], {"completion": "w 0", "prompt": "say 0"}]
    path = _file(tmp_path, *rows)
    kept, without = _prepare(base, path), _prepare(base, path, deduplicate=True)
    assert (len(kept.train), kept.reports[0].duplicates, kept.reports[0].left_out) == (5, 2, 0)
    assert list(without.train) == list(kept.train)[:3]
    assert without.reports[0].left_out == 2


def test_what_is_held_out_depends_on_the_question_alone(base: Base, tmp_path: Path) -> None:
    rows = _pairs(400)
    found = _prepare(base, _file(tmp_path, *rows), split=0.2)
    held = {example.tokens for example in found.held_out}
    assert 50 < len(held) < 110  # 80 are expected, 8 is one standard deviation
    assert len(held) + len(found.train) == 400
    assert found.reports[0].held_out == len(held)
    # in another order, among others, and with other answers: on the same side
    again = _prepare(base, _file(tmp_path, *rows[::-1], *_pairs(600)[500:]), split=0.2)
    assert held <= {example.tokens for example in again.held_out}
    assert not held & {example.tokens for example in again.train}
    asked = {e.tokens[: e.answer_start] for e in found.held_out}
    other = [{**row, "completion": "other"} for row in rows]
    found = _prepare(base, _file(tmp_path, *other), split=0.2)
    assert {e.tokens[: e.answer_start] for e in found.held_out} == asked


def test_rows_that_are_also_learnt_from_are_counted(base: Base, tmp_path: Path) -> None:
    train = _file(tmp_path, *_pairs(4))
    held = _file(tmp_path, *_pairs(6)[3:], name="held.jsonl")
    found = _prepare(base, train, eval=held)
    assert [report.also_in_train for report in found.reports] == [0, 1]
    assert (len(found.train), len(found.held_out)) == (4, 3)


def test_a_template_of_its_own_renders_the_prompt(base: Base, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    path = _file(tmp_path, {"messages": CHAT[:2]})
    found = _prepare(base, path, template=template)
    example = found.train[0]
    assert base.tokenizer.decode(example.tokens[: example.answer_start]) == "<one>"
    assert found.template == template.read_text()
    template.write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match=r"data\.template .*t\.jinja"):
        _prepare(base, path, template=template)


def test_a_corpus_reads_the_same_from_memory_and_from_disk() -> None:
    made = [Example(tuple(range(i, 2 * i + 2)), i % 3) for i in range(1, 60)]
    small, large = Corpus(in_memory=100), Corpus()
    for example in made:
        small.append(example)
        large.append(example)
    assert small.in_memory <= 100 < large.in_memory == small.tokens
    assert list(small) == list(large) == made
    assert small[-1] == made[-1]
    assert small[3:9:2] == made[3:9:2]
    assert [small.length(i) for i in range(len(made))] == [len(e.tokens) for e in made]
    assert small.loss_tokens == sum(e.loss_tokens for e in made)
    with pytest.raises(IndexError):
        small[len(made)]


def _shown(found: Prepared) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(*found.described())
    return capture.get()


def test_the_report_says_what_became_of_the_rows(base: Base, tmp_path: Path) -> None:
    rows = [*_pairs(5), _pairs(1)[0], {"text": "abc " * 20}, {"prompt": "a"}, [1]]
    config = DataConfig(train=_file(tmp_path, *rows), max_length=24)
    said = _shown(survey(config, base.tokenizer, shown=1))
    for words in ("rows", "bad rows", "2", "1 documents", "1 (kept: data.deduplicate)"):
        assert words in said
    assert f"{tmp_path}/rows.jsonl:8: fields ['prompt']" in said
    assert "and 1 more" in said
    assert "up to      24" not in said
    assert "up to      32 tokens" in said


def test_check_ends_with_1_where_a_run_would_refuse(base_directory: Path, tmp_path: Path) -> None:
    def check(*rows: Any) -> Any:
        path = _file(tmp_path, *rows)
        return CliRunner().invoke(app, ["check", str(path), "--base", str(base_directory)])

    good, bad = check(*_pairs(3)), check(*_pairs(3), {"prompt": "a", "completion": ""})
    assert (good.exit_code, bad.exit_code) == (0, 1)
    said = "".join(bad.output.split())  # where a line breaks depends on how long the path is
    assert "rows.jsonl:4: completion: an empty answer".replace(" ", "") in said
    assert "median" in good.output


def test_a_check_ends_as_a_run_would(base_directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for rows, said in (
        ("", "no rows: at least one"),
        ('{"text": "a b c", "continues": true}', "stop"),
    ):
        path.write_text(rows)
        done = CliRunner().invoke(app, ["check", str(path), "--base", str(base_directory)])
        assert done.exit_code == 1
        assert said in done.output.partition("a run would refuse this:")[2]


def test_a_run_saves_its_template_and_evaluates_with_it(
    base_directory: Path, tmp_path: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    out = tmp_path / "out"
    rows = [{"instruction": f"say {i}", "output": f"w {i}"} for i in range(20)]
    data = _file(tmp_path, *rows)
    flags = ["--base", str(base_directory), "--data", str(data), "--out", str(out), "--steps", "1"]
    more = ["--set", f"data.template={template}", "--set", "data.split=0.3"]
    result = CliRunner().invoke(app, ["run", *flags, *more])
    assert result.exit_code == 0, result.output
    assert "held out" in result.output
    saved = out / "chat_template.jinja"
    assert saved.read_text() == template.read_text()
    saved.write_text("{{ raise_exception('this one is used') }}")
    arguments = ["eval", str(data), "--base", str(base_directory), "--adapter", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "this one is used" in result.output
    assert CliRunner().invoke(app, ["run", *flags, "--overwrite"]).exit_code == 0
    assert not saved.exists()


def test_a_refusal_shows_what_it_is_about_and_does_not_obey_it(
    base_directory: Path, tmp_path: Path
) -> None:
    """Names may look like the terminal's markup."""
    (tmp_path / "[").mkdir()
    row = {"messages": [{"role": "nobody", "content": "a"}]}
    data = _file(tmp_path, row, name="[/red].jsonl")
    flags = ["--base", str(base_directory), "--data", str(data), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["run", *flags])
    assert result.exit_code == 2, result.exception
    assert "[/red].jsonl:1: messages[0].role is 'nobody'" in " ".join(result.output.split())
