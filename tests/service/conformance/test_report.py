"""The matrix as text: what a cell says, and where the table goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.conformance.report import BEGIN, END, as_json, legend, table, update
from service.conformance.result import BOUND, CHECKS, Cell, Cost, Row, worst

COST = Cost("low-rank", "4*r*(m + n)", "2*r*(m + n)", 4096, 1000, 0.05, 1.25)


def row(kind: str, base: str, **cells: Cell) -> Row:
    passed = dict.fromkeys(CHECKS, Cell("pass", 0.0))
    return Row(kind, base, {**passed, **cells}, COST)


ROWS = [
    row("lora", "mini", peft=Cell("pass", 2e-7), zero=Cell.nothing("random")),
    row("lora", "qwen3", peft=Cell("pass", 5e-6), round_trip=Cell("pass"), zero=Cell.nothing("r")),
    row("ia3", "mini", isolation=Cell("fail", 0.5, "far off")),
]


def test_a_cell_is_the_worst_of_all_bases() -> None:
    lines = table(ROWS).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert lines[2] == (
        "| `lora` | low-rank | = | 5e-06 | = | = | – | = | 4 KiB | +5.0 % | 1.25× |"
    )
    assert lines[3].startswith("| `ia3` | low-rank | **fails** | =")


def test_a_refused_kind_is_in_the_table() -> None:
    refused = Row("road", "mini", {"round_trip": Cell("fail", None, "got 422")})
    line = table([refused]).splitlines()[-1]
    assert line.startswith("| `road` | refused | – |")
    assert "**fails**" in line


def test_the_worst() -> None:
    cells = [Cell("pass", 1e-7), Cell.nothing("why"), Cell("pass"), Cell("pass", 1e-5)]
    assert worst(cells) == Cell("pass", 1e-5)
    assert worst([*cells, Cell("fail", None, "tokens")]).status == "fail"
    assert worst([Cell.nothing("why")]).status == "none"
    assert Cell.bounded(BOUND).status == "pass"
    assert Cell.bounded(1.01 * BOUND).status == "fail"
    assert Cell.bounded(float("nan")).status == "fail"


def test_json_holds_everything() -> None:
    found = json.loads(json.dumps(as_json(ROWS)))
    assert found["passed"] is False
    assert found["rows"][2]["cells"]["isolation"] == {
        "status": "fail",
        "error": 0.5,
        "note": "far off",
    }
    assert found["rows"][0]["cost"]["bytes"] == 4096
    assert as_json(ROWS[:2])["passed"] is True


def test_the_table_is_written_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        update(path, ROWS)
        text = path.read_text()
        assert text.startswith(f"before\n{BEGIN}\n")
        assert text.endswith(f"{END}\nafter\n")
        assert table(ROWS) in text
        assert legend(["mini", "qwen3"]) in text
        assert "old" not in text


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_file_without_both_marks_is_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="no place for the table"):
        update(path, ROWS)
    assert path.read_text() == text
