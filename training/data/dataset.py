"""A run's data: its files read once, with bad rows counted, duplicates found, a part held out.

Which rows are held out is decided by the hash of what they ask, so it depends neither on their
order nor on the seed: a file that grows keeps its test rows, and two answers to one question
stand on the same side. Raw text asks nothing: there it is pieces of data.max_length. While a file
is read, a number for each of its rows is kept in memory, to know a duplicate by: some 70 bytes a
row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from adapters.errors import AdapterError
from adapters.limits import Limits
from adapters.prompts.filling import check as check_prompt
from adapters.prompts.shelf import SUFFIXES, read_template
from adapters.prompts.template import PromptTemplate
from adapters.template import check_template
from training.config import DataConfig
from training.data.corpus import Corpus
from training.data.encoding import Encoding
from training.data.report import SHOWN, Report
from training.data.shape import chosen, question
from training.data.source import Row, scan
from training.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run learns from and is evaluated on."""

    train: Corpus
    held_out: Corpus
    reports: tuple[Report, ...]  # of data.train, then of data.eval where there is one
    template: str | None  # data.template's text, where it is a chat template
    prompt: PromptTemplate | None = None  # the same, where it is a prompt template

    def described(self) -> list[Any]:
        """One part for each file."""
        corpora = (self.train, self.held_out)
        return [r.described(c) for r, c in zip(self.reports, corpora, strict=False)]

    def counted(self) -> list[dict[str, Any]]:
        """The same for programs."""
        corpora = (self.train, self.held_out)
        return [r.counted(c) for r, c in zip(self.reports, corpora, strict=False)]


@dataclass(slots=True)
class _Reading:
    """One file's rows on their way into `taken` and `held_out`."""

    config: DataConfig
    encoding: Encoding
    report: Report
    taken: Corpus = field(default_factory=Corpus)
    held_out: Corpus = field(default_factory=Corpus)
    seen: set[int] = field(default_factory=set)

    def read(self, split: float, also: frozenset[int] | set[int] = frozenset()) -> None:
        """`also`: the digests of another file's rows, to be counted here."""
        for place, row in scan(self.report.path, self.config.raw):
            self.report.rows += 1
            try:
                if isinstance(row, DataError):
                    raise row
                self._take(place, row, split, also)
            except DataError as error:
                self.report.reject(error)

    def _take(self, place: str, row: Row, split: float, also: frozenset[int] | set[int]) -> None:
        report, row = self.report, self._chosen(row)
        if self.config.raw and "text" not in row:
            raise DataError(
                f"{place}: fields {sorted(row)}; data.raw needs text, and data.columns can name it"
            )
        encoded = self.encoding.examples(place, row)
        digest = _digest(json.dumps(row, ensure_ascii=False, sort_keys=True, default=str))
        report.also_in_train += digest in also
        if digest in self.seen:
            report.duplicates += 1
            if self.config.deduplicate:
                report.left_out += 1
                return
        self.seen.add(digest)
        report.note(place, encoded)
        values = self.encoding.parted(row)[1]
        asked = f"{question(row)}{json.dumps(values, sort_keys=True)}" if values else question(row)
        held = _digest(asked) < split * 2**64
        report.held_out += held and "continues" not in row
        stop = self.encoding.tokenizer.eos_token_id
        report.stops += sum(example.tokens[-1] == stop for example in encoded.examples)
        for example in encoded.examples:
            if "continues" in row:  # a text of any length: each of its pieces by itself
                held = _digest(repr(example.tokens)) < split * 2**64
                report.held_out += held
            (self.held_out if held else self.taken).append(example)

    def _chosen(self, row: Row) -> Row:
        """The columns that are wanted, and those that the prompt template names."""
        prompt = self.encoding.prompt
        names = {variable.name for variable in prompt.variables} if prompt else set()
        own = {name: row[name] for name in sorted(names & row.keys())}
        return own | chosen(row, self.config.columns)


def prepare(config: DataConfig, tokenizer: Any) -> Prepared:
    """Read `config`'s files. Raises DataError beyond `max_bad_rows`, or where nothing is left."""
    found = survey(config, tokenizer)
    for report in found.reports:
        report.refuse_beyond(config.max_bad_rows)
    refuse_unlearnable(found, config)
    return found


def refuse_unlearnable(found: Prepared, config: DataConfig) -> None:
    """Raises DataError where nothing can be learnt from the rows that are good, or no stopping, or
    nothing is held out that was to be."""
    if not found.train:
        raise DataError(f"{config.train}: no rows: at least one example is needed")
    if not found.reports[0].stops:
        raise DataError(
            f"{config.train}: no example ends with the stop token, so a model that learns from "
            'them would not learn to stop; the last piece of a text needs no "continues"'
        )
    if (config.eval or config.split) and not found.held_out:
        if config.eval:
            raise DataError(f"{config.eval}: no rows to evaluate on")
        raise DataError(
            f"{config.train}: data.split={config.split} leaves no rows to evaluate on: name a file "
            "as data.eval, or split off more, or leave data.split out to train without"
        )


def survey(config: DataConfig, tokenizer: Any, shown: int = SHOWN) -> Prepared:
    """The same, with any number of bad rows: they are in the reports."""
    template, prompt = _template(config.template)
    encoding = Encoding(
        _plain(tokenizer),
        config.max_length,
        config.loss,
        template,
        config.too_long,
        prompt,
    )
    train = _Reading(config, encoding, Report(config.train, shown))
    train.read(config.split or 0.0)
    if config.eval is None:
        return Prepared(train.taken, train.held_out, (train.report,), template, prompt)
    held = _Reading(config, encoding, Report(config.eval, shown))
    held.read(0.0, also=train.seen)
    return Prepared(train.taken, held.taken, (train.report, held.report), template, prompt)


def _plain(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise DataError("the base has no tokenizer: its data cannot be read")
    return tokenizer


def _template(path: Path | None) -> tuple[str | None, PromptTemplate | None]:
    """A chat template's text, or (YAML) a prompt template. Raises ConfigError where serving would
    refuse it."""
    if path is None:
        return None, None
    try:
        if path.suffix in SUFFIXES:
            prompt = read_template(path)[1]
            check_prompt(prompt)
            return None, prompt
        text = path.read_text(encoding="utf-8")
        check_template(text, Limits())
    except (OSError, UnicodeDecodeError, AdapterError) as error:
        raise ConfigError(f"data.template {path}: {error}") from None
    return text, None


def _digest(text: str) -> int:
    raw = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "big")
