"""`nibble adapters show`: what was measured of an adapter, whatever an upload brought along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from typer.testing import CliRunner

from service.commands import adapters

FIGURE = {"value": 0.98, "low": 0.96, "high": 0.99}
MEASURED = {
    "data": "tickets.jsonl",
    "questions": 500,
    "system": None,
    "figures": {"exact_match": FIGURE, "odd": 3},
    "against": {"base": {"exact_match": {"difference": 0.98, "p": 0.0001}}},
}


class Shown:
    """A server that knows one adapter."""

    def __init__(self, provenance: Any) -> None:
        self.provenance = provenance

    def adapter(self, name: str) -> dict[str, Any]:
        targets = [f"model.layers.{n}.mlp.{kind}" for n in range(80) for kind in ("up", "down")]
        return {"name": name, "targets": [*targets, "lm_head"], "provenance": self.provenance}


def show(monkeypatch: pytest.MonkeyPatch, provenance: Any) -> str:
    @contextmanager
    def connect(url: str | None, as_json: bool) -> Iterator[Shown]:
        yield Shown(provenance)

    monkeypatch.setattr(adapters, "connect", connect)
    done = CliRunner().invoke(adapters.app, ["show", "desk"])
    assert done.exit_code == 0, done.output
    return done.output


def test_targets_are_counted_by_their_last_name(monkeypatch: pytest.MonkeyPatch) -> None:
    said = show(monkeypatch, {})
    assert "up ×80, down ×80, lm_head" in said
    assert "model.layers" not in said


def test_figures_stand_in_a_table_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    said = show(monkeypatch, {"made": "by hand", "evaluation": {"evaluations": [MEASURED]}})
    above, _, below = said.partition("measured on")
    assert "by hand" in above
    assert "exact_match" not in above
    for part in ("tickets.jsonl, 500 questions", "exact_match", "0.98", "0.96 to 0.99", "base"):
        assert part in below
    assert "odd" not in below


@pytest.mark.parametrize(
    "given",
    [
        None,
        {},
        {"evaluation": {}},
        {"evaluation": {"evaluations": "none"}},
        {"evaluation": {"evaluations": [3, {"figures": [1]}, {"figures": {"a": {"value": 1}}}]}},
        {"evaluation": {"evaluations": [{**MEASURED, "against": [1]}]}},
        {"evaluation": [1]},
    ],
)
def test_an_evaluation_of_any_shape_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, given: Any
) -> None:
    assert "desk" in show(monkeypatch, given)
