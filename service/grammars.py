"""Grammars that outputs must follow, compiled once and kept: regex, choice, JSON schema, Lark.

Compiling is llguidance's, in Rust, without the interpreter's lock. What a client may make it do is
bounded four times: by the size of the source, by llguidance's own limits (items, states, and fuel
for its regex engine, at the compilation and again in each step), by how many compile at once, and
by how long a request waits for its turn.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from service.engine.guide import Guide
from service.engine.vocabulary import Vocabulary
from service.errors import InvalidRequest, Overloaded

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Kind = Literal["regex", "choice", "json", "lark"]

MAX_SOURCE = 32 << 10  # characters
MAX_CHOICES = 1024
AT_ONCE = 1  # compilations; each may take a core for a second
WAIT_SECONDS = 5.0
REMEMBERED = 128  # grammars of one vocabulary
VOCABULARIES = 8  # the base's and those of adapters; a large one takes tens of megabytes

_LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_items_in_row=1_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar as it was asked for. `field` is where, for errors."""

    kind: Kind
    source: str
    field: str

    @classmethod
    def choice(cls, options: Sequence[str], field: str) -> Grammar:
        return cls("choice", json.dumps(list(options), ensure_ascii=False), field)

    @classmethod
    def schema(cls, schema: Any, field: str) -> Grammar:
        """A JSON schema, as an object or as its text."""
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        return cls("json", text, field)


@dataclass(slots=True)
class _Known:
    """What is kept for one vocabulary."""

    tokenizer: LLTokenizer | None = None  # made with the first grammar
    guides: OrderedDict[tuple[Kind, str], Guide] = field(default_factory=OrderedDict)


class Grammars:
    """Compiles for the base's tokens, and for those of adapters that have their own.

    Call `guide` from one event loop.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Iterable[int]) -> None:
        """`tokenizer` of the base, as transformers has it; `vocabulary` is its logits' width."""
        self._base = tokenizer
        self._width = vocabulary
        self._ends = sorted(ends)
        self._vocabularies: OrderedDict[Vocabulary | None, _Known] = OrderedDict()
        self._lock = threading.Lock()
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def guide(self, grammar: Grammar, own: Vocabulary | None = None) -> Guide:
        """The compiled grammar over an adapter's `own` tokens, or else over the base's.

        Raises InvalidRequest, or Overloaded when others compile.
        """
        key = (grammar.kind, grammar.source)
        known = self._of(own)
        if found := self._found(known, key):
            return found
        if len(grammar.source) > MAX_SOURCE:
            raise InvalidRequest(
                f"a grammar of {len(grammar.source)} characters; should have at most {MAX_SOURCE}",
                grammar.field,
            )
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self._turn.acquire()
        except TimeoutError:
            raise Overloaded(f"other grammars are compiled since {WAIT_SECONDS:.0f} s") from None
        # Released when the thread is done, though the client may have gone long before.
        work = asyncio.get_running_loop().run_in_executor(None, self._compile, grammar, own, known)
        work.add_done_callback(lambda _: self._turn.release())
        made = await asyncio.shield(work)
        with self._lock:
            known.guides[key] = made
            if len(known.guides) > REMEMBERED:
                known.guides.popitem(last=False)
        return made

    def _of(self, own: Vocabulary | None) -> _Known:
        with self._lock:
            known = self._vocabularies.setdefault(own, _Known())
            self._vocabularies.move_to_end(own)
            if len(self._vocabularies) > VOCABULARIES:
                self._vocabularies.popitem(last=False)
            return known

    def _found(self, known: _Known, key: tuple[Kind, str]) -> Guide | None:
        with self._lock:
            if key in known.guides:
                known.guides.move_to_end(key)
            return known.guides.get(key)

    def _compile(self, grammar: Grammar, own: Vocabulary | None, known: _Known) -> Guide:
        if known.tokenizer is None:
            known.tokenizer = (
                LLTokenizer(TokenizerWrapper(_Spelled(own, self._ends)), eos_token=self._ends)
                if own
                else _tokenizer(self._base, self._width, self._ends)
            )
        try:
            matcher = LLMatcher(known.tokenizer, _source(grammar), log_level=0, limits=_LIMITS)
            if not matcher.is_error():
                matcher.compute_bitmask()  # what a first step costs, and whether there is one
        except (ValueError, RecursionError) as error:
            raise _refused(str(error), grammar) from error
        if matcher.is_error():
            raise _refused(matcher.get_error(), grammar)
        if matcher.is_stopped():
            raise _refused("no text follows it", grammar)
        return Guide(matcher)


def _tokenizer(source: Any, vocabulary: int | None, ends: list[int]) -> LLTokenizer:
    """From the JSON of the tokenizer behind transformers' own, with what was added to it.

    `vocabulary` None: as wide as its own tokens need.
    """
    backend = type(source.backend_tokenizer).from_str(source.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return LLTokenizer(backend.to_str(), n_vocab=vocabulary, eos_token=ends)


class _Spelled:
    """An adapter's tokens by their bytes, as llguidance's TokenizerWrapper reads them.

    From a JSON it takes every added token for a special one, that no grammar of texts can reach;
    here those with a text are tokens like any other.
    """

    bos_token_id: int | None = None

    def __init__(self, own: Vocabulary, ends: list[int]) -> None:
        self._plain = _tokenizer(own.tokenizer, None, ends)
        self.eos_token_id = ends[0] if ends else None
        self.tokens = [self._plain.decode_bytes([i]) for i in range(self._plain.vocab_size)]
        added = own.tokenizer.backend_tokenizer.get_added_tokens_decoder()
        for token, what in added.items():
            self.tokens[token] = what.content.encode()
        self.special_token_ids = sorted(added.keys() & own.special)

    def __call__(self, text: bytes) -> list[int]:
        return self._plain.tokenize_bytes(text)


def _source(grammar: Grammar) -> str:
    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(grammar.source))
    if grammar.kind == "choice":
        options = json.loads(grammar.source)
        return str(LLMatcher.grammar_from_regex("|".join(re.escape(o) for o in options)))
    if grammar.kind == "json":
        return str(LLMatcher.grammar_from_json_schema(grammar.source, overrides=_JSON))
    return str(LLMatcher.grammar_from_lark(grammar.source))


# A small model that may write white space for ever does so: one blank after a comma and a colon.
_JSON: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


def _refused(why: str, grammar: Grammar) -> InvalidRequest:
    return InvalidRequest(f"the grammar is refused: {' '.join(why.split())[:300]}", grammar.field)
