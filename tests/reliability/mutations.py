"""What a stranger might send: safetensors files, configs and tokenizers, damaged on purpose.

A mutation knows the format, so that most of them pass the first check and reach the later ones. The
same generator gives the same mutant.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any


@dataclass(frozen=True, slots=True)
class Upload:
    """One upload's parts, as bytes."""

    config: bytes
    weights: bytes
    tokenizer: bytes | None = None
    template: str | None = None


NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 64, 65, 255, 256, 4096, 65_537, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63),
    *(1 << 64, -(1 << 63), 10**40, 0.0, -0.0, 0.5, 1e-320, 1e4, 1e308, -1e308),
)
TEXTS = (
    *(
        "",
        " ",
        "a",
        "q_proj",
        "all-linear",
        "none",
        "all",
        "lora_only",
        "\x00",
        "\ud800",
        "é" * 300,
    ),
    *("a" * 600, "../../etc/passwd", ".*", ".*[qv]_proj", "(a+)+$", "(", "[", "(?P<x>.)(?P=x)"),
    *("embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj", "F32", "BF16", "I32", "U8"),
    *("NaN", "CAUSAL_LM", "LORA", "__metadata__", "{{ x }}", "base_model.model.lm_head.weight"),
)
WORDS = (b"NaN", b"Infinity", b"-", b"1e999", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\u0000")
WORDS += (b"\xff\xfe", b"\xef\xbb\xbf", b"null", b"true", b"9" * 5000, b"[" * 2000, b'{"a":' * 2000)
TEMPLATES = (
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in range(10**9) %}x{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ 'a' * 10**9 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{" * 5000,
    "{% set ns = namespace(x=messages) %}{{ ns.x | tojson }}",
)
LEAST_FLOATS = (b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f", b"\x01\x00\x00\x00")


def value(chance: Random, depth: int = 0) -> Any:
    """Any JSON value: most of them such as a check might have forgotten."""
    kind = chance.randrange(10)
    if kind < 4:
        return chance.choice(NUMBERS)
    if kind < 6:
        return chance.choice(TEXTS)
    if kind < 7 or depth > 2:
        return chance.choice((None, True, False, [], {}))
    if kind == 7:
        return [value(chance, depth + 1) for _ in range(chance.choice((1, 2, 3, 40)))]
    if kind == 8:
        return {chance.choice(TEXTS): value(chance, depth + 1) for _ in range(chance.randrange(4))}
    return [chance.choice(NUMBERS)] * chance.choice((5, 1000, 20_000))


def damaged_bytes(chance: Random, raw: bytes) -> bytes:
    """Bits turned over, a piece taken out, doubled or put in, an end cut off."""
    if not raw:
        return chance.choice(WORDS)
    at = chance.randrange(len(raw))
    until = min(len(raw), at + chance.choice((1, 1, 2, 8, 64, 4096)))
    kind = chance.randrange(6)
    if kind == 0:
        flipped = raw[at] ^ 1 << chance.randrange(8)
        return raw[:at] + bytes((flipped,)) + raw[at + 1 :]
    if kind == 1:
        return raw[:at] + raw[until:]
    if kind == 2:
        return raw[:until] + raw[at:until] + raw[until:]
    if kind == 3:
        return raw[:at] + chance.choice(WORDS) + raw[at:]
    if kind == 4:
        return raw[:at]
    return raw[:at] + chance.randbytes(until - at) + raw[until:]


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree of dicts and lists; of long lists the beginning."""
    found = [path] if path else []
    if isinstance(tree, dict):
        for key in tree:
            found += _places(tree[key], (*path, key))
    elif isinstance(tree, list):
        for index in range(min(len(tree), 4)):
            found += _places(tree[index], (*path, index))
    return found


def damaged_json(chance: Random, raw: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One place of a document changed, dropped, doubled, or taken from another document."""
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError):
        return damaged_bytes(chance, raw)
    places = _places(tree)
    if not places:
        return json.dumps(value(chance)).encode()
    *road, last = chance.choice(places)
    holder = tree
    for step in road:
        holder = holder[step]
    kind = chance.randrange(8)
    if kind < 3:
        holder[last] = value(chance)
    elif kind == 3:
        del holder[last]
    elif kind == 4 and isinstance(holder, dict):
        holder[chance.choice((*TEXTS, f"{last}_", *holder))] = copy.deepcopy(holder[last])
    elif kind == 5 and isinstance(holder[last], int | float):
        was = holder[last]
        holder[last] = chance.choice((was + 1, was - 1, -was, was * 2, float(was), str(was)))
    elif kind == 6 and others:
        other = json.loads(chance.choice(others))
        if isinstance(tree, dict) and isinstance(other, dict) and other:
            key = chance.choice(list(other))
            tree[key] = other[key]
    else:
        text = json.dumps(tree)
        return text.replace("{", '{"r": 1, "r": 2, ', 1).encode("utf-8", "surrogatepass")
    return json.dumps(tree).encode()


def parts(weights: bytes) -> tuple[bytes, bytes]:
    """Header and data of a file; whatever is there where it is no such file."""
    length = int.from_bytes(weights[:8], "little")
    length = length if length <= len(weights) else 0
    return weights[8 : 8 + length], weights[8 + length :]


def framed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    told = len(header) if length is None else length
    return (told % (1 << 64)).to_bytes(8, "little") + header + data


def damaged_header(chance: Random, raw: bytes) -> bytes:
    """A row's dtype, shape or offsets; a name; the order; rows more or fewer."""
    try:
        table = json.loads(raw)
        names = [name for name in table if name != "__metadata__"]
        name = chance.choice(names)
        row = table[name]
        kind = chance.randrange(12)
        if kind == 0:
            row["dtype"] = chance.choice(("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL"))
        elif kind in (1, 2):
            _resize(chance, row, "shape")
        elif kind in (3, 4):
            _resize(chance, row, "data_offsets")
        elif kind == 5:
            table[chance.choice(TEXTS)] = table.pop(name)
        elif kind == 6:
            table[name.replace("lora_", chance.choice(("lora_", "hada_", "")))] = dict(row)
        elif kind == 7:
            other = chance.choice(names)
            table[name], table[other] = table[other], row
        elif kind == 8:
            del table[name]
        elif kind == 9:
            table["__metadata__"] = value(chance)
        elif kind == 10:
            row[chance.choice(("dtype", "shape", "data_offsets", "more"))] = value(chance)
        else:
            most = 5000 if len(json.dumps(row)) < 200 else 1
            table |= {f"x{n}": row for n in range(chance.choice((1, 100, most)))}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return damaged_bytes(chance, raw)
    return json.dumps(table).encode()


def _resize(chance: Random, row: dict[str, Any], field: str) -> None:
    numbers = row[field]
    at = chance.randrange(len(numbers))
    kind = chance.randrange(5)
    if kind == 0:
        numbers[at] = value(chance)
    elif kind == 1:
        numbers[at] += chance.choice((-4, -2, -1, 1, 2, 4, 1 << 20))
    elif kind == 2:
        numbers.reverse()
    elif kind == 3:
        numbers.insert(at, chance.choice((0, 1, 2)))
    else:
        numbers.pop(at)


def damaged_weights(chance: Random, weights: bytes) -> bytes:
    header, data = parts(weights)
    kind = chance.randrange(10)
    if kind < 5:
        return framed(damaged_header(chance, header), data)
    if kind == 5:
        return framed(damaged_bytes(chance, header), data)
    if kind == 6:
        length = chance.choice((0, 1, 7, len(header) - 1, len(header) + 1, 1 << 20, 1 << 63, -1))
        return framed(header, data, length)
    if kind == 7:
        return damaged_bytes(chance, weights)
    if kind == 8 and len(data) >= 4:
        at = 4 * chance.randrange(len(data) // 4)
        return framed(header, data[:at] + chance.choice(LEAST_FLOATS) + data[at + 4 :])
    return framed(header, damaged_bytes(chance, data) if data else b"\x00")


Mutation = Callable[[Random, Upload, Sequence[Upload]], Upload]


def _config(chance: Random, upload: Upload, others: Sequence[Upload]) -> Upload:
    configs = [other.config for other in others]
    damage = damaged_json if chance.random() < 0.85 else lambda c, raw, _: damaged_bytes(c, raw)
    return Upload(
        damage(chance, upload.config, configs), upload.weights, upload.tokenizer, upload.template
    )


def _weights(chance: Random, upload: Upload, others: Sequence[Upload]) -> Upload:
    del others
    damaged = damaged_weights(chance, upload.weights)
    return Upload(upload.config, damaged, upload.tokenizer, upload.template)


def _tokenizer(chance: Random, upload: Upload, others: Sequence[Upload]) -> Upload:
    if upload.tokenizer is None:
        return _config(chance, upload, others)
    damage = damaged_json if chance.random() < 0.7 else damaged_bytes
    tokenizer = damage(chance, upload.tokenizer)
    return Upload(upload.config, upload.weights, tokenizer, upload.template)


def _template(chance: Random, upload: Upload, others: Sequence[Upload]) -> Upload:
    del others
    template = chance.choice(TEMPLATES)
    raw = damaged_bytes(chance, template.encode())
    return Upload(upload.config, upload.weights, upload.tokenizer, raw.decode(errors="replace"))


def _mixed(chance: Random, upload: Upload, others: Sequence[Upload]) -> Upload:
    """The config of one adapter with the weights of another."""
    other = chance.choice(others)
    return Upload(upload.config, other.weights, other.tokenizer, upload.template)


_MUTATIONS: tuple[tuple[Mutation, int], ...] = (
    (_config, 44),
    (_weights, 44),
    (_tokenizer, 6),
    (_mixed, 5),
    (_template, 1),
)


def mutant(seeds: Sequence[Upload], seed: int, number: int) -> Upload:
    """Mutant `number`: one to three mutations of one of the seeds."""
    chance = Random(f"{seed}:{number}")
    upload = chance.choice(seeds)
    kinds = [kind for kind, _ in _MUTATIONS]
    shares = [share for _, share in _MUTATIONS]
    for kind in chance.choices(kinds, shares, k=chance.choice((1, 1, 1, 2, 3))):
        upload = kind(chance, upload, seeds)
    return upload


# Headers alone: many and small, so a mutant is made of tokens and not of a parsed tree.

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[-+0-9.eE]+|[A-Za-z]+|.', re.DOTALL)
_ROWS: tuple[dict[str, Any], ...] = (
    {"a": ("F32", [2, 3], 24)},
    {"a": ("F16", [4], 8), "base_model.b": ("BF16", [1, 2, 1, 2], 8)},
    {"a": ("F32", [1], 4), "b": ("I32", [3], 12), "c": ("BF16", [2, 2], 8)},
)


@dataclass(frozen=True, slots=True)
class Headers:
    """Good headers as tokens, with the data behind them, and words to put into them."""

    seeds: tuple[tuple[list[bytes], bytes], ...]
    words: tuple[bytes, ...]

    @classmethod
    def make(cls) -> Headers:
        found = []
        for number, rows in enumerate(_ROWS):
            table: dict[str, Any] = {"__metadata__": {"format": "pt"}} if number else {}
            at = 0
            for name, (dtype, shape, size) in rows.items():
                table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
                at += size
            found.append((_TOKEN.findall(json.dumps(table).encode()), bytes(at)))
        own = {token for tokens, _ in found for token in tokens}
        texts = {json.dumps(one).encode() for one in (*TEXTS, *NUMBERS)}
        return cls(tuple(found), tuple(sorted(own | texts | set(WORDS))))

    def mutant(self, chance: Random) -> bytes:
        draw = chance.random
        seed, data = self.seeds[int(draw() * len(self.seeds))]
        tokens = seed.copy()
        for _ in range(1 + int(3 * draw() * draw())):
            at, kind = int(draw() * len(tokens)), int(draw() * 6)
            if kind < 2:
                tokens[at] = self.words[int(draw() * len(self.words))]
            elif kind == 2 and len(tokens) > 1:
                del tokens[at]
            elif kind == 3:
                tokens.insert(at, self.words[int(draw() * len(self.words))])
            elif kind == 4:
                tokens[at] = tokens[int(draw() * len(tokens))]
            else:
                other = int(draw() * len(tokens))
                tokens[at:at] = tokens[at:other]
        header, rest = b"".join(tokens), draw()
        if rest < 0.03:
            return framed(header, data, int(draw() * 2 * len(header)) << int(draw() * 60))
        if rest < 0.08:
            return framed(damaged_bytes(chance, header), data)
        if rest < 0.11:
            return damaged_bytes(chance, framed(header, data))
        return framed(header, data)
