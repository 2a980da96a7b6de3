"""What a run says while it goes on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.training.runs import run_of
from training import terminal
from training.recipe import Step


@pytest.mark.parametrize("seen", [False, True])
def test_a_log_grows_line_by_line_and_a_terminal_has_its_bar(
    monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=said, force_terminal=seen, width=60))
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    with terminal.progress() as shown:
        report = terminal.bar(shown, "train", run_of(optim={"steps": 9}))
        report(Step(1, 4.0, 0.1, 100, 1.0))
        report(Step(2, 3.0, 0.1, 200, 2.0, eval_loss=3.5))
    lines = [line.rstrip() for line in said.getvalue().splitlines() if "step " in line]
    last = "train  loss 3.0000  100 tokens/s  held out 3.5000  step 2 of 9"
    assert lines[-1].endswith(last)
    assert lines[:-1] == ([] if seen else ["train  loss 4.0000  step 1 of 9"])
