"""`nibble eval` on the embedded base and its samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.evaluation import FILE
from training.data import Example
from training.errors import ConfigError, DataError
from training.evaluation.card import KEPT, store
from training.evaluation.cli import app
from training.evaluation.scorecard import Question, fitting
from training.evaluation.shots import read_shots
from training.showcase import SAMPLES
from training.tasks import TASKS

ITEMS = 12


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    rows = [json.dumps(item.row) for item in TASKS["tickets"].items("test", ITEMS, seed=3)]
    path = tmp_path / "tickets.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    found = tmp_path / "tickets"
    shutil.copytree(SAMPLES / "tickets", found)
    return found


def run(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [str(a) for a in (*arguments, "--json")])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_an_adapter_beside_the_base_and_its_figures_beside_the_adapter(
    tickets: Path, adapter: Path
) -> None:
    before = json.loads((adapter / FILE).read_text(encoding="utf-8"))
    found = run(tickets, "--adapter", adapter)
    systems = found["systems"]
    assert list(systems) == ["base", "tickets"]
    figures = systems["tickets"]["figures"]
    assert set(figures) == {"perplexity", "exact_match", "json_valid", "field_match"}
    assert figures["exact_match"]["value"] > 0.9
    assert figures["perplexity"]["value"] < 1.1
    assert systems["base"]["figures"]["exact_match"]["value"] == 0.0
    test = systems["tickets"]["tests"]["exact_match"]
    assert (test["test"], test["p"] < 0.01) == ("McNemar, exact", True)
    kept = json.loads((adapter / FILE).read_text(encoding="utf-8"))
    assert {key: kept[key] for key in before} == before  # the card's own figures stay
    (one,) = kept["evaluations"]
    assert one["questions"] == ITEMS
    assert one["figures"]["exact_match"]["value"] == figures["exact_match"]["value"]
    assert "base" in one["against"]


def test_prompts_side_by_side_and_nothing_kept(tickets: Path, adapter: Path) -> None:
    before = (adapter / FILE).read_bytes()
    found = run(
        tickets, "--adapter", adapter, "--no-with-base", "--system", "Answer in French.",
        "--metric", "perplexity", "--limit", 4, "--no-keep",
    )  # fmt: skip
    plain, prompted = (s["figures"]["perplexity"]["value"] for s in found["systems"].values())
    assert list(found["systems"]) == ["tickets", "tickets + prompt 1"]
    assert plain != prompted
    assert (adapter / FILE).read_bytes() == before


def test_shots_stand_before_the_questions_of_base_and_adapter(
    tickets: Path, adapter: Path, tmp_path: Path
) -> None:
    shown = tmp_path / "train.jsonl"
    rows = [json.dumps(item.row) for item in TASKS["tickets"].items("train", 3, seed=5)]
    shown.write_text("\n".join(rows) + "\n", encoding="utf-8")
    found = run(
        tickets, "--adapter", adapter, "--shots", 2, "--examples", shown,
        "--metric", "perplexity", "--limit", 4,
    )  # fmt: skip
    names = ["base", "base + 2 shots", "tickets", "tickets + 2 shots"]
    assert list(found["systems"]) == names
    base, shot, trained, _ = (
        s["figures"]["perplexity"]["value"] for s in found["systems"].values()
    )
    assert trained < shot < base  # examples help, and training more
    assert found["systems"]["base + 2 shots"]["tests"]["perplexity"]["difference"]["value"] < 0
    kept = json.loads((adapter / FILE).read_text(encoding="utf-8"))["evaluations"]
    assert [one["system"] for one in kept[-2:]] == [None, "2 shots of train.jsonl"]

    for more, said in (
        (["--shots", "2"], "--shots needs --examples"),
        (["--shots", "4", "--examples", str(shown)], "3 examples, and --shots 4 needs as many"),
        (["--shots", "1", "--examples", str(tickets)], "its answer would be shown"),
    ):
        done = CliRunner().invoke(app, [str(tickets), *more])
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())


def test_shots_come_as_the_questions_do(tmp_path: Path) -> None:
    def file(name: str, *rows: dict[str, Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    plain = file("plain.jsonl", {"prompt": "1+1=", "completion": "2"})
    said = [
        {"role": "system", "content": "add"},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
    ]
    chat = file("chat.jsonl", {"messages": said})
    row = {"prompt": "3+4=", "completion": "7"}
    assert read_shots(plain, 1).before("here", row)["prompt"] == "1+1=2\n\n3+4="
    shots = read_shots(chat, 1)
    asked = {"instruction": "3+4", "output": "7"}
    told = [message["content"] for message in shots.before("here", asked)["messages"]]
    assert (told, shots.answers) == (["1+1", "2", "2+2", "4", "3+4", "7"], 2)
    own = [{"role": "system", "content": "be brief"}, *said[1:]]
    own[1] = {"role": "user", "content": "5+5"}
    told = [message["content"] for message in shots.before("here", {"messages": own})["messages"]]
    assert told[:3] == ["be brief", "1+1", "2"]
    with pytest.raises(DataError, match=r"here: the questions are plain prompts, and chat\.jsonl"):
        shots.before("here", row)
    with pytest.raises(DataError, match="a document asks nothing"):
        shots.before("here", {"text": "words"})


def test_labels_are_chosen_by_likelihood(tmp_path: Path) -> None:
    items = TASKS["particles"].items("test", 10)
    rows = [{"prompt": i.question, "completion": i.choices.index(i.answer)} for i in items]
    path = tmp_path / "labels.jsonl"
    lines = [json.dumps({**row, "completion": ["yes", "no"][row["completion"]]}) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = run(path, "--metric", "labels", "--choices", "yes,no")
    figures = found["systems"]["base"]["figures"]
    assert set(figures) == {"accuracy", "macro_f1"}
    assert 0.0 <= figures["accuracy"]["value"] <= 1.0
    refused = CliRunner().invoke(app, [str(path), "--metric", "labels", "--choices", "yes,maybe"])
    assert refused.exit_code == 2
    assert "'no' is none of the choices" in refused.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metric", "bleu"], "metric 'bleu': one of perplexity"),
        (["--no-with-base"], "nothing to measure"),
        (["--column", "prompt"], "field=column is needed"),
        (["--adapter", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused(tickets: Path, arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, [str(tickets), "--limit", "1", *arguments])
    assert done.exit_code == 2
    assert said in done.output.replace("\n", " ")


def test_a_file_that_is_not_there_is_missed_before_a_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluation.cli.load_base", lambda *_, **__: pytest.fail("loaded"))
    there = tmp_path / "there.jsonl"
    there.touch()
    for arguments in (
        [tmp_path / "no.jsonl"],
        [there, "--adapter", tmp_path / "no"],
        [there, "--shots", "1", "--examples", tmp_path / "no.jsonl"],
    ):
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert done.exit_code == 2
        assert "doesnotexist" in "".join(done.output.replace("│", "").split())


def test_the_metrics_fit_the_answers() -> None:
    def of(*answers: str) -> tuple[str, ...]:
        return fitting([Question(Example((1, 2), 1), answer) for answer in answers])

    assert of("", "") == ("perplexity",)
    assert of("yes", "no", "yes", "no") == ("perplexity", "exact_match", "labels")
    assert of('{"a": 1}', "[2]", '{"b": 3}') == ("perplexity", "exact_match", "json")
    long = ("one two three four five", "six seven eight nine ten")
    assert of(*long) == ("perplexity", "exact_match", "rouge_l", "chrf")


def test_the_same_data_is_kept_once_and_the_file_stays_small(tmp_path: Path) -> None:
    for number in range(KEPT + 5):
        store(tmp_path, {"data": f"{number % 3}", "data_sha256": "", "system": None, "n": number})
    kept = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))["evaluations"]
    assert [one["n"] for one in kept] == [KEPT + 2, KEPT + 3, KEPT + 4]
    for number in range(KEPT + 5):
        store(tmp_path, {"data": f"{number}", "data_sha256": "", "system": None})
    assert len(json.loads((tmp_path / FILE).read_text(encoding="utf-8"))["evaluations"]) == KEPT
    (tmp_path / FILE).write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a list"):
        store(tmp_path, {})
