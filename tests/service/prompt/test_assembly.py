"""Prompt assembly: the tokenizer's own ids, and refusals before any work."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adapters.errors import InvalidChat
from adapters.template import render_chat
from service.errors import InvalidRequest
from service.prompt.assembly import LONG_TEXT, Assembly
from tests.oracle import make_base

CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = make_base(tmp_path_factory.mktemp("base") / "tiny", "llama")
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def assembly(tokenizer: Any) -> Assembly:
    return Assembly(tokenizer, max_model_len=64)


def test_text_is_the_tokenizer_s(assembly: Assembly, tokenizer: Any) -> None:
    assert asyncio.run(assembly.text("two boats")) == tuple(tokenizer.encode("two boats"))


def test_chat_is_the_one_renderer_s(assembly: Assembly, tokenizer: Any) -> None:
    assert asyncio.run(assembly.chat(CHAT)) == tuple(render_chat(tokenizer, CHAT))
    own = "{% for m in messages %}<<{{ m['content'] }}{% endfor %}"
    ids = asyncio.run(assembly.chat(CHAT, own))
    assert ids == tuple(render_chat(tokenizer, CHAT, own))
    assert tokenizer.decode(ids) == "<<hello"


def test_truncation_keeps_the_end(assembly: Assembly) -> None:
    whole = asyncio.run(assembly.text("one two three four five"))
    assert asyncio.run(assembly.text("one two three four five", 4)) == whole[-4:]
    assert asyncio.run(assembly.text("one", 400)) == asyncio.run(assembly.text("one"))
    assert asyncio.run(assembly.chat(CHAT, None, 2)) == asyncio.run(assembly.chat(CHAT))[-2:]


def test_what_cannot_fit_is_never_tokenized(
    assembly: Assembly, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(len(token) for token in tokenizer.get_vocab())
    fits = "a" * (longest * 63)
    assert asyncio.run(assembly.text(fits))  # it may be too long, but that takes counting
    monkeypatch.setattr(tokenizer, "encode", None)
    with pytest.raises(InvalidRequest, match=r"at least 64 tokens.*64 tokens") as refusal:
        asyncio.run(assembly.text(fits + "a"))
    assert refusal.value.field == "inputs"
    with pytest.raises(InvalidRequest):
        asyncio.run(assembly.chat([{"role": "user", "content": fits + "a"}]))


def test_truncation_takes_what_would_not_fit(assembly: Assembly, tokenizer: Any) -> None:
    assert len(asyncio.run(assembly.text("a" * 100_000, 5))) == 5


def test_long_work_leaves_the_event_loop(tokenizer: Any) -> None:
    seen: list[threading.Thread] = []

    class Noted:
        def __call__(self, text: str) -> None: ...

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

        def encode(self, text: str) -> list[int]:
            seen.append(threading.current_thread())
            return [0]

    assembly = Assembly(Noted(), max_model_len=10**6)
    asyncio.run(assembly.text("a" * (LONG_TEXT - 1)))
    asyncio.run(assembly.text("a" * LONG_TEXT))
    assert seen[0] is threading.main_thread()
    assert seen[1] is not threading.main_thread()


def test_a_template_that_works_too_long_is_refused(assembly: Assembly) -> None:
    endless = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}"
    with pytest.raises(InvalidChat):
        asyncio.run(assembly.chat(CHAT, endless))


def test_pieces_cover_the_text(assembly: Assembly) -> None:
    pieces = asyncio.run(assembly.pieces("two boats"))
    assert "".join(piece.text for piece in pieces) == "two boats"
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
