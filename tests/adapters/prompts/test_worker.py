"""The process that renders: killed when it does not answer, replaced, and nothing else notices."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from adapters.errors import InvalidTemplate, InvalidVariables
from adapters.prompts import worker
from adapters.prompts.filling import SLOT, fill
from adapters.prompts.template import parse_template
from adapters.prompts.worker import Renderer

TEMPLATE = parse_template(
    {"variables": {"x": "string"}, "user": "{{ x }}{{ passages }}{{ input }}"}
)


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    found = Renderer(processes=1)
    yield found
    found.close()


def pid(renderer: Renderer) -> int:
    process = renderer._free.queue[0]
    assert process is not None
    return process._process.pid


def test_it_renders_what_this_process_would(renderer: Renderer) -> None:
    for text, passages in (("Why?", False), ("왜?\n\u2028", True), (None, False)):
        asked = renderer.fill(TEMPLATE, {"x": "a"}, text, passages=passages)
        assert asked == fill(TEMPLATE, {"x": "a"}, text, passages=passages)
    with pytest.raises(InvalidVariables, match="x: has U"):
        renderer.fill(TEMPLATE, {"x": SLOT})


def test_results_are_kept_by_their_hash(renderer: Renderer) -> None:
    before = renderer.hits
    first = renderer.fill(TEMPLATE, {"x": "kept"}, "Why?")
    assert renderer.hits == before
    assert renderer.fill(TEMPLATE, {"x": "kept"}, "Why?") is first
    assert renderer.hits == before + 1
    for template, values, text in (
        (TEMPLATE, {"x": "other"}, "Why?"),
        (TEMPLATE, {"x": "kept"}, "How?"),
        (parse_template({**TEMPLATE.plain(), "system": "S"}), {"x": "kept"}, "Why?"),
    ):
        assert renderer.fill(template, values, text) != first
    assert renderer.hits == before + 1


def test_no_process_is_left_when_it_closes() -> None:
    renderer = Renderer(processes=2)
    busy = renderer._free.get()
    renderer.check(TEMPLATE)
    renderer._free.put(busy)
    renderer.check(TEMPLATE)
    made = [one._process for one in renderer._free.queue if one is not None]
    renderer.close()
    assert [one.poll() for one in made] == [-signal.SIGKILL] * 2


def test_a_bad_template_is_refused_and_the_process_stays(renderer: Renderer) -> None:
    renderer.check(TEMPLATE)
    own = pid(renderer)
    with pytest.raises(InvalidTemplate, match="user: takes nope"):
        renderer.check(parse_template({"user": "{{ nope }}"}))
    assert pid(renderer) == own


def test_a_killed_process_is_replaced(renderer: Renderer) -> None:
    renderer.check(TEMPLATE)
    own = pid(renderer)
    os.kill(own, signal.SIGKILL)
    os.waitid(os.P_PID, own, os.WEXITED | os.WNOWAIT)
    renderer.check(TEMPLATE)
    assert pid(renderer) != own


def test_what_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "import time; print('{}', flush=True); time.sleep(600)"
    monkeypatch.setattr(worker, "COMMAND", (worker.sys.executable, "-I", "-c", endless))
    renderer = Renderer(processes=1, seconds=0.2)
    with pytest.raises(InvalidTemplate, match=r"did not end within 0\.2 s"):
        renderer.check(TEMPLATE)
    assert renderer._free.queue[0] is None
    renderer.close()


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = (
        "import sys; sys.path.insert(0, sys.argv[1]); import adapters.prompts.worker as w;"
        "w._answer = lambda question: {'x': len(bytearray(1 << 30))}; w.main()"
    )
    command: Any = (worker.sys.executable, "-I", "-c", greedy, str(worker.ROOT))
    monkeypatch.setattr(worker, "COMMAND", command)
    renderer = Renderer(processes=1)
    with pytest.raises(InvalidTemplate, match=f"more than {worker.MEMORY} bytes"):
        renderer.check(TEMPLATE)
    renderer.close()
