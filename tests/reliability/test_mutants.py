"""Damaged uploads and headers: nothing crashes the checks, or makes them swell."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import TooLarge
from tests.reliability import mutants
from tests.reliability.mutants import MORE_BYTES, Material, Report, material, run


def checked(made: Material, work: Path, count: int) -> Report:
    total = Report()
    for report in run(made, work, count=count, at_once=max(500, count // 50)):
        total.add(report)
    print(total)
    assert total.faults == []
    assert total.count == count == sum(total.ends.values())
    assert total.grown <= MORE_BYTES
    return total


@pytest.mark.parametrize("count", [2000, pytest.param(2_000_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_damaged_headers(tmp_path: Path, count: int) -> None:
    total = checked(Material(), tmp_path, count)
    assert total.ends["accepted"] > count // 20, "or all of them fail the first check"
    assert total.ends["TooLarge"] > 0


@pytest.mark.parametrize(
    ("kinds", "count"), [("lora", 200), pytest.param("all", 20_000, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(3600)
def test_damaged_uploads(tmp_path: Path, kinds: str, count: int) -> None:
    total = checked(material(tmp_path, mutants.kinds_of(kinds)), tmp_path, count)
    assert total.ends["accepted"] > count // 20


@pytest.mark.parametrize(
    ("error", "end"), [(TooLarge("x", "y"), "TooLarge"), (KeyError("x"), "fault")]
)
def test_only_a_refusal_is_one(tmp_path: Path, error: Exception, end: str) -> None:
    class Child(mutants._Child):
        def prepared(self, number: int) -> Callable[[], object]:
            def attempt() -> object:
                raise error

            return attempt

    question: dict[str, Any] = {"seed": 0, "first": 0, "count": 1}
    question |= {"file": str(tmp_path / "file"), "progress": str(tmp_path / "progress")}
    report = Report()
    Child([], question).judge(report, 7)
    assert dict(report.ends) == {end: 1}
    assert len(report.faults) == (end == "fault")


def test_a_child_that_dies_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = (*mutants.COMMAND[:3], "import os; os.abort()")
    monkeypatch.setattr(mutants, "COMMAND", dying)
    (tmp_path / "progress").write_bytes((7).to_bytes(8, "little"))
    (report,) = run(Material(), tmp_path, count=10, at_once=10)
    assert report.count == 10
    assert "mutant 7" in report.faults[0]


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_whoever_ends_it_hears_how_far_it_got(
    blow: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def struck(*_: Any, **__: Any) -> Iterator[Report]:
        yield Report(count=500)
        os.kill(os.getpid(), blow)
        yield Report(count=500)

    monkeypatch.setattr(mutants, "run", struck)
    monkeypatch.setattr("sys.argv", ["mutants", "header", "--first", "1000"])
    before = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            mutants.main()
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
    assert ended.value.code == 0
    assert "go on with --first 1500:\n500 mutants, 0 faults" in capsys.readouterr().out
